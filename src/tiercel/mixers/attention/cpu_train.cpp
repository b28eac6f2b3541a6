// The weights of attention in training: causal softmax over a window, in place, and its gradient.
#include <math.h>
#include "ops/cpu/train.h"

namespace tiercel {

// in place over the keys i − window < j ≤ i of row i mod keys; window 0: none;  back: y holds its gradient
struct CausalSoftmax { Values x, y; i64 rows, keys, window; };

}  // namespace tiercel

#if defined(TIERCEL_BINDINGS)

namespace tiercel {

static KernelHandle causal_softmax{"causal_softmax"}, causal_softmax_backward{"causal_softmax_backward"};

BINDINGS(m) {
    m.def("causal_softmax", [](const ValuesTuple& x, i64 rows, i64 keys, i64 window) {
        launch_openmp(causal_softmax, CausalSoftmax{values(x), {}, rows, keys, window}, rows * keys);
    });
    m.def("causal_softmax_backward", [](const ValuesTuple& y, const ValuesTuple& dy, i64 rows, i64 keys, i64 window) {
        launch_openmp(causal_softmax_backward, CausalSoftmax{values(y), values(dy), rows, keys, window}, rows * keys);
    });
}

}  // namespace tiercel

#else

namespace ISA {
using namespace tiercel;

void causal_softmax(const void* args, Worker& worker) {
    const CausalSoftmax& a = *(const CausalSoftmax*)args;
    constexpr i64 ROWS = 16;
    float* row = (float*)worker.scratch((a.keys + 16) * sizeof(float));
    for (i64 tile; (tile = worker.next_tile(ceil_div(a.rows, ROWS))) >= 0;)
        for (i64 i = tile * ROWS; i < min(a.rows, (tile + 1) * ROWS); i++) {
            const i64 stop = i % a.keys + 1, start = a.window > 0 && stop > a.window ? stop - a.window : 0;
            F max_x = set(-INFINITY), total = zero();
            for (i64 j = start; j < stop; j += 16) {
                const int n = (int)min(16, stop - j);
                F x = load_n(a.x, i, j, n);
                if (n < 16) {  // what the tail reads is zero
                    float v[16];
                    store(v, x);
                    for (int k = n; k < 16; k++) v[k] = -INFINITY;
                    x = load(v);
                }
                store(row + j - start, x);
                max_x = max(max_x, x);
            }
            const F top = set(maximum(max_x));
            for (i64 j = 0; j < stop - start; j += 16) {
                const F e = exp_or_nan(load(row + j) - top);
                store(row + j, e);
                total = total + e;
            }
            const F share = set(1.0f / sum(total));
            for (i64 j = 0; j < start; j += 16) store_n(a.x, i, j, zero(), (int)min(16, start - j));
            for (i64 j = start; j < stop; j += 16) store_n(a.x, i, j, load(row + j - start) * share, (int)min(16, stop - j));
            for (i64 j = stop; j < a.keys; j += 16) store_n(a.x, i, j, zero(), (int)min(16, a.keys - j));
        }
}

void causal_softmax_backward(const void* args, Worker& worker) {
    const CausalSoftmax& a = *(const CausalSoftmax*)args;
    constexpr i64 ROWS = 16;
    for (i64 tile; (tile = worker.next_tile(ceil_div(a.rows, ROWS))) >= 0;)
        for (i64 i = tile * ROWS; i < min(a.rows, (tile + 1) * ROWS); i++) {
            const i64 stop = i % a.keys + 1, start = a.window > 0 && stop > a.window ? stop - a.window : 0;
            F dot = zero();
            for (i64 j = start; j < stop; j += 16) {
                const int n = (int)min(16, stop - j);
                dot = fma(load_n(a.x, i, j, n), load_n(a.y, i, j, n), dot);
            }
            const F whole = set(sum(dot));
            for (i64 j = start; j < stop; j += 16) {
                const int n = (int)min(16, stop - j);
                store_n(a.y, i, j, load_n(a.x, i, j, n) * (load_n(a.y, i, j, n) - whole), n);
            }
            for (i64 j = 0; j < start; j += 16) store_n(a.y, i, j, zero(), (int)min(16, start - j));
            for (i64 j = stop; j < a.keys; j += 16) store_n(a.y, i, j, zero(), (int)min(16, a.keys - j));
        }
}

REGISTER_KERNEL("causal_softmax", causal_softmax);
REGISTER_KERNEL("causal_softmax_backward", causal_softmax_backward);

}  // namespace ISA

#endif
