// Packed matrices as the kernels read them: panels of sixteen output rows.
//
// A panel is the blocks of sixteen rows side by side, so that a lane is a row: for every block first the scales of the
// sixteen rows, field by field, then the quants.  Nothing is added to or lost from the file's blocks, a matrix takes
// the same bytes (rows are filled up to sixteen).  Quants lie in planes, for every 32 inputs:
//
//     nibbles  4 × 64 bytes   vector i: inputs 4i … 4i+3 in the low four bits, 16+4i … in the high ones
//     bits2   2 × 64 bytes   vector h: two bits for inputs 16h+4f … 16h+4f+3, field f = 0 … 3 from below
//     bits     1 × 64 bytes   bit g of a byte: inputs 4g … 4g+3
//     bytes    8 × 64 bytes
//
// Within 64 bytes lane r has four bytes: the four inputs of its row.
//
// Every format says:  value = s · q + o,  q unsigned, one s (and one o where AFFINE, else o = −ZERO · s) for SUB
// inputs and a row.  The formulas and the files' layouts stand in quant/legacy.py and quant/kquants.py.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace ISA {
using namespace tiercel;

enum Planes { NIBBLES = 1, BITS2 = 2, BITS1 = 4, BYTES = 8 };

constexpr int plane_bytes(int planes) {
    return (planes & NIBBLES ? 256 : 0) + (planes & BITS2 ? 128 : 0) + (planes & BITS1 ? 64 : 0) + (planes & BYTES ? 512 : 0);
}

// eight vectors of quants for 32 inputs; bits2 and bits lie above what is below them
template <int PLANES> INLINE void quants(const uint8_t* p, I q[8]) {
    constexpr int low = PLANES & NIBBLES ? 4 : PLANES & BITS2 ? 2 : 0;
    const I four = seti(0x0f0f0f0f), two = seti(0x03030303), one = seti(0x01010101);
    if constexpr (PLANES & BYTES) {
        for (int g = 0; g < 8; g++) q[g] = loadi(p + 64 * g);
    } else if constexpr (PLANES & NIBBLES) {
        for (int i = 0; i < 4; i++) {
            const I v = loadi(p + 64 * i);
            q[i] = v & four;
            q[i + 4] = shr(v, 4) & four;
        }
        p += 256;
    }
    if constexpr (PLANES & BITS2) {
        for (int h = 0; h < 2; h++) {
            const I v = loadi(p + 64 * h);
            for (int f = 0; f < 4; f++) {
                const I c = shr(v, 2 * f) & two;
                q[4 * h + f] = PLANES & NIBBLES ? q[4 * h + f] | shl(c, 4) : c;
            }
        }
        p += 128;
    }
    if constexpr (PLANES & BITS1) {
        const I v = loadi(p);
        for (int g = 0; g < 8; g++) q[g] = q[g] | shl(shr(v, g) & one, low);
    }
}

INLINE F scale_of(I packed, int k) { return to_float(byte(packed, k)); }
INLINE F signed_scale_of(I packed, int k) { return to_float(sar(shl(packed, 24 - 8 * k), 24)); }

// ── blocks of 32: float16 d (and m) ──

template <int PLANES, int Z> struct Plain {
    static constexpr int BLOCK = 32, SUB = 32, ZERO = Z, HEAD = 32, PLANES_ = PLANES;
    static constexpr int MAX_QUANT = PLANES & BYTES ? 255 : PLANES & BITS1 ? 31 : 15;
    static constexpr bool AFFINE = false;
    INLINE void scales(const uint8_t* p, F* s, F*) { s[0] = load_half(p); }
};

template <int PLANES> struct PlainMin {
    static constexpr int BLOCK = 32, SUB = 32, ZERO = 0, HEAD = 64, PLANES_ = PLANES;
    static constexpr int MAX_QUANT = PLANES & BITS1 ? 31 : 15;
    static constexpr bool AFFINE = true;
    INLINE void scales(const uint8_t* p, F* s, F* o) {
        s[0] = load_half(p);
        o[0] = load_half(p + 32);
    }
};

using Q4_0 = Plain<NIBBLES, 8>;
using Q5_0 = Plain<NIBBLES | BITS1, 16>;
using Q8_0 = Plain<BYTES, 128>;  // signed in the file; a panel holds q + 128
using Q4_1 = PlainMin<NIBBLES>;
using Q5_1 = PlainMin<NIBBLES | BITS1>;

