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
// fixed offset (model/state.py and layer_state.py draw them).  A batch has one Row for every text.
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
    FORMAT_Q6_K, FORMAT_INT8, FORMAT_NF4, FORMAT_BF16, FORMAT_BF16_12, FORMAT_F32
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
// panels of bf16 → twelve bits (twelve.h); without `out` only each panel's highest exponent and what it will take, with
// it those exponents, and where the panels begin stands at its start
struct ToTwelve { const uint8_t* panels; uint8_t* out; i64* sizes; uint8_t* highest; i64 inputs, outputs; };
// (rows, width) → super-blocks, width a multiple of 256; importance (width) or nullptr
struct Quantize { const float *x, *importance; uint8_t* out; i64 rows, width; int type; };
// ── what depends on a row's own past ──

struct StateWords {  // what a state's words say
    i64 length;      // tokens
    float* partials; // (segments, SPLIT, H, 2 + P): largest score, sum and vector of each key segment
    i64 segments;
    char** pages;    // of every PAGE tokens, what the attention layers remember (model/pages.py)
};
struct AttentionWords {  // an attention part's, from its offset
    i64 start;           // byte of a page where the layer's keys begin, (K, PAGE, P); the values follow
    i64 finished[1];     // pieces done, for each kv head; 0 between ops
};
struct RecurrentWords {  // a Mamba part's, from its offset
    i64 base;            // the token S stands before
    i64 finished;        // pieces done; 0 between ops
    void *columns, *x;   // (K − 1 + 2 chunk, C);  Mamba-2 (H, 2 chunk, P), Mamba-1 (2 chunk, I)
    float* dt;           // (2 chunk, H or I)
    void* B;             // (G, 2 chunk, N) or (2 chunk, N)
    float* S;            // (H, N, P) or (N, I)
    float* running;      // Mamba-1: (N, I), the state before token `running_length`
    i64 running_length;
};

constexpr i64 KEYS = 32;       // keys of a tile
constexpr i64 PAGE = 64;       // tokens of a page, whole tiles
constexpr i64 SEGMENT = 1024;  // keys summed by themselves, then merged in order
constexpr i64 SPLIT = 8;       // new tokens up to which segments may go to different threads

struct Texts {
    const Row* rows;
    i64 count;
    i64 part;  // offset of the layer part in the words
    int bf16;  // keys, values and inputs are kept as bf16, else float32
};

struct Rotary { Texts texts; const float* f; float *cos, *sin; i64 half; float scale; };  // (T, half): half the turned dims
struct Remember {  // k and v (T, K · P), rows `stride` apart, into the pages, k turned
    Texts texts;
    const float *k, *v, *cos, *sin;
    i64 stride, half, kv_heads, head_dim;
};
struct Attend {  // y (T, H · P); window 0: none
    Texts texts;
    const float *q, *cos, *sin;
    float* y;
    i64 stride, half, heads, kv_heads, head_dim, window;
    float scale;
};
struct Conv {  // y (T, channels) = silu(conv x), rounded to the state's type; dts (T, heads) = softplus(dt + bias), clamped
    Texts texts;
    const float *x, *weight, *bias, *dt, *dt_bias;  // weight (taps, channels); x and dt rows are `stride` apart
    float *y, *dts;
    i64 stride, channels, taps, heads;
    float low, high;
};
struct Ssd {  // y (T, H · P) from xBC and dt as Conv left them; columns: what Conv was given
    Texts texts;
    const float *xBC, *dt, *A, *D, *columns;
    float* y;
    i64 stride, heads, head_dim, groups, state, taps, chunk;
};
struct Select {  // Mamba-1: (T, widths summed) into dt, B, C, each with an RMS norm where it has a weight; B as kept
    const float* x;
    const float* weight[3];
    float* y[3];
    i64 tokens, width[3];
    float eps;
    int bf16;
};
struct Scan {  // Mamba-1: y (T, I) = (scan + D x) · silu(z); A (N, I); dt before bias and softplus
    Texts texts;
    const float *x, *dt, *dt_bias, *B, *C, *A, *D, *z, *columns;
    float* y;
    i64 stride, inner, state, taps, chunk;  // z and columns rows are `stride` apart
};
struct GatedNorm {  // z rows are `stride` apart; weight nullptr: y · silu(z)
    const float *x, *z, *weight;
    float* y;
    i64 tokens, width, stride, groups;
    float eps;
    int gate_first;
};

