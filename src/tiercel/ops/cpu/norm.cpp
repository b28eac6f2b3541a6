// RMS norms, one token after another: plain, and gated by silu(z) (Mamba-2's).
#include <math.h>
#include "tiles.h"

namespace tiercel {

struct RmsNorm { const float *x, *weight; float* y; i64 tokens, width; float eps; };
struct GatedNorm {  // z rows are `stride` apart; weight nullptr: y · silu(z)
    const float *x, *z, *weight;
    float* y;
    i64 tokens, width, stride, groups;
    float eps;
    int gate_first;
};

}  // namespace tiercel

#if defined(TIERCEL_BINDINGS)

#include "bindings.h"

namespace tiercel {

static KernelHandle rms_norm{"rms_norm"}, gated_norm{"gated_norm"};

BINDINGS(m) {
    m.def("rms_norm", [](Address x, Address weight, Address y, i64 T, i64 D, float eps) {
        launch(rms_norm, RmsNorm{ptr<float>(x), ptr<float>(weight), ptr<float>(y), T, D, eps}, T * D < SMALL,
               {{ptr<void>(x), T * D * f32}}, {{ptr<void>(y), T * D * f32}});
    });
    m.def("gated_norm", [](Address x, Address z, Address weight, Address y, i64 T, i64 D, i64 stride, i64 groups,
                           float eps, bool gate_first) {
        launch(gated_norm,
               GatedNorm{ptr<float>(x), ptr<float>(z), ptr<float>(weight), ptr<float>(y), T, D, stride, groups, eps,
                         gate_first},
               T * D < SMALL, {values(x, T, D), values(z, T, D, stride)}, {values(y, T, D)});
    });
}

}  // namespace tiercel

#else

namespace ISA {
using namespace tiercel;

void rms_norm(const void* args, Worker& worker) {
    const RmsNorm& a = *(const RmsNorm*)args;
    for_each_token(a.tokens, worker, [&](i64 t) {
        const float* x = a.x + t * a.width;
        float* y = a.y + t * a.width;
        const F scale = set(rms_scale(x, a.width, a.eps));
        for (i64 i = 0; i < a.width; i += 16) {
            const i64 n = a.width - i;
            store_n(y + i, load_n(x + i, n) * scale * load_n(a.weight + i, n), n);
        }
    });
}

void gated_norm(const void* args, Worker& worker) {
    const GatedNorm& a = *(const GatedNorm*)args;
    const i64 width = a.width / a.groups;
    for_each_token(a.tokens, worker, [&](i64 t) {
        for (i64 g = 0; g < a.groups; g++) {
            const float *x = a.x + t * a.width + g * width, *z = a.z + t * a.stride + g * width;
            float* y = a.y + t * a.width + g * width;
            if (!a.weight || a.gate_first)
                for (i64 i = 0; i < width; i += 16) store_n(y + i, load_n(x + i, width - i) * silu(load_n(z + i, width - i)), width - i);
            if (!a.weight) continue;
            const float* weight = a.weight + g * width;
            const float* h = a.gate_first ? y : x;
            const F scale = set(rms_scale(h, width, a.eps));
            for (i64 i = 0; i < width; i += 16) {
                const i64 n = width - i;
                F v = load_n(h + i, n) * scale * load_n(weight + i, n);
                if (!a.gate_first) v = v * silu(load_n(z + i, n));
                store_n(y + i, v, n);
            }
        }
    });
}

REGISTER_KERNEL("rms_norm", rms_norm);
REGISTER_KERNEL("gated_norm", gated_norm);

}  // namespace ISA

#endif
