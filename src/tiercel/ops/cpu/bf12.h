// bfloat16 in bf12 bits, the same numbers.
//
// Sign and mantissa (8 of 16 bits) of a weight are close to random; its exponent is one of a few neighbours.  A panel
// stores its highest exponent once, and every value has a code of four bits:
//
//     0 … 14   the exponent that much lower          15   exponent 0: zeros, subnormals
//
// Eight inputs of sixteen rows are a block.  One that holds an exponent beyond these is kept as it is, and its bit set.
//
//     matrix   int64 where each panel begins, filled up to 64 bytes · panels
//     panel    the exponents of the codes in place, twice sixteen shorts · a bit for each block, filled up · blocks
//     block    64 bytes of codes, word i: value i of four vectors · for each vector 32 bytes of sign and mantissa
//              or four vectors of 64 bytes
//
// A vector is what lies in a bf16 panel: sixteen rows' values for two inputs, 32 of them.  Compressing exponents without
// loss: DFloat11 (Zhang et al. 2025, arXiv 2504.11651), which has Huffman codes; a fixed width needs no decoding tables.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace ISA {
using namespace tiercel;

constexpr int RAW_BYTES = 256, CODED_BYTES = 192;  // bytes of a block

INLINE i64 bf12_head_bytes(i64 vectors) { return 64 + (vectors + 2047) / 2048 * 64; }  // vectors: of sixteen bits, in a panel

typedef int16_t shorts __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t ushorts __attribute__((vector_size(WIDTH * 4)));
typedef int8_t bytes_half __attribute__((vector_size(WIDTH * 2)));
typedef int8_t bytes_half_u __attribute__((vector_size(WIDTH * 2), aligned(1), may_alias));

struct BF12Reader {  // reads a panel block by block
    const uint8_t *flags, *at;
    I exponents;
    i64 b = 0;

    INLINE BF12Reader begin(const uint8_t* panel, i64 vectors) {
        BF12Reader r;
        r.flags = panel + 64;
        r.at = panel + bf12_head_bytes(vectors);
#if defined(TIERCEL_AVX512)
        r.exponents = loadi(panel);
#else
        uint16_t highest;
        memcpy(&highest, panel, 2);
        r.exponents = seti(highest << 16 | highest);
#endif
        return r;
    }

    INLINE I vector(const uint8_t* rest, I codes, int j, I exponents) {
        I r;
#if defined(TIERCEL_AVX512)  // the fifth bit that the permutation takes chooses between two equal bytes_half
        const __m512i e = _mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)codes.p[0], 4 * j), (__m512i)exponents.p[0]);
        const __m512i s = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)rest));
        r.p[0] = (vi)_mm512_ternarylogic_epi32(s, _mm512_set1_epi16((short)0x807f), e, 0xea);  // (s & mask) | e
#else
        EACH {
            const ushorts code = ((ushorts)codes.p[i] >> (4 * j)) & 15;
            const shorts e = ((shorts)exponents.p[i] - (shorts)(code << 7)) & (shorts)(code != 15);
            const shorts s = __builtin_convertvector(*((const bytes_half_u*)rest + i), shorts);
            r.p[i] = (vi)((s & (int16_t)0x807f) | e);
        }
#endif
        return r;
    }

    bool is_raw() const { return flags[b / 8] >> (b % 8) & 1; }

    // body(j, vector) for the four vectors of the next block
    template <class Body> __attribute__((always_inline)) inline void next(Body body) {
        if (__builtin_expect(is_raw(), 0)) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) body(j, loadi(at + 64 * j));
            at += RAW_BYTES;
        } else {
            const I codes = loadi(at);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) body(j, vector(at + 64 + 32 * j, codes, j, exponents));
            at += CODED_BYTES;
        }
        b++;
    }

    void skip(i64 blocks) {
        for (; blocks > 0; blocks--, b++) at += is_raw() ? RAW_BYTES : CODED_BYTES;
    }
};

INLINE const uint8_t* bf12_panel(const uint8_t* matrix, i64 p) {
    i64 begin;
    memcpy(&begin, matrix + 8 * p, 8);
    return matrix + begin;
}

// a panel as it lies in a bf16 matrix
INLINE void expand_bf12_panel(const uint8_t* panel, i64 vectors, uint8_t* out) {
    BF12Reader t = BF12Reader::begin(panel, vectors);
    for (i64 v = 0; v < vectors; v += 4)
        t.next([&](int j, I pair) {
            if (v + j < vectors) storei(out + 64 * (v + j), pair);
        });
}

}  // namespace ISA
