// RMS norm of training: forward and backward.
#include <math.h>
#include "train.h"

namespace tiercel {

// y = w x r, r (T) = 1 / √(mean x² + eps);  back: y is dy, dx like x
struct RmsNormTrain { Values x, y, dx; const float* weight; float* r; i64 tokens, width; float eps; };

}  // namespace tiercel

#if defined(TIERCEL_BINDINGS)

namespace tiercel {

static KernelHandle rms_norm_train{"rms_norm_train"}, rms_norm_train_backward{"rms_norm_train_backward"};

BINDINGS(m) {
    m.def("rms_norm_train", [](const ValuesTuple& x, Address weight, const ValuesTuple& y, Address r, i64 T, i64 D,
                               float eps) {
        launch_openmp(rms_norm_train,
                      RmsNormTrain{values(x), values(y), {}, ptr<float>(weight), ptr<float>(r), T, D, eps}, T * D);
    });
    m.def("rms_norm_train_backward", [](const ValuesTuple& x, Address weight, Address r, const ValuesTuple& dy,
                                        const ValuesTuple& dx, i64 T, i64 D) {
        launch_openmp(rms_norm_train_backward,
                      RmsNormTrain{values(x), values(dy), values(dx), ptr<float>(weight), ptr<float>(r), T, D, 0.0f},
                      T * D);
    });
}

}  // namespace tiercel

#else

namespace ISA {
using namespace tiercel;

void rms_norm_train(const void* args, Worker& worker) {
    const RmsNormTrain& a = *(const RmsNormTrain*)args;
    constexpr i64 TOKENS = 4;
    for (i64 tile; (tile = worker.next_tile(ceil_div(a.tokens, TOKENS))) >= 0;)
        for (i64 t = tile * TOKENS; t < min(a.tokens, (tile + 1) * TOKENS); t++) {
            F squares = zero();
            for (i64 i = 0; i < a.width; i += 16) {
                const F x = load_n(a.x, t, i, (int)min(16, a.width - i));
                squares = fma(x, x, squares);
            }
            a.r[t] = 1.0f / sqrtf(sum(squares) / (float)a.width + a.eps);
            const F r = set(a.r[t]);
            for (i64 i = 0; i < a.width; i += 16) {
                const int n = (int)min(16, a.width - i);
                store_n(a.y, t, i, load_n(a.x, t, i, n) * r * load_n(a.weight + i, n), n);
            }
        }
}

void rms_norm_train_backward(const void* args, Worker& worker) {
    const RmsNormTrain& a = *(const RmsNormTrain*)args;
    constexpr i64 TOKENS = 4;
    for (i64 tile; (tile = worker.next_tile(ceil_div(a.tokens, TOKENS))) >= 0;)
        for (i64 t = tile * TOKENS; t < min(a.tokens, (tile + 1) * TOKENS); t++) {
            const F r = set(a.r[t]);
            F dot = zero();
            for (i64 i = 0; i < a.width; i += 16) {
                const int n = (int)min(16, a.width - i);
                dot = fma(load_n(a.y, t, i, n) * load_n(a.weight + i, n), load_n(a.x, t, i, n) * r, dot);
            }
            const F mean = set(sum(dot) / (float)a.width);
            for (i64 i = 0; i < a.width; i += 16) {
                const int n = (int)min(16, a.width - i);
                const F h = load_n(a.x, t, i, n) * r;
                store_n(a.dx, t, i, (load_n(a.y, t, i, n) * load_n(a.weight + i, n) - h * mean) * r, n);
            }
        }
}

REGISTER_KERNEL("rms_norm_train", rms_norm_train);
REGISTER_KERNEL("rms_norm_train_backward", rms_norm_train_backward);

}  // namespace ISA

#endif
