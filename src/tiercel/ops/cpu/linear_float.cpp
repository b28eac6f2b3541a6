// Products with matrices of numbers, and with packed ones as numbers: linear.cpp says which is which.
#include "matmul.h"

namespace tiercel {

// rows of W as float32, those of `which` or the first `count`
struct GetRows { const uint8_t* weight; const i64* which; float* y; i64 inputs, count; float scale; int format; };

}  // namespace tiercel

#if defined(TIERCEL_BINDINGS)

#include "bindings.h"

namespace tiercel {

static KernelHandle inputs_to_bf16{"inputs_to_bf16"}, get_rows{"get_rows"};

BINDINGS(m) {
    m.def("inputs_to_bf16", [](Address x, Address out, i64 tokens, i64 inputs) {
        launch(inputs_to_bf16, QuantizeInputs{ptr<float>(x), ptr<uint8_t>(out), tokens, inputs, 0, 0},
               tokens * inputs < SMALL / 4, {{ptr<void>(x), tokens * inputs * f32}}, {{ptr<void>(out), 1}});
    });
    m.def("get_rows", [](Address weight, Address which, Address y, i64 inputs, i64 count, float scale, int format) {
        std::vector<Range> reads;
        if (which) reads.push_back({ptr<void>(which), count * sizeof(i64)});
        launch(get_rows, GetRows{ptr<uint8_t>(weight), ptr<i64>(which), ptr<float>(y), inputs, count, scale, format},
               count * inputs < SMALL, reads, {{ptr<void>(y), count * inputs * f32}});
    });
}

}  // namespace tiercel

#else

#include "bf12.h"
#include "formats.h"

