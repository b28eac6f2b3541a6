// Sums of products of bytes: sixteen rows' quants (unsigned, at most MAX_QUANT) with M tokens' activations (signed).
//
//     acc[m] = Σ_{FIRST ≤ g < LAST} Σ_{j<4} q[g][lane, j] · a[m][4g + j]
//
// Integer sums are exact in any order; each instruction set has its own way.
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

// s += q · a in place.  Written out, because compilers keep all products of a block alive before they add them, and
// then move registers about for a third of the time.
INLINE void accumulate(Sums& s, I q, I a) {
    __m256i t;
    asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(s.p[0]), "=&x"(t) : "x"(q.p[0]), "x"(a.p[0]));
    asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(s.p[1]), "=&x"(t) : "x"(q.p[1]), "x"(a.p[0]));
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
template <int MAX_QUANT, int FIRST, int LAST, int M> INLINE void dots(const I* q, const int8_t* a, I* acc) {
    constexpr int RUN = MAX_QUANT <= 15 || MAX_QUANT > 63 ? 8 : MAX_QUANT <= 31 ? 4 : 2;
#pragma GCC unroll 4
    for (int start = FIRST; start < LAST; start += RUN) {
        Sums low[M] = {}, high[M] = {};
#pragma GCC unroll 8
        for (int g = start; g < (start + RUN < LAST ? start + RUN : LAST); g++) {
            const I w = MAX_QUANT > 63 ? q[g] & seti(0x0f0f0f0f) : q[g], w1 = MAX_QUANT > 63 ? shr(q[g], 4) & seti(0x0f0f0f0f) : w;
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                const I x = four_bytes(a + 32 * m + 4 * g);
                accumulate(low[m], w, x);
                if constexpr (MAX_QUANT > 63) accumulate(high[m], w1, x);
            }
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            I sum = widen(low[m]);
            if constexpr (MAX_QUANT > 63) sum = sum + shl(widen(high[m]), 4);
            acc[m] = start == FIRST ? sum : acc[m] + sum;
        }
    }
}

#else

template <int MAX_QUANT, int FIRST, int LAST, int M> INLINE void dots(const I* q, const int8_t* a, I* acc) {
    for (int m = 0; m < M; m++) acc[m] = seti(0);
#pragma GCC unroll 8
    for (int g = FIRST; g < LAST; g++) {
        const I w = q[g];
#pragma GCC unroll 12
        for (int m = 0; m < M; m++) acc[m] = dot4(acc[m], w, four_bytes(a + 32 * m + 4 * g));
    }
}

#endif

}  // namespace ISA
