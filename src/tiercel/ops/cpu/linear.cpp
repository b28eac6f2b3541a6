// Matrix products: y = x Wᵀ, W in panels of sixteen rows.
//
//   packed   the input is rounded to eight bits, one scale for 32 values:  y = Σ_blocks  a · (s · Σ q x + …)
//   exact    the same weights as float32 numbers, inputs as they are
//   bf16     inputs rounded to bfloat16, products and sums in float32; W in sixteen bits or in twelve (twelve.h)
//   f32
//
// One row, few rows and many go through the same operations on every output, in the same order over K: a token's
// result does not depend on who shares the batch.  Few rows read the blocks as they lie; more unpack a panel into the
// cache first, K_PIECE inputs at a time.
#include "dots.h"
#include "formats.h"
#include "twelve.h"

#include <math.h>

namespace ISA {

#if defined(TIERCEL_AVX512)
constexpr int TILE = 12;
#else
constexpr int TILE = 4;
#endif

// tokens t … go through a tile of this many: the largest that fit
INLINE int tile_at(i64 left) {
    return left >= TILE ? TILE : left >= 8 && TILE > 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// the code with M = m, one of these sizes
#define WITH_TILE(m, ...)                                        \
    do {                                                         \
        if (TILE > 8 && (m) == TILE) { constexpr int M = TILE; __VA_ARGS__; } \
        else if (TILE > 8 && (m) == 8) { constexpr int M = TILE > 8 ? 8 : 1; __VA_ARGS__; } \
        else if ((m) == 4) { constexpr int M = 4; __VA_ARGS__; }  \
        else if ((m) == 2) { constexpr int M = 2; __VA_ARGS__; }  \
        else { constexpr int M = 1; __VA_ARGS__; }                \
    } while (0)

// ── inputs in eight bits ──
//
// For a tile of M tokens and every 32 inputs, one after another:
//     int8 q[M][32] · float a[M] · int32 z[M][Z] · float f[M][Z]        Z = 32 / SUB
// x ≈ a · q;  z = −ZERO · Σ q  over SUB inputs;  f = a · Σ q,  what o is multiplied by

constexpr i64 token_bytes(int sub) { return 36 + 8 * (32 / sub); }

INLINE void round_block(const float* x, int n, int sub, int zero_point, int8_t* q, float* a, int32_t* z, float* f) {
    const F v0 = n >= 16 ? load(x) : load_some(x, n), v1 = n >= 32 ? load(x + 16) : n > 16 ? load_some(x + 16, n - 16) : zero();
    const int32_t most = maximum(max(as_int(abs(v0)), as_int(abs(v1))));  // as integers: NaN is the largest of all
    float largest;
    memcpy(&largest, &most, 4);
    const bool finite = most < 0x7f800000;
    *a = finite ? largest * (1.0f / 127.0f) : NAN;
    const F scale = set(largest > 1e-36f && finite ? 127.0f / largest : 0.0f);
    const I q0 = finite ? round(v0 * scale) : seti(0), q1 = finite ? round(v1 * scale) : seti(0);
    store_bytes(q, q0);
    store_bytes(q + 16, q1);
    if (sub == 32) {
        const int32_t total = sum(q0 + q1);
        z[0] = -zero_point * total;
        f[0] = *a * (float)total;
    } else {
        const int32_t total[2] = {sum(q0), sum(q1)};
        for (int h = 0; h < 2; h++) {
            z[h] = -zero_point * total[h];
            f[h] = *a * (float)total[h];
        }
    }
}

// the tile of M tokens that begins at x (rows `stride` apart)
INLINE void round_tile(const float* x, i64 stride, i64 K, int M, int sub, int zero_point, uint8_t* out) {
    const int Z = 32 / sub;
    for (i64 k = 0; k < K; k += 32, out += M * token_bytes(sub)) {
        float* a = (float*)(out + 32 * M);
        int32_t* z = (int32_t*)(a + M);
        float* f = (float*)(z + Z * M);
        for (int m = 0; m < M; m++)
            round_block(x + m * stride + k, K - k < 32 ? K - k : 32, sub, zero_point, (int8_t*)out + 32 * m, a + m, z + Z * m, f + Z * m);
    }
}

// ── one block of 32 inputs, sixteen rows, M tokens ──

template <class Q, int M> INLINE void block(const I* q, const F* s, const F* o, const uint8_t* in, F* acc) {
    constexpr int Z = 32 / Q::SUB;
    const float* a = (const float*)(in + 32 * M);
    const int32_t* z = (const int32_t*)(a + M);
    const float* f = (const float*)(z + Z * M);
    I sums[M];
    F total[M];
    dots<Q::MOST, 0, 8 / Z, M>(q, (const int8_t*)in, sums);
    for (int m = 0; m < M; m++) total[m] = to_float(Q::ZERO ? sums[m] + seti(z[Z * m]) : sums[m]) * s[0];
    if constexpr (Z == 2) {
        dots<Q::MOST, 4, 8, M>(q, (const int8_t*)in, sums);
        for (int m = 0; m < M; m++) total[m] = fma(to_float(Q::ZERO ? sums[m] + seti(z[2 * m + 1]) : sums[m]), s[1], total[m]);
    }
    for (int m = 0; m < M; m++) {
        acc[m] = fma(total[m], set(a[m]), acc[m]);
        if constexpr (Q::AFFINE)
            for (int h = 0; h < Z; h++) acc[m] = fma(o[h], set(f[Z * m + h]), acc[m]);
    }
}

// ── out ──

INLINE void finish(const Linear& a, i64 token, i64 panel, F y) {
    const i64 n = panel * 16, rest = a.outputs - n;
    if (a.scale != 1.0f) y = y * set(a.scale);
    if (a.bias) y = y + (rest >= 16 ? load(a.bias + n) : load_some(a.bias + n, rest));
    float* to = a.y + token * a.outputs + n;
    if (rest >= 16) store(to, y);
    else store_some(to, y, rest);
}

INLINE F partial(const Linear& a, i64 token, i64 panel) {
    const float* at = a.y + token * a.outputs + panel * 16;
    const i64 rest = a.outputs - panel * 16;
    return rest >= 16 ? load(at) : load_some(at, rest);
}

INLINE void keep(const Linear& a, i64 token, i64 panel, F y) {
    float* at = a.y + token * a.outputs + panel * 16;
    const i64 rest = a.outputs - panel * 16;
    if (rest >= 16) store(at, y);
    else store_some(at, y, rest);
}

// ── few rows: blocks are taken as they lie ──

constexpr i64 PANELS = 16;         // taken at a time: at the start of a piece nothing has been fetched yet
constexpr i64 DISTANCE = 1024;     // bytes fetched ahead: the processor's own fetching stops at every page
constexpr i64 FEW = TILE;          // more rows are worth a panel unpacked in the cache
constexpr i64 TOKENS = 16 * 12;    // tokens that share an unpacked panel: whole tiles

INLINE i64 pieces_of(const Linear& a, const Team& team) {
    const i64 each = (a.outputs + 15) / 16 / (2 * team.size);
    return each < 1 ? 1 : each > PANELS ? PANELS : each;
}

// work(begin, end, panel) for tokens in parts of TOKENS and panels `each` in a row
template <class Work> INLINE void each_panel(const Linear& a, Team& team, i64 each, Work work) {
    const i64 panels = (a.outputs + 15) / 16, groups = (panels + each - 1) / each, parts = (a.tokens + TOKENS - 1) / TOKENS;
    for (i64 piece; (piece = team.take(groups * parts)) >= 0;) {
        const i64 begin = piece % parts * TOKENS, end = begin + TOKENS < a.tokens ? begin + TOKENS : a.tokens;
        const i64 first = piece / parts * each, last = first + each < panels ? first + each : panels;
        for (i64 p = first; p < last; p++) work(begin, end, p);
    }
}

// M tokens (a tile) with one panel
template <class Q, int M> INLINE void direct(const uint8_t* panel, i64 all32, const uint8_t* in, bool fresh, F* acc) {
    constexpr int Z = 32 / Q::SUB, PARTS32 = Q::BLOCK / 32, EACH32 = BLOCK_BYTES<Q> / PARTS32;
    for (int m = 0; m < M; m++) acc[m] = zero();
    for (i64 b = 0; b * PARTS32 < all32; b++) {
        F s[SCALES<Q>], o[SCALES<Q>];
        block_scales<Q>(panel, b, s, o);
        const int parts = all32 - b * PARTS32 < PARTS32 ? all32 - b * PARTS32 : PARTS32;
#pragma GCC unroll 1
        for (int part = 0; part < parts; part++, in += M * token_bytes(Q::SUB)) {
            if (fresh)
                for (int i = 0; i < (EACH32 + 63) / 64; i++)
                    __builtin_prefetch(panel + b * BLOCK_BYTES<Q> + part * EACH32 + i * 64 + DISTANCE, 0, 3);
            I q[8];
            block_quants<Q>(panel, b, part, q);
            block<Q, M>(q, s + Z * part, o + Z * part, in, acc);
        }
    }
}

template <class Q> void few_rows(const Linear& a, Team& team) {
    const i64 all32 = (a.inputs + 31) / 32, bytes = panel_bytes<Q>(a.inputs);
    const uint8_t* in = a.rounded;
    each_panel(a, team, pieces_of(a, team), [&](i64 begin, i64 end, i64 p) {
        if (in == nullptr) {  // one row, which every thread rounds for itself: sooner done than waited for
            uint8_t* mine = (uint8_t*)team.scratch(all32 * token_bytes(Q::SUB));
            round_tile(a.x, 0, a.inputs, 1, Q::SUB, Q::ZERO, mine);
            in = mine;
        }
        for (i64 t = begin; t < end;) {
            const int m = tile_at(end - t);
            F acc[TILE];
            WITH_TILE(m, (direct<Q, M>(a.weight + p * bytes, all32, in + t * all32 * token_bytes(Q::SUB), t == begin, acc)));
            for (int i = 0; i < m; i++) finish(a, t + i, p, acc[i]);
            t += m;
        }
    });
}

// ── many rows: a panel is unpacked first ──

constexpr i64 K_PIECE = 1024;    // inputs unpacked at a time, 24 KB: a multiple of every block, and at home in L1

constexpr int AHEAD = 6;         // lines fetched during 32 inputs of a tile: what is unpacked next, while there is time

struct Unpacked {  // 32 inputs of one panel
    I q[8];
    F s[2], o[2];
};

template <class Q> void unpack(const uint8_t* panel, i64 first, i64 last, Unpacked* out) {
    constexpr int Z = 32 / Q::SUB;
    for (i64 b = first; b < last; b++) {
        F s[SCALES<Q>], o[SCALES<Q>];
        block_scales<Q>(panel, b, s, o);
        for (int part = 0; part < Q::BLOCK / 32; part++, out++) {
            block_quants<Q>(panel, b, part, out->q);
            for (int h = 0; h < Z; h++) {
                out->s[h] = s[Z * part + h];
                if constexpr (Q::AFFINE) out->o[h] = o[Z * part + h];
            }
        }
    }
}

template <class Q, int M>
__attribute__((noinline)) void tile(const Unpacked* w, const uint8_t* in, i64 count, F* acc, const char* later, int ahead) {
    F sum[M];
    for (int m = 0; m < M; m++) sum[m] = acc[m];
    for (i64 i = 0; i < count; i++, w++, in += M * token_bytes(Q::SUB)) {
        for (int j = 0; j < ahead; j++) __builtin_prefetch(later + (i * ahead + j) * 64, 0, 2);
        block<Q, M>(w->q, w->s, w->o, in, sum);
    }
    for (int m = 0; m < M; m++) acc[m] = sum[m];
}

template <class Q> void many_rows(const Linear& a, Team& team) {
    const i64 blocks = (a.inputs + Q::BLOCK - 1) / Q::BLOCK, bytes = panel_bytes<Q>(a.inputs);
    const i64 piece_blocks = K_PIECE / Q::BLOCK, all32 = (a.inputs + 31) / 32;
    // not so many tokens: several panels in a row, so that what is fetched ahead is this thread's own
    const i64 each = a.tokens > 32 ? 1 : pieces_of(a, team);
    Unpacked* w = nullptr;
    each_panel(a, team, each, [&](i64 begin, i64 end, i64 p) {
        if (w == nullptr) w = (Unpacked*)team.scratch(K_PIECE / 32 * sizeof(Unpacked));
        for (i64 b = 0; b < blocks; b += piece_blocks) {
            const i64 stop = b + piece_blocks < blocks ? b + piece_blocks : blocks;
            const i64 k32 = b * (Q::BLOCK / 32);
            const i64 some = (stop * (Q::BLOCK / 32) < all32 ? stop * (Q::BLOCK / 32) : all32) - k32;
            const char* later = (const char*)a.weight + p * bytes + stop * BLOCK_BYTES<Q>;
            unpack<Q>(a.weight + p * bytes, b, stop, w);
            for (i64 t = begin; t < end;) {
                const int m = tile_at(end - t);
                const uint8_t* in = a.rounded + (t * all32 + m * k32) * token_bytes(Q::SUB);
                F acc[TILE];
                for (int i = 0; i < m; i++) acc[i] = b == 0 ? zero() : partial(a, t + i, p);
                WITH_TILE(m, (tile<Q, M>(w, in, some, acc, later, t == begin ? AHEAD : 0)));
                for (int i = 0; i < m; i++) {
                    if (stop == blocks) finish(a, t + i, p, acc[i]);
                    else keep(a, t + i, p, acc[i]);
                }
                t += m;
            }
        }
    });
}

void linear(const void* args, Team& team) {
    const Linear& a = *(const Linear*)args;
    if (a.tokens <= FEW) { WITH_FORMAT(a.format, few_rows<Q>(a, team)) }
    else { WITH_FORMAT(a.format, many_rows<Q>(a, team)) }
}

void round_inputs(const void* args, Team& team) {
    const RoundInputs& a = *(const RoundInputs*)args;
    const i64 bytes = (a.inputs + 31) / 32 * token_bytes(a.sub);
    for (i64 piece; (piece = team.take((a.tokens + TILE - 1) / TILE)) >= 0;)
        for (i64 t = piece * TILE; t < a.tokens && t < (piece + 1) * TILE;) {
            const int m = tile_at(a.tokens - t);
            round_tile(a.x + t * a.inputs, a.inputs, a.inputs, m, a.sub, a.zero, a.out + t * bytes);
            t += m;
        }
}

// ── numbers: float32 and bfloat16 matrices, and packed ones made float32 ──
//
// A panel of numbers has sixteen rows' values for one input (f32), or for two (bf16, an odd last one with zero).

template <class Q> INLINE void block_values(const uint8_t* panel, i64 b, int part, const F* s, const F* o, F* v) {
    I q[8];
    if constexpr (LEVELS<Q>) {
        quants<Q::PLANES_>(panel + b * BLOCK_BYTES<Q> + Q::HEAD + part * plane_bytes(Q::PLANES_), q);
        const F most = load((const float*)(panel + b * BLOCK_BYTES<Q>));
        for (int k = 0; k < 32; k++) {
            int32_t n[16];
            float x[16];
            storei(n, byte(q[k / 4], k % 4));
            for (int i = 0; i < 16; i++) x[i] = NF4_LEVELS[n[i]];
            v[k] = load((const float*)x) * most;
        }
        return;
    }
    block_quants<Q>(panel, b, part, q);
    for (int k = 0; k < 32; k++) {
        const I n = byte(q[k / 4], k % 4);
        const int h = k / Q::SUB;
        v[k] = Q::AFFINE ? to_float(n) * s[h] + o[h] : to_float(n - seti(Q::ZERO)) * s[h];
    }
}

// inputs first … last − 1 of a panel as float32, sixteen rows for each; first is a multiple of K_PIECE
void panel_values(int format, const uint8_t* weight, i64 inputs, i64 p, i64 first, i64 last, F* out) {
    if (format == FORMAT_F32) {
        const float* from = (const float*)weight + p * 16 * inputs;
        for (i64 k = first; k < last; k++) *out++ = load(from + 16 * k);
    } else if (format == FORMAT_BF16) {
        const uint8_t* from = weight + p * 32 * ((inputs + 1) / 2 * 2);
        for (i64 k = first; k < last; k++) {
            const I pair = loadi(from + k / 2 * 64);
            *out++ = as_float(k % 2 ? pair & seti((int)0xffff0000) : shl(pair, 16));
        }
    } else if (format == FORMAT_BF16_12) {
        Twelve t = Twelve::begin(twelve_panel(weight, p), (inputs + 1) / 2);
        t.skip(first / 8);
        for (i64 k = first; k < last; k += 8)
            t.next([&](int j, I pair) {
                if (k + 2 * j < last) *out++ = as_float(shl(pair, 16));
                if (k + 2 * j + 1 < last) *out++ = as_float(pair & seti((int)0xffff0000));
            });
    } else {
        WITH_FORMAT(format, {
            constexpr int Z = 32 / Q::SUB;
            const uint8_t* panel = weight + p * panel_bytes<Q>(inputs);
            for (i64 b = first / Q::BLOCK; b * Q::BLOCK < last; b++) {
                F s[SCALES<Q>], o[SCALES<Q>], v[32];
                block_scales<Q>(panel, b, s, o);
                for (int part = 0; part < Q::BLOCK / 32; part++) {
                    block_values<Q>(panel, b, part, s + Z * part, o + Z * part, v);
                    for (int k = 0; k < 32; k++)
                        if (b * Q::BLOCK + part * 32 + k < last) *out++ = v[k];
                }
            }
        })
    }
}

template <int M> INLINE void f32_tile(const F* w, const float* x, i64 stride, i64 count, bool fresh, F* acc) {
    F sum[M];
    for (int m = 0; m < M; m++) sum[m] = acc[m];
    for (i64 k = 0; k < count; k++) {
        if (fresh) __builtin_prefetch((const char*)(w + k) + DISTANCE, 0, 3);
        for (int m = 0; m < M; m++) sum[m] = fma(w[k], set(x[m * stride + k]), sum[m]);
    }
    for (int m = 0; m < M; m++) acc[m] = sum[m];
}

INLINE void round_row(const float* x, i64 inputs, bf16* out) {  // in pairs: an odd last one with zero
    i64 k = 0;
    for (; k + 16 <= inputs; k += 16) store(out + k, load(x + k));
    for (; k < inputs; k++) out[k] = to_bf16(x[k]);
    if (inputs % 2) out[inputs] = 0;
}

// two inputs of sixteen rows with M tokens; x: pairs of bf16, token after token (`stride` pairs apart)
template <int M> INLINE void add_pair(I pair, const uint32_t* x, i64 stride, F* sum) {
#if defined(TIERCEL_AVX512)
    for (int m = 0; m < M; m++)
        sum[m].p[0] = (vf)_mm512_dpbf16_ps((__m512)sum[m].p[0], (__m512bh)pair.p[0], (__m512bh)_mm512_set1_epi32(x[m * stride]));
#else
    const F even = as_float(shl(pair, 16)), odd = as_float(pair & seti((int)0xffff0000));
    for (int m = 0; m < M; m++) {
        const uint32_t b = x[m * stride], low = b << 16, high = b & 0xffff0000u;
        float e, o;
        memcpy(&e, &low, 4);
        memcpy(&o, &high, 4);
        sum[m] = fma(even, set(e), sum[m]);
        sum[m] = fma(odd, set(o), sum[m]);
    }
#endif
}

// Sums of bf16 products: pairs in turn, so that one row need not wait for its last product before the next.
#if defined(TIERCEL_AVX512)
constexpr int TURNS = 2;
#else
constexpr int TURNS = 1;
#endif

template <int M> INLINE void start_sums(F (*sum)[M]) {
    for (int i = 0; i < TURNS; i++)
        for (int m = 0; m < M; m++) sum[i][m] = zero();
}
template <int M> INLINE void end_sums(F (*sum)[M], F* acc) {
    for (int m = 0; m < M; m++) acc[m] = TURNS == 2 ? sum[0][m] + sum[TURNS - 1][m] : sum[0][m];
}

template <int M> INLINE void bf16_tile(const uint8_t* w, const uint32_t* x, i64 stride, i64 pairs, bool fresh, F* acc) {
    F sum[TURNS][M];
    start_sums<M>(sum);
    if constexpr (M > 4) {  // one turn after the other: both together are slower, in most of the registers
        for (int i = 0; i < TURNS; i++) {
            F one[M];
            for (int m = 0; m < M; m++) one[m] = zero();
            for (i64 k = i; k < pairs; k += TURNS) {
                if (fresh) __builtin_prefetch(w + 64 * k + DISTANCE, 0, 3);
                add_pair<M>(loadi(w + 64 * k), x + k, stride, one);
            }
            for (int m = 0; m < M; m++) sum[i][m] = one[m];
        }
    } else {
        for (i64 k = 0; k < pairs; k++) {
            if (fresh) __builtin_prefetch(w + 64 * k + DISTANCE, 0, 3);
            if (k % TURNS) add_pair<M>(loadi(w + 64 * k), x + k, stride, sum[TURNS - 1]);
            else add_pair<M>(loadi(w + 64 * k), x + k, stride, sum[0]);
        }
    }
    end_sums<M>(sum, acc);
}

// the same sums from twelve bits; `wide`: where they are kept in sixteen for the tiles that follow, or nullptr
template <int M> INLINE void twelve_tile(const uint8_t* w, const uint32_t* x, i64 stride, i64 pairs, uint8_t* wide, F* acc) {
    F sum[TURNS][M];
    start_sums<M>(sum);
    Twelve t = Twelve::begin(w, pairs);
    for (i64 k = 0; k < pairs; k += 4) {
        for (int i = 0; i < SHORT / 64; i++) __builtin_prefetch(t.at + 64 * i + 2 * DISTANCE, 0, 3);
        const bool whole = k + 4 <= pairs;
        t.next([&](int j, I pair) {
            if (!whole && k + j >= pairs) return;
            if (wide) storei(wide + 64 * (k + j), pair);
            add_pair<M>(pair, x + k + j, stride, sum[j % TURNS]);
        });
    }
    end_sums<M>(sum, acc);
}

void linear_f32(const void* args, Team& team) {
    const Linear& a = *(const Linear*)args;
    const bool direct = a.format == FORMAT_F32;  // lies in the form that is multiplied
    F* values = nullptr;
    each_panel(a, team, direct && a.tokens <= FEW ? pieces_of(a, team) : 1, [&](i64 begin, i64 end, i64 p) {
        if (values == nullptr && !direct) values = (F*)team.scratch(K_PIECE * sizeof(F));
        for (i64 k = 0; k < a.inputs; k += K_PIECE) {
            const i64 stop = k + K_PIECE < a.inputs ? k + K_PIECE : a.inputs;
            const F* w = direct ? (const F*)((const float*)a.weight + (p * a.inputs + k) * 16) : values;
            if (!direct) panel_values(a.format, a.weight, a.inputs, p, k, stop, values);
            for (i64 t = begin; t < end;) {
                const int m = tile_at(end - t);
                F acc[TILE];
                for (int i = 0; i < m; i++) acc[i] = k == 0 ? zero() : partial(a, t + i, p);
                WITH_TILE(m, (f32_tile<M>(w, a.x + t * a.inputs + k, a.inputs, stop - k, direct && t == begin, acc)));
                for (int i = 0; i < m; i++) {
                    if (stop == a.inputs) finish(a, t + i, p, acc[i]);
                    else keep(a, t + i, p, acc[i]);
                }
                t += m;
            }
        }
    });
}

void linear_bf16(const void* args, Team& team) {
    const Linear& a = *(const Linear*)args;
    const i64 pairs = (a.inputs + 1) / 2;
    const bool twelve = a.format == FORMAT_BF16_12, again = a.tokens > tile_at(a.tokens);
    const uint32_t* x = (const uint32_t*)a.rounded;
    uint8_t* wide = nullptr;
    each_panel(a, team, a.tokens > FEW ? 1 : pieces_of(a, team), [&](i64 begin, i64 end, i64 p) {
        if (x == nullptr) {  // one row
            uint32_t* mine = (uint32_t*)team.scratch(pairs * 4 + 4);
            round_row(a.x, a.inputs, (bf16*)mine);
            x = mine;
        } else if (twelve && again && wide == nullptr) wide = (uint8_t*)team.scratch(pairs * 64);
        for (i64 t = begin; t < end;) {
            const int m = tile_at(end - t);
            const uint8_t* w = twelve ? wide : a.weight + p * pairs * 64;
            F acc[TILE];
            if (twelve && t == begin)
                WITH_TILE(m, (twelve_tile<M>(twelve_panel(a.weight, p), x + t * pairs, pairs, pairs, wide, acc)));
            else WITH_TILE(m, (bf16_tile<M>(w, x + t * pairs, pairs, pairs, t == begin, acc)));
            for (int i = 0; i < m; i++) finish(a, t + i, p, acc[i]);
            t += m;
        }
    });
}

void round_bf16(const void* args, Team& team) {
    const RoundInputs& a = *(const RoundInputs*)args;
    const i64 pairs = (a.inputs + 1) / 2;
    for (i64 t; (t = team.take(a.tokens)) >= 0;) round_row(a.x + t * a.inputs, a.inputs, (bf16*)a.out + t * pairs * 2);
}

// ── rows of a matrix as numbers: embeddings, and the way back ──

void rows(const void* args, Team& team) {
    const Rows& a = *(const Rows*)args;
    F* values = nullptr;
    for (i64 t; (t = team.take(a.count)) >= 0;) {
        const i64 row = a.which ? a.which[t] : t;
        if (values == nullptr) values = (F*)team.scratch(K_PIECE * sizeof(F));
        for (i64 k = 0; k < a.inputs; k += K_PIECE) {
            const i64 stop = k + K_PIECE < a.inputs ? k + K_PIECE : a.inputs;
            panel_values(a.format, a.weight, a.inputs, row / 16, k, stop, values);
            for (i64 i = k; i < stop; i++) a.y[t * a.inputs + i] = ((const float*)&values[i - k])[row % 16] * a.scale;
        }
    }
}

void linears(Kernels& k) {
    k.linear = linear;
    k.linear_f32 = linear_f32;
    k.linear_bf16 = linear_bf16;
    k.round_inputs = round_inputs;
    k.round_bf16 = round_bf16;
    k.rows = rows;
}

}  // namespace ISA
