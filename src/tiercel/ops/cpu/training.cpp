// What stands between the products with matrices in training, on the way to the loss and back: low-rank products with
// dropout, the convolution, the gate, the decays of a scan.
//
// Values are float32 or bf16 as torch gives them, sums float32.  Dropout is a function of a seed and the place, so that
// the way back need not be told what was dropped.
#include "texts.h"

#include <math.h>

namespace ISA {
using namespace tiercel;

// ── values of either type ──

INLINE F load_n(const Values& v, i64 row, i64 column, int n) {
    const i64 at = row * v.stride + column;
    return v.bf16 ? load_n((const bf16*)v.at + at, n) : load_n((const float*)v.at + at, n);
}

INLINE void store_n(const Values& v, i64 row, i64 column, F x, int n) {
    const i64 at = row * v.stride + column;
    if (v.bf16) store_n((bf16*)v.at + at, x, n);
    else store_n((float*)v.at + at, x, n);
}

// ── dropout: sixteen bits decide, one random number serves two values ──

constexpr i64 PAIR = 32;

INLINE I mixed(I x) {
    x = (x ^ shr(x, 16)) * seti(0x7feb352d);
    x = (x ^ shr(x, 15)) * seti((int32_t)0x846ca68b);
    return x ^ shr(x, 16);
}

// all ones where the values `column` … + 15 and + 16 … + 31 of a row stay; column is a multiple of 32
INLINE void stays(const Dropout& d, i64 row, i64 column, i64 width, I* first, I* second) {
    static const int32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const uint32_t at = (uint32_t)(row * parts(width, PAIR) * 16 + column / 2);
    const I random = mixed(mixed(loadi(lanes) + seti((int32_t)(at + (uint32_t)d.seed))) ^ seti((int32_t)(d.seed >> 32)));
    const I last = seti(d.below - 1);
    *first = sar(last - (random & seti(0xffff)), 31);
    *second = sar(last - shr(random, 16), 31);
}

INLINE F only(F x, I where) { return as_float(as_int(x) & where); }

// what dropout leaves of `n` values (at most 32) of a row, zeros after them
INLINE void dropped(const Values& x, const Dropout& d, i64 row, i64 column, i64 width, int n, float* out) {
    F a = load_n(x, row, column, n), b = n > 16 ? load_n(x, row, column + 16, n - 16) : zero();
    if (d.below > 0) {
        I first, second;
        stays(d, row, column, width, &first, &second);
        a = only(a, first);
        b = only(b, second);
    }
    store(out, a);
    store(out + 16, b);
}

// ── low rank ──

// y (T, R) = dropout(x) (T, K) · w (K, R)
void narrow(const void* args, Team& team) {
    const Narrow& a = *(const Narrow*)args;
    constexpr i64 TOKENS = 8, INPUTS = 256;
    float* x = (float*)team.scratch(TOKENS * INPUTS * sizeof(float));
    for (i64 piece; (piece = team.take(parts(a.tokens, TOKENS))) >= 0;) {
        const i64 first = piece * TOKENS, count = least(TOKENS, a.tokens - first);
        for (i64 from = 0; from < a.inputs; from += INPUTS) {
            const i64 inputs = least(INPUTS, a.inputs - from);
            for (i64 t = 0; t < TOKENS; t++)
                for (i64 k = 0; k < inputs; k += PAIR)
                    dropped(a.x, a.dropout, first + (t < count ? t : 0), from + k, a.inputs, least(PAIR, inputs - k),
                            x + t * INPUTS + k);
            for (i64 r = 0; r < a.rank; r += 16) {
                const int some = least(16, a.rank - r);
                F sum[TOKENS];
                for (i64 t = 0; t < TOKENS; t++) sum[t] = zero();
                const float* w = a.w + from * a.rank + r;
                if (some == 16)
                    for (i64 k = 0; k < inputs; k++) {
                        const F row = load(w + k * a.rank);
                        for (i64 t = 0; t < TOKENS; t++) sum[t] = fma(set(x[t * INPUTS + k]), row, sum[t]);
                    }
                else
                    for (i64 k = 0; k < inputs; k++) {
                        const F row = load_some(w + k * a.rank, some);
                        for (i64 t = 0; t < TOKENS; t++) sum[t] = fma(set(x[t * INPUTS + k]), row, sum[t]);
                    }
                for (i64 t = 0; t < count; t++) {
                    float* y = a.y + (first + t) * a.rank + r;
                    store_n(y, from ? load_n(y, some) + sum[t] : sum[t], some);
                }
            }
        }
    }
}

// thirty-two outputs, or `some` and `others`, of eight tokens
template <class Lanes> INLINE void widen_thirty_two(const Widen& a, const float* const* x, i64 first, i64 count, i64 n, Lanes some, Lanes others) {
    constexpr i64 TOKENS = 8;
    F left[TOKENS], right[TOKENS];
    for (i64 t = 0; t < TOKENS; t++) left[t] = right[t] = zero();
    for (i64 r = 0; r < a.rank; r++) {
        const float* w = a.w + r * a.outputs + n;
        const F l = load_n(w, some), h = others > 0 ? load_n(w + 16, others) : zero();
        for (i64 t = 0; t < TOKENS; t++) {
            const F v = set(x[t][r]);
            left[t] = fma(v, l, left[t]);
            right[t] = fma(v, h, right[t]);
        }
    }
    for (i64 t = 0; t < count; t++) {
        if (a.dropout.below > 0) {
            I stay, also;
            stays(a.dropout, first + t, n, a.outputs, &stay, &also);
            left[t] = only(left[t], stay);
            right[t] = only(right[t], also);
        }
        if (a.base.at) {
            left[t] = load_n(a.base, first + t, n, some) + left[t];
            if (others > 0) right[t] = load_n(a.base, first + t, n + 16, others) + right[t];
        }
        store_n(a.y, first + t, n, left[t], some);
        if (others > 0) store_n(a.y, first + t, n + 16, right[t], others);
    }
}

// y (T, N) = base + dropout(x (T, R) · w (R, N))
void widen(const void* args, Team& team) {
    const Widen& a = *(const Widen*)args;
    constexpr i64 TOKENS = 8;
    for (i64 piece; (piece = team.take(parts(a.tokens, TOKENS))) >= 0;) {
        const i64 first = piece * TOKENS, count = least(TOKENS, a.tokens - first);
        const float* x[TOKENS];
        for (i64 t = 0; t < TOKENS; t++) x[t] = a.x + (first + (t < count ? t : 0)) * a.rank;
        i64 n = 0;
        for (; n + PAIR <= a.outputs; n += PAIR) widen_thirty_two(a, x, first, count, n, Constant<16>(), Constant<16>());
        if (n < a.outputs)
            widen_thirty_two(a, x, first, count, n, (int)least(16, a.outputs - n), (int)least(16, a.outputs - n - 16));
    }
}

// y (R, K), or (K, R), = a (T, R)ᵀ · dropout(x) (T, K)
void correlate(const void* args, Team& team) {
    const Correlate& a = *(const Correlate*)args;
    constexpr i64 TOKENS = 128;
    float* x = (float*)team.scratch(TOKENS * PAIR * sizeof(float));
    for (i64 piece; (piece = team.take(parts(a.inputs, PAIR))) >= 0;) {
        const i64 k = piece * PAIR, width = least(PAIR, a.inputs - k);
        for (i64 first = 0; first < a.tokens; first += TOKENS) {
            const i64 count = least(TOKENS, a.tokens - first);
            for (i64 t = 0; t < count; t++) dropped(a.x, a.dropout, first + t, k, a.inputs, width, x + t * PAIR);
            for (i64 r = 0; r < a.rank; r += 8)
                for (i64 half = 0; half < width; half += 16) {
                    const i64 ranks = least(8, a.rank - r);
                    const float* rows[8];
                    for (i64 i = 0; i < 8; i++) rows[i] = a.a + first * a.rank + r + (i < ranks ? i : 0);
                    F sum[8];
                    for (i64 i = 0; i < 8; i++) sum[i] = zero();
                    for (i64 t = 0; t < count; t++) {
                        const F v = load(x + t * PAIR + half);
                        for (i64 i = 0; i < 8; i++) sum[i] = fma(set(rows[i][t * a.rank]), v, sum[i]);
                    }
                    const int some = least(16, width - half);
                    for (i64 i = 0; i < ranks; i++) {
                        if (!a.by_input) {
                            float* y = a.y + (r + i) * a.inputs + k + half;
                            store_n(y, first ? load_n(y, some) + sum[i] : sum[i], some);
                            continue;
                        }
                        float v[16];
                        store(v, sum[i]);
                        for (i64 j = 0; j < some; j++) {
                            float* y = a.y + (k + half + j) * a.rank + r + i;
                            *y = first ? *y + v[j] : v[j];
                        }
                    }
                }
        }
    }
}

// ── y = silu(g) · u ──

INLINE F sigmoid(F x) { return set(1.0f) / (set(1.0f) + exp(zero() - x)); }

template <class Body> INLINE void each_value(i64 tokens, i64 width, Team& team, Body body) {
    constexpr i64 TOKENS = 4;
    for (i64 piece; (piece = team.take(parts(tokens, TOKENS))) >= 0;)
        for (i64 t = piece * TOKENS; t < least(tokens, (piece + 1) * TOKENS); t++)
            for (i64 i = 0; i < width; i += 16) body(t, i, (int)least(16, width - i));
}

void added(const void* args, Team& team) {
    const Added& a = *(const Added*)args;
    each_value(a.tokens, a.width, team, [&](i64 t, i64 i, int n) { store_n(a.y, t, i, load_n(a.a, t, i, n) + load_n(a.b, t, i, n), n); });
}

void silu_gate(const void* args, Team& team) {
    const SiluGate& a = *(const SiluGate*)args;
    each_value(a.tokens, a.width, team, [&](i64 t, i64 i, int n) {
        store_n(a.y, t, i, silu(load_n(a.g, t, i, n)) * load_n(a.u, t, i, n), n);
    });
}

void silu_gate_back(const void* args, Team& team) {
    const SiluGate& a = *(const SiluGate*)args;
    each_value(a.tokens, a.width, team, [&](i64 t, i64 i, int n) {
        const F g = load_n(a.g, t, i, n), u = load_n(a.u, t, i, n), dy = load_n(a.y, t, i, n), s = sigmoid(g);
        store_n(a.du, t, i, dy * g * s, n);
        store_n(a.dg, t, i, dy * u * s * (set(1.0f) + g * (set(1.0f) - s)), n);
    });
}

// ── y = silu(causal depthwise convolution) inside documents: reach[t] lags are of t's document ──

template <class Body> INLINE void each_lag(i64 lags, Body body) {
    if (lags == 3) {
        body(3);
        body(2);
        body(1);
        body(0);
    } else {
        for (i64 k = lags; k >= 0; k--) body(k);
    }
}

INLINE F convolved(const PackedConv& a, const F* w, F bias, i64 t, i64 c, int n) {
    F sum = bias;
    each_lag(a.reach[t], [&](i64 k) { sum = fma(load_n(a.x, t - k, c, n), w[k], sum); });
    return sum;
}

template <class Body> INLINE void each_channels(const PackedConv& a, Team& team, Body body) {
    for (i64 piece; (piece = team.take(parts(a.channels, 16))) >= 0;) {
        const i64 c = piece * 16;
        const int n = (int)least(16, a.channels - c);
        F w[TAPS];
        for (i64 k = 0; k < a.taps; k++) w[k] = load_n(a.weight + k * a.channels + c, n);
        body(c, n, w, a.bias ? load_n(a.bias + c, n) : zero());
    }
}

void packed_conv(const void* args, Team& team) {
    const PackedConv& a = *(const PackedConv*)args;
    each_channels(a, team, [&](i64 c, int n, const F* w, F bias) {
        for (i64 t = 0; t < a.tokens; t++) store_n(a.y, t, c, silu(convolved(a, w, bias, t, c, n)), n);
    });
}

// y holds its gradient; dweight (taps, C) and dbias (C)
void packed_conv_back(const void* args, Team& team) {
    const PackedConv& a = *(const PackedConv*)args;
    each_channels(a, team, [&](i64 c, int n, const F* w, F bias) {
        F dw[TAPS], db = zero(), open[TAPS];  // open[i]: dx of t − i, to which later tokens still add
        for (i64 k = 0; k < TAPS; k++) dw[k] = open[k] = zero();
        for (i64 t = 0; t < a.tokens; t++) {
            const F h = convolved(a, w, bias, t, c, n), s = sigmoid(h);
            const F dh = load_n(a.y, t, c, n) * s * (set(1.0f) + h * (set(1.0f) - s));
            db = db + dh;
            each_lag(a.reach[t], [&](i64 k) {
                dw[k] = fma(dh, load_n(a.x, t - k, c, n), dw[k]);
                open[k] = fma(dh, w[k], open[k]);
            });
            if (t >= a.taps - 1) store_n(a.dx, t - a.taps + 1, c, open[a.taps - 1], n);
            for (i64 k = a.taps - 1; k > 0; k--) open[k] = open[k - 1];
            open[0] = zero();
        }
        for (i64 k = 1; k < a.taps; k++)
            if (a.tokens - k >= 0) store_n(a.dx, a.tokens - k, c, open[k], n);
        for (i64 k = 0; k < a.taps; k++) store_n(a.dweight + k * a.channels + c, dw[k], n);
        if (a.dbias) store_n(a.dbias + c, db, n);
    });
}

// ── the weights inside a chunk: w_tj = exp(a_t − a_j) s_tj, a in two numbers ──

INLINE F decay(const Decayed& a, i64 head, i64 t, i64 j) {
    const float *high = a.high + head * a.chunk, *low = a.low + head * a.chunk;
    const F lag = set(high[t]) - load(high + j) + (set(low[t]) - load(low + j));
    return exp(min(max(lag, set(-60.0f)), zero()));
}

// scores are zero for j > t; chunk is a multiple of 16
void decayed(const void* args, Team& team) {
    const Decayed& a = *(const Decayed*)args;
    const i64 Q = a.chunk, heads = a.chunks * a.heads, shared = a.heads / a.groups;
    for (i64 piece; (piece = team.take(heads)) >= 0;) {
        const float* scores = a.scores + piece / shared * Q * Q;
        for (i64 t = 0; t < Q; t++) {
            for (i64 j = 0; j <= t; j += 16) store_n(a.w, piece * Q + t, j, decay(a, piece, t, j) * load(scores + t * Q + j), 16);
            for (i64 j = (t / 16 + 1) * 16; j < Q; j += 16) store_n(a.w, piece * Q + t, j, zero(), 16);
        }
    }
}

// w holds its gradient; dscores (chunks · G, Q, Q), not masked; of x = dw ∘ w without its diagonal: rows (chunks · H, Q)
// sums over j, columns (chunks · H, Q / 16, Q) sums over sixteen t
void decayed_back(const void* args, Team& team) {
    const Decayed& a = *(const Decayed*)args;
    const i64 Q = a.chunk, blocks = Q / 16, shared = a.heads / a.groups;
    for (i64 piece; (piece = team.take(a.chunks * a.groups * blocks)) >= 0;) {
        const i64 group = piece / blocks, block = blocks - 1 - piece % blocks;
        float* dscores = a.dscores + group * Q * Q;
        const float* scores = a.scores + group * Q * Q;
        for (i64 head = group * shared; head < (group + 1) * shared; head++) {
            float* columns = a.columns + (head * blocks + block) * Q;
            for (i64 j = 0; j < Q; j += 16) store(columns + j, zero());
            for (i64 t = block * 16; t < block * 16 + 16; t++) {
                F row = zero();
                for (i64 j = 0; j < Q; j += 16) {
                    float* ds = dscores + t * Q + j;
                    const bool first = head == group * shared;
                    if (j > t) {
                        if (first) store(ds, zero());
                        continue;
                    }
                    const F dw = load_n(a.w, head * Q + t, j, 16) * decay(a, head, t, j);
                    store(ds, first ? dw : load(ds) + dw);
                    F x = dw * load(scores + t * Q + j);
                    if (t < j + 16) {
                        float v[16];
                        store(v, x);
                        v[t - j] = 0;
                        x = load(v);
                    }
                    row = row + x;
                    store(columns + j, load(columns + j) + x);
                }
                a.rows[head * Q + t] = sum(row);
            }
        }
    }
}

// ── a scan's layouts ──

INLINE float scale_at(const float* scale, i64 at) { return scale ? scale[at] : 1.0f; }

// by head a row is P values; by group, where a token's heads of one group lie side by side, a part of one
INLINE i64 head_row(const Layout& l, i64 t, i64 h) { return (t / l.chunk * l.heads + h) * l.chunk + t % l.chunk; }
INLINE i64 group_row(const Layout& l, i64 t, i64 h) {
    return (t / l.chunk * l.groups + h / (l.heads / l.groups)) * l.chunk + t % l.chunk;
}
INLINE i64 group_column(const Layout& l, i64 h) { return h % (l.heads / l.groups) * l.head_dim; }

template <class Body> INLINE void each_head(const Layout& l, Team& team, Body body) {
    constexpr i64 TOKENS = 8;
    const i64 tokens = l.chunks * l.chunk;
    for (i64 piece; (piece = team.take(parts(tokens, TOKENS))) >= 0;)
        for (i64 t = piece * TOKENS; t < least(tokens, (piece + 1) * TOKENS); t++)
            for (i64 h = 0; h < l.heads; h++) body(t, h, t * l.heads + h);
}

void spread(const void* args, Team& team) {
    const Spread& a = *(const Spread*)args;
    const Layout& l = a.layout;
    each_head(l, team, [&](i64 t, i64 h, i64 th) {
        const F scale = set(scale_at(a.scale, th)), other = set(scale_at(a.other_scale, th));
        const i64 row = group_row(l, t, h), column = group_column(l, h);
        F dot = zero();
        for (i64 p = 0; p < l.head_dim; p += 16) {
            const int n = (int)least(16, l.head_dim - p);
            const F x = load_n(a.x, t, h * l.head_dim + p, n);
            store_n(a.by_head, head_row(l, t, h), p, x * scale, n);
            if (!a.by_group.at) continue;
            store_n(a.by_group, row, column + p, x * other, n);
            if (a.with.at) dot = fma(x * other, load_n(a.with, row, column + p, n), dot);
        }
        if (a.with.at) a.dots[th] = sum(dot);
    });
}

void gather(const void* args, Team& team) {
    const Gather& a = *(const Gather*)args;
    const Layout& l = a.layout;
    each_head(l, team, [&](i64 t, i64 h, i64 th) {
        const F D = set(a.D ? a.D[h] : 0.0f), scale = set(scale_at(a.scale, th));
        for (i64 p = 0; p < l.head_dim; p += 16) {
            const int n = (int)least(16, l.head_dim - p);
            F y = load_n(a.by_head, head_row(l, t, h), p, n);
            if (a.by_group.at) y = fma(load_n(a.by_group, group_row(l, t, h), group_column(l, h) + p, n), scale, y);
            if (a.D) y = fma(load_n(a.x, t, h * l.head_dim + p, n), D, y);
            store_n(a.y, t, h * l.head_dim + p, y, n);
        }
    });
}

void gather_back(const void* args, Team& team) {
    const GatherBack& a = *(const GatherBack*)args;
    const Layout& l = a.layout;
    each_head(l, team, [&](i64 t, i64 h, i64 th) {
        const F D = set(a.D ? a.D[h] : 0.0f), scale = set(scale_at(a.scale, th)), dt = set(a.dt[th]);
        F dots = zero(), left = zero();
        for (i64 p = 0; p < l.head_dim; p += 16) {
            const int n = (int)least(16, l.head_dim - p);
            const F x = load_n(a.x, t, h * l.head_dim + p, n);
            F du = load_n(a.by_head, head_row(l, t, h), p, n);
            if (a.by_group.at) {
                const F from = load_n(a.by_group, group_row(l, t, h), group_column(l, h) + p, n) * scale;
                left = fma(x, from, left);
                du = du + from;
            }
            dots = fma(x, du, dots);
            store_n(a.dx, t, h * l.head_dim + p, fma(load_n(a.dy, t, h * l.head_dim + p, n), D, du * dt), n);
        }
        a.dots[th] = sum(dots);
        if (a.by_group.at) a.left[th] = sum(left);
    });
}

// what chunks hand on: y_c = Σ_{k<c} g_ck x_k, back y_c = Σ_{k>c} g_kc x_k
void carry(const void* args, Team& team) {
    const Carry& a = *(const Carry*)args;
    const Layout& l = a.layout;
    const i64 C = a.count, rows = l.chunks / C, shared = l.heads / l.groups;
    for (i64 piece; (piece = team.take(rows * l.groups * a.state)) >= 0;) {
        const i64 n = piece % a.state, group = piece / a.state % l.groups, row = piece / a.state / l.groups;
        const auto at = [&](i64 c) { return ((row * C + c) * l.groups + group) * a.state + n; };
        for (i64 h = 0; h < shared; h++) {
            const float* g = a.g + (row * l.heads + group * shared + h) * C * C;
            for (i64 p = h * l.head_dim; p < (h + 1) * l.head_dim; p += 16) {
                const int some = (int)least(16, (h + 1) * l.head_dim - p);
                for (i64 c = 0; c < C; c++) {
                    F sum = zero();
                    for (i64 k = a.back ? c + 1 : 0; k < (a.back ? C : c); k++)
                        sum = fma(set(a.back ? g[k * C + c] : g[c * C + k]), load_n(a.x, at(k), p, some), sum);
                    store_n(a.y, at(c), p, sum, some);
                }
            }
        }
    }
}

// dg_ck = Σ y_c x_k for k < c, else 0
void carry_dots(const void* args, Team& team) {
    const Carry& a = *(const Carry*)args;
    const Layout& l = a.layout;
    const i64 C = a.count, rows = l.chunks / C, shared = l.heads / l.groups;
    for (i64 piece; (piece = team.take(rows * l.heads * C)) >= 0;) {
        const i64 c = piece % C, head = piece / C % l.heads, row = piece / C / l.heads, column = head % shared * l.head_dim;
        float* dg = a.dg + piece * C;
        const auto at = [&](i64 chunk) { return ((row * C + chunk) * l.groups + head / shared) * a.state; };
        for (i64 k = 0; k < C; k++) {
            F dot = zero();
            for (i64 n = 0; k < c && n < a.state; n++)
                for (i64 p = 0; p < l.head_dim; p += 16) {
                    const int some = (int)least(16, l.head_dim - p);
                    dot = fma(load_n(a.y, at(c) + n, column + p, some), load_n(a.x, at(k) + n, column + p, some), dot);
                }
            dg[k] = sum(dot);
        }
    }
}

// ── attention's weights ──

INLINE F exp_or_nan(F x) {  // exp takes NaN for a number
    F e = exp(x);
    EACH e.p[i] = x.p[i] == x.p[i] ? e.p[i] : x.p[i];
    return e;
}

void softmax(const void* args, Team& team) {
    const Softmax& a = *(const Softmax*)args;
    constexpr i64 ROWS = 16;
    float* row = (float*)team.scratch((a.keys + 16) * sizeof(float));
    for (i64 piece; (piece = team.take(parts(a.rows, ROWS))) >= 0;)
        for (i64 i = piece * ROWS; i < least(a.rows, (piece + 1) * ROWS); i++) {
            const i64 stop = i % a.keys + 1, start = a.window > 0 && stop > a.window ? stop - a.window : 0;
            F most = set(-INFINITY), total = zero();
            for (i64 j = start; j < stop; j += 16) {
                const int n = (int)least(16, stop - j);
                F x = load_n(a.x, i, j, n);
                if (n < 16) {  // what the tail reads is zero
                    float v[16];
                    store(v, x);
                    for (int k = n; k < 16; k++) v[k] = -INFINITY;
                    x = load(v);
                }
                store(row + j - start, x);
                most = max(most, x);
            }
            const F top = set(maximum(most));
            for (i64 j = 0; j < stop - start; j += 16) {
                const F e = exp_or_nan(load(row + j) - top);
                store(row + j, e);
                total = total + e;
            }
            const F share = set(1.0f / sum(total));
            for (i64 j = 0; j < start; j += 16) store_n(a.x, i, j, zero(), (int)least(16, start - j));
            for (i64 j = start; j < stop; j += 16) store_n(a.x, i, j, load(row + j - start) * share, (int)least(16, stop - j));
            for (i64 j = stop; j < a.keys; j += 16) store_n(a.x, i, j, zero(), (int)least(16, a.keys - j));
        }
}

void softmax_back(const void* args, Team& team) {
    const Softmax& a = *(const Softmax*)args;
    constexpr i64 ROWS = 16;
    for (i64 piece; (piece = team.take(parts(a.rows, ROWS))) >= 0;)
        for (i64 i = piece * ROWS; i < least(a.rows, (piece + 1) * ROWS); i++) {
            const i64 stop = i % a.keys + 1, start = a.window > 0 && stop > a.window ? stop - a.window : 0;
            F dot = zero();
            for (i64 j = start; j < stop; j += 16) {
                const int n = (int)least(16, stop - j);
                dot = fma(load_n(a.x, i, j, n), load_n(a.y, i, j, n), dot);
            }
            const F whole = set(sum(dot));
            for (i64 j = start; j < stop; j += 16) {
                const int n = (int)least(16, stop - j);
                store_n(a.y, i, j, load_n(a.x, i, j, n) * (load_n(a.y, i, j, n) - whole), n);
            }
            for (i64 j = 0; j < start; j += 16) store_n(a.y, i, j, zero(), (int)least(16, start - j));
            for (i64 j = stop; j < a.keys; j += 16) store_n(a.y, i, j, zero(), (int)least(16, a.keys - j));
        }
}

// ── the loss of logits ──

void cross_entropy(const void* args, Team& team) {
    const CrossEntropy& a = *(const CrossEntropy*)args;
    for (i64 t; (t = team.take(a.tokens)) >= 0;) {
        F most = set(-INFINITY), total = zero();
        const i64 whole = a.words / 16 * 16;
        const int rest = (int)(a.words - whole);
        float tail[16];
        for (int i = 0; i < 16; i++) tail[i] = -INFINITY;  // what is no word
        for (i64 v = 0; v < whole; v += 16) most = max(most, load_n(a.x, t, v, 16));
        if (rest) {
            float x[16];
            store(x, load_n(a.x, t, whole, rest));
            for (int i = 0; i < rest; i++) tail[i] = x[i];
            most = max(most, load(tail));
        }
        const F top = set(maximum(most));
        for (i64 from = 0; from < whole; from += 512) {  // parts first: a sum of thousands rounds thousands of times
            F part = zero();
            for (i64 v = from; v < least(whole, from + 512); v += 16) part = part + exp_or_nan(load_n(a.x, t, v, 16) - top);
            total = total + part;
        }
        if (rest) total = total + exp_or_nan(load(tail) - top);
        const float all = sum(total);
        float right[16];
        const i64 target = a.targets[t], at = target / 16 * 16;
        store(right, load_n(a.x, t, at, (int)least(16, a.words - at)));
        a.losses[t] = logf(all) + maximum(most) - right[target - at];
        const F share = set(1.0f / all);
        for (i64 v = 0; v < a.words; v += 16) {
            const int n = (int)least(16, a.words - v);
            F p = exp(load_n(a.x, t, v, n) - top) * share;
            if (v == at) {
                store(right, p);
                right[target - at] -= 1.0f;
                p = load(right);
            }
            store_n(a.x, t, v, p, n);
        }
    }
}

// ── norm ──

void normed(const void* args, Team& team) {
    const Normed& a = *(const Normed*)args;
    constexpr i64 TOKENS = 4;
    for (i64 piece; (piece = team.take(parts(a.tokens, TOKENS))) >= 0;)
        for (i64 t = piece * TOKENS; t < least(a.tokens, (piece + 1) * TOKENS); t++) {
            F squares = zero();
            for (i64 i = 0; i < a.width; i += 16) {
                const F x = load_n(a.x, t, i, (int)least(16, a.width - i));
                squares = fma(x, x, squares);
            }
            a.r[t] = 1.0f / sqrtf(sum(squares) / (float)a.width + a.eps);
            const F r = set(a.r[t]);
            for (i64 i = 0; i < a.width; i += 16) {
                const int n = (int)least(16, a.width - i);
                store_n(a.y, t, i, load_n(a.x, t, i, n) * r * load_n(a.weight + i, n), n);
            }
        }
}

void normed_back(const void* args, Team& team) {
    const Normed& a = *(const Normed*)args;
    constexpr i64 TOKENS = 4;
    for (i64 piece; (piece = team.take(parts(a.tokens, TOKENS))) >= 0;)
        for (i64 t = piece * TOKENS; t < least(a.tokens, (piece + 1) * TOKENS); t++) {
            const F r = set(a.r[t]);
            F dot = zero();
            for (i64 i = 0; i < a.width; i += 16) {
                const int n = (int)least(16, a.width - i);
                dot = fma(load_n(a.y, t, i, n) * load_n(a.weight + i, n), load_n(a.x, t, i, n) * r, dot);
            }
            const F mean = set(sum(dot) / (float)a.width);
            for (i64 i = 0; i < a.width; i += 16) {
                const int n = (int)least(16, a.width - i);
                const F h = load_n(a.x, t, i, n) * r;
                store_n(a.dx, t, i, (load_n(a.y, t, i, n) * load_n(a.weight + i, n) - h * mean) * r, n);
            }
        }
}

void training(Kernels& k) {
    k.spread = spread;
    k.carry = carry;
    k.carry_dots = carry_dots;
    k.gather = gather;
    k.gather_back = gather_back;
    k.softmax = softmax;
    k.softmax_back = softmax_back;
    k.added = added;
    k.cross_entropy = cross_entropy;
    k.normed = normed;
    k.normed_back = normed_back;
    k.narrow = narrow;
    k.widen = widen;
    k.correlate = correlate;
    k.silu_gate = silu_gate;
    k.silu_gate_back = silu_gate_back;
    k.packed_conv = packed_conv;
    k.packed_conv_back = packed_conv_back;
    k.decayed = decayed;
    k.decayed_back = decayed_back;
}

}  // namespace ISA
