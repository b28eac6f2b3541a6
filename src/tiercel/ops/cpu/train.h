// What the kernels of training share: values of float32 or bfloat16 as torch gives them, dropout.
//
// Sums are float32.  Dropout is a function of a seed and the position, so that the backward pass needs no mask.
#pragma once

#include "kernels.h"
#include "tiles.h"

namespace tiercel {

struct Values { void* at; i64 stride; int bf16; };  // rows of bf16 or float32; at nullptr: none
struct Dropout { uint64_t seed; int32_t below; };   // what is dropped, of 65536; 0: nothing

}  // namespace tiercel

#if defined(TIERCEL_BINDINGS)

#include "bindings.h"

namespace tiercel {

using ValuesTuple = std::tuple<Address, i64, int>;  // address, values from row to row, whether bf16
using DropoutTuple = std::tuple<uint64_t, int>;     // seed, what is dropped of 65536

inline Values values(const ValuesTuple& v) { return {ptr<void>(std::get<0>(v)), std::get<1>(v), std::get<2>(v)}; }
inline Dropout dropout(const DropoutTuple& d) { return {std::get<0>(d), std::get<1>(d)}; }

}  // namespace tiercel

#else

namespace ISA {
using namespace tiercel;

INLINE F load_n(const Values& v, i64 row, i64 column, int n) {
    const i64 at = row * v.stride + column;
    return v.bf16 ? load_n((const bf16*)v.at + at, n) : load_n((const float*)v.at + at, n);
}

INLINE void store_n(const Values& v, i64 row, i64 column, F x, int n) {
    const i64 at = row * v.stride + column;
    if (v.bf16) store_n((bf16*)v.at + at, x, n);
    else store_n((float*)v.at + at, x, n);
}

INLINE F sigmoid(F x) { return set(1.0f) / (set(1.0f) + exp(zero() - x)); }

INLINE F exp_or_nan(F x) {  // exp takes NaN for a number
    F e = exp(x);
    EACH e.p[i] = x.p[i] == x.p[i] ? e.p[i] : x.p[i];
    return e;
}

template <class Body> INLINE void for_each_vector(i64 tokens, i64 width, Worker& worker, Body body) {
    constexpr i64 TOKENS = 4;
    for (i64 tile; (tile = worker.next_tile(ceil_div(tokens, TOKENS))) >= 0;)
        for (i64 t = tile * TOKENS; t < min(tokens, (tile + 1) * TOKENS); t++)
            for (i64 i = 0; i < width; i += 16) body(t, i, (int)min(16, width - i));
}

}  // namespace ISA

#endif
