// What every kernel is told.  Pointers and sizes only; a kernel never allocates, fails or knows about Python.
//
// Letters: T tokens of the whole batch, D width, K and N a matrix's inputs and outputs, H heads, P head dim,
// G groups, S state, L new tokens of one row.  Between ops every activation is float32; matrices round their input as
// they need it, states keep bf16 or float32.
#pragma once

#include <stdint.h>

#include "team.h"

namespace tiercel {

using i64 = int64_t;

// ── rows: which text each token belongs to ──
//
// A state is a run of int64 words: word 0 is the number of tokens it holds, each layer part has its own words at a
// fixed offset (model/state.py draws them).  A batch has one Row for every text.
struct Row {
    i64* state;   // the words of its state
    i64 first;    // its first token in the batch
    i64 tokens;   // how many new ones
};

struct RmsNorm { const float *x, *weight; float* y; i64 tokens, width; float eps; };
struct Add { const float *a, *b; float* y; i64 count; };  // y = a + b
struct Gate { const float *gate, *up; float* y; i64 count; int activation; };  // y = act(gate) · up
enum Activation { SILU, GELU, GELU_TANH, RELU };

// (rows, width) → super-blocks, width a multiple of 256; importance (width) or nullptr
struct Quantize { const float *x, *importance; uint8_t* out; i64 rows, width; int type; };
enum Super { Q2_K, Q3_K, Q4_K, Q5_K, Q6_K };

struct Kernels {
    const char* name;
    Kernel rms_norm, add, gate;
    Kernel quantize;
};

const Kernels& kernels();  // those of the instruction set in use

}  // namespace tiercel
