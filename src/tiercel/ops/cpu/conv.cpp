// Causal depthwise convolution: with silu, and dt = softplus(dt + bias), what stands before a scan; between two gates a
// mixer of its own (mixers/short_conv).
#include "batch.h"

namespace tiercel {

struct CausalConv1d {  // y (T, channels) = silu(conv x), rounded to the state's type; dts (T, heads) = softplus(dt + bias), clamped
    BatchMetadata batch;
    const float *x, *weight, *bias, *dt, *dt_bias;  // weight (taps, channels); x and dt rows are `stride` apart
    float *y, *dts;
    i64 stride, channels, taps, heads;
    float low, high;
    const float *B, *C;  // nullptr, or y = C · conv(B · x), rows as those of x; conv_state moves on, by chunks
    i64 chunk;
};

}  // namespace tiercel

#if defined(TIERCEL_BINDINGS)

#include "bindings.h"

namespace tiercel {

static KernelHandle causal_conv1d{"causal_conv1d"};

BINDINGS(m) {
    m.def("causal_conv1d",
          [](const MetadataTuple& t, Address x, Address weight, Address bias, Address dt, Address dt_bias, Address y,
             Address dts, i64 stride, i64 C, i64 taps, i64 H, float low, float high) {
              const i64 T = tokens_of(t);
              const BatchMetadata batch = metadata(t);
              launch(causal_conv1d,
                     CausalConv1d{batch, ptr<float>(x), ptr<float>(weight), ptr<float>(bias), ptr<float>(dt),
                                  ptr<float>(dt_bias), ptr<float>(y), ptr<float>(dts), stride, C, taps, H, low, high,
                                  nullptr, nullptr, 0},
                     T * C < SMALL / 32, {state_of(batch), values(x, T, C, stride), values(dt, T, H, stride)},
                     {values(y, T, C), values(dts, T, H)});
          });
    m.def("short_conv", [](const MetadataTuple& t, Address BCx, Address weight, Address bias, Address y, i64 stride,
                           i64 C, i64 taps, i64 chunk) {
        const i64 T = tokens_of(t);
        const BatchMetadata batch = metadata(t);
        const float* B = ptr<float>(BCx);
        launch(causal_conv1d,
               CausalConv1d{batch, B + 2 * C, ptr<float>(weight), ptr<float>(bias), nullptr, nullptr, ptr<float>(y),
                            nullptr, stride, C, taps, 0, 0, 0, B, B + C, chunk},
               T * C < SMALL / 32, {values(BCx, T, 3 * C, stride)}, {state_of(batch), values(y, T, C)});
    });
}

}  // namespace tiercel

#else

