// The extension module: raw addresses in, nothing else.  `ops/cpu/native.py` has tensors; this file does not.
#include <stdexcept>

#include "bindings.h"

namespace nb = nanobind;
using namespace tiercel;

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

std::vector<std::string> available() {
    std::vector<std::string> out;
    for (const char* isa : {"avx512", "avx2", "portable"})
        if (has(isa)) out.push_back(isa);
    return out;
}

std::string chosen;

void choose(const std::string& isa) {
    if (!has(isa)) throw std::invalid_argument("this machine has no " + isa);
    use_kernels(isa);
    chosen = isa;
}

std::vector<std::string> names(const Ops& ops) {
    std::vector<std::string> out;
    for (const Op& op : ops.all()) out.push_back(kernel_name(chosen, op.kernel));
    return out;
}

}  // namespace

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // captured graphs live as long as the models of a process
    choose(available().front());
    m.def("available", available, "Instruction sets of this build that this machine has, the best first.");
    m.def("isa", [] { return chosen; });
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

    bind_kernels(m);
}
