// y = causal depthwise convolution inside documents, silu of it where asked: reach[t] lags are of t's document; forward
// and backward.
#include "train.h"

namespace tiercel {

constexpr i64 TAPS = 8;  // at most
struct Conv1dVarlen {  // weight (taps, channels), of the lags 0 …; reach (T): lags inside the document
    Values x, y, dx;
    const float *weight, *bias;
    const i64* reach;
    float *dweight, *dbias;
    i64 tokens, channels, taps;
    bool silu;
};

}  // namespace tiercel

#if defined(TIERCEL_BINDINGS)

namespace tiercel {

static KernelHandle conv1d_varlen{"conv1d_varlen"}, conv1d_varlen_backward{"conv1d_varlen_backward"};

BINDINGS(m) {
    m.attr("TAPS") = TAPS;
    m.def("conv1d_varlen", [](const ValuesTuple& x, Address weight, Address bias, Address reach, const ValuesTuple& y,
                              i64 T, i64 C, i64 taps, bool silu) {
        launch_openmp(conv1d_varlen,
                      Conv1dVarlen{values(x),
                                   values(y),
                                   {},
                                   ptr<float>(weight),
                                   ptr<float>(bias),
                                   ptr<i64>(reach),
                                   nullptr,
                                   nullptr,
                                   T,
                                   C,
                                   taps,
                                   silu},
                      T * C);
    });
    m.def("conv1d_varlen_backward",
          [](const ValuesTuple& x, Address weight, Address bias, Address reach, const ValuesTuple& dy,
             const ValuesTuple& dx, Address dweight, Address dbias, i64 T, i64 C, i64 taps,
             bool silu) {
              launch_openmp(conv1d_varlen_backward,
                            Conv1dVarlen{values(x), values(dy), values(dx), ptr<float>(weight), ptr<float>(bias),
                                         ptr<i64>(reach), ptr<float>(dweight), ptr<float>(dbias), T, C, taps,
                                         silu},
                            T * C);
          });
}

}  // namespace tiercel

#else

namespace ISA {
using namespace tiercel;

template <class Body> INLINE void for_each_lag(i64 lags, Body body) {
    if (lags == 3) {
        body(3);
        body(2);
        body(1);
        body(0);
    } else {
        for (i64 k = lags; k >= 0; k--) body(k);
    }
}

INLINE F convolved(const Conv1dVarlen& a, const F* w, F bias, i64 t, i64 c, int n) {
    F sum = bias;
    for_each_lag(a.reach[t], [&](i64 k) { sum = fma(load_n(a.x, t - k, c, n), w[k], sum); });
    return sum;
}

template <class Body> INLINE void for_each_channel_group(const Conv1dVarlen& a, Worker& worker, Body body) {
    for (i64 tile; (tile = worker.next_tile(ceil_div(a.channels, 16))) >= 0;) {
        const i64 c = tile * 16;
        const int n = (int)min(16, a.channels - c);
        F w[TAPS];
        for (i64 k = 0; k < a.taps; k++) w[k] = load_n(a.weight + k * a.channels + c, n);
        body(c, n, w, a.bias ? load_n(a.bias + c, n) : zero());
    }
}

void conv1d_varlen(const void* args, Worker& worker) {
    const Conv1dVarlen& a = *(const Conv1dVarlen*)args;
    for_each_channel_group(a, worker, [&](i64 c, int n, const F* w, F bias) {
        for (i64 t = 0; t < a.tokens; t++) {
            const F h = convolved(a, w, bias, t, c, n);
            store_n(a.y, t, c, a.silu ? silu(h) : h, n);
        }
    });
}

// y holds its gradient; dweight (taps, C) and dbias (C)
void conv1d_varlen_backward(const void* args, Worker& worker) {
    const Conv1dVarlen& a = *(const Conv1dVarlen*)args;
    for_each_channel_group(a, worker, [&](i64 c, int n, const F* w, F bias) {
        F dw[TAPS], db = zero(), pending[TAPS];  // pending[i]: dx of t − i, to which later tokens still add
        for (i64 k = 0; k < TAPS; k++) dw[k] = pending[k] = zero();
        for (i64 t = 0; t < a.tokens; t++) {
            F dh = load_n(a.y, t, c, n);
            if (a.silu) {
                const F h = convolved(a, w, bias, t, c, n), s = sigmoid(h);
                dh = dh * s * (set(1.0f) + h * (set(1.0f) - s));
            }
            db = db + dh;
            for_each_lag(a.reach[t], [&](i64 k) {
                dw[k] = fma(dh, load_n(a.x, t - k, c, n), dw[k]);
                pending[k] = fma(dh, w[k], pending[k]);
            });
            if (t >= a.taps - 1) store_n(a.dx, t - a.taps + 1, c, pending[a.taps - 1], n);
            for (i64 k = a.taps - 1; k > 0; k--) pending[k] = pending[k - 1];
            pending[0] = zero();
        }
        for (i64 k = 1; k < a.taps; k++)
            if (a.tokens - k >= 0) store_n(a.dx, a.tokens - k, c, pending[k], n);
        for (i64 k = 0; k < a.taps; k++) store_n(a.dweight + k * a.channels + c, dw[k], n);
        if (a.dbias) store_n(a.dbias + c, db, n);
    });
}

REGISTER_KERNEL("conv1d_varlen", conv1d_varlen);
REGISTER_KERNEL("conv1d_varlen_backward", conv1d_varlen_backward);

}  // namespace ISA

#endif
