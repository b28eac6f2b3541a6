// float32 → super-blocks of 256 values: quant/search.py and quant/pack.py once more, operation for operation, sixteen
// blocks at a time, one in each lane.  Same bits as there, so nothing is fused and every sum has the order of `total`.
//
// Letters as there: S sub-blocks of a block, V values of a sub-block.
#include "kernels.h"

namespace tiercel {

// (rows, width) → super-blocks, width a multiple of 256; importance (width) or nullptr
struct Quantize { const float *x, *importance; uint8_t* out; i64 rows, width; int type; };

}  // namespace tiercel

#if defined(TIERCEL_BINDINGS)

#include "bindings.h"

namespace tiercel {

static KernelHandle quantize{"quantize"};

BINDINGS(m) {
    m.def("quantize", [](int type, Address x, Address importance, Address out, i64 rows, i64 width, i64 row_bytes) {
        const auto noted =
            importance ? std::vector<Range>{{ptr<void>(x), rows * width * f32}, {ptr<void>(importance), width * f32}}
                       : std::vector<Range>{{ptr<void>(x), rows * width * f32}};
        launch(quantize, Quantize{ptr<float>(x), ptr<float>(importance), ptr<uint8_t>(out), rows, width, type},
               rows * width < SMALL, noted, {{ptr<void>(out), (size_t)(rows * row_bytes)}});
    });
}

}  // namespace tiercel

#else

#include "vec.h"