// ── training (training.cpp) ──

struct Values { void* at; i64 stride; int bf16; };      // rows of bf16 or float32; at nullptr: none
struct Dropout { uint64_t seed; int32_t below; };       // what is dropped, of 65536; 0: nothing
struct Narrow { Values x; const float* w; float* y; i64 tokens, inputs, rank; Dropout dropout; };
struct Widen { const float *x, *w; Values base, y; i64 tokens, rank, outputs; Dropout dropout; };
struct Correlate { const float* a; Values x; float* y; i64 tokens, rank, inputs; int by_input; Dropout dropout; };
struct Added { Values a, b, y; i64 tokens, width; };  // y = a + b
// losses (T) = −log softmax(x)[target], and x becomes their gradient, softmax(x) less one at the target
struct CrossEntropy { Values x; const i64* targets; float* losses; i64 tokens, words; };
struct SiluGate { Values g, u, y, dg, du; i64 tokens, width; };
constexpr i64 TAPS = 8;  // of a packed convolution at most
struct PackedConv {  // weight (taps, channels), of the lags 0 …; reach (T): lags inside the document
    Values x, y, dx;
    const float *weight, *bias;
    const i64* reach;
    float *dweight, *dbias;
    i64 tokens, channels, taps;
};
struct Decayed {  // high, low: (chunks · H, Q);  scores, dscores: (chunks · G, Q, Q);  w: (chunks · H · Q, Q)
    const float *high, *low, *scores;
    Values w;
    float *dscores, *rows, *columns;
    i64 chunks, heads, groups, chunk;
};
// A scan's tensors lie by token (T, H, P), by head (K, H, Q, P) or by group (K, G, Q, H / G · P); scales are (T, H).
struct Layout { i64 chunks, chunk, heads, groups, head_dim; };
// by_head = scale · x, by_group = other_scale · x, dots (T, H) = Σ by_group · with; scale nullptr: 1
struct Spread { Values x, by_head, by_group, with; const float *scale, *other_scale; float* dots; Layout layout; };
// y = by_head + scale · by_group + D x
struct Gather { Values by_head, by_group, x, y; const float *scale, *D; Layout layout; };
// du = by_head + scale · by_group;  dx = dt du + D dy, dots (T, H) = Σ x du, left (T, H) = Σ x scale by_group
struct GatherBack { Values by_head, by_group, x, dy, dx; const float *scale, *dt, *D; float *dots, *left; Layout layout; };
// x, y: states (K, G, N, H / G · P);  g, dg: (rows, H, C, C), C = count chunks of a row
struct Carry { Values x, y; const float* g; float* dg; i64 count, state; int back; Layout layout; };
// in place over the keys i − window < j ≤ i of row i mod keys; window 0: none;  back: y holds its gradient
struct Softmax { Values x, y; i64 rows, keys, window; };
// y = w x r, r (T) = 1 / √(mean x² + eps);  back: y is dy, dx like x
struct Normed { Values x, y, dx; const float* weight; float* r; i64 tokens, width; float eps; };

struct Kernels {
    const char* name;
    Kernel rms_norm, add, gate;
    Kernel linear, linear_f32, linear_bf16, round_inputs, round_bf16, rows, to_panels, from_panels, to_twelve;
    Kernel quantize;
    Kernel rotary, remember, attend, conv, ssd, select, scan, gated_norm;
    Kernel narrow, widen, correlate, silu_gate, silu_gate_back, packed_conv, packed_conv_back, decayed, decayed_back;
    Kernel spread, gather, gather_back, carry, carry_dots, softmax, softmax_back, normed, normed_back, added, cross_entropy;
};

const Kernels& kernels();  // those of the instruction set in use

}  // namespace tiercel
