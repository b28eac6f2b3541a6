// Sixteen lanes, whatever the machine: F (float), I (int32).  One AVX-512 register, two of AVX2, or four of
// sixteen bytes that any compiler maps onto what its target has (SSE2, NEON).
//
// This file is compiled once per instruction set; everything in it lives in the namespace ISA, so that no inline
// function of one build can stand in for another's.  No standard library template is used here for the same reason.
// Sums are written in one order and nothing is contracted (-ffp-contract=off): a lane's result does
// not depend on which tile or thread computed it.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(TIERCEL_AVX512)
#define ISA avx512
#include <immintrin.h>
#elif defined(TIERCEL_AVX2)
#define ISA avx2
#include <immintrin.h>
#else
#define ISA portable
#endif

#define INLINE static inline __attribute__((always_inline))

namespace ISA {

using bf16 = uint16_t;

#if defined(TIERCEL_AVX512)
constexpr int PARTS = 1, WIDTH = 16;
#elif defined(TIERCEL_AVX2)
constexpr int PARTS = 2, WIDTH = 8;
#else
constexpr int PARTS = 4, WIDTH = 4;
#endif

typedef float vf __attribute__((vector_size(WIDTH * 4)));
typedef int32_t vi __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t vu __attribute__((vector_size(WIDTH * 4)));
typedef float vf_u __attribute__((vector_size(WIDTH * 4), aligned(1), may_alias));
typedef int32_t vi_u __attribute__((vector_size(WIDTH * 4), aligned(1), may_alias));

struct F { vf p[PARTS]; };
struct I { vi p[PARTS]; };

#define EACH _Pragma("GCC unroll 4") for (int i = 0; i < PARTS; i++)

// ── memory ──

INLINE F load(const float* a) { F r; EACH r.p[i] = *(const vf_u*)(a + i * WIDTH); return r; }
INLINE void store(float* a, F x) { EACH *(vf_u*)(a + i * WIDTH) = x.p[i]; }
INLINE I loadi(const void* a) { I r; EACH r.p[i] = *((const vi_u*)a + i); return r; }
INLINE void storei(void* a, I x) { EACH *((vi_u*)a + i) = x.p[i]; }
INLINE F set(float x) { F r; EACH r.p[i] = x - vf{}; return r; }
INLINE I seti(int32_t x) { I r; EACH r.p[i] = x - vi{}; return r; }
INLINE F zero() { return set(0.0f); }

// ── arithmetic ──

INLINE F operator+(F a, F b) { EACH a.p[i] += b.p[i]; return a; }
INLINE F operator-(F a, F b) { EACH a.p[i] -= b.p[i]; return a; }
INLINE F operator*(F a, F b) { EACH a.p[i] *= b.p[i]; return a; }
INLINE F operator/(F a, F b) { EACH a.p[i] /= b.p[i]; return a; }
INLINE I operator+(I a, I b) { EACH a.p[i] += b.p[i]; return a; }
INLINE I operator-(I a, I b) { EACH a.p[i] -= b.p[i]; return a; }
INLINE I operator*(I a, I b) { EACH a.p[i] *= b.p[i]; return a; }
INLINE I operator&(I a, I b) { EACH a.p[i] &= b.p[i]; return a; }
INLINE I operator|(I a, I b) { EACH a.p[i] |= b.p[i]; return a; }
INLINE I operator^(I a, I b) { EACH a.p[i] ^= b.p[i]; return a; }
INLINE I shl(I a, int n) { EACH a.p[i] = (vi)((vu)a.p[i] << n); return a; }
INLINE I shr(I a, int n) { EACH a.p[i] = (vi)((vu)a.p[i] >> n); return a; }   // zeros come in
INLINE I sar(I a, int n) { EACH a.p[i] = a.p[i] >> n; return a; }             // the sign comes in
INLINE F as_float(I a) { F r; EACH r.p[i] = (vf)a.p[i]; return r; }
INLINE I as_int(F a) { I r; EACH r.p[i] = (vi)a.p[i]; return r; }
INLINE F to_float(I a) { F r; EACH r.p[i] = __builtin_convertvector(a.p[i], vf); return r; }

// a · b + c, one rounding where the machine has it
INLINE F fma(F a, F b, F c) {
#if defined(TIERCEL_AVX512)
    c.p[0] = (vf)_mm512_fmadd_ps((__m512)a.p[0], (__m512)b.p[0], (__m512)c.p[0]);
#elif defined(TIERCEL_AVX2)
    EACH c.p[i] = (vf)_mm256_fmadd_ps((__m256)a.p[i], (__m256)b.p[i], (__m256)c.p[i]);
#else
    EACH c.p[i] += a.p[i] * b.p[i];
#endif
    return c;
}

INLINE F max(F a, F b) {
#if defined(TIERCEL_AVX512)
    a.p[0] = (vf)_mm512_max_ps((__m512)a.p[0], (__m512)b.p[0]);
#else
    EACH a.p[i] = a.p[i] > b.p[i] ? a.p[i] : b.p[i];
#endif
    return a;
}

INLINE F min(F a, F b) {
#if defined(TIERCEL_AVX512)
    a.p[0] = (vf)_mm512_min_ps((__m512)a.p[0], (__m512)b.p[0]);
#else
    EACH a.p[i] = a.p[i] < b.p[i] ? a.p[i] : b.p[i];
#endif
    return a;
}

INLINE F abs(F a) { return as_float(as_int(a) & seti(0x7fffffff)); }

// nearest integer, ties to even; |a| < 2²²
INLINE I round(F a) {
#if defined(TIERCEL_AVX512)
    I r; r.p[0] = (vi)_mm512_cvtps_epi32((__m512)a.p[0]); return r;
#elif defined(TIERCEL_AVX2)
    I r; EACH r.p[i] = (vi)_mm256_cvtps_epi32((__m256)a.p[i]); return r;
#else
    const F magic = set(12582912.0f);  // 1.5 · 2²³: the sum keeps the integer in its low bits
    return as_int(a + magic) - as_int(magic);
#endif
}

// four products of bytes a lane: acc + Σ w_k a_k, w unsigned, a signed; exact
INLINE I dot4(I acc, I w, I a) {
#if defined(TIERCEL_AVX512)
    acc.p[0] = (vi)_mm512_dpbusd_epi32((__m512i)acc.p[0], (__m512i)w.p[0], (__m512i)a.p[0]);
#elif defined(TIERCEL_AVX2)
    EACH {
        const __m256i wi = (__m256i)w.p[i], ai = (__m256i)a.p[i];
        const __m256i even = _mm256_madd_epi16(_mm256_and_si256(wi, _mm256_set1_epi16(255)),
                                               _mm256_srai_epi16(_mm256_slli_epi16(ai, 8), 8));
        const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(wi, 8), _mm256_srai_epi16(ai, 8));
        acc.p[i] += (vi)_mm256_add_epi32(even, odd);
    }
#else
    typedef int16_t vs __attribute__((vector_size(WIDTH * 4)));
    typedef uint16_t vus __attribute__((vector_size(WIDTH * 4)));
    EACH {
        const vs even = (vs)((vus)w.p[i] & 255) * ((vs)((vus)a.p[i] << 8) >> 8);  // at most 255 · 128: fits
        const vs odd = (vs)((vus)w.p[i] >> 8) * ((vs)a.p[i] >> 8);
        const vi e = (vi)even, o = (vi)odd;
        acc.p[i] += ((vi)((vu)e << 16) >> 16) + (e >> 16) + ((vi)((vu)o << 16) >> 16) + (o >> 16);
    }
#endif
    return acc;
}

