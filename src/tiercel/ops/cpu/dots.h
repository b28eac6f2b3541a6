// Sums of products of bytes: sixteen rows' quants (unsigned, at most MOST) with M tokens' activations (signed).
//
//     acc[m] += Σ_{FIRST ≤ g < LAST} Σ_{j<4} q[g][lane, j] · a[m][4g + j]
//
// Integers, so exact in any order; every machine gets there in its own way.
#pragma once

#include "vec.h"

namespace ISA {

INLINE I four_bytes(const int8_t* a) {  // the same four in every lane
    int32_t x;
    memcpy(&x, a, 4);
    return seti(x);
}

#if defined(TIERCEL_AVX2)

struct Sums { __m256i p[2]; };  // sixteen-bit partial sums, two for every lane

INLINE Sums products(I q, I a) {
    return {_mm256_maddubs_epi16((__m256i)q.p[0], (__m256i)a.p[0]), _mm256_maddubs_epi16((__m256i)q.p[1], (__m256i)a.p[1])};
}
INLINE Sums operator+(Sums a, Sums b) {
    return {_mm256_add_epi16(a.p[0], b.p[0]), _mm256_add_epi16(a.p[1], b.p[1])};
}
INLINE I widen(Sums s) {
    const __m256i one = _mm256_set1_epi16(1);
    I r;
    r.p[0] = (vi)_mm256_madd_epi16(s.p[0], one);
    r.p[1] = (vi)_mm256_madd_epi16(s.p[1], one);
    return r;
}

// How many pairs of products sixteen bits hold: 8 · 2 · 15 · 127 = 30480, 4 · 2 · 31 · 127, 2 · 2 · 63 · 127.
// Bytes are taken as two nibbles.
template <int MOST, int FIRST, int LAST, int M> INLINE void dots(const I* q, const int8_t* a, I* acc) {
    if constexpr (MOST > 63) {
        const I four = seti(0x0f0f0f0f);
        Sums low[M], high[M];
#pragma GCC unroll 8
        for (int g = FIRST; g < LAST; g++) {
            const I w = q[g], w0 = w & four, w1 = shr(w, 4) & four;
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                const I x = four_bytes(a + 32 * m + 4 * g);
                low[m] = g == FIRST ? products(w0, x) : low[m] + products(w0, x);
                high[m] = g == FIRST ? products(w1, x) : high[m] + products(w1, x);
            }
        }
        for (int m = 0; m < M; m++) acc[m] = acc[m] + widen(low[m]) + shl(widen(high[m]), 4);
    } else {
        constexpr int RUN = MOST <= 15 ? 8 : MOST <= 31 ? 4 : 2;
        Sums part[M];
#pragma GCC unroll 8
        for (int g = FIRST; g < LAST; g++) {
            const I w = q[g];
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                const Sums x = products(w, four_bytes(a + 32 * m + 4 * g));
                part[m] = (g - FIRST) % RUN == 0 ? x : part[m] + x;
                if ((g - FIRST) % RUN == RUN - 1 || g == LAST - 1) acc[m] = acc[m] + widen(part[m]);
            }
        }
    }
}

#else

template <int MOST, int FIRST, int LAST, int M> INLINE void dots(const I* q, const int8_t* a, I* acc) {
#pragma GCC unroll 8
    for (int g = FIRST; g < LAST; g++) {
        const I w = q[g];
#pragma GCC unroll 12
        for (int m = 0; m < M; m++) acc[m] = dot4(acc[m], w, four_bytes(a + 32 * m + 4 * g));
    }
}

#endif

}  // namespace ISA