namespace ISA {
using namespace tiercel;

// Sixteen channels (or `some`) of a tile: inputs of the history and new ones in a row, rounded to the state's type, then
// the sums.
template <class T, class Lanes>
INLINE void conv_sixteen(const CausalConv1d& a, const T* kept, i64 t, i64 c, i64 before, i64 n, float* conv_in, Lanes some) {
    const i64 history = a.taps - 1, at = t * a.stride + c;
    for (i64 i = 0; i < before; i++) store(conv_in + 16 * i, load_n(kept + i * a.channels, some));
    for (i64 i = before; i < n + history; i++) {
        const i64 from = at + (i - history) * a.stride;
        F x = load_n(a.x + from, some);
        if (a.B) x = x * load_n(a.B + from, some);
        store(conv_in + 16 * i, rounded(x, (const T*)0));
    }
    const float* weight = a.weight + c;
    float* y = a.y + t * a.channels + c;
    const F bias = a.bias ? load_n(a.bias + c, some) : zero();
    auto put = [&](i64 i, F sum) {
        sum = a.C ? sum * load_n(a.C + at + i * a.stride, some) : rounded(silu(sum), (const T*)0);
        store_n(y + i * a.channels, sum, some);
    };
    if (a.taps == 4) {
        const F w0 = load_n(weight, some), w1 = load_n(weight + a.channels, some);
        const F w2 = load_n(weight + 2 * a.channels, some), w3 = load_n(weight + 3 * a.channels, some);
        for (i64 i = 0; i < n; i++) {
            const float* column = conv_in + 16 * i;
            F sum = fma(load(column + 16), w1, load(column) * w0);
            put(i, fma(load(column + 48), w3, fma(load(column + 32), w2, sum)) + bias);
        }
        return;
    }
    for (i64 i = 0; i < n; i++) {
        F sum = load(conv_in + 16 * i) * load_n(weight, some);
        for (i64 k = 1; k < a.taps; k++) sum = fma(load(conv_in + 16 * (i + k)), load_n(weight + k * a.channels, some), sum);
        put(i, sum + bias);
    }
}

// A short convolution's state: the new inputs B · x behind the pending ones, and what is committed dropped.
template <class T> INLINE void move_conv_state(const CausalConv1d& a, const SeqSlice& seq, RecurrentDescriptor& state) {
    T* rows = (T*)state.buffers<ConvBuffers>().conv_state;
    const i64 length = length_of(seq), used = a.taps - 1 + length - state.committed_pos;
    const i64 commit = next_committed_pos(state.committed_pos, length, seq.tokens, a.chunk) - state.committed_pos;
    shift_rows(rows, a.channels, used, commit, nullptr, 0, 0, a.channels);
    rows += max(used - commit, 0) * a.channels;
    for (i64 t = max(commit - used, 0); t < seq.tokens; t++, rows += a.channels) {
        const i64 from = (seq.first + t) * a.stride;
        for (i64 c = 0; c < a.channels; c += 16) {
            const i64 n = min(16, a.channels - c);
            store_n(rows + c, load_n(a.x + from + c, n) * load_n(a.B + from + c, n), n);
        }
    }
    state.committed_pos += commit;
}

// Before a scan, conv_state moves on at the end of that.
template <class T> INLINE void conv_as(const CausalConv1d& a, Worker& worker) {
    constexpr i64 TOKENS = 64, CHANNELS = 256;
    const i64 history = a.taps - 1, blocks = ceil_div(a.channels, CHANNELS), tiles = blocks + (a.heads > 0);
    float* conv_in = (float*)worker.scratch((TOKENS + history) * 16 * sizeof(float));
    auto tiles_of = [&](const SeqSlice& seq) { return ceil_div(seq.tokens, TOKENS) * tiles; };
    for_each_tile(a.batch, worker, tiles_of, [&](const SeqSlice& seq, i64 tile) {
        const i64 from = tile / tiles * TOKENS, n = min(TOKENS, seq.tokens - from), block = tile % tiles;
        if (block == blocks) {
            for (i64 t = seq.first + from; t < seq.first + from + n; t++)
                for (i64 h = 0; h < a.heads; h += 16) {
                    const int some = min(16, a.heads - h);
                    const F dt = softplus(load_n(a.dt + t * a.stride + h, some) + load_n(a.dt_bias + h, some));
                    store_n(a.dts + t * a.heads + h, min(max(dt, set(a.low)), set(a.high)), some);
                }
            return;
        }
        RecurrentDescriptor& state = layer_of<RecurrentDescriptor>(a.batch, seq);
        const i64 pending = length_of(seq) - state.committed_pos, before = max(history - from, 0);
        const T* kept = (const T*)state.buffers<ConvBuffers>().conv_state + (pending + from) * a.channels;
        const i64 t = seq.first + from, stop = min(a.channels, (block + 1) * CHANNELS);
        i64 c = block * CHANNELS;
        for (i64 i = 0; i < min(before, n + history); i++) fetch(kept + i * a.channels + c, (stop - c) * sizeof(T));
        for (; c + 16 <= stop; c += 16) conv_sixteen(a, kept + c, t, c, before, n, conv_in, Constant<16>());
        if (c < stop) conv_sixteen(a, kept + c, t, c, before, n, conv_in, (int)(stop - c));
        if (a.C && last_of(state.tiles_done, tiles_of(seq))) move_conv_state<T>(a, seq, state);
    });
}

void causal_conv1d(const void* args, Worker& worker) {
    const CausalConv1d& a = *(const CausalConv1d*)args;
    if (a.batch.bf16) conv_as<bf16>(a, worker);
    else conv_as<float>(a, worker);
}

REGISTER_KERNEL("causal_conv1d", causal_conv1d);

}  // namespace ISA

#endif