namespace ISA {
using namespace tiercel;

namespace {

constexpr int BLOCK = 256, LANES = 16, ROUNDS = 3, FITS = 2, SPREADS = 11;

INLINE F select(I mask, F a, F b) { EACH a.p[i] = mask.p[i] ? a.p[i] : b.p[i]; return a; }
INLINE I greater(F a, F b) { I r; EACH r.p[i] = a.p[i] > b.p[i]; return r; }
INLINE F negative(F a) { return as_float(as_int(a) ^ seti((int32_t)0x80000000)); }

INLINE F inverse(F x) {
    const F r = set(1.0f) / x;
    return select(greater(set(1e30f), abs(r)), r, zero());
}

INLINE F nearest(F x, float low, float high) { return to_float(round(min(max(x, set(low)), set(high)))); }

INLINE uint16_t to_half(float f) {  // nearest, ties to even; magnitudes below 65520
    uint32_t u;
    memcpy(&u, &f, 4);
    const uint32_t sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
    if (a < 0x38800000) {  // a denormal half, or zero: counted in units of 2⁻²⁴ by an addition
        float m;
        memcpy(&m, &a, 4);
        m += 0.5f;
        memcpy(&u, &m, 4);
        return (uint16_t)(sign | (u - 0x3f000000));
    }
    return (uint16_t)(sign | ((a + 0xfff + ((a >> 13) & 1) - 0x38000000) >> 13));
}

struct Halves { uint16_t bits[LANES]; };

INLINE Halves halves(F x) {
    float f[LANES];
    Halves h;
    store(f, x);
    for (int i = 0; i < LANES; i++) h.bits[i] = to_half(f[i]);
    return h;
}

INLINE F half(F x) {
    const Halves h = halves(x + zero());
    return load_half(h.bits);
}

// Σ over the values of a sub-block: four running sums, then these
struct Total {
    F part[4];
    INLINE F join(const Total& t) { return (t.part[0] + t.part[2]) + (t.part[1] + t.part[3]); }
    void add(int i, F x) { part[i & 3] = i < 4 ? x : part[i & 3] + x; }
};

// Values and weights of sixteen blocks; without weights they all are 1.
template <int S_, int V_, bool WEIGHTED_> struct Tile {
    static constexpr int S = S_, V = V_;
    static constexpr bool WEIGHTED = WEIGHTED_;
    const F *x, *w;
    INLINE F weighed(const F* w, int i, F x) { return WEIGHTED ? w[i] * x : x; }
};

template <class T> INLINE F weight_of(const F* w) {
    if (!T::WEIGHTED) return set((float)T::V);
    Total t;
    _Pragma("GCC unroll 32") for (int i = 0; i < T::V; i++) t.add(i, w[i]);
    return Total::join(t);
}

struct Sums { F Q, QQ, QX; };

// Σ w q, Σ w q², Σ w q x over a sub-block, q(i) giving the levels
template <class T, class Levels> INLINE Sums sums(const F* x, const F* w, Levels levels) {
    Total Q, QQ, QX;
    _Pragma("GCC unroll 32") for (int i = 0; i < T::V; i++) {
        const F q = levels(i), wq = T::weighed(w, i, q);
        Q.add(i, wq);
        QQ.add(i, wq * q);
        QX.add(i, wq * x[i]);
    }
    return {Total::join(Q), Total::join(QQ), Total::join(QX)};
}

INLINE float spread(int i) { return (float)(i - 6) / 4; }

// ── value = d · scale · q − dmin · min ──

struct AffineFit {
    F W, Y, limit, s, m, gain;
    void consider(Sums t) {
        const F two = set(2.0f);
        const F determinant = W * t.QQ - t.Q * t.Q;
        const I apart = greater(determinant, set(1e-6f) * (W * t.QQ));
        const F divisor = select(apart, determinant, set(1.0f));
        const F nm = min(select(apart, (t.QQ * Y - t.Q * t.QX) / divisor, zero()), limit);
        const I free = apart & greater(limit, nm);
        const F ns = select(free, (W * t.QX - Y * t.Q) / divisor, (t.QX - nm * t.Q) * inverse(t.QQ));
        const F g = two * (ns * t.QX + nm * Y) - (ns * ns * t.QQ + two * (ns * nm) * t.Q + nm * nm * W);
        const I better = greater(ns, zero()) & greater(g, gain);
        s = select(better, ns, s);
        m = select(better, nm, m);
        gain = select(better, g, gain);
    }
};

template <class T> INLINE void affine(const F* x, const F* w, float top, F& s, F& m) {
    F low = x[0], high = x[0], y[T::V];
    for (int i = 1; i < T::V; i++) low = min(low, x[i]), high = max(high, x[i]);
    low = min(low, zero());
    const F step = inverse(high - low);
    Total Y;
    _Pragma("GCC unroll 32") for (int i = 0; i < T::V; i++) {
        y[i] = x[i] - low;
        Y.add(i, T::weighed(w, i, y[i]));
    }
    AffineFit fit{weight_of<T>(w), Total::join(Y), negative(low), zero(), zero(), zero()};
    for (int k = 0; k < SPREADS; k++) {
        const F by = step * set(top + spread(k));
        fit.consider(sums<T>(y, w, [&](int i) { return nearest(y[i] * by, 0, top); }));
    }
    for (int k = 0; k < FITS; k++) {
        const F by = inverse(fit.s), from = fit.m;
        fit.consider(sums<T>(y, w, [&](int i) { return nearest((y[i] - from) * by, 0, top); }));
    }
    s = fit.s;
    m = fit.m + low;
}

template <int S> struct AffineBlock { F d, dmin, scales[S], mins[S]; };

// the scale one lower, as it is, or one higher, each with the min that suits it: what fits the levels best
template <int S> INLINE void fit_integers(AffineBlock<S>& now, const Sums* t, const F* W, const F* X, float max_scale) {
    const F two = set(2.0f);
    for (int j = 0; j < S; j++) {
        const F ratio = inverse(W[j]) * inverse(now.dmin), was = now.scales[j];
        F lowest = zero();
        for (int change = -1; change <= 1; change++) {
            const F trial = min(max(was + set((float)change), zero()), set(max_scale)), sc = now.d * trial;
            const F mins = nearest((sc * t[j].Q - X[j]) * ratio, 0, max_scale), mn = now.dmin * mins;
            const F e = sc * sc * t[j].QQ - two * (sc * mn) * t[j].Q + mn * mn * W[j] - two * (sc * t[j].QX) +
                        two * (mn * X[j]);
            const I better = change == -1 ? seti(-1) : greater(lowest, e);
            now.scales[j] = select(better, trial, now.scales[j]);
            now.mins[j] = select(better, mins, now.mins[j]);
            lowest = select(better, e, lowest);
        }
    }
}

// d and dmin by least squares over all sub-blocks; d alone where the two are not independent
template <int S> INLINE void fit_halves(AffineBlock<S>& now, const Sums* t, const F* W, const F* X) {
    F A, B, C, P, R;
    for (int j = 0; j < S; j++) {
        const F sc = now.scales[j], mn = now.mins[j];
        const F a = sc * sc * t[j].QQ, b = sc * mn * t[j].Q, c = mn * mn * W[j], p = sc * t[j].QX, r = mn * X[j];
        A = j ? A + a : a, B = j ? B + b : b, C = j ? C + c : c, P = j ? P + p : p, R = j ? R + r : r;
    }
    const F determinant = A * C - B * B, divisor = select(greater(determinant, zero()), determinant, set(1.0f));
    const F both_d = (P * C - R * B) / divisor, both_dmin = (P * B - R * A) / divisor;
    const I both = greater(determinant, set(1e-6f) * (A * C)) & greater(both_d, zero()) & greater(both_dmin, zero());
    const F d_only = (P + now.dmin * B) * inverse(A);
    const F d = select(both, both_d, select(greater(d_only, zero()), d_only, now.d));
    now.dmin = half(select(both, both_dmin, now.dmin));
    now.d = half(d);
}

template <class T> AffineBlock<T::S> affine_block(const T& tile, float top, float max_scale) {
    constexpr int S = T::S, V = T::V;
    F s[S], m[S], W[S], X[S];
    AffineBlock<S> now;
    now.d = now.dmin = zero();
    for (int j = 0; j < S; j++) {
        const F *x = tile.x + j * V, *w = tile.w + j * V;
        affine<T>(x, w, top, s[j], m[j]);
        W[j] = weight_of<T>(w);
        Total t;
        _Pragma("GCC unroll 32") for (int i = 0; i < V; i++) t.add(i, T::weighed(w, i, x[i]));
        X[j] = Total::join(t);
        now.d = max(now.d, s[j]);
        now.dmin = max(now.dmin, negative(m[j]));
    }
    now.d = half(now.d / set(max_scale));
    now.dmin = half(now.dmin / set(max_scale));
    {
        const F by = inverse(now.d), by_min = inverse(now.dmin);
        for (int j = 0; j < S; j++) {
            now.scales[j] = nearest(s[j] * by, 0, max_scale);
            now.mins[j] = nearest(negative(m[j]) * by_min, 0, max_scale);
        }
    }
    AffineBlock<S> best = now;
    F lowest_error = zero();
    for (int round = 0;; round++) {
        Sums t[S];
        F error = zero();
        for (int j = 0; j < S; j++) {
            const F *x = tile.x + j * V, *w = tile.w + j * V;
            const F step = now.d * now.scales[j], low = now.dmin * now.mins[j], by = inverse(step);
            Total e;
            int at = 0;
            t[j] = sums<T>(x, w, [&](int i) {
                const F q = nearest((x[i] + low) * by, 0, top), off = step * q - low - x[i];
                e.add(at++, T::weighed(w, i, off * off));
                return q;
            });
            error = j == 0 ? Total::join(e) : error + Total::join(e);
        }
        if (round == 0) {
            lowest_error = error;
        } else {
            const I better = greater(lowest_error, error);
            best.d = select(better, now.d, best.d);
            best.dmin = select(better, now.dmin, best.dmin);
            for (int j = 0; j < S; j++) {
                best.scales[j] = select(better, now.scales[j], best.scales[j]);
                best.mins[j] = select(better, now.mins[j], best.mins[j]);
            }
            lowest_error = select(better, error, lowest_error);
        }
        if (round == ROUNDS) return best;

        fit_integers(now, t, W, X, max_scale);
        fit_halves(now, t, W, X);
    }
}

// ── value = d · scale · q ──

struct SymmetricFit {
    F s, gain;
    void consider(Sums t) {
        const F ns = t.QX * inverse(t.QQ), g = ns * t.QX;
        const I better = greater(g, gain);
        s = select(better, ns, s);
        gain = select(better, g, gain);
    }
};

INLINE F farthest(F high, F low) { return select(greater(negative(low), high), low, high); }

template <class T> INLINE F symmetric(const F* x, const F* w, float top) {
    F low = x[0], high = x[0];
    for (int i = 1; i < T::V; i++) low = min(low, x[i]), high = max(high, x[i]);
    const F step = inverse(farthest(high, low));
    SymmetricFit fit{zero(), zero()};
    const auto consider = [&](F by) {
        fit.consider(sums<T>(x, w, [&](int i) { return nearest(x[i] * by, -top, top - 1); }));
    };
    for (int k = 0; k < SPREADS; k++) {
        consider(step * set(-(top + spread(k))));
        consider(step * set(top - 1 + spread(k)));
    }
    for (int k = 0; k < FITS; k++) consider(inverse(fit.s));
    return fit.s;
}

template <int S> struct SymmetricBlock { F d, scales[S]; };

template <class T> SymmetricBlock<T::S> symmetric_block(const T& tile, float top, float max_scale) {
    constexpr int S = T::S, V = T::V;
    F s[S], high, low;
    for (int j = 0; j < S; j++) {
        s[j] = symmetric<T>(tile.x + j * V, tile.w + j * V, top);
        high = j ? max(high, s[j]) : s[j];
        low = j ? min(low, s[j]) : s[j];
    }
    SymmetricBlock<S> now;
    now.d = half(farthest(high, low) / set(-max_scale));
    for (int j = 0; j < S; j++) now.scales[j] = nearest(s[j] * inverse(now.d), -max_scale, max_scale - 1);
    SymmetricBlock<S> best = now;
    F lowest_error = zero();
    for (int round = 0;; round++) {
        Sums t[S];
        F error = zero();
        for (int j = 0; j < S; j++) {
            const F *x = tile.x + j * V, *w = tile.w + j * V;
            const F step = now.d * now.scales[j], by = inverse(step);
            Total e;
            int at = 0;
            t[j] = sums<T>(x, w, [&](int i) {
                const F q = nearest(x[i] * by, -top, top - 1), off = step * q - x[i];
                e.add(at++, T::weighed(w, i, off * off));
                return q;
            });
            error = j == 0 ? Total::join(e) : error + Total::join(e);
        }
        if (round == 0) {
            lowest_error = error;
        } else {
            const I better = greater(lowest_error, error);
            best.d = select(better, now.d, best.d);
            for (int j = 0; j < S; j++) best.scales[j] = select(better, now.scales[j], best.scales[j]);
            lowest_error = select(better, error, lowest_error);
        }
        if (round == ROUNDS) return best;
        F A, P;
        for (int j = 0; j < S; j++) {
            const F sc = nearest(t[j].QX * inverse(t[j].QQ) * inverse(now.d), -max_scale, max_scale - 1);
            const F a = sc * sc * t[j].QQ, p = sc * t[j].QX;
            now.scales[j] = sc;
            A = j ? A + a : a, P = j ? P + p : p;
        }
        const F fitted = P * inverse(A);
        now.d = half(select(greater(abs(fitted), zero()), fitted, now.d));
    }
}

// ── bytes: kquants.py draws them ──

struct Fields {  // what the sixteen blocks are made of, one after another
    uint8_t q[LANES][BLOCK];
    uint8_t scales[LANES][16], mins[LANES][16];
    Halves d, dmin;
};

INLINE void spill(uint8_t* first, int stride, F x) {
    int32_t v[LANES];
    storei(v, round(x));
    for (int i = 0; i < LANES; i++) first[i * stride] = (uint8_t)v[i];
}

template <class T> INLINE void affine_fields(const T& tile, float top, float max_scale, Fields& f) {
    const AffineBlock<T::S> b = affine_block(tile, top, max_scale);
    for (int j = 0; j < T::S; j++) {
        const F step = b.d * b.scales[j], low = b.dmin * b.mins[j], by = inverse(step);
        spill(&f.scales[0][j], 16, b.scales[j]);
        spill(&f.mins[0][j], 16, b.mins[j]);
        for (int i = j * T::V; i < (j + 1) * T::V; i++) spill(&f.q[0][i], BLOCK, nearest((tile.x[i] + low) * by, 0, top));
    }
    f.d = halves(b.d);
    f.dmin = halves(b.dmin);
}

template <class T> INLINE void symmetric_fields(const T& tile, float top, float max_scale, float from, Fields& f) {
    const SymmetricBlock<T::S> b = symmetric_block(tile, top, max_scale);
    for (int j = 0; j < T::S; j++) {
        const F by = inverse(b.d * b.scales[j]);
        spill(&f.scales[0][j], 16, b.scales[j] + set(from));
        for (int i = j * T::V; i < (j + 1) * T::V; i++)
            spill(&f.q[0][i], BLOCK, nearest(tile.x[i] * by, -top, top - 1) + set(top));
    }
    f.d = halves(b.d);
}

// `bits` of q above `shift`, in runs of `width` bytes: the lowest fields of all bytes first
INLINE void join_fields(const uint8_t* q, int shift, int bits, int width, int count, uint8_t* out) {
    const int per = 8 / bits, mask = (1 << bits) - 1;
    for (int run = 0; run < count / (width * per); run++)
        for (int i = 0; i < width; i++) {
            int b = 0;
            for (int k = 0; k < per; k++) b |= ((q[(run * per + k) * width + i] >> shift) & mask) << (bits * k);
            out[run * width + i] = (uint8_t)b;
        }
}

INLINE void scales_and_mins(const uint8_t* s, const uint8_t* m, uint8_t* out) {
    for (int i = 0; i < 4; i++) {
        out[i] = (uint8_t)(s[i] | (s[i + 4] >> 4) << 6);
        out[i + 4] = (uint8_t)(m[i] | (m[i + 4] >> 4) << 6);
        out[i + 8] = (uint8_t)((s[i + 4] & 15) | (m[i + 4] & 15) << 4);
    }
}

void write_block(int type, const Fields& f, int lane, uint8_t* out) {
    const uint8_t *q = f.q[lane], *s = f.scales[lane], *m = f.mins[lane];
    const uint16_t *d = &f.d.bits[lane], *dmin = &f.dmin.bits[lane];
    switch (type) {
    case FORMAT_Q2_K:
        for (int j = 0; j < 16; j++) out[j] = (uint8_t)(s[j] | m[j] << 4);
        join_fields(q, 0, 2, 32, BLOCK, out + 16);
        memcpy(out + 80, d, 2);
        memcpy(out + 82, dmin, 2);
        return;
    case FORMAT_Q3_K:
        join_fields(q, 2, 1, 32, BLOCK, out);
        join_fields(q, 0, 2, 32, BLOCK, out + 32);
        join_fields(s, 0, 4, 8, 16, out + 96);
        join_fields(s, 4, 2, 4, 16, out + 104);
        memcpy(out + 108, d, 2);
        return;
    case FORMAT_Q4_K:
        memcpy(out, d, 2);
        memcpy(out + 2, dmin, 2);
        scales_and_mins(s, m, out + 4);
        join_fields(q, 0, 4, 32, BLOCK, out + 16);
        return;
    case FORMAT_Q5_K:
        memcpy(out, d, 2);
        memcpy(out + 2, dmin, 2);
        scales_and_mins(s, m, out + 4);
        join_fields(q, 4, 1, 32, BLOCK, out + 16);
        join_fields(q, 0, 4, 32, BLOCK, out + 48);
        return;
    case FORMAT_Q6_K:
        join_fields(q, 0, 4, 64, BLOCK, out);
        join_fields(q, 4, 2, 32, BLOCK, out + 128);
        memcpy(out + 192, s, 16);
        memcpy(out + 208, d, 2);
        return;
    }
}

template <bool WEIGHTED> void quantize_tile(int type, const F* x, const F* w, Fields& f) {
    using Small = Tile<16, 16, WEIGHTED>;
    using Large = Tile<8, 32, WEIGHTED>;
    switch (type) {
    case FORMAT_Q2_K: return affine_fields(Small{x, w}, 3, 15, f);
    case FORMAT_Q3_K: return symmetric_fields(Small{x, w}, 4, 32, 32, f);
    case FORMAT_Q4_K: return affine_fields(Large{x, w}, 15, 63, f);
    case FORMAT_Q5_K: return affine_fields(Large{x, w}, 31, 63, f);
    case FORMAT_Q6_K: return symmetric_fields(Small{x, w}, 32, 128, 0, f);
    }
}

// sixteen blocks side by side; lanes beyond `count` are zero
template <class At> INLINE void load_blocks(F* into, int count, At at) {
    for (int i = 0; i < BLOCK; i++) {
        float v[LANES] = {};
        for (int lane = 0; lane < count; lane++) v[lane] = at(lane)[i];
        into[i] = load(v);
    }
}

constexpr int BYTES[] = {84, 110, 144, 176, 210};  // Q2_K … Q6_K, in the order of Format

struct Scratch { F x[BLOCK], w[BLOCK]; Fields fields; };

}  // namespace

void quantize(const void* args, Worker& worker) {
    const Quantize& a = *(const Quantize*)args;
    const i64 per_row = a.width / BLOCK, blocks = a.rows * per_row;
    Scratch& room = *(Scratch*)worker.scratch(sizeof(Scratch));
    for (i64 tile; (tile = worker.next_tile((blocks + LANES - 1) / LANES)) >= 0;) {
        const i64 first = tile * LANES;
        const int count = (int)(blocks - first < LANES ? blocks - first : LANES);
        load_blocks(room.x, count, [&](int lane) { return a.x + (first + lane) * BLOCK; });
        if (a.importance) {
            load_blocks(room.w, count, [&](int lane) { return a.importance + (first + lane) % per_row * BLOCK; });
            quantize_tile<true>(a.type, room.x, room.w, room.fields);
        } else {
            quantize_tile<false>(a.type, room.x, room.w, room.fields);
        }
        for (int lane = 0; lane < count; lane++)
            write_block(a.type, room.fields, lane, a.out + (first + lane) * BYTES[a.type - FORMAT_Q2_K]);
    }
}

REGISTER_KERNEL("quantize", quantize);

}  // namespace ISA

#endif
