// The Mamba-2 scan: y_t = exp(a_t) C_t S + Σ_{j≤t} exp(a_t − a_j) dt_j (C_t · B_j) x_j + D x_t, see mixers/mamba2/chunked.py.
//
// Every output is the same chain of operations whether its token comes alone or with a whole prompt: n in order, then
// j in order from the start of the chunk; C_t · B_j in sixteen lanes over n.  One token reads S where it lies; more
// go six at a time through panels of sixteen channels.
#include "ops/cpu/scan.h"

namespace tiercel {

struct Mamba2Buffers {  // in the order of Mamba2's `buffers()`
    void *conv_state, *x;  // (K − 1 + 2 chunk, C), (H, 2 chunk, P)
    float* dt;             // (2 chunk, H)
    void* B;               // (G, 2 chunk, N)
    float* ssm_state;      // (H, N, P), before token `committed_pos`
};
struct SSD {  // y (T, H · P) from xBC and dt as CausalConv1d left them; columns: what CausalConv1d was given
    BatchMetadata batch;
    const float *xBC, *dt, *A, *D, *conv_in;
    float* y;
    i64 stride, heads, head_dim, groups, state, taps, chunk;
};

}  // namespace tiercel

#if defined(TIERCEL_BINDINGS)

#include "ops/cpu/bindings.h"

namespace tiercel {

static KernelHandle ssd{"ssd"};

BINDINGS(m) {
    m.def("ssd", [](const MetadataTuple& t, Address xBC, Address dt, Address A, Address D, Address conv_in, Address y, i64 stride, i64 H, i64 P, i64 G,
                    i64 N, i64 taps, i64 chunk) {
        const i64 T = tokens_of(t), C = H * P + 2 * G * N;
        const BatchMetadata batch = metadata(t);
        launch(ssd,
           SSD{batch, ptr<float>(xBC), ptr<float>(dt), ptr<float>(A), ptr<float>(D), ptr<float>(conv_in), ptr<float>(y),
               stride, H, P, G, N, taps, chunk},
           H * P * N < SMALL, {values(xBC, T, C), values(dt, T, H), values(conv_in, T, C, stride)},
           {state_of(batch), values(y, T, H * P)});
    });
}

}  // namespace tiercel

#else

