// What stands around the scans: causal depthwise convolution with silu, dt, the choice of Mamba-1, the gated norm.
#include "texts.h"

#include <math.h>

namespace ISA {

// Sixteen channels (or `some`) of a piece: the history's columns and the new ones side by side, as the state gives or
// will give them back, then the sums.
template <class T, class Lanes>
INLINE void conv_sixteen(const Conv& a, const T* kept, const float* x, float* y, i64 c, i64 before, i64 n, float* columns, Lanes some) {
    const i64 history = a.taps - 1;
    for (i64 i = 0; i < before; i++) store(columns + 16 * i, load_n(kept + i * a.channels, some));
    for (i64 i = before; i < n + history; i++)
        store(columns + 16 * i, rounded(load_n(x + (i - history) * a.stride, some), (const T*)0));
    const float* weight = a.weight + c;
    const F bias = a.bias ? load_n(a.bias + c, some) : zero();
    if (a.taps == 4) {
        const F w0 = load_n(weight, some), w1 = load_n(weight + a.channels, some);
        const F w2 = load_n(weight + 2 * a.channels, some), w3 = load_n(weight + 3 * a.channels, some);
        for (i64 i = 0; i < n; i++) {
            const float* column = columns + 16 * i;
            F sum = fma(load(column + 16), w1, load(column) * w0);
            sum = fma(load(column + 48), w3, fma(load(column + 32), w2, sum)) + bias;
            store_n(y + i * a.channels, rounded(silu(sum), (const T*)0), some);
        }
        return;
    }
    for (i64 i = 0; i < n; i++) {
        F sum = load(columns + 16 * i) * load_n(weight, some);
        for (i64 k = 1; k < a.taps; k++) sum = fma(load(columns + 16 * (i + k)), load_n(weight + k * a.channels, some), sum);
        store_n(y + i * a.channels, rounded(silu(sum + bias), (const T*)0), some);
    }
}

// The state itself takes the new columns when the scan is done (ssd, scan).
template <class T> INLINE void conv_as(const Conv& a, Team& team) {
    constexpr i64 TOKENS = 64, CHANNELS = 256;
    const i64 history = a.taps - 1, blocks = parts(a.channels, CHANNELS), pieces = blocks + (a.heads > 0);
    float* columns = (float*)team.scratch((TOKENS + history) * 16 * sizeof(float));
    each_piece(a.texts, team, [&](const Row& row) { return parts(row.tokens, TOKENS) * pieces; }, [&](const Row& row, i64 piece) {
        const i64 from = piece / pieces * TOKENS, n = least(TOKENS, row.tokens - from), block = piece % pieces;
        if (block == blocks) {
            for (i64 t = row.first + from; t < row.first + from + n; t++)
                for (i64 h = 0; h < a.heads; h += 16) {
                    const int some = least(16, a.heads - h);
                    const F dt = softplus(load_n(a.dt + t * a.stride + h, some) + load_n(a.dt_bias + h, some));
                    store_n(a.dts + t * a.heads + h, min(max(dt, set(a.low)), set(a.high)), some);
                }
            return;
        }
        const RecurrentWords& words = recurrent_of(a.texts, row);
        const i64 open = length_of(row) - words.base, before = most(history - from, 0);
        const T* kept = (const T*)words.columns + (open + from) * a.channels;
        const float* x = a.x + (row.first + from) * a.stride;
        float* y = a.y + (row.first + from) * a.channels;
        const i64 stop = least(a.channels, (block + 1) * CHANNELS);
        i64 c = block * CHANNELS;
        for (i64 i = 0; i < least(before, n + history); i++) fetch(kept + i * a.channels + c, (stop - c) * sizeof(T));
        for (; c + 16 <= stop; c += 16) conv_sixteen(a, kept + c, x + c, y + c, c, before, n, columns, Constant<16>());
        if (c < stop) conv_sixteen(a, kept + c, x + c, y + c, c, before, n, columns, (int)(stop - c));
    });
}

void conv_and_dt(const void* args, Team& team) {
    const Conv& a = *(const Conv*)args;
    if (a.texts.bf16) conv_as<bf16>(a, team);
    else conv_as<float>(a, team);
}

template <class Body> INLINE void each_token(i64 tokens, Team& team, Body body) {
    constexpr i64 TOKENS = 4;
    for (i64 piece; (piece = team.take(parts(tokens, TOKENS))) >= 0;)
        for (i64 t = piece * TOKENS; t < tokens && t < (piece + 1) * TOKENS; t++) body(t);
}

// y = w · x / √(mean x² + eps)
INLINE float norm_scale(const float* x, i64 width, float eps) {
    F squares = zero();
    for (i64 i = 0; i < width; i += 16) { const F v = load_n(x + i, width - i); squares = fma(v, v, squares); }
    return 1.0f / sqrtf(sum(squares) / (float)width + eps);
}

void select_parts(const void* args, Team& team) {
    const Select& a = *(const Select*)args;
    each_token(a.tokens, team, [&](i64 t) {
        const float* x = a.x + t * (a.width[0] + a.width[1] + a.width[2]);
        for (int part = 0; part < 3; part++) {
            const i64 width = a.width[part];
            float* y = a.y[part] + t * width;
            const float* weight = a.weight[part];
            const F scale = set(weight ? norm_scale(x, width, a.eps) : 1.0f);
            for (i64 i = 0; i < width; i += 16) {
                F v = load_n(x + i, width - i);
                if (weight) v = v * scale * load_n(weight + i, width - i);
                if (part == 1 && a.bf16) v = rounded(v, (const bf16*)0);
                store_n(y + i, v, width - i);
            }
            x += width;
        }
    });
}

void gated_norm(const void* args, Team& team) {
    const GatedNorm& a = *(const GatedNorm*)args;
    const i64 width = a.width / a.groups;
    each_token(a.tokens, team, [&](i64 t) {
        for (i64 g = 0; g < a.groups; g++) {
            const float *x = a.x + t * a.width + g * width, *z = a.z + t * a.stride + g * width;
            float* y = a.y + t * a.width + g * width;
            if (!a.weight || a.gate_first)
                for (i64 i = 0; i < width; i += 16) store_n(y + i, load_n(x + i, width - i) * silu(load_n(z + i, width - i)), width - i);
            if (!a.weight) continue;
            const float* weight = a.weight + g * width;
            const float* h = a.gate_first ? y : x;
            const F scale = set(norm_scale(h, width, a.eps));
            for (i64 i = 0; i < width; i += 16) {
                const i64 n = width - i;
                F v = load_n(h + i, n) * scale * load_n(weight + i, n);
                if (!a.gate_first) v = v * silu(load_n(z + i, n));
                store_n(y + i, v, n);
            }
        }
    });
}

void conv(Kernels& k) {
    k.conv = conv_and_dt;
    k.select = select_parts;
    k.gated_norm = gated_norm;
}

}  // namespace ISA