// ── sums over lanes, always in the same tree ──

INLINE float sum(F a) {
#if defined(TIERCEL_AVX512)
    return _mm512_reduce_add_ps((__m512)a.p[0]);  // this very tree
#elif defined(TIERCEL_AVX2)
    const __m256 eight = (__m256)(a.p[0] + a.p[1]);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    float x[16];
    store(x, a);
    for (int n = 8; n > 0; n /= 2)
        for (int i = 0; i < n; i++) x[i] += x[i + n];
    return x[0];
#endif
}

INLINE float maximum(F a) {
#if defined(TIERCEL_AVX512)
    return _mm512_reduce_max_ps((__m512)a.p[0]);
#elif defined(TIERCEL_AVX2)
    const __m256 eight = _mm256_max_ps((__m256)a.p[0], (__m256)a.p[1]);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
    float x[16], m;
    store(x, a);
    m = x[0];
    for (int i = 1; i < 16; i++) m = x[i] > m ? x[i] : m;
    return m;
#endif
}

INLINE I max(I a, I b) {
#if defined(TIERCEL_AVX512)
    a.p[0] = (vi)_mm512_max_epi32((__m512i)a.p[0], (__m512i)b.p[0]);
#elif defined(TIERCEL_AVX2)
    EACH a.p[i] = (vi)_mm256_max_epi32((__m256i)a.p[i], (__m256i)b.p[i]);
#else
    EACH a.p[i] = a.p[i] > b.p[i] ? a.p[i] : b.p[i];
#endif
    return a;
}

