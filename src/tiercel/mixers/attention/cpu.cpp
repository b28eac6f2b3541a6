// Rotary positions, keys and values in their pages, and causal grouped-query attention.
//
// A query meets the keys in tiles of KEYS at absolute positions, each tile one step of the running softmax; after every
// SEGMENT keys the sums start again, and the segments are merged in order.  So the result of a query does not depend on
// the split of work: in a prompt a thread takes a block of queries through all segments, in decode each
// thread takes some segments of the one query.
#include <math.h>
#include "ops/cpu/batch.h"

namespace tiercel {

struct Rotary { BatchMetadata batch; const float* f; float *cos, *sin; i64 half; float scale; };  // (T, half): half the turned dims
struct StoreKV {  // k and v (T, K · P), rows `stride` apart, into the pages, k turned
    BatchMetadata batch;
    const float *k, *v, *cos, *sin;
    i64 stride, half, kv_heads, head_dim;
};
struct PagedAttention {  // y (T, H · P); window 0: none
    BatchMetadata batch;
    const float *q, *cos, *sin;
    float* y;
    i64 stride, half, heads, kv_heads, head_dim, window;
    float scale;
};

constexpr i64 KEYS = 32;       // keys of a tile
constexpr i64 PAGE = 64;       // tokens of a page, whole tiles
constexpr i64 SEGMENT = 1024;  // keys summed by themselves, then merged in order
constexpr i64 SPLIT = 8;       // new tokens up to which segments may go to different threads

}  // namespace tiercel

#if defined(TIERCEL_BINDINGS)

#include "ops/cpu/bindings.h"

namespace tiercel {

static KernelHandle rotary{"rotary"}, store_kv{"store_kv"}, paged_attention{"paged_attention"};

BINDINGS(m) {
    m.attr("KEYS") = KEYS;
    m.attr("PAGE") = PAGE;
    m.attr("SEGMENT") = SEGMENT;
    m.attr("SPLIT") = SPLIT;
    m.def("rotary", [](const MetadataTuple& t, Address f, Address cos, Address sin, i64 half, float scale) {
        const i64 T = tokens_of(t);
        launch(rotary, Rotary{metadata(t), ptr<float>(f), ptr<float>(cos), ptr<float>(sin), half, scale},
               T * half < 1024, {}, {values(cos, T, half), values(sin, T, half)});
    });
    m.def("store_kv", [](const MetadataTuple& t, Address k, Address v, Address cos, Address sin, i64 stride, i64 half,
                         i64 K, i64 P) {
        const i64 T = tokens_of(t);
        const BatchMetadata batch = metadata(t);
        launch(store_kv,
               StoreKV{batch, ptr<float>(k), ptr<float>(v), ptr<float>(cos), ptr<float>(sin), stride, half, K, P},
               T * K * P < SMALL,
               {values(k, T, K * P, stride), values(v, T, K * P, stride), values(cos, T, half), values(sin, T, half)},
               {state_of(batch)});
    });
    m.def("paged_attention", [](const MetadataTuple& t, Address q, Address cos, Address sin, Address y, i64 stride,
                                i64 half, i64 H, i64 K, i64 P, i64 window, float scale) {
        const i64 T = tokens_of(t);
        const BatchMetadata batch = metadata(t);
        launch(paged_attention,
               PagedAttention{batch, ptr<float>(q), ptr<float>(cos), ptr<float>(sin), ptr<float>(y), stride, half, H, K,
                              P, window, scale},
               false, {state_of(batch), values(q, T, H * P, stride), values(cos, T, half), values(sin, T, half)},
               {values(y, T, H * P), {&((StateDescriptor*)batch.seqs[0].descriptor)->partials, sizeof(i64)}});
    });
}

}  // namespace tiercel

#else

