// Norms, sums and gates: one token after another, sixteen lanes at a time.
#include "kernels.h"
#include "vec.h"

#include <math.h>

namespace ISA {
using namespace tiercel;

// pieces of a (tokens, width) tensor: tokens, a few at a time
constexpr i64 TOKENS = 8;

template <class Args, class Body> INLINE void each_token(const Args& a, Team& team, Body body) {
    for (i64 piece; (piece = team.take((a.tokens + TOKENS - 1) / TOKENS)) >= 0;)
        for (i64 t = piece * TOKENS; t < a.tokens && t < (piece + 1) * TOKENS; t++) body(t);
}

void rms_norm(const void* args, Team& team) {
    const RmsNorm& a = *(const RmsNorm*)args;
    each_token(a, team, [&](i64 t) {
        const float* x = a.x + t * a.width;
        float* y = a.y + t * a.width;
        F squares = zero();
        i64 i = 0;
        for (; i + 16 <= a.width; i += 16) { const F v = load(x + i); squares = fma(v, v, squares); }
        if (i < a.width) { const F v = load_some(x + i, a.width - i); squares = fma(v, v, squares); }
        const F scale = set(1.0f / sqrtf(sum(squares) / (float)a.width + a.eps));
        for (i = 0; i + 16 <= a.width; i += 16) store(y + i, load(x + i) * scale * load(a.weight + i));
        if (i < a.width) {
            const int n = a.width - i;
            store_some(y + i, load_some(x + i, n) * scale * load_some(a.weight + i, n), n);
        }
    });
}

template <class Body> INLINE void each_sixteen(i64 count, Team& team, Body body) {
    constexpr i64 PIECE = 4096;
    for (i64 piece; (piece = team.take((count + PIECE - 1) / PIECE)) >= 0;) {
        const i64 stop = count < (piece + 1) * PIECE ? count : (piece + 1) * PIECE;
        i64 i = piece * PIECE;
        for (; i + 16 <= stop; i += 16) body(i, 16);
        if (i < stop) body(i, (int)(stop - i));
    }
}

void add(const void* args, Team& team) {
    const Add& a = *(const Add*)args;
    each_sixteen(a.count, team, [&](i64 i, int n) { store_n(a.y + i, load_n(a.a + i, n) + load_n(a.b + i, n), n); });
}

INLINE F map(F x, float (*f)(float)) {
    float v[16];
    store(v, x);
    for (int i = 0; i < 16; i++) v[i] = f(v[i]);
    return load(v);
}

INLINE F activate(int activation, F x) {
    if (activation == SILU) return silu(x);
    if (activation == RELU) return max(x, zero());
    const F half = set(0.5f), one = set(1.0f);
    if (activation == GELU) return half * x * (one + map(x * set(0.70710678f), erff));
    return half * x * (one + map(set(0.79788456f) * (x + set(0.044715f) * x * x * x), tanhf));
}

void gate(const void* args, Team& team) {
    const Gate& a = *(const Gate*)args;
    each_sixteen(a.count, team, [&](i64 i, int n) {
        store_n(a.y + i, activate(a.activation, load_n(a.gate + i, n)) * load_n(a.up + i, n), n);
    });
}

void pointwise(Kernels& k) {
    k.rms_norm = rms_norm;
    k.add = add;
    k.gate = gate;
}

}  // namespace ISA
