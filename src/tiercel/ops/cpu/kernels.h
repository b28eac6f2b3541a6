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

// ── matrices ──

enum Format {
    FORMAT_Q4_0, FORMAT_Q4_1, FORMAT_Q5_0, FORMAT_Q5_1, FORMAT_Q8_0, FORMAT_Q2_K, FORMAT_Q3_K, FORMAT_Q4_K, FORMAT_Q5_K,
    FORMAT_Q6_K, FORMAT_INT8, FORMAT_NF4, FORMAT_BF16, FORMAT_F32
};

// y (tokens, outputs) = scale · x (tokens, inputs) Wᵀ + bias.  `rounded`: what round_inputs or round_bf16 made of x,
// for more than one token
struct Linear {
    const uint8_t* weight;
    const float* x;
    const uint8_t* rounded;
    const float* bias;
    float* y;
    i64 inputs, outputs, tokens;
    float scale;
    int format;
};
struct RoundInputs { const float* x; uint8_t* out; i64 tokens, inputs; int sub, zero; };
// rows of W as float32, those of `which` or the first `count`
struct Rows { const uint8_t* weight; const i64* which; float* y; i64 inputs, count; float scale; int format; };
// rows first … first + count − 1 (first a multiple of 16) between a file's blocks and panels
struct Panels { uint8_t *blocks, *panels; i64 inputs, outputs, first, count; int format; };
// (rows, width) → super-blocks, width a multiple of 256; importance (width) or nullptr
struct Quantize { const float *x, *importance; uint8_t* out; i64 rows, width; int type; };

struct Kernels {
    const char* name;
    Kernel rms_norm, add, gate;
    Kernel linear, linear_f32, linear_bf16, round_inputs, round_bf16, rows, to_panels, from_panels;
    Kernel quantize;
};

const Kernels& kernels();  // those of the instruction set in use

}  // namespace tiercel