namespace ISA {

// ── numbers: float32 and bfloat16 matrices, and packed ones made float32 ──
//
// A panel of numbers has sixteen rows' values for one input (f32), or for two (bf16, an odd last one with zero).

template <class Q> INLINE void block_values(const uint8_t* panel, i64 b, int part, const F* s, const F* o, F* v) {
    I q[8];
    if constexpr (LEVELS<Q>) {
        quants<Q::PLANES_>(panel + b * BLOCK_BYTES<Q> + Q::HEAD + part * plane_bytes(Q::PLANES_), q);
        const F scale = load((const float*)(panel + b * BLOCK_BYTES<Q>));
        for (int k = 0; k < 32; k++) {
            int32_t n[16];
            float x[16];
            storei(n, byte(q[k / 4], k % 4));
            for (int i = 0; i < 16; i++) x[i] = NF4_LEVELS[n[i]];
            v[k] = load((const float*)x) * scale;
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

// inputs first … last − 1 of a panel as float32, sixteen rows for each; first is a multiple of K_BLOCK
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
        BF12Reader t = BF12Reader::begin(bf12_panel(weight, p), (inputs + 1) / 2);
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

INLINE void row_to_bf16(const float* x, i64 inputs, bf16* out) {  // in pairs: an odd last one with zero
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

// the same sums from bf12 bits; `wide`: where they are kept in sixteen for the tiles that follow, or nullptr
template <int M> INLINE void bf12_tile(const uint8_t* w, const uint32_t* x, i64 stride, i64 pairs, uint8_t* wide, F* acc) {
    F sum[TURNS][M];
    start_sums<M>(sum);
    BF12Reader t = BF12Reader::begin(w, pairs);
    for (i64 k = 0; k < pairs; k += 4) {
        for (int i = 0; i < CODED_BYTES / 64; i++) __builtin_prefetch(t.at + 64 * i + 2 * DISTANCE, 0, 3);
        const bool whole = k + 4 <= pairs;
        t.next([&](int j, I pair) {
            if (!whole && k + j >= pairs) return;
            if (wide) storei(wide + 64 * (k + j), pair);
            add_pair<M>(pair, x + k + j, stride, sum[j % TURNS]);
        });
    }
    end_sums<M>(sum, acc);
}

i64 f32_row_bytes(const Linear& a) { return a.inputs * (i64)sizeof(float); }

void prepare_f32(const Linear& a, const float* const* rows, i64 tokens, void* out) {
    for (i64 t = 0; t < tokens; t++) memcpy((float*)out + t * a.inputs, rows[t], a.inputs * (i64)sizeof(float));
}

i64 f32_room(const Linear& a) { return a.format == FORMAT_F32 ? 0 : K_BLOCK * sizeof(F); }

void multiply_f32(const Linear& a, i64 begin, i64 end, i64 first, i64 last, void* room) {
    const bool direct = a.format == FORMAT_F32;  // lies in the form that is multiplied
    const float* x = (const float*)a.quantized;
    F* values = (F*)room;
    for (i64 p = first; p < last; p++)
        for (i64 k = 0; k < a.inputs; k += K_BLOCK) {
            const i64 stop = k + K_BLOCK < a.inputs ? k + K_BLOCK : a.inputs;
            const F* w = direct ? (const F*)((const float*)a.weight + (p * a.inputs + k) * 16) : values;
            if (!direct) panel_values(a.format, a.weight, a.inputs, p, k, stop, values);
            for (i64 t = begin; t < end;) {
                const int m = tile_at(end - t);
                F acc[TILE];
                for (int i = 0; i < m; i++) acc[i] = k == 0 ? zero() : partial(a, t + i, p);
                WITH_TILE(m, (f32_tile<M>(w, x + t * a.inputs + k, a.inputs, stop - k, direct && t == begin, acc)));
                for (int i = 0; i < m; i++) {
                    if (stop == a.inputs) finish(a, t + i, p, acc[i]);
                    else keep(a, t + i, p, acc[i]);
                }
                t += m;
            }
        }
}

extern const Method f32_method{f32_row_bytes, prepare_f32, f32_room, multiply_f32};

void linear_f32(const void* args, Worker& worker) {
    Linear a = *(const Linear*)args;
    a.quantized = (const uint8_t*)a.x;  // as they are
    multiply(a, worker, f32_method, a.format == FORMAT_F32 && a.tokens <= FEW ? panels_per_tile(a, worker) : 1);
}

i64 bf16_row_bytes(const Linear& a) { return (a.inputs + 1) / 2 * 4; }

void prepare_bf16(const Linear& a, const float* const* rows, i64 tokens, void* out) {
    for (i64 t = 0; t < tokens; t++) row_to_bf16(rows[t], a.inputs, (bf16*)((char*)out + t * bf16_row_bytes(a)));
}

i64 bf16_room(const Linear& a) {
    return a.format == FORMAT_BF16_12 && a.tokens > tile_at(a.tokens) ? (a.inputs + 1) / 2 * 64 : 0;
}

void multiply_bf16(const Linear& a, i64 begin, i64 end, i64 first, i64 last, void* room) {
    const i64 pairs = (a.inputs + 1) / 2;
    const uint32_t* x = (const uint32_t*)a.quantized;
    const bool bf12 = a.format == FORMAT_BF16_12;
    uint8_t* wide = bf16_room(a) ? (uint8_t*)room : nullptr;
    for (i64 p = first; p < last; p++)
        for (i64 t = begin; t < end;) {
            const int m = tile_at(end - t);
            const uint8_t* w = bf12 ? wide : a.weight + p * pairs * 64;
            F acc[TILE];
            if (bf12 && t == begin)
                WITH_TILE(m, (bf12_tile<M>(bf12_panel(a.weight, p), x + t * pairs, pairs, pairs, wide, acc)));
            else WITH_TILE(m, (bf16_tile<M>(w, x + t * pairs, pairs, pairs, t == begin, acc)));
            for (int i = 0; i < m; i++) finish(a, t + i, p, acc[i]);
            t += m;
        }
}

extern const Method bf16_method{bf16_row_bytes, prepare_bf16, bf16_room, multiply_bf16};

void linear_bf16(const void* args, Worker& worker) {
    const Linear& a = *(const Linear*)args;
    multiply(a, worker, bf16_method, a.tokens > FEW ? 1 : panels_per_tile(a, worker));
}

void inputs_to_bf16(const void* args, Worker& worker) {
    const QuantizeInputs& a = *(const QuantizeInputs*)args;
    const i64 pairs = (a.inputs + 1) / 2;
    for (i64 t; (t = worker.next_tile(a.tokens)) >= 0;) row_to_bf16(a.x + t * a.inputs, a.inputs, (bf16*)a.out + t * pairs * 2);
}

// ── rows of a matrix as numbers: embeddings, and gradients of inputs ──

void get_rows(const void* args, Worker& worker) {
    const GetRows& a = *(const GetRows*)args;
    F* values = nullptr;
    for (i64 t; (t = worker.next_tile(a.count)) >= 0;) {
        const i64 row = a.which ? a.which[t] : t;
        if (values == nullptr) values = (F*)worker.scratch(K_BLOCK * sizeof(F));
        for (i64 k = 0; k < a.inputs; k += K_BLOCK) {
            const i64 stop = k + K_BLOCK < a.inputs ? k + K_BLOCK : a.inputs;
            panel_values(a.format, a.weight, a.inputs, row / 16, k, stop, values);
            for (i64 i = k; i < stop; i++) a.y[t * a.inputs + i] = ((const float*)&values[i - k])[row % 16] * a.scale;
        }
    }
}

REGISTER_KERNEL("linear_f32", linear_f32);
REGISTER_KERNEL("linear_bf16", linear_bf16);
REGISTER_KERNEL("inputs_to_bf16", inputs_to_bf16);
REGISTER_KERNEL("get_rows", get_rows);

}  // namespace ISA

#endif
