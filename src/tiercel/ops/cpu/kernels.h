// What every kernel is given: pointers and sizes.  A kernel never allocates, fails or calls Python.
//
// A kernel lives in one file, `ops/cpu/<op>.cpp` or `mixers/<mixer>/cpu*.cpp`, which CMake compiles once for every
// instruction set and once with TIERCEL_BINDINGS for its Python binding:
//
//     namespace tiercel { struct Scale { const float* x; float* y; i64 count; float by; }; }   what the op is given
//     #if defined(TIERCEL_BINDINGS)
//     static KernelHandle scale{"scale"};
//     BINDINGS(m) { m.def("scale", …launch(scale, Scale{…}, …)); }
//     #else
//     namespace ISA { void scale(const void* args, Worker& worker) { … }   REGISTER_KERNEL("scale", scale); }
//     #endif
//
// Letters: T tokens of the whole batch, D width, K and N a matrix's inputs and outputs, H heads, P head dim,
// G groups, S or N state, L new tokens of one sequence.  Between ops every activation is float32; matrices quantize
// their input as they need it, states keep bf16 or float32.
#pragma once

#include <stdint.h>

#include "thread_pool.h"

namespace tiercel {

using i64 = int64_t;

// Adds a kernel of one instruction set to the registry (registry.cpp).
struct Registration {
    Registration(const char* isa, const char* name, Kernel kernel);
};

// The kernel of a name in the instruction set in use.
struct KernelHandle {
    const char* name;
    Kernel kernel = nullptr;  // set by `choose`
    explicit KernelHandle(const char* name);
};

#define TIERCEL_STRING_(x) #x
#define TIERCEL_STRING(x) TIERCEL_STRING_(x)
#define TIERCEL_JOIN_(a, b) a##b
#define TIERCEL_JOIN(a, b) TIERCEL_JOIN_(a, b)

// Calls of a constructor in registry.cpp and nothing else: they run on machines without this instruction set, too.
#define REGISTER_KERNEL(name, kernel) \
    static const ::tiercel::Registration TIERCEL_JOIN(registration, __COUNTER__)(TIERCEL_STRING(ISA), name, kernel)

enum Format {  // of a matrix, in the order of `formats` (linear.cpp)
    FORMAT_Q4_0, FORMAT_Q4_1, FORMAT_Q5_0, FORMAT_Q5_1, FORMAT_Q8_0, FORMAT_Q2_K, FORMAT_Q3_K, FORMAT_Q4_K, FORMAT_Q5_K,
    FORMAT_Q6_K, FORMAT_INT8, FORMAT_NF4, FORMAT_BF16, FORMAT_BF16_12, FORMAT_F32
};

// ── the sequences of a batch and their states ──
//
// A state is found through its descriptor, int64s at an address that stays: its own fields, then those of every layer.

struct SeqSlice {     // one sequence of a batch
    i64* descriptor;  // of its state
    i64 first;        // its first token in the batch
    i64 tokens;       // number of new ones
};

struct StateDescriptor {
    i64 length;       // tokens
    float* partials;  // (segments, SPLIT, H, 2 + P): largest score, sum and vector of each key segment
    i64 segments;
};
struct AttentionDescriptor {  // of an attention layer
    char** pages;             // of every PAGE tokens, keys and values of all attention layers with the same window
    i64 start;                // byte of a page where the layer's keys begin, (K, PAGE, P); the values follow
    i64 tiles_done[1];        // for each kv head; 0 between ops
};
struct RecurrentDescriptor {  // of a layer with a recurrent state; then a pointer for each of the mixer's `buffers()`
    i64 committed_pos;        // the token that ssm_state stands before
    i64 tiles_done;           // 0 between ops
    template <class Buffers> Buffers& buffers() const { return *(Buffers*)(this + 1); }
};
struct ConvBuffers { void* conv_state; };  // first of all mixers' that have a convolution

struct BatchMetadata {  // the sequences of a batch, and one layer of their states
    const SeqSlice* seqs;
    i64 count;
    i64 layer;  // where its descriptor begins
    int bf16;   // keys, values and inputs are kept as bf16, else float32
};

}  // namespace tiercel