INLINE int32_t sum(I a) {
#if defined(TIERCEL_AVX512)
    return _mm512_reduce_add_epi32((__m512i)a.p[0]);
#else
    vi s = a.p[0];
    for (int i = 1; i < PARTS; i++) s += a.p[i];
    int32_t r = 0;
    for (int i = 0; i < WIDTH; i++) r += s[i];
    return r;
#endif
}

INLINE int32_t maximum(I a) {
#if defined(TIERCEL_AVX512)
    return _mm512_reduce_max_epi32((__m512i)a.p[0]);
#elif defined(TIERCEL_AVX2)
    const __m256i m = _mm256_max_epi32((__m256i)a.p[0], (__m256i)a.p[1]);
    __m128i n = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    n = _mm_max_epi32(n, _mm_shuffle_epi32(n, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(n, _mm_shuffle_epi32(n, 0xb1)));
#else
    int32_t x[16], m;
    memcpy(x, &a, 64);
    m = x[0];
    for (int i = 1; i < 16; i++) m = x[i] > m ? x[i] : m;
    return m;
#endif
}

// ── narrow types ──

INLINE void store_bytes(int8_t* to, I a) {  // −128 … 127
#if defined(TIERCEL_AVX512)
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)a.p[0]));
#elif defined(TIERCEL_AVX2)
    const __m256i w = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)a.p[0], (__m256i)a.p[1]), 0xd8);
    _mm_storeu_si128((__m128i*)to, _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
#else
    for (int i = 0; i < 16; i++) to[i] = (int8_t)a.p[i / WIDTH][i % WIDTH];
#endif
}

INLINE float from_bf16(bf16 x) { uint32_t u = (uint32_t)x << 16; float f; memcpy(&f, &u, 4); return f; }

INLINE bf16 to_bf16(float f) {  // nearest, ties to even; NaN stays NaN
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (bf16)((u >> 16) | 64);
    return (bf16)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

INLINE I bf16_bits(F x) {  // the same for sixteen, in the low half of every lane
    const I u = as_int(x);
    I r = shr(u + seti(0x7fff) + (shr(u, 16) & seti(1)), 16);
    EACH r.p[i] = x.p[i] == x.p[i] ? r.p[i] : (vi)((vu)u.p[i] >> 16) | 64;
    return r;
}

INLINE F load(const bf16* a) {
#if defined(TIERCEL_AVX512)
    F r;
    r.p[0] = (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)a)), 16);
    return r;
#elif defined(TIERCEL_AVX2)
    F r;
    EACH r.p[i] = (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)a + i)), 16);
    return r;
#else
    float x[16];
    for (int i = 0; i < 16; i++) x[i] = from_bf16(a[i]);
    return load(x);
#endif
}

INLINE void store(bf16* a, F x) {
#if defined(TIERCEL_AVX512)
    _mm256_storeu_si256((__m256i*)a, (__m256i)_mm512_cvtneps_pbh((__m512)x.p[0]));
#elif defined(TIERCEL_AVX2)
    const I u = bf16_bits(x);
    const __m256i mixed = _mm256_packus_epi32((__m256i)u.p[0], (__m256i)u.p[1]);  // 0–3 8–11 4–7 12–15
    _mm256_storeu_si256((__m256i*)a, _mm256_permute4x64_epi64(mixed, 0xd8));
#else
    const I u = bf16_bits(x);
    uint32_t bits[16];
    storei(bits, u);
    for (int i = 0; i < 16; i++) a[i] = (bf16)bits[i];
#endif
}

// rounded to the type of memory, as float32
INLINE F rounded(F x, const float*) { return x; }
INLINE F rounded(F x, const bf16*) {
#if defined(TIERCEL_AVX512)
    const __m256i narrow = (__m256i)_mm512_cvtneps_pbh((__m512)x.p[0]);
    x.p[0] = (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
    return x;
#else
    return as_float(shl(bf16_bits(x), 16));
#endif
}

INLINE F load_half(const void* a) {  // 16 float16
#if defined(TIERCEL_AVX512)
    F r;
    r.p[0] = (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)a));
    return r;