namespace ISA {
using namespace tiercel;

template <class T> struct Inputs {  // pending inputs of the state, then the new ones
    const SSD& a;
    const SeqSlice& seq;
    const Mamba2Buffers& buffers;
    i64 pending, rows;
    const float* added(i64 j) const { return a.xBC + (seq.first + j - pending) * (a.heads * a.head_dim + 2 * a.groups * a.state); }
    const T* x(i64 j, i64 h) const { return (const T*)buffers.x + (h * rows + j) * a.head_dim; }
    const T* B(i64 j, i64 g) const { return (const T*)buffers.B + (g * rows + j) * a.state; }
    const float* dt(i64 j) const { return j < pending ? buffers.dt + j * a.heads : a.dt + (seq.first + j - pending) * a.heads; }
    const float* new_x(i64 j, i64 h) const { return added(j) + h * a.head_dim; }
    const float* new_B(i64 j, i64 g) const { return added(j) + a.heads * a.head_dim + g * a.state; }
    const float* C(i64 j, i64 g) const { return added(j) + a.heads * a.head_dim + (a.groups + g) * a.state; }
};

// Decay from every input to the end of its sixteen, times dt: what queries beyond these share.
INLINE void to_sixteens(float* out, const double* a, const float* dt, i64 count) {
    for (i64 j = 0; j + 16 <= count; j += 16) store(out + j, exp_since(a + j, a[j + 15]) * load(dt + j));
}

// w_j = exp(a_t − a_j) dt_j s_j for j ≤ t, in whole vectors.  Over whole sixteens before t the exponential is a product
// of two, so that not every pair of tokens needs its own.
INLINE void weights_of(float* w, const double* a, i64 t, const float* shared, const float* dt, const float* s) {
    const F tiny = set(1.1754944e-38f);  // less would be denormal: no contribution, and slow
    for (i64 many = 0; many < t / 16; many += 16) {
        const i64 stop = min(16, t / 16 - many);
        float lag[16] = {}, since[16];
        for (i64 i = 0; i < stop; i++) lag[i] = (float)(a[t] - a[(many + i) * 16 + 15]);
        store(since, exp(min(load(lag), zero())));
        for (i64 k = 0; k < stop; k++) {
            const i64 j = (many + k) * 16;
            F v = load(shared + j) * set(since[k]);
            EACH v.p[i] = v.p[i] < tiny.p[i] ? vf{} : v.p[i];
            store(w + j, v * load(s + j));
        }
    }
    const i64 j = t / 16 * 16;
    store(w + j, exp_since(a + j, a[t]) * load(dt + j) * load(s + j));
}

// ── one token: vectors of P, S where it lies ──

constexpr i64 DISTANCE = 2048;  // bytes of S fetched ahead: the processor's own fetching stops at every page

template <int W, class T, class Lanes>
INLINE void one(const float* C, const float* S, i64 N, i64 P, float decay, const float* w, const T* x, i64 kept,
                const float* new_x, i64 stride, i64 count, float D, float* y, Lanes n) {
    F s[W];
    for (int i = 0; i < W; i++) s[i] = zero();
    for (i64 k = 0; k < N; k++) {
        const F c = set(C[k]);
        for (int i = 0; i < W; i++) __builtin_prefetch((const char*)(S + k * P + 16 * i) + DISTANCE, 0, 3);
        for (int i = 0; i < W; i++) s[i] = fma(c, load_n(S + k * P + 16 * i, n), s[i]);
    }
    for (int i = 0; i < W; i++) s[i] = s[i] * set(decay);
    for (i64 j = 0; j < kept; j++) {
        const F v = set(w[j]);
        for (int i = 0; i < W; i++) s[i] = fma(v, load_n(x + j * P + 16 * i, n), s[i]);
    }
    const float* last = new_x;
    for (i64 j = kept; j < count; j++, new_x += stride) {
        const F v = set(w[j]);
        for (int i = 0; i < W; i++) s[i] = fma(v, load_n(new_x + 16 * i, n), s[i]);
        last = new_x;
    }
    for (int i = 0; i < W; i++) store_n(y + 16 * i, fma(set(D), load_n(last + 16 * i, n), s[i]), n);
}

// ── many: six tokens by sixteen channels ──

template <class T> INLINE void ssd_as(const SSD& a, Worker& worker) {
    const i64 H = a.heads, P = a.head_dim, G = a.groups, N = a.state, R = H / G, chunk = a.chunk, history = a.taps - 1;
    // heads of a tile: all compute the same dots, so no more tiles than keep every thread busy
    const i64 each = max(1, min(min(8, R), a.batch.count * H / (4 * worker.size))), blocks = ceil_div(R, each);
    const i64 channels = H * P + 2 * G * N, width = padded(chunk), lanes = padded(N);
    i64 most_new = 1;
    for (i64 i = 0; i < a.batch.count; i++) most_new = max(most_new, min(chunk, a.batch.seqs[i].tokens));
    const i64 floats = chunk * lanes + 2 * most_new * width + each * width + each * N * P + 2 * 16 * max(N, chunk) + 3 * width;
    Scratch scratch{(char*)worker.scratch(floats * sizeof(float) + each * width * sizeof(double) + 16 * 64)};
    float* Bs = scratch.alloc<float>(chunk * lanes);        // B of the chunk
    float* dots_of = scratch.alloc<float>(most_new * width);  // C_t · B_j
    float* w = scratch.alloc<float>(most_new * width);        // the same with decay and dt, for one head
    float* dts = scratch.alloc<float>(each * width);          // by head
    double* as = scratch.alloc<double>(each * width);
    float* next = scratch.alloc<float>(each * N * P);         // states beyond the boundary
    float* S_panel = scratch.alloc<float>(16 * max(N, chunk));
    float* x_panel = scratch.alloc<float>(16 * max(N, chunk));
    float* from_start = scratch.alloc<float>(width);
    float* shared = scratch.alloc<float>(width);
    float* to_end = scratch.alloc<float>(width);

    for_each_tile(a.batch, worker, [&](const SeqSlice&) { return G * blocks; }, [&](const SeqSlice& seq, i64 tile) {
        RecurrentDescriptor& state = layer_of<RecurrentDescriptor>(a.batch, seq);
        Mamba2Buffers& buffers = state.buffers<Mamba2Buffers>();
        const i64 length = length_of(seq), pending = length - state.committed_pos, all = pending + seq.tokens;
        const i64 commit = next_committed_pos(state.committed_pos, length, seq.tokens, chunk) - state.committed_pos;
        const i64 g = tile / blocks, first_head = g * R + tile % blocks * each;
        const i64 heads = min(each, (g + 1) * R - first_head);
        const Inputs<T> in{a, seq, buffers, pending, 2 * chunk};

        for (i64 start = 0; start < all; start += chunk) {
            const i64 count = min(chunk, all - start), kept = max(0, min(pending - start, count));
            const i64 first = kept, queries = count - kept;  // tokens of this chunk that are new
            const bool advance = count == chunk && (start + count < all || start + count == commit);
            const bool panels = queries > 3 || advance;
            // log decay from the chunk's start through each input
            unroll6(heads, [&](i64 h, auto some) {
                double sums[some] = {};
                for (i64 j = 0; j < count; j++) {
                    const float* dt = in.dt(start + j) + first_head + h;
                    for (int i = 0; i < some; i++) {
                        sums[i] += (double)dt[i] * (double)a.A[first_head + h + i];
                        as[(h + i) * width + j] = sums[i];
                        dts[(h + i) * width + j] = dt[i];
                    }
                }
            });
            for (i64 h = 0; h < heads; h++)
                for (i64 j = count; j < padded(count); j++) {
                    as[h * width + j] = 0;
                    dts[h * width + j] = 0;
                }
            if (panels)
                for (i64 j = 0; j < count; j++)
                    for (i64 n = 0; n < N; n += 16) {
                        const i64 i = start + j;
                        store(Bs + j * lanes + n, i < pending ? load_n(in.B(i, g) + n, N - n) : load_n(in.new_B(i, g) + n, N - n));
                    }
            for (i64 q = 0; q < queries; q++) {
                const i64 t = first + q;
                const float* C = in.C(start + t, g);
                float* s = dots_of + q * width;
                if (panels) all_dots(C, Bs, lanes, N, t + 1, s);
                else {
                    all_dots(C, in.B(start, g), N, N, kept, s);
                    all_dots(C, in.new_B(start + kept, g), channels, N, t + 1 - kept, s + kept);
                }
                for (i64 j = t + 1; j < padded(t + 1); j++) s[j] = 0;
            }
            for (i64 h = 0; h < heads; h++) {
                const i64 head = first_head + h;
                // beyond the boundary the state is needed, but not to be kept
                float* S = start > commit ? next + h * N * P : buffers.ssm_state + head * N * P;
                float* after = start + count <= commit ? S : next + h * N * P;
                const double* decay = as + h * width;
                exps_of(from_start, decay, count);
                to_sixteens(shared, decay, dts + h * width, count);
                for (i64 q = 0; q < queries; q++)
                    weights_of(w + q * width, decay, first + q, shared, dts + h * width, dots_of + q * width);
                float* y = a.y + ((seq.first + start + first - pending) * H + head) * P;
                if (!panels) {
                    for (i64 q = 0; q < queries; q++) {
                        i64 p = 0;
                        const auto go = [&](auto W, auto n) {
                            one<W>(in.C(start + first + q, g), S + p, N, P, from_start[first + q], w + q * width,
                                   in.x(start, head) + p, kept, in.new_x(start + kept, head) + p, channels, first + q + 1,
                                   a.D[head], y + q * H * P + p, n);
                        };
                        for (; p + 64 <= P; p += 64) go(Constant<4>(), Constant<16>());
                        for (; p + 16 <= P; p += 16) go(Constant<1>(), Constant<16>());
                        if (p < P) go(Constant<1>(), (int)(P - p));
                    }
                    continue;
                }
                for (i64 j = 0; advance && j < count; j += 16)
                    store(to_end + j, exp_since(decay + j, decay[count - 1]) * load(dts + h * width + j));
                for (i64 p = 0; p < P; p += 16) {
                    const int n = min(16, P - p);
                    load_panel(S_panel, S + p, P, N, n);
                    load_panel(x_panel, in.x(start, head) + p, P, kept, n);
                    if (kept < count) load_panel(x_panel + 16 * kept, in.new_x(start + kept, head) + p, channels, count - kept, n);
                    unroll6(queries, [&](i64 q, auto rows) {
                        F s[rows];
                        for (int r = 0; r < rows; r++) s[r] = zero();
                        panel_product<rows>(s, in.C(start + first + q, g), channels, 1, S_panel, N);
                        for (int r = 0; r < rows; r++) s[r] = s[r] * set(from_start[first + q + r]);
                        const i64 t = first + q;
                        panel_product<rows>(s, w + q * width, width, 1, x_panel, t + 1);
                        for (int r = 0; r < rows; r++) {
                            for (i64 j = t + 1; j <= t + r; j++) s[r] = fma(set(w[(q + r) * width + j]), load(x_panel + 16 * j), s[r]);
                            store_n(y + (q + r) * H * P + p, fma(set(a.D[head]), load(x_panel + 16 * (t + r)), s[r]), n);
                        }
                    });
                    if (!advance) continue;
                    for (i64 j = 0; j < count; j++) store(x_panel + 16 * j, load(x_panel + 16 * j) * set(to_end[j]));
                    unroll6(N, [&](i64 k, auto rows) {
                        F s[rows];
                        for (int r = 0; r < rows; r++) s[r] = load(S_panel + 16 * (k + r)) * set(from_start[count - 1]);
                        panel_product<rows>(s, Bs + k, 1, lanes, x_panel, count);
                        for (int r = 0; r < rows; r++) store_n(after + (k + r) * P + p, s[r], n);
                    });
                }
            }
        }
        // what only this tile reads moves on at once, the rest when all tiles of the seq are done
        for (i64 h = first_head; h < first_head + heads; h++)
            shift_rows((T*)buffers.x + h * 2 * chunk * P, P, pending, commit, in.new_x(pending, h), channels, seq.tokens, P);
        shift_rows(buffers.dt + first_head, H, pending, commit, a.dt + seq.first * H + first_head, H, seq.tokens, heads);
        if (!last_of(state.tiles_done, G * blocks)) return;
        for (i64 i = 0; i < G; i++)
            shift_rows((T*)buffers.B + i * 2 * chunk * N, N, pending, commit, in.new_B(pending, i), channels, seq.tokens, N);
        shift_rows((T*)buffers.conv_state, channels, history + pending, commit, a.conv_in + seq.first * a.stride, a.stride, seq.tokens, channels);
        state.committed_pos += commit;
    });
}

void ssd(const void* args, Worker& worker) {
    const SSD& a = *(const SSD*)args;
    if (a.batch.bf16) ssd_as<bf16>(a, worker);
    else ssd_as<float>(a, worker);
}

REGISTER_KERNEL("ssd", ssd);

}  // namespace ISA

#endif
