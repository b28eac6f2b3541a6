// Low-rank products of training with dropout: LoRA down, up and the gradients of both.
#include "train.h"

namespace tiercel {

struct LoraA { Values x; const float* w; float* y; i64 tokens, inputs, rank; Dropout dropout; };
struct LoraB { const float *x, *w; Values base, y; i64 tokens, rank, outputs; Dropout dropout; };
struct LoraGrad { const float* a; Values x; float* y; i64 tokens, rank, inputs; int by_input; Dropout dropout; };

}  // namespace tiercel

#if defined(TIERCEL_BINDINGS)

namespace tiercel {

static KernelHandle lora_a{"lora_a"}, lora_b{"lora_b"}, lora_grad{"lora_grad"};

BINDINGS(m) {
    m.def("lora_a", [](const ValuesTuple& x, Address w, Address y, i64 T, i64 K, i64 R, const DropoutTuple& d) {
        launch_openmp(lora_a, LoraA{values(x), ptr<float>(w), ptr<float>(y), T, K, R, dropout(d)}, T * K);
    });
    m.def("lora_b", [](Address x, Address w, const ValuesTuple& base, const ValuesTuple& y, i64 T, i64 R, i64 N,
                       const DropoutTuple& d) {
        launch_openmp(lora_b, LoraB{ptr<float>(x), ptr<float>(w), values(base), values(y), T, R, N, dropout(d)}, T * N);
    });
    m.def("lora_grad",
          [](Address a, const ValuesTuple& x, Address y, i64 T, i64 R, i64 K, int by_input, const DropoutTuple& d) {
              launch_openmp(lora_grad, LoraGrad{ptr<float>(a), values(x), ptr<float>(y), T, R, K, by_input, dropout(d)},
                            T * K);
          });
}

}  // namespace tiercel

#else

namespace ISA {
using namespace tiercel;

// ── dropout: sixteen bits decide, one random number serves two values ──

constexpr i64 PAIR = 32;

INLINE I mixed(I x) {
    x = (x ^ shr(x, 16)) * seti(0x7feb352d);
    x = (x ^ shr(x, 15)) * seti((int32_t)0x846ca68b);
    return x ^ shr(x, 16);
}

// all ones where the values `column` … + 15 and + 16 … + 31 of a row stay; column is a multiple of 32
INLINE void keep_masks(const Dropout& d, i64 row, i64 column, i64 width, I* first, I* second) {
    static const int32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const uint32_t at = (uint32_t)(row * ceil_div(width, PAIR) * 16 + column / 2);
    const I random = mixed(mixed(loadi(lanes) + seti((int32_t)(at + (uint32_t)d.seed))) ^ seti((int32_t)(d.seed >> 32)));
    const I last = seti(d.below - 1);
    *first = sar(last - (random & seti(0xffff)), 31);
    *second = sar(last - shr(random, 16), 31);
}

INLINE F masked(F x, I where) { return as_float(as_int(x) & where); }

// what dropout leaves of `n` values (at most 32) of a row, zeros after them
INLINE void load_dropout(const Values& x, const Dropout& d, i64 row, i64 column, i64 width, int n, float* out) {
    F a = load_n(x, row, column, n), b = n > 16 ? load_n(x, row, column + 16, n - 16) : zero();
    if (d.below > 0) {
        I first, second;
        keep_masks(d, row, column, width, &first, &second);
        a = masked(a, first);
        b = masked(b, second);
    }
    store(out, a);
    store(out + 16, b);
}

// ── low rank ──

// y (T, R) = dropout(x) (T, K) · w (K, R)
void lora_a(const void* args, Worker& worker) {
    const LoraA& a = *(const LoraA*)args;
    constexpr i64 TOKENS = 8, INPUTS = 256;
    float* x = (float*)worker.scratch(TOKENS * INPUTS * sizeof(float));
    for (i64 tile; (tile = worker.next_tile(ceil_div(a.tokens, TOKENS))) >= 0;) {
        const i64 first = tile * TOKENS, count = min(TOKENS, a.tokens - first);
        for (i64 from = 0; from < a.inputs; from += INPUTS) {
            const i64 inputs = min(INPUTS, a.inputs - from);
            for (i64 t = 0; t < TOKENS; t++)
                for (i64 k = 0; k < inputs; k += PAIR)
                    load_dropout(a.x, a.dropout, first + (t < count ? t : 0), from + k, a.inputs, min(PAIR, inputs - k),
                            x + t * INPUTS + k);
            for (i64 r = 0; r < a.rank; r += 16) {
                const int some = min(16, a.rank - r);
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
template <class Lanes> INLINE void lora_b_32(const LoraB& a, const float* const* x, i64 first, i64 count, i64 n, Lanes some, Lanes others) {
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
            keep_masks(a.dropout, first + t, n, a.outputs, &stay, &also);
            left[t] = masked(left[t], stay);
            right[t] = masked(right[t], also);
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
void lora_b(const void* args, Worker& worker) {
    const LoraB& a = *(const LoraB*)args;
    constexpr i64 TOKENS = 8;
    for (i64 tile; (tile = worker.next_tile(ceil_div(a.tokens, TOKENS))) >= 0;) {
        const i64 first = tile * TOKENS, count = min(TOKENS, a.tokens - first);
        const float* x[TOKENS];
        for (i64 t = 0; t < TOKENS; t++) x[t] = a.x + (first + (t < count ? t : 0)) * a.rank;
        i64 n = 0;
        for (; n + PAIR <= a.outputs; n += PAIR) lora_b_32(a, x, first, count, n, Constant<16>(), Constant<16>());
        if (n < a.outputs)
            lora_b_32(a, x, first, count, n, (int)min(16, a.outputs - n), (int)min(16, a.outputs - n - 16));
    }
}

// y (R, K), or (K, R), = a (T, R)ᵀ · dropout(x) (T, K)
void lora_grad(const void* args, Worker& worker) {
    const LoraGrad& a = *(const LoraGrad*)args;
    constexpr i64 TOKENS = 128;
    float* x = (float*)worker.scratch(TOKENS * PAIR * sizeof(float));
    for (i64 tile; (tile = worker.next_tile(ceil_div(a.inputs, PAIR))) >= 0;) {
        const i64 k = tile * PAIR, width = min(PAIR, a.inputs - k);
        for (i64 first = 0; first < a.tokens; first += TOKENS) {
            const i64 count = min(TOKENS, a.tokens - first);
            for (i64 t = 0; t < count; t++) load_dropout(a.x, a.dropout, first + t, k, a.inputs, width, x + t * PAIR);
            for (i64 r = 0; r < a.rank; r += 8)
                for (i64 half = 0; half < width; half += 16) {
                    const i64 ranks = min(8, a.rank - r);
                    const float* rows[8];
                    for (i64 i = 0; i < 8; i++) rows[i] = a.a + first * a.rank + r + (i < ranks ? i : 0);
                    F sum[8];
                    for (i64 i = 0; i < 8; i++) sum[i] = zero();
                    for (i64 t = 0; t < count; t++) {
                        const F v = load(x + t * PAIR + half);
                        for (i64 i = 0; i < 8; i++) sum[i] = fma(set(rows[i][t * a.rank]), v, sum[i]);
                    }
                    const int some = min(16, width - half);
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

REGISTER_KERNEL("lora_a", lora_a);
REGISTER_KERNEL("lora_b", lora_b);
REGISTER_KERNEL("lora_grad", lora_grad);

}  // namespace ISA

#endif
