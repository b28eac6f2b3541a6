// The Mamba-1 scan: S = exp(dt A) ∘ S + B ⊗ dt x, y = (C S + D x) · silu(z), channels in lanes; and the parts that its
// x_proj makes.
#include "ops/cpu/batch.h"
#include "ops/cpu/tiles.h"

namespace tiercel {

struct Mamba1Buffers {  // in the order of Mamba1's `buffers()`, and the length that `running` stands at
    void *conv_state, *x;  // (K − 1 + 2 chunk, I), (2 chunk, I)
    float* dt;             // (2 chunk, I)
    void* B;               // (2 chunk, N)
    float *ssm_state, *running;  // (N, I): before token `committed_pos`, before token `running_pos`
    i64 running_pos;
};
struct SplitNorm {  // Mamba-1: (T, widths summed) into dt, B, C, each with an RMS norm where it has a weight; B as kept
    const float* x;
    const float* weight[3];
    float* y[3];
    i64 tokens, width[3];
    float eps;
    int bf16;
};
struct SelectiveScan {  // Mamba-1: y (T, I) = (scan + D x) · silu(z); A (N, I); dt before bias and softplus
    BatchMetadata batch;
    const float *x, *dt, *dt_bias, *B, *C, *A, *D, *z, *conv_in;
    float* y;
    i64 stride, inner, state, taps, chunk;  // z and conv_in rows are `stride` apart
};

}  // namespace tiercel

#if defined(TIERCEL_BINDINGS)

#include "ops/cpu/bindings.h"

namespace tiercel {

static KernelHandle split_norm{"split_norm"}, selective_scan{"selective_scan"};

BINDINGS(m) {
    m.def("split_norm", [](Address x, Address w0, Address w1, Address w2, Address y0, Address y1, Address y2, i64 T,
                           i64 n0, i64 n1, i64 n2, float eps, bool bf16) {
        launch(split_norm,
               SplitNorm{ptr<float>(x),
                         {ptr<float>(w0), ptr<float>(w1), ptr<float>(w2)},
                         {ptr<float>(y0), ptr<float>(y1), ptr<float>(y2)},
                         T,
                         {n0, n1, n2},
                         eps,
                         bf16},
               T * (n0 + n1 + n2) < SMALL, {values(x, T, n0 + n1 + n2)},
               {values(y0, T, n0), values(y1, T, n1), values(y2, T, n2)});
    });
    m.def("selective_scan",
          [](const MetadataTuple& t, Address x, Address dt, Address dt_bias, Address B, Address C, Address A, Address D,
             Address z, Address conv_in, Address y, i64 stride, i64 I, i64 N, i64 taps, i64 chunk) {
              const i64 T = tokens_of(t);
              const BatchMetadata batch = metadata(t);
              launch(selective_scan,
                     SelectiveScan{batch, ptr<float>(x), ptr<float>(dt), ptr<float>(dt_bias), ptr<float>(B),
                                   ptr<float>(C), ptr<float>(A), ptr<float>(D), ptr<float>(z), ptr<float>(conv_in),
                                   ptr<float>(y), stride, I, N, taps, chunk},
                     T * I * N < SMALL / 8,
                     {values(x, T, I), values(dt, T, I), values(B, T, N), values(C, T, N), values(z, T, I, stride),
                      values(conv_in, T, I, stride)},
                     {state_of(batch), values(y, T, I)});
          });
}

}  // namespace tiercel

#else

