// Bindings of what training needs, run on torch's threads.
#include <nanobind/stl/tuple.h>

#include "bind.h"

namespace nb = nanobind;

namespace tiercel {

namespace {

using ValuesTuple = std::tuple<at, i64, int>;    // address, values from row to row, whether bf16
using DropoutTuple = std::tuple<uint64_t, int>;  // seed, what is dropped of 65536

Values values(const ValuesTuple& v) { return {ptr<void>(std::get<0>(v)), std::get<1>(v), std::get<2>(v)}; }
Dropout dropout(const DropoutTuple& d) { return {std::get<0>(d), std::get<1>(d)}; }

template <class Args> void go_among(Kernel kernel, const Args& args, i64 values) {
    static_assert(sizeof(Args) <= Op::MOST);
    nb::gil_scoped_release free;
    submit_among(kernel, &args, sizeof args, values < SMALL);
}

}  // namespace

void bind_training(nb::module_& m) {
    m.def("narrow", [](const ValuesTuple& x, at w, at y, i64 T, i64 K, i64 R, const DropoutTuple& d) {
        go_among(kernels().narrow, Narrow{values(x), ptr<float>(w), ptr<float>(y), T, K, R, dropout(d)}, T * K);
    });
    m.def("widen", [](at x, at w, const ValuesTuple& base, const ValuesTuple& y, i64 T, i64 R, i64 N, const DropoutTuple& d) {
        go_among(kernels().widen, Widen{ptr<float>(x), ptr<float>(w), values(base), values(y), T, R, N, dropout(d)}, T * N);
    });
    m.def("correlate", [](at a, const ValuesTuple& x, at y, i64 T, i64 R, i64 K, int by_input, const DropoutTuple& d) {
        go_among(kernels().correlate, Correlate{ptr<float>(a), values(x), ptr<float>(y), T, R, K, by_input, dropout(d)}, T * K);
    });
    m.def("silu_gate", [](const ValuesTuple& g, const ValuesTuple& u, const ValuesTuple& y, i64 T, i64 D) {
        go_among(kernels().silu_gate, SiluGate{values(g), values(u), values(y), {}, {}, T, D}, T * D);
    });
    m.def("silu_gate_back", [](const ValuesTuple& g, const ValuesTuple& u, const ValuesTuple& dy, const ValuesTuple& dg,
                               const ValuesTuple& du, i64 T, i64 D) {
        go_among(kernels().silu_gate_back, SiluGate{values(g), values(u), values(dy), values(dg), values(du), T, D}, T * D);
    });
    m.attr("TAPS") = TAPS;
    m.def("packed_conv", [](const ValuesTuple& x, at weight, at bias, at reach, const ValuesTuple& y, i64 T, i64 C, i64 taps) {
        go_among(kernels().packed_conv,
                 PackedConv{values(x), values(y), {}, ptr<float>(weight), ptr<float>(bias), ptr<i64>(reach), nullptr, nullptr,
                            T, C, taps}, T * C);
    });
    m.def("packed_conv_back", [](const ValuesTuple& x, at weight, at bias, at reach, const ValuesTuple& dy,
                                 const ValuesTuple& dx, at dweight, at dbias, i64 T, i64 C, i64 taps) {
        go_among(kernels().packed_conv_back,
                 PackedConv{values(x), values(dy), values(dx), ptr<float>(weight), ptr<float>(bias), ptr<i64>(reach),
                            ptr<float>(dweight), ptr<float>(dbias), T, C, taps}, T * C);
    });
    m.def("decayed", [](at high, at low, at scores, const ValuesTuple& w, i64 K, i64 H, i64 G, i64 Q) {
        go_among(kernels().decayed,
                 Decayed{ptr<float>(high), ptr<float>(low), ptr<float>(scores), values(w), nullptr, nullptr, nullptr, K, H, G, Q},
                 K * H * Q * Q);
    });
    m.def("decayed_back", [](at high, at low, at scores, const ValuesTuple& dw, at dscores, at rows, at columns, i64 K, i64 H,
                             i64 G, i64 Q) {
        go_among(kernels().decayed_back,
                 Decayed{ptr<float>(high), ptr<float>(low), ptr<float>(scores), values(dw), ptr<float>(dscores),
                         ptr<float>(rows), ptr<float>(columns), K, H, G, Q},
                 K * H * Q * Q);
    });
}

}  // namespace tiercel
