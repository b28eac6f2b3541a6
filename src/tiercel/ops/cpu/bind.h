// What the bindings share: addresses become pointers, arguments become an op.
#pragma once

#include <nanobind/nanobind.h>

#include <vector>

#include "kernels.h"

namespace tiercel {

using at = uintptr_t;

template <class T> T* ptr(at a) { return (T*)a; }

template <class Args>
void go(Kernel kernel, const Args& args, bool alone, const std::vector<Range>& reads, const std::vector<Range>& writes) {
    static_assert(sizeof(Args) <= Op::MOST);
    nanobind::gil_scoped_release free;
    submit(kernel, &args, sizeof args, alone, reads, writes);
}

constexpr size_t f32 = sizeof(float);

// below so many values, waking other threads costs more than it saves
constexpr i64 SMALL = 16384;

void bind_mixers(nanobind::module_&);
void bind_training(nanobind::module_&);

}  // namespace tiercel
