// Sums and gates, sixteen lanes at a time.
#include "activation.h"

namespace tiercel {

struct Add { const float *a, *b; float* y; i64 count; };  // y = a + b
struct Gate { const float *gate, *up; float* y; i64 count; int activation; };  // y = act(gate) · up, or act(gate) without up
struct AddGated { const float *a, *b, *scores; float* y; i64 tokens, width; };  // y = a + σ(score) · b, a score for each row

}  // namespace tiercel

#if defined(TIERCEL_BINDINGS)

#include "bindings.h"

namespace tiercel {

static KernelHandle add{"add"}, gate{"gate"}, add_gated{"add_gated"};

BINDINGS(m) {
    m.def("add", [](Address a, Address b, Address y, i64 n) {
        launch(add, Add{ptr<float>(a), ptr<float>(b), ptr<float>(y), n}, n < SMALL,
               {{ptr<void>(a), n * f32}, {ptr<void>(b), n * f32}}, {{ptr<void>(y), n * f32}});
    });
    m.def("gate", [](Address g, Address up, Address y, i64 n, int activation) {
        launch(gate, Gate{ptr<float>(g), ptr<float>(up), ptr<float>(y), n, activation}, n < SMALL,
               {values(g, n, 1), values(up, n, 1)}, {values(y, n, 1)});
    });
    m.def("add_gated", [](Address a, Address b, Address scores, Address y, i64 tokens, i64 width) {
        launch(add_gated, AddGated{ptr<float>(a), ptr<float>(b), ptr<float>(scores), ptr<float>(y), tokens, width},
               tokens * width < SMALL, {values(a, tokens, width), values(b, tokens, width), values(scores, tokens, 1)},
               {values(y, tokens, width)});
    });
}

}  // namespace tiercel

#else

namespace ISA {
using namespace tiercel;

template <class Body> INLINE void for_each_vector(i64 count, Worker& worker, Body body) {
    constexpr i64 TILE_VALUES = 4096;
    for (i64 tile; (tile = worker.next_tile((count + TILE_VALUES - 1) / TILE_VALUES)) >= 0;) {
        const i64 stop = count < (tile + 1) * TILE_VALUES ? count : (tile + 1) * TILE_VALUES;
        i64 i = tile * TILE_VALUES;
        for (; i + 16 <= stop; i += 16) body(i, 16);
        if (i < stop) body(i, (int)(stop - i));
    }
}

void add(const void* args, Worker& worker) {
    const Add& a = *(const Add*)args;
    for_each_vector(a.count, worker, [&](i64 i, int n) { store_n(a.y + i, load_n(a.a + i, n) + load_n(a.b + i, n), n); });
}

void gate(const void* args, Worker& worker) {
    const Gate& a = *(const Gate*)args;
    for_each_vector(a.count, worker, [&](i64 i, int n) {
        const F y = activate(a.activation, load_n(a.gate + i, n));
        store_n(a.y + i, a.up ? y * load_n(a.up + i, n) : y, n);
    });
}

void add_gated(const void* args, Worker& worker) {
    const AddGated& a = *(const AddGated*)args;
    for_each_token(a.tokens, worker, [&](i64 t) {
        const F factor = sigmoid(set(a.scores[t]));
        for (i64 i = t * a.width, left = a.width; left > 0; i += 16, left -= 16)
            store_n(a.y + i, fma(factor, load_n(a.b + i, left), load_n(a.a + i, left)), left);
    });
}

REGISTER_KERNEL("add", add);
REGISTER_KERNEL("gate", gate);
REGISTER_KERNEL("add_gated", add_gated);

}  // namespace ISA

#endif
