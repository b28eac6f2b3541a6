// Sums and gates, sixteen lanes at a time.
#include <math.h>
#include "tiles.h"

namespace tiercel {

struct Add { const float *a, *b; float* y; i64 count; };  // y = a + b
struct Gate { const float *gate, *up; float* y; i64 count; int activation; };  // y = act(gate) · up
enum Activation { SILU, GELU, GELU_TANH, RELU, SIGMOID };

}  // namespace tiercel

#if defined(TIERCEL_BINDINGS)

#include "bindings.h"

namespace tiercel {

static KernelHandle add{"add"}, gate{"gate"};

BINDINGS(m) {
    m.def("add", [](Address a, Address b, Address y, i64 n) {
        launch(add, Add{ptr<float>(a), ptr<float>(b), ptr<float>(y), n}, n < SMALL,
               {{ptr<void>(a), n * f32}, {ptr<void>(b), n * f32}}, {{ptr<void>(y), n * f32}});
    });
    m.def("gate", [](Address g, Address up, Address y, i64 n, int activation) {
        launch(gate, Gate{ptr<float>(g), ptr<float>(up), ptr<float>(y), n, activation}, n < SMALL,
               {{ptr<void>(g), n * f32}, {ptr<void>(up), n * f32}}, {{ptr<void>(y), n * f32}});
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

INLINE F map(F x, float (*f)(float)) {
    float v[16];
    store(v, x);
    for (int i = 0; i < 16; i++) v[i] = f(v[i]);
    return load(v);
}

INLINE F activate(int activation, F x) {
    if (activation == SILU) return silu(x);
    if (activation == RELU) return max(x, zero());
    if (activation == SIGMOID) return set(1.0f) / (set(1.0f) + exp(zero() - x));
    const F half = set(0.5f), one = set(1.0f);
    if (activation == GELU) return half * x * (one + map(x * set(0.70710678f), erff));
    return half * x * (one + map(set(0.79788456f) * (x + set(0.044715f) * x * x * x), tanhf));
}

void gate(const void* args, Worker& worker) {
    const Gate& a = *(const Gate*)args;
    for_each_vector(a.count, worker, [&](i64 i, int n) {
        store_n(a.y + i, activate(a.activation, load_n(a.gate + i, n)) * load_n(a.up + i, n), n);
    });
}

REGISTER_KERNEL("add", add);
REGISTER_KERNEL("gate", gate);

}  // namespace ISA

#endif
