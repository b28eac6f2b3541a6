// Matrix products: y = x Wᵀ, W in panels of sixteen rows.
//
//   packed   the input is quantized to int8, one scale for 32 values:  y = Σ_blocks  a · (s · Σ q x + …)
//   exact    the same weights as float32 numbers, inputs as they are
//   bf16     inputs rounded to bfloat16, products and sums in float32; W in sixteen bits or in bf12 (bf12.h)
//   f32
//
// One row, few rows and many go through the same operations on every output, in the same order over K: a token's
// result does not depend on the rest of the batch.  Few rows read the blocks in place; more unpack a panel into the
// cache first, K_BLOCK inputs at a time.
#include "matmul.h"

#if defined(TIERCEL_BINDINGS)

#include "bindings.h"

namespace tiercel {

static KernelHandle linear{"linear"}, linear_f32{"linear_f32"}, linear_bf16{"linear_bf16"};
static KernelHandle quantize_inputs{"quantize_inputs"};

BINDINGS(m) {
    m.attr("formats") = std::vector<std::string>{"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K",    "Q3_K", "Q4_K",
                                                 "Q5_K", "Q6_K", "INT8", "NF4",  "BF16", "BF16_12", "F32"};
    m.def("linear", [](Address weight, i64 weight_bytes, Address x, Address quantized, Address bias, Address y,
                       i64 inputs, i64 outputs, i64 tokens, float scale, int format, bool exact) {
        const bool bf16 = format == FORMAT_BF16 || format == FORMAT_BF16_12;
        const KernelHandle& kernel = exact || format == FORMAT_F32 ? linear_f32 : bf16 ? linear_bf16 : linear;
        std::vector<Range> reads{{ptr<void>(x), tokens * inputs * f32}};
        if (quantized) reads.push_back({ptr<void>(quantized), 1});
        launch(kernel,
               Linear{ptr<uint8_t>(weight), ptr<float>(x), ptr<uint8_t>(quantized), ptr<float>(bias), ptr<float>(y),
                      inputs, outputs, tokens, scale, format},
               weight_bytes * tokens < SMALL, reads, {{ptr<void>(y), tokens * outputs * f32}});
    });
    m.def("quantize_inputs", [](Address x, Address out, i64 tokens, i64 inputs, int sub, int zero) {
        launch(quantize_inputs, QuantizeInputs{ptr<float>(x), ptr<uint8_t>(out), tokens, inputs, sub, zero},
               tokens * inputs < SMALL / 4, {{ptr<void>(x), tokens * inputs * f32}}, {{ptr<void>(out), 1}});
    });
}

}  // namespace tiercel

#else

#include "dots.h"
#include "formats.h"

