// What chunked scans share: dot products, decays of differences, products of six rows by sixteen channels.
#pragma once

#include "batch.h"

#if !defined(TIERCEL_BINDINGS)

namespace ISA {

// C · B for J rows of B, each in sixteen lanes over n and then summed in the tree of sum()
template <int J, class V> INLINE void dots(const float* C, const V* B, i64 stride, i64 N, float* out) {
    F s[J];
    for (int j = 0; j < J; j++) s[j] = zero();
    i64 n = 0;
    for (; n + 16 <= N; n += 16) {
        const F c = load(C + n);
        for (int j = 0; j < J; j++) s[j] = fma(c, load(B + j * stride + n), s[j]);
    }
    if (n < N) {
        const F c = load_some(C + n, N - n);
        for (int j = 0; j < J; j++) s[j] = fma(c, load_some(B + j * stride + n, N - n), s[j]);
    }
    for (int j = 0; j < J; j++) out[j] = sum(s[j]);
}

template <class V> INLINE void all_dots(const float* C, const V* B, i64 stride, i64 N, i64 count, float* out) {
    i64 j = 0;
    for (; j + 4 <= count; j += 4) dots<4>(C, B + j * stride, stride, N, out + j);
    for (; j < count; j++) dots<1>(C, B + j * stride, stride, N, out + j);
}

// exp(now − a_j) for sixteen j; a in float64, as differences of long sums are taken
INLINE F exp_since(const double* a, double now) {
    float lag[16];
    for (int i = 0; i < 16; i++) lag[i] = (float)(now - a[i]);
    return exp(min(load(lag), zero()));
}

INLINE void exps_of(float* out, const double* a, i64 count) {  // exp(a_j)
    for (i64 j = 0; j < count; j += 16) {
        float x[16];
        for (int i = 0; i < 16; i++) x[i] = (float)a[j + i];
        store(out + j, exp(load(x)));
    }
}

// sums (R rows of 16) += Σ_k rows[r][k] panel[k], k in order
template <int R> INLINE void panel_product(F (&sum)[R], const float* rows, i64 stride, i64 step, const float* panel, i64 count) {
    for (i64 k = 0; k < count; k++) {
        const F v = load(panel + 16 * k);
        for (int r = 0; r < R; r++) sum[r] = fma(set(rows[r * stride + k * step]), v, sum[r]);
    }
}

template <class T> INLINE void load_panel(float* panel, const T* x, i64 stride, i64 count, int n) {
    for (i64 k = 0; k < count; k++) store(panel + 16 * k, load_n(x + k * stride, n));
}

}  // namespace ISA

#endif