namespace ISA {
using namespace tiercel;

// ── dt, B and C ──

void split_norm(const void* args, Worker& worker) {
    const SplitNorm& a = *(const SplitNorm*)args;
    for_each_token(a.tokens, worker, [&](i64 t) {
        const float* x = a.x + t * (a.width[0] + a.width[1] + a.width[2]);
        for (int part = 0; part < 3; part++) {
            const i64 width = a.width[part];
            float* y = a.y[part] + t * width;
            const float* weight = a.weight[part];
            const F scale = set(weight ? rms_scale(x, width, a.eps) : 1.0f);
            for (i64 i = 0; i < width; i += 16) {
                F v = load_n(x + i, width - i);
                if (weight) v = v * scale * load_n(weight + i, width - i);
                if (part == 1 && a.bf16) v = rounded(v, (const bf16*)0);
                store_n(y + i, v, width - i);
            }
            x += width;
        }
    });
}

// ── the scan ──

// one token further, for sixteen channels: S (N, 16) in scratch; C S where C is given
INLINE F step(float* S, const float* A, i64 stride, int some, F dt, F x, const float* B, const float* C, i64 N) {
    const F added = dt * x;
    F y = zero();
    for (i64 n = 0; n < N; n++) {
        const F decay = exp(dt * load_n(A + n * stride, some));
        const F s = fma(decay, load(S + 16 * n), added * set(B[n]));
        store(S + 16 * n, s);
        if (C) y = fma(set(C[n]), s, y);
    }
    return y;
}

template <class T> INLINE void selective_scan_as(const SelectiveScan& a, Worker& worker) {
    const i64 I = a.inner, N = a.state, chunk = a.chunk, history = a.taps - 1;
    constexpr i64 CHANNELS = 64;
    i64 longest = 1;
    for (i64 i = 0; i < a.batch.count; i++) longest = max(longest, a.batch.seqs[i].tokens);
    Scratch scratch{(char*)worker.scratch((16 * N + 2 * chunk * N + longest * CHANNELS) * sizeof(float) + 4 * 64)};
    float* S = scratch.alloc<float>(16 * N);
    float* Bs = scratch.alloc<float>(2 * chunk * N);         // of the pending inputs
    float* dts = scratch.alloc<float>(longest * CHANNELS);   // of the new ones

    for_each_tile(a.batch, worker, [&](const SeqSlice&) { return ceil_div(I, CHANNELS); }, [&](const SeqSlice& seq, i64 tile) {
        RecurrentDescriptor& state = layer_of<RecurrentDescriptor>(a.batch, seq);
        Mamba1Buffers& buffers = state.buffers<Mamba1Buffers>();
        const i64 length = length_of(seq), pending = length - state.committed_pos;
        const i64 cut = next_committed_pos(state.committed_pos, length, seq.tokens, chunk) - state.committed_pos;  // counted in pending inputs
        const bool trimmed = buffers.running_pos != length;
        const T* x = (const T*)buffers.x;
        if (trimmed || (cut > 0 && cut <= pending))
            for (i64 j = 0; j < pending; j++)
                for (i64 n = 0; n < N; n += 16)
                    store_n(Bs + j * N + n, load_n((const T*)buffers.B + j * N + n, N - n), N - n);
        const i64 stop = min(I, (tile + 1) * CHANNELS);
        for (i64 c = tile * CHANNELS; c < stop; c += 16) {
            const int some = min(16, stop - c);
            const auto take = [&](const float* from) { for (i64 n = 0; n < N; n++) store(S + 16 * n, load_n(from + n * I + c, some)); };
            const auto keep = [&](float* to) { for (i64 n = 0; n < N; n++) store_n(to + n * I + c, load(S + 16 * n), some); };
            const auto again = [&](i64 first, i64 last) {
                for (i64 j = first; j < last; j++)
                    step(S, a.A + c, I, some, load_n(buffers.dt + j * I + c, some), load_n(x + j * I + c, some), Bs + j * N, nullptr, N);
            };
            const bool behind = cut > 0 && cut <= pending;  // the boundary lies among the old inputs
            if (trimmed) {
                take(buffers.ssm_state);
                again(0, behind ? cut : pending);
                if (behind) {
                    keep(buffers.ssm_state);
                    again(cut, pending);
                }
            } else {
                if (behind) {
                    take(buffers.ssm_state);
                    again(0, cut);
                    keep(buffers.ssm_state);
                }
                take(buffers.running);
            }
            const F bias = load_n(a.dt_bias + c, some), D = load_n(a.D + c, some);
            for (i64 t = 0; t < seq.tokens; t++) {
                const i64 token = seq.first + t;
                const F dt = softplus(load_n(a.dt + token * I + c, some) + bias), in = load_n(a.x + token * I + c, some);
                const F y = step(S, a.A + c, I, some, dt, in, a.B + token * N, a.C + token * N, N);
                store_n(a.y + token * I + c, fma(D, in, y) * silu(load_n(a.z + token * a.stride + c, some)), some);
                store(dts + t * CHANNELS + c % CHANNELS, dt);
                if (pending + t + 1 == cut) keep(buffers.ssm_state);
            }
            keep(buffers.running);
        }
        const i64 c = tile * CHANNELS, width = stop - c;
        shift_rows((T*)buffers.x + c, I, pending, cut, a.x + seq.first * I + c, I, seq.tokens, width);
        shift_rows(buffers.dt + c, I, pending, cut, dts, CHANNELS, seq.tokens, width);
        if (!last_of(state.tiles_done, ceil_div(I, CHANNELS))) return;
        shift_rows((T*)buffers.B, N, pending, cut, a.B + seq.first * N, N, seq.tokens, N);
        shift_rows((T*)buffers.conv_state, I, history + pending, cut, a.conv_in + seq.first * a.stride, a.stride, seq.tokens, I);
        state.committed_pos += cut;
        buffers.running_pos = length + seq.tokens;
    });
}

void selective_scan(const void* args, Worker& worker) {
    const SelectiveScan& a = *(const SelectiveScan*)args;
    if (a.batch.bf16) selective_scan_as<bf16>(a, worker);
    else selective_scan_as<float>(a, worker);
}

REGISTER_KERNEL("split_norm", split_norm);
REGISTER_KERNEL("selective_scan", selective_scan);

}  // namespace ISA

#endif
