// Activations, sixteen lanes at a time.
#pragma once

#include "tiles.h"

namespace tiercel {

enum Activation { SILU, GELU, GELU_TANH, RELU, SIGMOID, RELU2 };  // native.py: ACTIVATIONS

}  // namespace tiercel

#if !defined(TIERCEL_BINDINGS)

namespace ISA {

INLINE F map(F x, float (*f)(float)) {
    float v[16];
    store(v, x);
    for (int i = 0; i < 16; i++) v[i] = f(v[i]);
    return load(v);
}

INLINE F sigmoid(F x) { return set(1.0f) / (set(1.0f) + exp(zero() - x)); }

INLINE F activate(int activation, F x) {
    if (activation == SILU) return silu(x);
    if (activation == RELU) return max(x, zero());
    if (activation == SIGMOID) return sigmoid(x);
    if (activation == RELU2) return max(x, zero()) * max(x, zero());
    const F half = set(0.5f), one = set(1.0f);
    if (activation == GELU) return half * x * (one + map(x * set(0.70710678f), erff));
    return half * x * (one + map(set(0.79788456f) * (x + set(0.044715f) * x * x * x), tanhf));
}

}  // namespace ISA

#endif
