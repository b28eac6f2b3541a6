// What the bindings of kernels share: addresses become pointers, arguments become an op.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace tiercel {

struct BindingRegistration {
    explicit BindingRegistration(void (*bind)(nanobind::module_&));
};

// `BINDINGS(m) { m.def(…); }`: runs when the module is imported.
#define BINDINGS(m)                                            \
    static void bind(nanobind::module_& m);                    \
    static const BindingRegistration binding_registration(bind); \
    static void bind(nanobind::module_& m)

void use_kernels(const std::string& isa);
std::string kernel_name(const std::string& isa, Kernel kernel);
void bind_kernels(nanobind::module_& m);

using Address = uintptr_t;

template <class T> T* ptr(Address a) { return (T*)a; }

constexpr size_t f32 = sizeof(float);

// with fewer values, waking other threads costs more than it saves
constexpr i64 SMALL = 16384;

// Runs (or records) an op on the thread pool.
template <class Args>
void launch(const KernelHandle& handle, const Args& args, bool serial, const std::vector<Range>& reads,
            const std::vector<Range>& writes) {
    static_assert(sizeof(Args) <= Op::MAX_ARG_BYTES);
    nanobind::gil_scoped_release free;
    submit(handle.kernel, &args, sizeof args, serial, reads, writes);
}

// Runs an op of training on torch's threads.
template <class Args> void launch_openmp(const KernelHandle& handle, const Args& args, i64 values) {
    static_assert(sizeof(Args) <= Op::MAX_ARG_BYTES);
    nanobind::gil_scoped_release free;
    submit_openmp(handle.kernel, &args, sizeof args, values < SMALL);
}

// rows of `width` float32 values, `stride` apart
inline Range values(Address a, i64 rows, i64 width, i64 stride = 0) {
    return {ptr<void>(a), a && rows > 0 ? ((rows - 1) * (stride ? stride : width) + width) * f32 : 0};
}

// ── batches (ops/cpu/batch.py: BatchMetadata) ──

// address of the slices, their number, where the layer's descriptor begins, whether kept as bf16, new tokens in all
using MetadataTuple = std::tuple<Address, i64, i64, int, i64>;

inline BatchMetadata metadata(const MetadataTuple& t) {
    return {ptr<SeqSlice>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}
inline i64 tokens_of(const MetadataTuple& t) { return std::get<4>(t); }

// Represents all state of a layer in hazards: ops on the same layer run one after another.
inline Range state_of(const BatchMetadata& batch) { return {batch.seqs[0].descriptor + batch.layer, sizeof(i64)}; }

}  // namespace tiercel