namespace ISA {

// ── inputs in eight bits ──
//
// For a tile of M tokens and every 32 inputs, one after another:
//     int8 q[M][32] · float a[M] · int32 z[M][Z] · float f[M][Z]        Z = 32 / SUB
// x ≈ a · q;  z = −ZERO · Σ q  over SUB inputs;  f = a · Σ q,  what o is multiplied by

constexpr i64 token_bytes(int sub) { return 36 + 8 * (32 / sub); }

INLINE void quantize_input_block(const float* x, int n, int sub, int zero_point, int8_t* q, float* a, int32_t* z, float* f) {
    const F v0 = n >= 16 ? load(x) : load_some(x, n), v1 = n >= 32 ? load(x + 16) : n > 16 ? load_some(x + 16, n - 16) : zero();
    const int32_t max_bits = maximum(max(as_int(abs(v0)), as_int(abs(v1))));  // as integers: NaN is the largest of all
    float largest;
    memcpy(&largest, &max_bits, 4);
    const bool finite = max_bits < 0x7f800000;
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

// a tile of M tokens
INLINE void quantize_input_tile(const float* const* rows, i64 K, int M, int sub, int zero_point, uint8_t* out) {
    const int Z = 32 / sub;
    for (i64 k = 0; k < K; k += 32, out += M * token_bytes(sub)) {
        float* a = (float*)(out + 32 * M);
        int32_t* z = (int32_t*)(a + M);
        float* f = (float*)(z + Z * M);
        for (int m = 0; m < M; m++)
            quantize_input_block(rows[m] + k, K - k < 32 ? K - k : 32, sub, zero_point, (int8_t*)out + 32 * m, a + m, z + Z * m, f + Z * m);
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
    dots<Q::MAX_QUANT, 0, 8 / Z, M>(q, (const int8_t*)in, sums);
    for (int m = 0; m < M; m++) total[m] = to_float(Q::ZERO ? sums[m] + seti(z[Z * m]) : sums[m]) * s[0];
    if constexpr (Z == 2) {
        dots<Q::MAX_QUANT, 4, 8, M>(q, (const int8_t*)in, sums);
        for (int m = 0; m < M; m++) total[m] = fma(to_float(Q::ZERO ? sums[m] + seti(z[2 * m + 1]) : sums[m]), s[1], total[m]);
    }
    for (int m = 0; m < M; m++) {
        acc[m] = fma(total[m], set(a[m]), acc[m]);
        if constexpr (Q::AFFINE)
            for (int h = 0; h < Z; h++) acc[m] = fma(o[h], set(f[Z * m + h]), acc[m]);
    }
}

// ── few rows: blocks in place ──

// M tokens (a tile) with one panel
template <class Q, int M> INLINE void direct(const uint8_t* panel, i64 all32, const uint8_t* in, bool fresh, F* acc) {
    constexpr int Z = 32 / Q::SUB, PARTS32 = Q::BLOCK / 32, EACH32 = BLOCK_BYTES<Q> / PARTS32;
    for (int m = 0; m < M; m++) acc[m] = zero();
    for (i64 b = 0; b * PARTS32 < all32; b++) {
        F s[SCALES<Q>], o[SCALES<Q>];
        block_scales<Q>(panel, b, s, o);
        const int sub_blocks = all32 - b * PARTS32 < PARTS32 ? all32 - b * PARTS32 : PARTS32;
#pragma GCC unroll 1
        for (int part = 0; part < sub_blocks; part++, in += M * token_bytes(Q::SUB)) {
            if (fresh)
                for (int i = 0; i < (EACH32 + 63) / 64; i++)
                    __builtin_prefetch(panel + b * BLOCK_BYTES<Q> + part * EACH32 + i * 64 + DISTANCE, 0, 3);
            I q[8];
            block_quants<Q>(panel, b, part, q);
            block<Q, M>(q, s + Z * part, o + Z * part, in, acc);
        }
    }
}

template <class Q> void few_rows(const Linear& a, i64 begin, i64 end, i64 first, i64 last) {
    const i64 all32 = (a.inputs + 31) / 32, bytes = panel_bytes<Q>(a.inputs);
    for (i64 p = first; p < last; p++)
        for (i64 t = begin; t < end;) {
            const int m = tile_at(end - t);
            const uint8_t* in = a.quantized + t * all32 * token_bytes(Q::SUB);
            F acc[TILE];
            WITH_TILE(m, (direct<Q, M>(a.weight + p * bytes, all32, in, t == begin, acc)));
            for (int i = 0; i < m; i++) finish(a, t + i, p, acc[i]);
            t += m;
        }
}

// ── many rows: a panel is unpacked first ──

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

template <class Q> void many_rows(const Linear& a, i64 begin, i64 end, i64 first, i64 last, Unpacked* w) {
    const i64 blocks = (a.inputs + Q::BLOCK - 1) / Q::BLOCK, bytes = panel_bytes<Q>(a.inputs);
    const i64 k_blocks = K_BLOCK / Q::BLOCK, all32 = (a.inputs + 31) / 32;
    for (i64 p = first; p < last; p++)
        for (i64 b = 0; b < blocks; b += k_blocks) {
            const i64 stop = b + k_blocks < blocks ? b + k_blocks : blocks;
            const i64 k32 = b * (Q::BLOCK / 32);
            const i64 some = (stop * (Q::BLOCK / 32) < all32 ? stop * (Q::BLOCK / 32) : all32) - k32;
            const char* later = (const char*)a.weight + p * bytes + stop * BLOCK_BYTES<Q>;
            unpack<Q>(a.weight + p * bytes, b, stop, w);
            for (i64 t = begin; t < end;) {
                const int m = tile_at(end - t);
                const uint8_t* in = a.quantized + (t * all32 + m * k32) * token_bytes(Q::SUB);
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
}

i64 packed_row_bytes(const Linear& a) {
    WITH_FORMAT(a.format, return (a.inputs + 31) / 32 * token_bytes(Q::SUB))
    return 0;
}

void quantize_rows(const float* const* rows, i64 tokens, i64 inputs, int sub, int zero, uint8_t* out) {
    const i64 bytes = (inputs + 31) / 32 * token_bytes(sub);
    for (i64 t = 0; t < tokens;) {
        const int m = tile_at(tokens - t);
        quantize_input_tile(rows + t, inputs, m, sub, zero, out + t * bytes);
        t += m;
    }
}

void prepare_packed(const Linear& a, const float* const* rows, i64 tokens, void* out) {
    WITH_FORMAT(a.format, quantize_rows(rows, tokens, a.inputs, Q::SUB, Q::ZERO, (uint8_t*)out))
}

i64 packed_room(const Linear& a) { return a.tokens <= FEW ? 0 : K_BLOCK / 32 * sizeof(Unpacked); }

void multiply_packed(const Linear& a, i64 begin, i64 end, i64 first, i64 last, void* room) {
    if (a.tokens <= FEW) { WITH_FORMAT(a.format, few_rows<Q>(a, begin, end, first, last)) }
    else { WITH_FORMAT(a.format, many_rows<Q>(a, begin, end, first, last, (Unpacked*)room)) }
}

extern const Method packed_method{packed_row_bytes, prepare_packed, packed_room, multiply_packed};

void linear(const void* args, Worker& worker) {
    const Linear& a = *(const Linear*)args;
    // few tokens: several panels in a row, so that prefetched data belongs to this thread
    multiply(a, worker, packed_method, a.tokens > 32 ? 1 : panels_per_tile(a, worker));
}

void quantize_inputs(const void* args, Worker& worker) {
    const QuantizeInputs& a = *(const QuantizeInputs*)args;
    const i64 bytes = (a.inputs + 31) / 32 * token_bytes(a.sub);
    for (i64 tile; (tile = worker.next_tile((a.tokens + TILE - 1) / TILE)) >= 0;) {
        const i64 t = tile * TILE, count = min(a.tokens - t, TILE);
        const float* rows[TILE];
        for (i64 i = 0; i < count; i++) rows[i] = a.x + (t + i) * a.inputs;
        quantize_rows(rows, count, a.inputs, a.sub, a.zero, a.out + t * bytes);
    }
}

REGISTER_KERNEL("linear", linear);
REGISTER_KERNEL("quantize_inputs", quantize_inputs);

}  // namespace ISA

#endif
