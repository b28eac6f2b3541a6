// Bindings of what depends on a row's own past.
#include <nanobind/stl/tuple.h>

#include "bind.h"

namespace nb = nanobind;

namespace tiercel {

namespace {

// (address of the rows, how many, the part's offset in the words, whether kept as bf16, new tokens in all)
using TextsTuple = std::tuple<at, i64, i64, int, i64>;

Texts metadata_for(const TextsTuple& t) { return {ptr<Row>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)}; }
i64 tokens_of(const TextsTuple& t) { return std::get<4>(t); }

// Stands for all that a layer part remembers: ops on the same part run one after another.
Range memory(const Texts& t) { return {t.rows[0].state + t.part, sizeof(i64)}; }

// rows of `width` values, `stride` apart
Range values(at a, i64 rows, i64 width, i64 stride = 0) {
    return {ptr<void>(a), a && rows > 0 ? ((rows - 1) * (stride ? stride : width) + width) * f32 : 0};
}

}  // namespace

void bind_mixers(nb::module_& m) {
    m.attr("KEYS") = KEYS;
    m.attr("PAGE") = PAGE;
    m.attr("SEGMENT") = SEGMENT;
    m.attr("SPLIT") = SPLIT;

    m.def("rotary", [](const TextsTuple& t, at f, at cos, at sin, i64 half, float scale) {
        const i64 T = tokens_of(t);
        go(kernels().rotary, Rotary{metadata_for(t), ptr<float>(f), ptr<float>(cos), ptr<float>(sin), half, scale},
           T * half < 1024, {}, {values(cos, T, half), values(sin, T, half)});
    });
    m.def("remember", [](const TextsTuple& t, at k, at v, at cos, at sin, i64 stride, i64 half, i64 K, i64 P) {
        const i64 T = tokens_of(t);
        const Texts texts = metadata_for(t);
        go(kernels().remember,
           Remember{texts, ptr<float>(k), ptr<float>(v), ptr<float>(cos), ptr<float>(sin), stride, half, K, P},
           T * K * P < SMALL,
           {values(k, T, K * P, stride), values(v, T, K * P, stride), values(cos, T, half), values(sin, T, half)},
           {memory(texts)});
    });
    m.def("attend", [](const TextsTuple& t, at q, at cos, at sin, at y, i64 stride, i64 half, i64 H, i64 K, i64 P,
                       i64 window, float scale) {
        const i64 T = tokens_of(t);
        const Texts texts = metadata_for(t);
        go(kernels().attend,
           Attend{texts, ptr<float>(q), ptr<float>(cos), ptr<float>(sin), ptr<float>(y), stride, half, H, K, P, window, scale},
           false, {memory(texts), values(q, T, H * P, stride), values(cos, T, half), values(sin, T, half)},
           {values(y, T, H * P), {&((StateWords*)texts.rows[0].state)->partials, sizeof(i64)}});
    });
    m.def("conv", [](const TextsTuple& t, at x, at weight, at bias, at dt, at dt_bias, at y, at dts, i64 stride, i64 C,
                     i64 taps, i64 H, float low, float high) {
        const i64 T = tokens_of(t);
        const Texts texts = metadata_for(t);
        go(kernels().conv,
           Conv{texts, ptr<float>(x), ptr<float>(weight), ptr<float>(bias), ptr<float>(dt), ptr<float>(dt_bias),
                ptr<float>(y), ptr<float>(dts), stride, C, taps, H, low, high},
           T * C < SMALL / 32, {memory(texts), values(x, T, C, stride), values(dt, T, H, stride)},
           {values(y, T, C), values(dts, T, H)});
    });
    m.def("ssd", [](const TextsTuple& t, at xBC, at dt, at A, at D, at columns, at y, i64 stride, i64 H, i64 P, i64 G,
                    i64 N, i64 taps, i64 chunk) {
        const i64 T = tokens_of(t), C = H * P + 2 * G * N;
        const Texts texts = metadata_for(t);
        go(kernels().ssd,
           Ssd{texts, ptr<float>(xBC), ptr<float>(dt), ptr<float>(A), ptr<float>(D), ptr<float>(columns), ptr<float>(y),
               stride, H, P, G, N, taps, chunk},
           H * P * N < SMALL, {values(xBC, T, C), values(dt, T, H), values(columns, T, C, stride)},
           {memory(texts), values(y, T, H * P)});
    });
    m.def("select", [](at x, at w0, at w1, at w2, at y0, at y1, at y2, i64 T, i64 n0, i64 n1, i64 n2, float eps, bool bf16) {
        go(kernels().select,
           Select{ptr<float>(x), {ptr<float>(w0), ptr<float>(w1), ptr<float>(w2)},
                  {ptr<float>(y0), ptr<float>(y1), ptr<float>(y2)}, T, {n0, n1, n2}, eps, bf16},
           T * (n0 + n1 + n2) < SMALL, {values(x, T, n0 + n1 + n2)},
           {values(y0, T, n0), values(y1, T, n1), values(y2, T, n2)});
    });
    m.def("scan", [](const TextsTuple& t, at x, at dt, at dt_bias, at B, at C, at A, at D, at z, at columns, at y,
                     i64 stride, i64 I, i64 N, i64 taps, i64 chunk) {
        const i64 T = tokens_of(t);
        const Texts texts = metadata_for(t);
        go(kernels().scan,
           Scan{texts, ptr<float>(x), ptr<float>(dt), ptr<float>(dt_bias), ptr<float>(B), ptr<float>(C), ptr<float>(A),
                ptr<float>(D), ptr<float>(z), ptr<float>(columns), ptr<float>(y), stride, I, N, taps, chunk},
           T * I * N < SMALL / 8,
           {values(x, T, I), values(dt, T, I), values(B, T, N), values(C, T, N), values(z, T, I, stride),
            values(columns, T, I, stride)},
           {memory(texts), values(y, T, I)});
    });
    m.def("gated_norm", [](at x, at z, at weight, at y, i64 T, i64 D, i64 stride, i64 groups, float eps, bool gate_first) {
        go(kernels().gated_norm,
           GatedNorm{ptr<float>(x), ptr<float>(z), ptr<float>(weight), ptr<float>(y), T, D, stride, groups, eps, gate_first},
           T * D < SMALL, {values(x, T, D), values(z, T, D, stride)}, {values(y, T, D)});
    });
}

}  // namespace tiercel
