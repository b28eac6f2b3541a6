// What stands around the scans: causal depthwise convolution with silu, dt, the choice of Mamba-1, the gated norm.
#include "texts.h"

#include <math.h>

namespace ISA {

// A piece is a few tokens of a few channels.  Its columns, the history's and the new ones, are first written side by
// side as the state will give them back; the state itself takes them when the scan is done (ssd, scan).
template <class T> INLINE void conv_as(const Conv& a, Team& team) {
    constexpr i64 TOKENS = 32, CHANNELS = 256;
    const i64 history = a.taps - 1, blocks = parts(a.channels, CHANNELS), pieces = blocks + (a.heads > 0);
    float* columns = (float*)team.scratch((TOKENS + history) * CHANNELS * sizeof(float));
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
        const i64 open = length_of(row) - words.base, first = block * CHANNELS, width = least(CHANNELS, a.channels - first);
        for (i64 i = 0; i < n + history; i++) {
            const i64 t = from + i - history;
            float* column = columns + i * CHANNELS;
            if (t < 0) {
                const T* kept = (const T*)words.columns + (open + history + t) * a.channels + first;
                for (i64 c = 0; c < width; c += 16) store(column + c, load_n(kept + c, width - c));
            } else {
                const float* x = a.x + (row.first + t) * a.stride + first;
                for (i64 c = 0; c < width; c += 16) store(column + c, rounded(load_n(x + c, width - c), (const T*)0));
            }
        }
        for (i64 c = 0; c < width; c += 16) {
            const int some = least(16, width - c);
            const float* weight = a.weight + first + c;
            const F bias = a.bias ? load_n(a.bias + first + c, some) : zero();
            for (i64 i = 0; i < n; i++) {
                F sum = load(columns + i * CHANNELS + c) * load_n(weight, some);
                for (i64 k = 1; k < a.taps; k++)
                    sum = fma(load(columns + (i + k) * CHANNELS + c), load_n(weight + k * a.channels, some), sum);
                const F y = rounded(silu(sum + bias), (const T*)0);
                store_n(a.y + (row.first + from + i) * a.channels + first + c, y, some);
            }
        }
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