// ── super-blocks of 256 ──

// Q4_K, Q5_K   | d | dmin | three words of six-bit scales and mins |
template <int PLANES> struct SixBit {
    static constexpr int BLOCK = 256, SUB = 32, ZERO = 0, HEAD = 256, PLANES_ = PLANES;
    static constexpr int MAX_QUANT = PLANES & BITS1 ? 31 : 15;
    static constexpr bool AFFINE = true;
    INLINE void scales(const uint8_t* p, F* s, F* o) {
        const F d = load_half(p), dmin = zero() - load_half(p + 32);
        const I low = loadi(p + 64), high = loadi(p + 128), rest = loadi(p + 192);
        const I six = seti(0x3f3f3f3f), four = seti(0x0f0f0f0f), two = seti(0x03030303);
        const I s0 = low & six, m0 = high & six;
        const I s1 = (rest & four) | shl(shr(low, 6) & two, 4), m1 = (shr(rest, 4) & four) | shl(shr(high, 6) & two, 4);
        for (int j = 0; j < 4; j++) {
            s[j] = d * scale_of(s0, j);
            s[j + 4] = d * scale_of(s1, j);
            o[j] = dmin * scale_of(m0, j);
            o[j + 4] = dmin * scale_of(m1, j);
        }
    }
};
using Q4_K = SixBit<NIBBLES>;
using Q5_K = SixBit<NIBBLES | BITS1>;

// | d | four words of signed scales |
struct Q6_K {
    static constexpr int BLOCK = 256, SUB = 16, ZERO = 32, HEAD = 288, PLANES_ = NIBBLES | BITS2, MAX_QUANT = 63;
    static constexpr bool AFFINE = false;
    INLINE void scales(const uint8_t* p, F* s, F*) {
        const F d = load_half(p);
        for (int w = 0; w < 4; w++) {
            const I v = loadi(p + 32 + 64 * w);
            for (int j = 0; j < 4; j++) s[4 * w + j] = d * signed_scale_of(v, j);
        }
    }
};

// | d | three words of six-bit scales − 32 |
struct Q3_K {
    static constexpr int BLOCK = 256, SUB = 16, ZERO = 4, HEAD = 224, PLANES_ = BITS2 | BITS1, MAX_QUANT = 7;
    static constexpr bool AFFINE = false;
    INLINE void scales(const uint8_t* p, F* s, F*) {
        const F d = load_half(p);
        const I a = loadi(p + 32), b = loadi(p + 96), top = loadi(p + 160);
        const I four = seti(0x0f0f0f0f), two = seti(0x03030303);
        const I words[4] = {(a & four) | shl(top & two, 4), (b & four) | shl(shr(top, 2) & two, 4),
                            (shr(a, 4) & four) | shl(shr(top, 4) & two, 4), (shr(b, 4) & four) | shl(shr(top, 6) & two, 4)};
        for (int w = 0; w < 4; w++)
            for (int j = 0; j < 4; j++) s[4 * w + j] = d * to_float(byte(words[w], j) - seti(32));
    }
};

// | d | dmin | four words, scale in the low nibble and min in the high one |
struct Q2_K {
    static constexpr int BLOCK = 256, SUB = 16, ZERO = 0, HEAD = 320, PLANES_ = BITS2, MAX_QUANT = 3;
    static constexpr bool AFFINE = true;
    INLINE void scales(const uint8_t* p, F* s, F* o) {
        const F d = load_half(p), dmin = zero() - load_half(p + 32);
        for (int w = 0; w < 4; w++) {
            const I v = loadi(p + 64 + 64 * w);
            for (int j = 0; j < 4; j++) {
                s[4 * w + j] = d * to_float(byte(v, j) & seti(15));
                o[4 * w + j] = dmin * to_float(shr(byte(v, j), 4));
            }
        }
    }
};

// ── INT8 and NF4 ──

// one float32 scale for a row, before its first block: `scales` gets the panel's beginning (see ROW_SCALE)
struct Int8 {
    static constexpr int BLOCK = 32, SUB = 32, ZERO = 128, HEAD = 0, PLANES_ = BYTES, MAX_QUANT = 255;
    static constexpr bool AFFINE = false;
    INLINE void scales(const uint8_t* panel, F* s, F*) { s[0] = load((const float*)panel); }
};

