// Bindings of what training needs, run on torch's threads.
#include <nanobind/stl/tuple.h>

#include "bind.h"

namespace nb = nanobind;

namespace tiercel {

namespace {

using ValuesTuple = std::tuple<at, i64, int>;    // address, values from row to row, whether bf16
using DropoutTuple = std::tuple<uint64_t, int>;  // seed, what is dropped of 65536

using LayoutTuple = std::tuple<i64, i64, i64, i64, i64>;  // chunks, tokens of one, heads, groups, head dim

Layout layout(const LayoutTuple& l) {
    return {std::get<0>(l), std::get<1>(l), std::get<2>(l), std::get<3>(l), std::get<4>(l)};
}
i64 size(const LayoutTuple& l) { return std::get<0>(l) * std::get<1>(l) * std::get<2>(l) * std::get<4>(l); }
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
    m.def("added", [](const ValuesTuple& a, const ValuesTuple& b, const ValuesTuple& y, i64 T, i64 D) {
        go_among(kernels().added, Added{values(a), values(b), values(y), T, D}, T * D);
    });
    m.def("cross_entropy", [](const ValuesTuple& x, at targets, at losses, i64 T, i64 V) {
        go_among(kernels().cross_entropy, CrossEntropy{values(x), ptr<i64>(targets), ptr<float>(losses), T, V}, T * V);
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
    m.def("spread", [](const ValuesTuple& x, at scale, at other_scale, const ValuesTuple& by_head, const ValuesTuple& by_group,
                       const ValuesTuple& with, at dots, const LayoutTuple& l) {
        go_among(kernels().spread, Spread{values(x), values(by_head), values(by_group), values(with), ptr<float>(scale),
                                          ptr<float>(other_scale), ptr<float>(dots), layout(l)}, size(l));
    });
    m.def("gather", [](const ValuesTuple& by_head, const ValuesTuple& by_group, at scale, const ValuesTuple& x, at D,
                       const ValuesTuple& y, const LayoutTuple& l) {
        go_among(kernels().gather, Gather{values(by_head), values(by_group), values(x), values(y), ptr<float>(scale),
                                          ptr<float>(D), layout(l)}, size(l));
    });
    m.def("gather_back", [](const ValuesTuple& by_head, const ValuesTuple& by_group, at scale, const ValuesTuple& x,
                            const ValuesTuple& dy, at dt, at D, const ValuesTuple& dx, at dots, at left, const LayoutTuple& l) {
        go_among(kernels().gather_back,
                 GatherBack{values(by_head), values(by_group), values(x), values(dy), values(dx), ptr<float>(scale),
                            ptr<float>(dt), ptr<float>(D), ptr<float>(dots), ptr<float>(left), layout(l)}, size(l));
    });
    m.def("carry", [](const ValuesTuple& x, at g, const ValuesTuple& y, i64 count, i64 state, int back, const LayoutTuple& l) {
        go_among(kernels().carry, Carry{values(x), values(y), ptr<float>(g), nullptr, count, state, back, layout(l)},
                 size(l) * state);
    });
    m.def("carry_dots", [](const ValuesTuple& x, const ValuesTuple& y, at dg, i64 count, i64 state, const LayoutTuple& l) {
        go_among(kernels().carry_dots, Carry{values(x), values(y), nullptr, ptr<float>(dg), count, state, 0, layout(l)},
                 size(l) * state);
    });
    m.def("softmax", [](const ValuesTuple& x, i64 rows, i64 keys, i64 window) {
        go_among(kernels().softmax, Softmax{values(x), {}, rows, keys, window}, rows * keys);
    });
    m.def("softmax_back", [](const ValuesTuple& y, const ValuesTuple& dy, i64 rows, i64 keys, i64 window) {
        go_among(kernels().softmax_back, Softmax{values(y), values(dy), rows, keys, window}, rows * keys);
    });
    m.def("normed", [](const ValuesTuple& x, at weight, const ValuesTuple& y, at r, i64 T, i64 D, float eps) {
        go_among(kernels().normed, Normed{values(x), values(y), {}, ptr<float>(weight), ptr<float>(r), T, D, eps}, T * D);
    });
    m.def("normed_back", [](const ValuesTuple& x, at weight, at r, const ValuesTuple& dy, const ValuesTuple& dx, i64 T, i64 D) {
        go_among(kernels().normed_back, Normed{values(x), values(dy), values(dx), ptr<float>(weight), ptr<float>(r), T, D, 0.0f},
                 T * D);
    });
}

}  // namespace tiercel
