// What all products with a matrix in panels share: the sizes of tiles, loops over panels, the end of a sum.
#pragma once

#include "tiles.h"

namespace tiercel {

// y (tokens, outputs) = scale · x (tokens, inputs) Wᵀ + bias.  `quantized`: what quantize_inputs or inputs_to_bf16 made of x,
// for more than one token
struct Linear {
    const uint8_t* weight;
    const float* x;
    const uint8_t* quantized;
    const float* bias;
    float* y;
    i64 inputs, outputs, tokens;
    float scale;
    int format;
};
struct QuantizeInputs { const float* x; uint8_t* out; i64 tokens, inputs; int sub, zero; };

}  // namespace tiercel

#if !defined(TIERCEL_BINDINGS)

namespace ISA {
using namespace tiercel;

#if defined(TIERCEL_AVX512)
constexpr int TILE = 12;
#else
constexpr int TILE = 4;
#endif

// tokens t … go through a tile of this many: the largest that fit
INLINE int tile_at(i64 left) {
    return left >= TILE ? TILE : left >= 8 && TILE > 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// the code with M = m, one of these sizes
#define WITH_TILE(m, ...)                                        \
    do {                                                         \
        if (TILE > 8 && (m) == TILE) { constexpr int M = TILE; __VA_ARGS__; } \
        else if (TILE > 8 && (m) == 8) { constexpr int M = TILE > 8 ? 8 : 1; __VA_ARGS__; } \
        else if ((m) == 4) { constexpr int M = 4; __VA_ARGS__; }  \
        else if ((m) == 2) { constexpr int M = 2; __VA_ARGS__; }  \
        else { constexpr int M = 1; __VA_ARGS__; }                \
    } while (0)

constexpr i64 PANELS = 16;       // of one work tile at most: at its start nothing has been prefetched yet
constexpr i64 DISTANCE = 1024;   // bytes of prefetch distance: the hardware prefetcher stops at every page
constexpr i64 FEW = TILE;        // from this many rows a panel is unpacked into the cache first
constexpr i64 TOKENS = 16 * 12;  // tokens that share an unpacked panel: whole tiles
constexpr i64 K_BLOCK = 1024;    // inputs unpacked at a time, 24 KB: a multiple of every block, fits L1

INLINE i64 panels_per_tile(const Linear& a, const Worker& worker) {
    const i64 each = (a.outputs + 15) / 16 / (2 * worker.size);
    return each < 1 ? 1 : each > PANELS ? PANELS : each;
}

// work(begin, end, first, last) for tokens in parts of TOKENS and panels `each` in a row
template <class Work> INLINE void for_each_part(const Linear& a, Worker& worker, i64 each, Work work) {
    const i64 panels = ceil_div(a.outputs, 16), groups = ceil_div(panels, each), parts = ceil_div(a.tokens, TOKENS);
    for (i64 tile; (tile = worker.next_tile(groups * parts)) >= 0;) {
        const i64 begin = tile % parts * TOKENS, end = begin + TOKENS < a.tokens ? begin + TOKENS : a.tokens;
        const i64 first = tile / parts * each, last = first + each < panels ? first + each : panels;
        work(begin, end, first, last);
    }
}

// ── one way to multiply: linear.cpp, linear_float.cpp ──

struct Method {
    i64 (*row_bytes)(const Linear& a);  // of one token's inputs as `product` reads them
    void (*prepare)(const Linear& a, const float* const* rows, i64 tokens, void* out);  // makes `a.quantized` of rows
    i64 (*room)(const Linear& a);       // bytes of its own that `product` needs
    void (*product)(const Linear& a, i64 begin, i64 end, i64 first, i64 last, void* room);  // y of tokens and panels
};
extern const Method packed_method, bf16_method, f32_method;

INLINE const Method& method_of(int format, bool exact) {
    if (exact || format == FORMAT_F32) return f32_method;
    return format == FORMAT_BF16 || format == FORMAT_BF16_12 ? bf16_method : packed_method;
}

INLINE i64 lines(i64 bytes) { return ceil_div(bytes, 64) * 64; }

// The product on all threads.  One row's inputs every thread prepares for itself, which is faster than waiting.
INLINE void multiply(Linear a, Worker& worker, const Method& method, i64 each) {
    char* room = nullptr;
    for_each_part(a, worker, each, [&](i64 begin, i64 end, i64 first, i64 last) {
        if (room == nullptr) {
            const i64 inputs = a.quantized ? 0 : lines(method.row_bytes(a));
            room = (char*)worker.scratch(inputs + method.room(a) + 64);
            if (inputs) {
                method.prepare(a, &a.x, 1, room);
                a.quantized = (const uint8_t*)room;
                room += inputs;
            }
        }
        method.product(a, begin, end, first, last, room);
    });
}

INLINE void finish(const Linear& a, i64 token, i64 panel, F y) {
    const i64 n = panel * 16, rest = a.outputs - n;
    if (a.scale != 1.0f) y = y * set(a.scale);
    if (a.bias) y = y + (rest >= 16 ? load(a.bias + n) : load_some(a.bias + n, rest));
    float* to = a.y + token * a.outputs + n;
    if (rest >= 16) store(to, y);
    else store_some(to, y, rest);
}

INLINE F partial(const Linear& a, i64 token, i64 panel) {
    const float* at = a.y + token * a.outputs + panel * 16;
    const i64 rest = a.outputs - panel * 16;
    return rest >= 16 ? load(at) : load_some(at, rest);
}

INLINE void keep(const Linear& a, i64 token, i64 panel, F y) {
    float* at = a.y + token * a.outputs + panel * 16;
    const i64 rest = a.outputs - panel * 16;
    if (rest >= 16) store(at, y);
    else store_some(at, y, rest);
}

}  // namespace ISA

#endif
