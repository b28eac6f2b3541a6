// Sums and gates of training, whatever the dtypes: forward and backward.
#include "train.h"

namespace tiercel {

struct AddMixed { Values a, b, y; i64 tokens, width; };  // y = a + b
struct SiluGate { Values g, u, y, dg, du; i64 tokens, width; };

}  // namespace tiercel

#if defined(TIERCEL_BINDINGS)

namespace tiercel {

static KernelHandle add_mixed{"add_mixed"}, silu_gate{"silu_gate"}, silu_gate_backward{"silu_gate_backward"};

BINDINGS(m) {
    m.def("add_mixed", [](const ValuesTuple& a, const ValuesTuple& b, const ValuesTuple& y, i64 T, i64 D) {
        launch_openmp(add_mixed, AddMixed{values(a), values(b), values(y), T, D}, T * D);
    });
    m.def("silu_gate", [](const ValuesTuple& g, const ValuesTuple& u, const ValuesTuple& y, i64 T, i64 D) {
        launch_openmp(silu_gate, SiluGate{values(g), values(u), values(y), {}, {}, T, D}, T * D);
    });
    m.def("silu_gate_backward", [](const ValuesTuple& g, const ValuesTuple& u, const ValuesTuple& dy,
                                   const ValuesTuple& dg, const ValuesTuple& du, i64 T, i64 D) {
        launch_openmp(silu_gate_backward, SiluGate{values(g), values(u), values(dy), values(dg), values(du), T, D},
                      T * D);
    });
}

}  // namespace tiercel

#else

namespace ISA {
using namespace tiercel;

void add_mixed(const void* args, Worker& worker) {
    const AddMixed& a = *(const AddMixed*)args;
    for_each_vector(a.tokens, a.width, worker, [&](i64 t, i64 i, int n) { store_n(a.y, t, i, load_n(a.a, t, i, n) + load_n(a.b, t, i, n), n); });
}

void silu_gate(const void* args, Worker& worker) {
    const SiluGate& a = *(const SiluGate*)args;
    for_each_vector(a.tokens, a.width, worker, [&](i64 t, i64 i, int n) {
        store_n(a.y, t, i, silu(load_n(a.g, t, i, n)) * load_n(a.u, t, i, n), n);
    });
}

void silu_gate_backward(const void* args, Worker& worker) {
    const SiluGate& a = *(const SiluGate*)args;
    for_each_vector(a.tokens, a.width, worker, [&](i64 t, i64 i, int n) {
        const F g = load_n(a.g, t, i, n), u = load_n(a.u, t, i, n), dy = load_n(a.y, t, i, n), s = sigmoid(g);
        store_n(a.du, t, i, dy * g * s, n);
        store_n(a.dg, t, i, dy * u * s * (set(1.0f) + g * (set(1.0f) - s)), n);
    });
}

REGISTER_KERNEL("add_mixed", add_mixed);
REGISTER_KERNEL("silu_gate", silu_gate);
REGISTER_KERNEL("silu_gate_backward", silu_gate_backward);

}  // namespace ISA

#endif
