// Integer arithmetic, and loops over tiles of tokens.
#pragma once

#include <math.h>

#include "kernels.h"

#if !defined(TIERCEL_BINDINGS)

#include "vec.h"

namespace ISA {
using namespace tiercel;

INLINE i64 min(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 max(i64 a, i64 b) { return a > b ? a : b; }
INLINE i64 ceil_div(i64 count, i64 each) { return (count + each - 1) / each; }
INLINE i64 padded(i64 count) { return ceil_div(count, 16) * 16; }

template <int N> struct Constant {
    constexpr operator int() const { return N; }
};

// body(token) for all tokens, a few at a time
template <class Body> INLINE void for_each_token(i64 tokens, Worker& worker, Body body) {
    constexpr i64 TOKENS = 4;
    for (i64 tile; (tile = worker.next_tile(ceil_div(tokens, TOKENS))) >= 0;)
        for (i64 t = tile * TOKENS; t < min(tokens, (tile + 1) * TOKENS); t++) body(t);
}

// Σ x² in sixteen lanes → 1 / √(mean + eps)
INLINE float rms_scale(const float* x, i64 width, float eps) {
    F squares = zero();
    for (i64 i = 0; i < width; i += 16) {
        const F v = load_n(x + i, width - i);
        squares = fma(v, v, squares);
    }
    return 1.0f / sqrtf(sum(squares) / (float)width + eps);
}

}  // namespace ISA

#endif