namespace ISA {
using namespace tiercel;

// Keys and values of one kv head: a seq of P for every token, PAGE of them in a seq.
template <class T> struct Cache {
    char* const* pages;
    i64 keys, values, P;  // bytes of a page before the head's

    T* at(i64 start, i64 token) const { return (T*)(pages[(uint64_t)token / PAGE] + start) + (uint64_t)token % PAGE * P; }
    T* k(i64 token) const { return at(keys, token); }
    T* v(i64 token) const { return at(values, token); }
};
template <class T> INLINE Cache<T> cache_of(const BatchMetadata& batch, const SeqSlice& seq, i64 h, i64 kv_heads, i64 P) {
    const AttentionDescriptor& layer = layer_of<AttentionDescriptor>(batch, seq);
    const i64 head = PAGE * P * sizeof(T);
    return {layer.pages, layer.start + h * head, layer.start + (kv_heads + h) * head, P};
}

// Turn the first 2 · half dims by the angles of this token, and scale all.
template <class T>
INLINE void rotate(T* to, const float* x, const float* cos, const float* sin, i64 half, i64 dims, float scale) {
    const F s = set(scale);
    for (i64 i = 0; i < half; i += 16) {
        const int n = half - i;
        const F u = load_n(x + i, n), w = load_n(x + half + i, n), c = load_n(cos + i, n), d = load_n(sin + i, n);
        store_n(to + i, (u * c - w * d) * s, n);
        store_n(to + half + i, (w * c + u * d) * s, n);
    }
    for (i64 i = 2 * half; i < dims; i += 16) store_n(to + i, load_n(x + i, dims - i) * s, dims - i);
}

void rotary(const void* args, Worker& worker) {
    const Rotary& a = *(const Rotary*)args;
    constexpr i64 TOKENS = 8;
    for_each_tile(a.batch, worker, [](const SeqSlice& seq) { return ceil_div(seq.tokens, TOKENS); }, [&](const SeqSlice& seq, i64 tile) {
        const i64 length = length_of(seq), stop = min(seq.tokens, (tile + 1) * TOKENS);
        for (i64 t = tile * TOKENS; t < stop; t++) {
            float* cos = a.cos + (seq.first + t) * a.half;
            float* sin = a.sin + (seq.first + t) * a.half;
            for (i64 i = 0; i < a.half; i++) {
                const float angle = (float)(length + t) * a.f[i];
                cos[i] = cosf(angle) * a.scale;
                sin[i] = sinf(angle) * a.scale;
            }
        }
    });
}

template <class T> INLINE void store_kv_as(const StoreKV& a, Worker& worker) {
    constexpr i64 TOKENS = 16;
    const i64 P = a.head_dim;
    for_each_tile(a.batch, worker, [](const SeqSlice& seq) { return ceil_div(seq.tokens, TOKENS); }, [&](const SeqSlice& seq, i64 tile) {
        const i64 length = length_of(seq), stop = min(seq.tokens, (tile + 1) * TOKENS);
        for (i64 h = 0; h < a.kv_heads; h++) {
            const Cache<T> cache = cache_of<T>(a.batch, seq, h, a.kv_heads, P);
            for (i64 t = tile * TOKENS; t < stop; t++) {
                const i64 token = seq.first + t;
                const float *cos = a.cos + token * a.half, *sin = a.sin + token * a.half;
                rotate(cache.k(length + t), a.k + token * a.stride + h * P, cos, sin, a.half, P, 1.0f);
                copy(cache.v(length + t), a.v + token * a.stride + h * P, P);
            }
        }
    });
}

void store_kv(const void* args, Worker& worker) {
    const StoreKV& a = *(const StoreKV*)args;
    if (a.batch.bf16) store_kv_as<bf16>(a, worker);
    else store_kv_as<float>(a, worker);
}

// ── a tile of keys ──

constexpr int VECTORS = KEYS / 16;  // of a tile's keys
constexpr i64 AHEAD = 2 * KEYS;     // keys that are asked for before they are read: the next page is somewhere else

// A tile turned so that keys are lanes: one seq of KEYS for every dim, or, of bf16, for every two dims, each lane a pair
// as it lies in memory (the even dim in the low half).  Sixteen keys, rows of P, become columns of `out`.

INLINE void turn_plainly(const float* k, uint32_t* out, i64 from, i64 P) {
    for (i64 p = from; p < P; p++)
        for (int j = 0; j < 16; j++) memcpy(out + p * KEYS + j, k + j * P + p, 4);
}

INLINE void turn_plainly(const bf16* k, uint32_t* out, i64 from, i64 P) {
    for (i64 p = from; p < P; p += 2)
        for (int j = 0; j < 16; j++)
            out[p / 2 * KEYS + j] = k[j * P + p] | (p + 1 < P ? (uint32_t)k[j * P + p + 1] << 16 : 0);
}

#if defined(TIERCEL_AVX2) || defined(TIERCEL_AVX512)
// four words of sixteen keys, `stride` bytes apart, by their words
INLINE void turn_four(const char* k, i64 stride, uint32_t* out) {
#if defined(TIERCEL_AVX512)
    __m512i r[4], s[4];
    const auto words = [&](int key) { return _mm_loadu_si128((const __m128i*)(k + key * stride)); };
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_inserti32x4(_mm512_castsi128_si512(words(i)), words(i + 4), 1);
        r[i] = _mm512_inserti32x4(_mm512_inserti32x4(r[i], words(i + 8), 2), words(i + 12), 3);
    }
    for (int i = 0; i < 2; i++) {
        s[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        s[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        _mm512_storeu_si512(out + 2 * i * KEYS, _mm512_unpacklo_epi64(s[i], s[i + 2]));
        _mm512_storeu_si512(out + (2 * i + 1) * KEYS, _mm512_unpackhi_epi64(s[i], s[i + 2]));
    }
#else
    for (int half = 0; half < 2; half++, k += 8 * stride) {
        __m256i r[4], s[4];
        for (int i = 0; i < 4; i++) {
            const __m256i low = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)(k + i * stride)));
            r[i] = _mm256_inserti128_si256(low, _mm_loadu_si128((const __m128i*)(k + (i + 4) * stride)), 1);
        }
        for (int i = 0; i < 2; i++) {
            s[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            s[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        for (int i = 0; i < 2; i++) {
            _mm256_storeu_si256((__m256i*)(out + 2 * i * KEYS + 8 * half), _mm256_unpacklo_epi64(s[i], s[i + 2]));
            _mm256_storeu_si256((__m256i*)(out + (2 * i + 1) * KEYS + 8 * half), _mm256_unpackhi_epi64(s[i], s[i + 2]));
        }
    }
#endif
}

template <class T> INLINE void turn(const T* k, uint32_t* out, i64 P) {
    constexpr i64 DIMS = 16 / sizeof(T);
    i64 p = 0;
    for (; p + DIMS <= P; p += DIMS) turn_four((const char*)(k + p), P * sizeof(T), out + p * 4 / DIMS * KEYS);
    turn_plainly(k, out, p, P);
}
#else
template <class T> INLINE void turn(const T* k, uint32_t* out, i64 P) { turn_plainly(k, out, 0, P); }
#endif

// pairs become two rows of floats
INLINE void pairs_to_float(const uint32_t* pairs, float* out, i64 P) {
    for (i64 p = 0; p < P; p += 2)
        for (int v = 0; v < KEYS; v += 16) {
            const I pair = loadi(pairs + p / 2 * KEYS + v);
            store(out + p * KEYS + v, as_float(shl(pair, 16)));
            if (p + 1 < P) store(out + (p + 1) * KEYS + v, as_float(pair & seti(0xffff0000)));
        }
}

// Sums of R queries are chains of their own, too few to keep the machine busy with one vector each: AVX-512 has the
// registers for a full tile of keys and for four vectors of values.
#if defined(TIERCEL_AVX512)
constexpr int SIDE = VECTORS;
template <int R> constexpr int DIMS = 4;
#else
constexpr int SIDE = 1;
template <int R> constexpr int DIMS = R == 1 ? 4 : R <= 3 ? 2 : 1;
#endif

// scores of R queries with a tile's keys: Σ_p q_p k_p, p in order
template <int R> INLINE void add_scores(F (&sum)[R][SIDE], const float* q, i64 stride, const F (&k)[SIDE]) {
    for (int r = 0; r < R; r++) {
        const F one = set(q[r * stride]);
        for (int i = 0; i < SIDE; i++) sum[r][i] = fma(one, k[i], sum[r][i]);
    }
}

template <int R, class Body> INLINE void each_side(float* s, Body body) {
    for (int v = 0; v < KEYS; v += 16 * SIDE) {
        F sum[R][SIDE];
        for (int r = 0; r < R; r++)
            for (int i = 0; i < SIDE; i++) sum[r][i] = zero();
        body(sum, v);
        for (int r = 0; r < R; r++)
            for (int i = 0; i < SIDE; i++) store(s + r * KEYS + v + 16 * i, sum[r][i]);
    }
}

// `ahead`: a later tile to prefetch along the way, unless 0: at once the requests would wait for each other
template <int R> INLINE void scores_of(const float* q, i64 stride, const float* keys, i64 P, float* s, const float* ahead = nullptr) {
    each_side<R>(s, [&](auto& sum, int v) {
        for (i64 p = 0; p < P; p++) {
            if (ahead) fetch(ahead + v * P + p * 16 * SIDE, 64 * SIDE);
            F k[SIDE];
            for (int i = 0; i < SIDE; i++) k[i] = load(keys + p * KEYS + v + 16 * i);
            add_scores<R>(sum, q + p, stride, k);
        }
    });
}

template <int R> INLINE void scores_of(const float* q, i64 stride, const uint32_t* pairs, i64 P, float* s, const bf16* ahead = nullptr) {
    each_side<R>(s, [&](auto& sum, int v) {
        for (i64 p = 0; p < P; p += 2) {
            if (ahead) fetch(ahead + v * P + p * 16 * SIDE, 64 * SIDE);
            F even[SIDE], odd[SIDE];
            for (int i = 0; i < SIDE; i++) {
                const I pair = loadi(pairs + p / 2 * KEYS + v + 16 * i);
                even[i] = as_float(shl(pair, 16));
                odd[i] = as_float(pair & seti(0xffff0000));
            }
            add_scores<R>(sum, q + p, stride, even);
            if (p + 1 < P) add_scores<R>(sum, q + p + 1, stride, odd);
        }
    });
}

// o = o · decay + Σ_k w_k v_k, k from `first` to `last` in order, for R queries and W · 16 dims.  `ahead` values further
// on are prefetched along the way, unless 0.
template <int R, int W, class V>
INLINE void add_values(const float* w, const float* decay, const V* v, i64 v_stride, float* o, i64 stride, i64 first, i64 last, const V* ahead) {
    F sum[R][W];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < W; i++) sum[r][i] = load(o + r * stride + 16 * i) * set(decay[r]);
    for (i64 k = first; k < last; k++) {
        F value[W];
        if (ahead)
            for (int i = 0; i < W; i += 64 / (16 * (int)sizeof(V))) __builtin_prefetch(ahead + k * v_stride + 16 * i, 0, 2);
        for (int i = 0; i < W; i++) value[i] = load(v + k * v_stride + 16 * i);
        for (int r = 0; r < R; r++) {
            const F weight = set(w[r * KEYS + k]);
            for (int i = 0; i < W; i++) sum[r][i] = fma(weight, value[i], sum[r][i]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < W; i++) store(o + r * stride + 16 * i, sum[r][i]);
}

template <int R, class V>
INLINE void add_all_values(const float* w, const float* decay, const V* v, i64 v_stride, float* o, i64 dims, i64 first, i64 last, const V* ahead = nullptr) {
    constexpr int W = DIMS<R>;
    constexpr i64 LINE = 64 / sizeof(V);  // values of a cache line
    const auto line = [&](i64 p) { return ahead && p % LINE == 0 ? ahead + p : nullptr; };
    i64 p = 0;
    for (; p + 16 * W <= dims; p += 16 * W) add_values<R, W>(w, decay, v + p, v_stride, o + p, dims, first, last, line(p));
    for (; p < dims; p += 16) add_values<R, 1>(w, decay, v + p, v_stride, o + p, dims, first, last, line(p));
}

// ── one block of queries ──

// GetRows are the queries of a block times the heads of a group.  sums: of the keys since the last segment began.
struct Block {
    i64 group, rows, dims;      // heads that share keys; queries · group; P in full vectors
    float *q, *scores, *decay;  // (rows, dims), (rows, KEYS), (rows)
    float *max, *sums, *o;     // largest score so far (rows), Σ of weights by lane (rows, 16), Σ of weighted values
    uint32_t* turned;           // a tile of keys
    float *keys, *values;       // as float32: (P, KEYS), (KEYS, dims)
};

INLINE i64 block_floats(i64 rows, i64 dims) { return rows * (2 * dims + KEYS + 32) + 3 * KEYS * dims + 512; }

template <class T> INLINE Block block_in(Scratch& scratch, i64 group, i64 rows, i64 dims) {
    Block b{group, rows, dims};
    b.q = scratch.alloc<float>(rows * dims);
    b.scores = scratch.alloc<float>(rows * KEYS);
    b.decay = scratch.alloc<float>(rows);
    b.max = scratch.alloc<float>(rows);
    b.sums = scratch.alloc<float>(rows * 16);
    b.o = scratch.alloc<float>(rows * dims);
    b.turned = scratch.alloc<uint32_t>(dims * KEYS);
    b.keys = sizeof(T) == 2 ? scratch.alloc<float>(dims * KEYS) : (float*)b.turned;
    b.values = scratch.alloc<float>(KEYS * dims);
    return b;
}

// One step of the running softmax: scores become weights.  Lanes outside of first … last do not count.
INLINE void weigh(Block& b, i64 r, i64 first, i64 last) {
    float* s = b.scores + r * KEYS;
    F score[VECTORS];
    for (int v = 0; v < VECTORS; v++) score[v] = load(s + 16 * v);
    if (first > 0 || last < KEYS) {
        for (int j = 0; j < KEYS; j++)
            if (j < first || j >= last) s[j] = -INFINITY;
        for (int v = 0; v < VECTORS; v++) score[v] = load(s + 16 * v);
    }
    F top = score[0];
    for (int v = 1; v < VECTORS; v++) top = max(top, score[v]);
    const float before = b.max[r], now = maximum(top);
    F sum = load(b.sums + 16 * r);
    b.decay[r] = 1.0f;
    if (now > before) {
        float decay[16];
        store(decay, exp(set(before - now)));
        b.max[r] = now;
        b.decay[r] = decay[0];
        sum = sum * set(decay[0]);
    }
    const F largest = set(b.max[r]);
    for (int v = 0; v < VECTORS; v++) {
        const F w = exp(score[v] - largest);
        sum = sum + w;
        store(s + 16 * v, w);
    }
    store(b.sums + 16 * r, sum);
}

// Queries at `first_query` … of one kv head attend_keys the keys from `start` to `stop`.
template <class T>
INLINE void attend_keys(Block& b, const Cache<T>& cache, i64 first_query, i64 window, i64 start, i64 stop) {
    static_assert(PAGE % KEYS == 0);  // a tile lies in one page
    const i64 P = cache.P;
    const i64 last_query = first_query + b.rows / b.group - 1;
    for (i64 r = 0; r < b.rows; r++) b.max[r] = -INFINITY;
    memset(b.sums, 0, b.rows * 16 * sizeof(float));
    memset(b.o, 0, b.rows * b.dims * sizeof(float));
    const auto oldest = [&](i64 query) { return window > 0 ? max(0, query - window + 1) : 0; };
    if (oldest(first_query) > start) start = oldest(first_query) / KEYS * KEYS;
    if (stop > last_query + 1) stop = last_query + 1;
    for (i64 tile = start; tile < stop; tile += KEYS) {
        const T *key = cache.k(tile), *value = cache.v(tile);
        const bool more = b.rows <= 6 && tile + AHEAD <= last_query;  // few rows: memory is what they wait for
        const T* ahead = more ? cache.k(tile + AHEAD) : nullptr;
        for (int i = 0; i < VECTORS; i++) turn(key + 16 * i * P, b.turned + 16 * i, P);
        const bool full = tile + KEYS - 1 <= first_query && tile >= oldest(last_query);
        if ((full || first_query == last_query) && b.rows <= 6 && b.dims == P) {  // few rows: values straight from the cache
            const i64 first = max(oldest(first_query) - tile, 0), last = min(first_query + 1 - tile, KEYS);
            const T* later = more ? cache.v(tile + AHEAD) : nullptr;
            unroll6(b.rows, [&](i64 r, auto n) {
                if constexpr (sizeof(T) == 2) scores_of<n>(b.q + r * b.dims, b.dims, b.turned, P, b.scores + r * KEYS, ahead);
                else scores_of<n>(b.q + r * b.dims, b.dims, b.keys, P, b.scores + r * KEYS, ahead);
                for (i64 i = r; i < r + n; i++) weigh(b, i, first, last);
                add_all_values<n>(b.scores + r * KEYS, b.decay + r, value, P, b.o + r * b.dims, b.dims, first, last, later);
            });
            continue;
        }
        if constexpr (sizeof(T) == 2) pairs_to_float(b.turned, b.keys, P);
        const i64 valid = min(KEYS, stop - tile);
        for (i64 j = 0; j < valid; j++)
            for (i64 p = 0; p < P; p += 16) store(b.values + j * b.dims + p, load_n(value + j * P + p, P - p));
        if (full) {
            unroll6(b.rows, [&](i64 r, auto n) {
                scores_of<n>(b.q + r * b.dims, b.dims, b.keys, P, b.scores + r * KEYS);
                for (i64 i = r; i < r + n; i++) weigh(b, i, 0, KEYS);
                add_all_values<n>(b.scores + r * KEYS, b.decay + r, b.values, b.dims, b.o + r * b.dims, b.dims, 0, KEYS);
            });
            continue;
        }
        for (i64 query = max(first_query, tile); query <= last_query; query++) {  // the heads of one query see the same keys
            const i64 first = max(oldest(query) - tile, 0), last = min(query + 1 - tile, KEYS);
            if (first >= last) continue;
            unroll6(b.group, [&](i64 h, auto n) {
                const i64 r = (query - first_query) * b.group + h;
                scores_of<n>(b.q + r * b.dims, b.dims, b.keys, P, b.scores + r * KEYS);
                for (i64 i = r; i < r + n; i++) weigh(b, i, first, last);
                add_all_values<n>(b.scores + r * KEYS, b.decay + r, b.values, b.dims, b.o + r * b.dims, b.dims, first, last);
            });
        }
    }
}

// Segments in order: (max, sum, o) += a later segment's.
INLINE void merge(float& max_a, float& sum_a, float* o_a, float max_b, float sum_b, const float* o_b, i64 dims) {
    if (max_b == -INFINITY) return;  // met no key
    if (max_a == -INFINITY) {
        max_a = max_b;
        sum_a = sum_b;
        memcpy(o_a, o_b, dims * sizeof(float));
        return;
    }
    const float top = max_a > max_b ? max_a : max_b;
    const F a = exp(set(max_a - top)), b = exp(set(max_b - top));
    float f[16], g[16];
    store(f, a);
    store(g, b);
    max_a = top;
    sum_a = sum_a * f[0] + sum_b * g[0];
    for (i64 p = 0; p < dims; p += 16) {
        const int n = min(16, dims - p);
        store_n(o_a + p, load_n(o_a + p, n) * a + load_n(o_b + p, n) * b, n);
    }
}

INLINE void finish(float* y, const float* o, float sum, i64 P) {
    const F all = set(sum);
    for (i64 p = 0; p < P; p += 16) store_n(y + p, load_n(o + p, P - p) / all, P - p);
}

template <class T> INLINE void paged_attention_as(const PagedAttention& a, Worker& worker) {
    const i64 H = a.heads, K = a.kv_heads, P = a.head_dim, dims = padded(P), group = H / K;
    const i64 block = max(1, 96 / group);  // queries
    const auto queries = [&](const SeqSlice& seq) { return seq.tokens <= SPLIT ? seq.tokens : min(block, seq.tokens); };
    const auto first_segment = [&](const SeqSlice& seq) {
        return a.window > 0 ? max(0, length_of(seq) - a.window + 1) / SEGMENT : 0;
    };
    const auto segments = [&](const SeqSlice& seq) { return ceil_div(length_of(seq) + seq.tokens, SEGMENT) - first_segment(seq); };
    i64 rows = 0;
    for (i64 i = 0; i < a.batch.count; i++) rows = max(rows, queries(a.batch.seqs[i]) * group);
    Scratch scratch{(char*)worker.scratch((block_floats(rows, dims) + rows * (dims + 32)) * sizeof(float) + 1024)};
    float* all_o = scratch.alloc<float>(rows * dims);
    float* all_max = scratch.alloc<float>(rows);
    float* all_sum = scratch.alloc<float>(rows);
    const Scratch rest = scratch;

    for_each_tile(a.batch, worker, [&](const SeqSlice& seq) {
        return K * (seq.tokens <= SPLIT ? segments(seq) : ceil_div(seq.tokens, block));
    }, [&](const SeqSlice& seq, i64 tile) {
        const StateDescriptor& state = *(const StateDescriptor*)seq.descriptor;
        AttentionDescriptor& descriptor = layer_of<AttentionDescriptor>(a.batch, seq);
        const bool split = seq.tokens <= SPLIT;
        const i64 h = tile % K, length = state.length, count = segments(seq), first = first_segment(seq);
        // of a prompt the last queries come first: they have the most keys
        const i64 from = split ? 0 : (ceil_div(seq.tokens, block) - 1 - tile / K) * block;
        const i64 n = split ? seq.tokens : min(block, seq.tokens - from);
        Scratch own = rest;
        Block b = block_in<T>(own, group, n * group, dims);
        for (i64 r = 0; r < b.rows; r++) {
            const i64 token = seq.first + from + r / group;
            rotate(b.q + r * dims, a.q + token * a.stride + (h * group + r % group) * P, a.cos + token * a.half,
                   a.sin + token * a.half, a.half, P, a.scale);
            all_max[r] = -INFINITY;
        }
        const Cache<T> cache = cache_of<T>(a.batch, seq, h, K, P);
        const auto y = [&](i64 r) { return a.y + (seq.first + from + r / group) * H * P + (h * group + r % group) * P; };
        const auto partial = [&](i64 s, i64 r) { return state.partials + ((s * SPLIT + r / group) * H + h * group + r % group) * (2 + P); };
        const i64 one = split ? first + tile / K : -1, stop = split ? one + 1 : ceil_div(length + from + n, SEGMENT);
        for (i64 s = split ? one : first; s < stop; s++) {
            attend_keys(b, cache, length + from, a.window, s * SEGMENT, (s + 1) * SEGMENT);
            for (i64 r = 0; r < b.rows; r++) {
                const float sum_r = sum(load(b.sums + 16 * r));
                if (split && count > 1) {
                    float* p = partial(s, r);
                    p[0] = b.max[r];
                    p[1] = sum_r;
                    memcpy(p + 2, b.o + r * dims, P * sizeof(float));
                } else merge(all_max[r], all_sum[r], all_o + r * dims, b.max[r], sum_r, b.o + r * dims, P);
            }
        }
        if (split && count > 1) {
            if (!last_of(descriptor.tiles_done[h], count)) return;
            for (i64 r = 0; r < b.rows; r++)
                for (i64 s = first; s < first + count; s++) {
                    const float* p = partial(s, r);
                    merge(all_max[r], all_sum[r], all_o + r * dims, p[0], p[1], p + 2, P);
                }
        }
        for (i64 r = 0; r < b.rows; r++) finish(y(r), all_o + r * dims, all_sum[r], P);
    });
}

void paged_attention(const void* args, Worker& worker) {
    const PagedAttention& a = *(const PagedAttention*)args;
    if (a.batch.bf16) paged_attention_as<bf16>(a, worker);
    else paged_attention_as<float>(a, worker);
}

REGISTER_KERNEL("rotary", rotary);
REGISTER_KERNEL("store_kv", store_kv);
REGISTER_KERNEL("paged_attention", paged_attention);

}  // namespace ISA

#endif