// sixteen levels, not evenly spaced (QLoRA, Dettmers et al. 2023, appendix E); products use them rounded to 1/112.03, the
// multiple of all up to 127 that rounds the sixteen with the least squared error
constexpr float NF4_LEVELS[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
    -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
struct NF4 {
    static constexpr int BLOCK = 64, SUB = 32, ZERO = 128, HEAD = 64, PLANES_ = NIBBLES, MAX_QUANT = 255;
    static constexpr bool AFFINE = false;
    INLINE void scales(const uint8_t* p, F* s, F*) {
        s[0] = s[1] = load((const float*)p) * set(1.0f / 112.03f);
    }
};

template <class Q> constexpr bool LEVELS = false;
template <> constexpr bool LEVELS<NF4> = true;
template <class Q> constexpr bool ROW_SCALE = false;
template <> constexpr bool ROW_SCALE<Int8> = true;

template <class Q> constexpr int SCALES = Q::BLOCK / Q::SUB;
template <class Q> constexpr int BLOCK_BYTES = Q::HEAD + Q::BLOCK / 32 * plane_bytes(Q::PLANES_);
template <class Q> constexpr int PANEL_HEAD = ROW_SCALE<Q> ? 64 : 0;

template <class Q> INLINE i64 panel_bytes(i64 K) { return PANEL_HEAD<Q> + (K + Q::BLOCK - 1) / Q::BLOCK * BLOCK_BYTES<Q>; }

INLINE I look_up(I nibbles) {  // round(112.03 · level) + 128
    alignas(16) static const uint8_t codes[16] = {16, 50, 69, 84, 96, 107, 118, 128, 137, 146, 156, 166, 177, 191, 209, 240};
#if defined(TIERCEL_AVX512)
    nibbles.p[0] = (vi)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)codes)), (__m512i)nibbles.p[0]);
    return nibbles;
#elif defined(TIERCEL_AVX2)
    const __m256i t = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)codes));
    EACH nibbles.p[i] = (vi)_mm256_shuffle_epi8(t, (__m256i)nibbles.p[i]);
    return nibbles;
#else
    uint8_t b[64];
    storei(b, nibbles);
    for (int i = 0; i < 64; i++) b[i] = codes[b[i]];
    return loadi(b);
#endif
}

// block number `b` of a panel: its scales, and the quants of its 32-input part `part`
template <class Q> INLINE void block_scales(const uint8_t* panel, i64 b, F* s, F* o) {
    Q::scales(ROW_SCALE<Q> ? panel : panel + b * BLOCK_BYTES<Q>, s, o);
}
template <class Q> INLINE void block_quants(const uint8_t* panel, i64 b, int part, I q[8]) {
    quants<Q::PLANES_>(panel + PANEL_HEAD<Q> + b * BLOCK_BYTES<Q> + Q::HEAD + part * plane_bytes(Q::PLANES_), q);
    if constexpr (LEVELS<Q>)
        for (int g = 0; g < 8; g++) q[g] = look_up(q[g]);
}

// body(Q) with the format's struct
#define WITH_FORMAT(format, ...)                                              \
    switch (format) {                                                         \
        case FORMAT_Q4_0: { using Q = Q4_0; __VA_ARGS__; break; }             \
        case FORMAT_Q4_1: { using Q = Q4_1; __VA_ARGS__; break; }             \
        case FORMAT_Q5_0: { using Q = Q5_0; __VA_ARGS__; break; }             \
        case FORMAT_Q5_1: { using Q = Q5_1; __VA_ARGS__; break; }             \
        case FORMAT_Q8_0: { using Q = Q8_0; __VA_ARGS__; break; }             \
        case FORMAT_Q2_K: { using Q = Q2_K; __VA_ARGS__; break; }             \
        case FORMAT_Q3_K: { using Q = Q3_K; __VA_ARGS__; break; }             \
        case FORMAT_Q4_K: { using Q = Q4_K; __VA_ARGS__; break; }             \
        case FORMAT_Q5_K: { using Q = Q5_K; __VA_ARGS__; break; }             \
        case FORMAT_Q6_K: { using Q = Q6_K; __VA_ARGS__; break; }             \
        case FORMAT_INT8: { using Q = Int8; __VA_ARGS__; break; }             \
        default: { using Q = NF4; __VA_ARGS__; break; }                       \
    }

}  // namespace ISA
