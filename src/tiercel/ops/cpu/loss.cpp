// The loss of logits and its gradient, in place.
#include <math.h>
#include "train.h"

namespace tiercel {

// losses (T) = −log causal_softmax(x)[target], and x becomes their gradient, causal_softmax(x) less one at the target
struct CrossEntropy { Values x; const i64* targets; float* losses; i64 tokens, vocab; };

}  // namespace tiercel

#if defined(TIERCEL_BINDINGS)

namespace tiercel {

static KernelHandle cross_entropy{"cross_entropy"};

BINDINGS(m) {
    m.def("cross_entropy", [](const ValuesTuple& x, Address targets, Address losses, i64 T, i64 V) {
        launch_openmp(cross_entropy, CrossEntropy{values(x), ptr<i64>(targets), ptr<float>(losses), T, V}, T * V);
    });
}

}  // namespace tiercel

#else

namespace ISA {
using namespace tiercel;

void cross_entropy(const void* args, Worker& worker) {
    const CrossEntropy& a = *(const CrossEntropy*)args;
    for (i64 t; (t = worker.next_tile(a.tokens)) >= 0;) {
        F max_x = set(-INFINITY), total = zero();
        const i64 whole = a.vocab / 16 * 16;
        const int rest = (int)(a.vocab - whole);
        float tail[16];
        for (int i = 0; i < 16; i++) tail[i] = -INFINITY;  // what is no word
        for (i64 v = 0; v < whole; v += 16) max_x = max(max_x, load_n(a.x, t, v, 16));
        if (rest) {
            float x[16];
            store(x, load_n(a.x, t, whole, rest));
            for (int i = 0; i < rest; i++) tail[i] = x[i];
            max_x = max(max_x, load(tail));
        }
        const F top = set(maximum(max_x));
        for (i64 from = 0; from < whole; from += 512) {  // parts first: a sum of thousands rounds thousands of times
            F part = zero();
            for (i64 v = from; v < min(whole, from + 512); v += 16) part = part + exp_or_nan(load_n(a.x, t, v, 16) - top);
            total = total + part;
        }
        if (rest) total = total + exp_or_nan(load(tail) - top);
        const float all = sum(total);
        float right[16];
        const i64 target = a.targets[t], at = target / 16 * 16;
        store(right, load_n(a.x, t, at, (int)min(16, a.vocab - at)));
        a.losses[t] = logf(all) + maximum(max_x) - right[target - at];
        const F share = set(1.0f / all);
        for (i64 v = 0; v < a.vocab; v += 16) {
            const int n = (int)min(16, a.vocab - v);
            F p = exp(load_n(a.x, t, v, n) - top) * share;
            if (v == at) {
                store(right, p);
                right[target - at] -= 1.0f;
                p = load(right);
            }
            store_n(a.x, t, v, p, n);
        }
    }
}

REGISTER_KERNEL("cross_entropy", cross_entropy);

}  // namespace ISA

#endif
