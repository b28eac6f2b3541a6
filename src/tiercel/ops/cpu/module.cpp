// The extension module: raw addresses in, nothing else.  `ops/cpu/__init__.py` knows tensors; this file does not.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "bind.h"

namespace nb = nanobind;
using namespace tiercel;

#if defined(TIERCEL_X86)
namespace avx512 { const Kernels& table(); }
namespace avx2 { const Kernels& table(); }
#endif
namespace portable { const Kernels& table(); }

namespace tiercel {

namespace {

bool has(const std::string& isa) {
#if defined(TIERCEL_X86)
    if (isa == "avx512")
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
    return isa == "portable";
}

const Kernels* chosen = nullptr;

void choose(const std::string& isa) {
    if (!has(isa)) throw std::invalid_argument("this machine has no " + isa);
#if defined(TIERCEL_X86)
    if (isa == "avx512") { chosen = &avx512::table(); return; }
    if (isa == "avx2") { chosen = &avx2::table(); return; }
#endif
    chosen = &portable::table();
}

std::vector<std::string> available() {
    std::vector<std::string> out;
    for (const char* isa : {"avx512", "avx2", "portable"})
        if (has(isa)) out.push_back(isa);
    return out;
}

std::vector<std::string> names(const Ops& ops) {
    const Kernels& k = kernels();
#define NAME(x) {k.x, #x}
    const std::vector<std::pair<Kernel, const char*>> known{
        NAME(rms_norm), NAME(add), NAME(gate), NAME(linear), NAME(linear_f32), NAME(linear_bf16), NAME(round_inputs),
        NAME(round_bf16), NAME(rows), NAME(rotary), NAME(remember), NAME(attend), NAME(conv), NAME(ssd), NAME(select),
        NAME(scan), NAME(gated_norm)};
    std::vector<std::string> out;
    for (const Op& op : ops.all()) {
        out.push_back("?");
        for (const auto& [kernel, name] : known)
            if (op.kernel == kernel) out.back() = name;
    }
    return out;
}

}  // namespace

const Kernels& kernels() { return *chosen; }

}  // namespace tiercel

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // recordings live as long as the networks of a process
    choose(available().front());
    m.def("available", available, "Instruction sets of this build that this machine has, the best first.");
    m.def("isa", [] { return std::string(kernels().name); });
    m.def("choose", choose);
    m.def("set_threads", set_threads);
    m.def("threads", threads);

    nb::class_<Ops>(m, "Ops")
        .def(nb::init<>())
        .def("run", [](Ops& ops) { nb::gil_scoped_release free; ops.run(threads()); })
        .def("profile", [](Ops& ops) { nb::gil_scoped_release free; return ops.profile(threads()); },
             "Seconds of every op in one run, each waited for.")
        .def("names", names)
        .def("__len__", &Ops::size)
        .def("waits", &Ops::waits);
    m.def("record", [](Ops& ops) { record(&ops); });
    m.def("stop", [] { record(nullptr); });

    bind_mixers(m);
    bind_training(m);

    m.def("rms_norm", [](at x, at weight, at y, i64 T, i64 D, float eps) {
        go(kernels().rms_norm, RmsNorm{ptr<float>(x), ptr<float>(weight), ptr<float>(y), T, D, eps}, T * D < SMALL,
           {{ptr<void>(x), T * D * f32}}, {{ptr<void>(y), T * D * f32}});
    });
    m.def("add", [](at a, at b, at y, i64 n) {
        go(kernels().add, Add{ptr<float>(a), ptr<float>(b), ptr<float>(y), n}, n < SMALL,
           {{ptr<void>(a), n * f32}, {ptr<void>(b), n * f32}}, {{ptr<void>(y), n * f32}});
    });
    m.def("gate", [](at gate, at up, at y, i64 n, int activation) {
        go(kernels().gate, Gate{ptr<float>(gate), ptr<float>(up), ptr<float>(y), n, activation}, n < SMALL,
           {{ptr<void>(gate), n * f32}, {ptr<void>(up), n * f32}}, {{ptr<void>(y), n * f32}});
    });

    // ── matrices ──

    m.attr("formats") = std::vector<std::string>{"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
                                                 "Q6_K", "INT8", "NF4", "BF16", "BF16_12", "F32"};
    m.def("linear", [](at weight, i64 weight_bytes, at x, at rounded, at bias, at y, i64 inputs, i64 outputs, i64 tokens,
                       float scale, int format, bool exact) {
        const bool bf16 = format == FORMAT_BF16 || format == FORMAT_BF16_12;
        const Kernel k = exact || format == FORMAT_F32 ? kernels().linear_f32
                         : bf16                        ? kernels().linear_bf16
                                                       : kernels().linear;
        std::vector<Range> reads{{ptr<void>(x), tokens * inputs * f32}};
        if (rounded) reads.push_back({ptr<void>(rounded), 1});
        go(k, Linear{ptr<uint8_t>(weight), ptr<float>(x), ptr<uint8_t>(rounded), ptr<float>(bias), ptr<float>(y), inputs,
                     outputs, tokens, scale, format},
           weight_bytes * tokens < SMALL, reads, {{ptr<void>(y), tokens * outputs * f32}});
    });
    m.def("round_inputs", [](at x, at out, i64 tokens, i64 inputs, int sub, int zero) {
        go(kernels().round_inputs, RoundInputs{ptr<float>(x), ptr<uint8_t>(out), tokens, inputs, sub, zero},
           tokens * inputs < SMALL / 4, {{ptr<void>(x), tokens * inputs * f32}}, {{ptr<void>(out), 1}});
    });
    m.def("round_bf16", [](at x, at out, i64 tokens, i64 inputs) {
        go(kernels().round_bf16, RoundInputs{ptr<float>(x), ptr<uint8_t>(out), tokens, inputs, 0, 0},
           tokens * inputs < SMALL / 4, {{ptr<void>(x), tokens * inputs * f32}}, {{ptr<void>(out), 1}});
    });
    m.def("rows", [](at weight, at which, at y, i64 inputs, i64 count, float scale, int format) {
        std::vector<Range> reads;
        if (which) reads.push_back({ptr<void>(which), count * sizeof(i64)});
        go(kernels().rows, Rows{ptr<uint8_t>(weight), ptr<i64>(which), ptr<float>(y), inputs, count, scale, format},
           count * inputs < SMALL, reads, {{ptr<void>(y), count * inputs * f32}});
    });
    m.def("to_panels", [](at blocks, at panels, i64 inputs, i64 outputs, i64 first, i64 count, int format) {
        go(kernels().to_panels, Panels{ptr<uint8_t>(blocks), ptr<uint8_t>(panels), inputs, outputs, first, count, format},
           false, {}, {});
    });
    m.def("from_panels", [](at blocks, at panels, i64 inputs, i64 outputs, i64 first, i64 count, int format) {
        go(kernels().from_panels, Panels{ptr<uint8_t>(blocks), ptr<uint8_t>(panels), inputs, outputs, first, count, format},
           false, {}, {});
    });
    m.def("to_twelve", [](at panels, at out, at sizes, at highest, i64 inputs, i64 outputs) {
        go(kernels().to_twelve,
           ToTwelve{ptr<uint8_t>(panels), ptr<uint8_t>(out), ptr<i64>(sizes), ptr<uint8_t>(highest), inputs, outputs}, false, {}, {});
    });
    m.def("quantize", [](int type, at x, at importance, at out, i64 rows, i64 width, i64 row_bytes) {
        const auto noted = importance ? std::vector<Range>{{ptr<void>(x), rows * width * f32}, {ptr<void>(importance), width * f32}}
                                      : std::vector<Range>{{ptr<void>(x), rows * width * f32}};
        go(kernels().quantize, Quantize{ptr<float>(x), ptr<float>(importance), ptr<uint8_t>(out), rows, width, type},
           rows * width < SMALL, noted, {{ptr<void>(out), (size_t)(rows * row_bytes)}});
    });
}