#elif defined(TIERCEL_AVX2)
    F r;
    EACH r.p[i] = (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)a + i));
    return r;
#else
    float x[16];
    for (int i = 0; i < 16; i++) {  // scaling by 2¹¹² moves the exponent, denormals included
        uint16_t h;
        memcpy(&h, (const char*)a + 2 * i, 2);
        uint32_t u = (uint32_t)(h & 0x7fff) << 13, s = (uint32_t)(h & 0x8000) << 16;
        if (u >= 0x0f800000u) {  // infinity, NaN
            u |= 0x7f800000u;
            u |= s;
            memcpy(&x[i], &u, 4);
        } else {
            float f;
            memcpy(&f, &u, 4);
            f *= 5192296858534827628530496329220096.0f;
            memcpy(&u, &f, 4);
            u |= s;
            memcpy(&x[i], &u, 4);
        }
    }
    return load(x);
#endif
}

// ── tails: the first n (1 … 16) values of memory; the rest reads as zero and is not written ──

template <class T> INLINE F load_some(const T* a, int n) {
    T x[16] = {};
    memcpy(x, a, n * sizeof(T));
    return load((const T*)x);
}

template <class T> INLINE void store_some(T* a, F x, int n) {
    T y[16];
    store((T*)y, x);
    memcpy(a, y, n * sizeof(T));
}

INLINE F load_n(const float* a, int n) { return n >= 16 ? load(a) : load_some(a, n); }
INLINE F load_n(const bf16* a, int n) { return n >= 16 ? load(a) : load_some(a, n); }
template <class T> INLINE void store_n(T* a, F x, int n) { n >= 16 ? store(a, x) : store_some(a, x, n); }

// ── functions ──

// e^x, relative error about 2e-7; 0 below −87.3, where results would be denormal; x above 88.7 gives infinity-like max
INLINE F exp(F x) {
    const F lowest = set(-87.33654f);
    F y = min(max(x, lowest), set(88.72283f));
    const I k = round(y * set(1.44269504f));
    const F n = to_float(k);
    y = fma(n, set(-0.693145752f), y);
    y = fma(n, set(-1.42860677e-6f), y);
    F p = set(1.98756915e-4f);  // Cephes expf
    p = fma(p, y, set(1.39819995e-3f));
    p = fma(p, y, set(8.33345189e-3f));
    p = fma(p, y, set(4.16657959e-2f));
    p = fma(p, y, set(1.66666654e-1f));
    p = fma(p, y, set(0.5f));
    p = fma(p, y * y, y) + set(1.0f);
    const F r = as_float(as_int(p) + shl(k, 23));
    F out;
    EACH out.p[i] = x.p[i] < lowest.p[i] ? vf{} : r.p[i];
    return out;
}

// log(1 + x) for x in 0 … 1
INLINE F log1p(F x) {
    const F one = set(1.0f), w = x + one;
    F f, e, exact, y;
    EACH {
        const vi upper = w.p[i] > (1.41421356f - vf{});
        f.p[i] = upper ? w.p[i] * 0.5f - one.p[i] : w.p[i] - one.p[i];
        e.p[i] = upper ? (0.69314718f - vf{}) : vf{};
    }
    F p = set(7.0376836292e-2f);  // Cephes logf
    p = fma(p, f, set(-1.1514610310e-1f));
    p = fma(p, f, set(1.1676998740e-1f));
    p = fma(p, f, set(-1.2420140846e-1f));
    p = fma(p, f, set(1.4249322787e-1f));
    p = fma(p, f, set(-1.6668057665e-1f));
    p = fma(p, f, set(2.0000714765e-1f));
    p = fma(p, f, set(-2.4999993993e-1f));
    p = fma(p, f, set(3.3333331174e-1f));
    y = fma(p * f, f * f, fma(f * f, set(-0.5f), f)) + e;
    exact = y * (x / (w - one));  // what the sum 1 + x lost
    EACH y.p[i] = w.p[i] == one.p[i] ? x.p[i] : exact.p[i];
    return y;
}

INLINE F softplus(F x) { return max(x, zero()) + log1p(exp(zero() - abs(x))); }

INLINE F silu(F x) { return x / (set(1.0f) + exp(zero() - x)); }

// lanes k of four rows' worth of bytes, as int32: byte `k` of every lane
INLINE I byte(I a, int k) { return shr(a, 8 * k) & seti(255); }

}  // namespace ISA
