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
    m.def("ssd", [](const MetadataTuple& t, Address xBC, Address dt, Address A, Address D, Address conv_in, Address y,
                    i64 stride, i64 H, i64 P, i64 G, i64 N, i64 taps, i64 chunk) {
        const i64 T = tokens_of(t), C = H * P + 2 * G * N;
        const BatchMetadata batch = metadata(t);
        launch(ssd,
               SSD{batch, ptr<float>(xBC), ptr<float>(dt), ptr<float>(A), ptr<float>(D), ptr<float>(conv_in),
                   ptr<float>(y), stride, H, P, G, N, taps, chunk},
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
    i64 channels() const { return a.heads * a.head_dim + 2 * a.groups * a.state; }
    const float* added(i64 j) const { return a.xBC + (seq.first + j - pending) * channels(); }
    const T* x(i64 j, i64 h) const { return (const T*)buffers.x + (h * rows + j) * a.head_dim; }
    const T* B(i64 j, i64 g) const { return (const T*)buffers.B + (g * rows + j) * a.state; }
    const float* dt(i64 j) const {
        return j < pending ? buffers.dt + j * a.heads : a.dt + (seq.first + j - pending) * a.heads;
    }
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

// ── a tile: heads of one group, of one sequence ──

struct SSDScratch {
    i64 width, lanes;          // a chunk's inputs and N, in whole vectors
    float *B, *dots, *weights; // B of the chunk (chunk, lanes);  C_t · B_j (queries, width), and with decay and dt
    float* dt;                 // by head (heads, width)
    double* decay;             // log decay from the chunk's start through each input (heads, width)
    float* next;               // states after the committed position (heads, N, P)
    float *S_panel, *x_panel, *from_start, *shared, *to_end;
};

INLINE SSDScratch scratch_for(const SSD& a, Worker& worker, i64 heads) {
    const i64 N = a.state, P = a.head_dim, chunk = a.chunk, width = padded(chunk), lanes = padded(N);
    i64 queries = 1;
    for (i64 i = 0; i < a.batch.count; i++) queries = max(queries, min(chunk, a.batch.seqs[i].tokens));
    const i64 floats =
        chunk * lanes + 2 * queries * width + heads * width + heads * N * P + 2 * 16 * max(N, chunk) + 3 * width;
    Scratch scratch{(char*)worker.scratch(floats * sizeof(float) + heads * width * sizeof(double) + 16 * 64)};
    SSDScratch s{width, lanes};
    s.B = scratch.alloc<float>(chunk * lanes);
    s.dots = scratch.alloc<float>(queries * width);
    s.weights = scratch.alloc<float>(queries * width);
    s.dt = scratch.alloc<float>(heads * width);
    s.decay = scratch.alloc<double>(heads * width);
    s.next = scratch.alloc<float>(heads * N * P);
    s.S_panel = scratch.alloc<float>(16 * max(N, chunk));
    s.x_panel = scratch.alloc<float>(16 * max(N, chunk));
    s.from_start = scratch.alloc<float>(width);
    s.shared = scratch.alloc<float>(width);
    s.to_end = scratch.alloc<float>(width);
    return s;
}

struct Chunk {  // of a sequence's pending and new inputs
    i64 start, count, kept;  // its first input, inputs, how many of them are pending ones
    bool advance, panels;    // the state moves past it;  many tokens, or the state moves: panels
    i64 queries() const { return count - kept; }  // new tokens
};

// log decays and dt of all heads of the tile
template <class T> INLINE void decays(const Inputs<T>& in, const SSDScratch& s, const Chunk& c, i64 first_head, i64 heads) {
    unroll6(heads, [&](i64 h, auto some) {
        double sums[some] = {};
        for (i64 j = 0; j < c.count; j++) {
            const float* dt = in.dt(c.start + j) + first_head + h;
            for (int i = 0; i < some; i++) {
                sums[i] += (double)dt[i] * (double)in.a.A[first_head + h + i];
                s.decay[(h + i) * s.width + j] = sums[i];
                s.dt[(h + i) * s.width + j] = dt[i];
            }
        }
    });
    for (i64 h = 0; h < heads; h++)
        for (i64 j = c.count; j < padded(c.count); j++) {
            s.decay[h * s.width + j] = 0;
            s.dt[h * s.width + j] = 0;
        }
}

// C_t · B_j of all new tokens t with the inputs j ≤ t of the chunk
template <class T> INLINE void scores(const Inputs<T>& in, const SSDScratch& s, const Chunk& c, i64 g) {
    const i64 N = in.a.state, channels = in.channels();
    if (c.panels)
        for (i64 j = 0; j < c.count; j++)
            for (i64 n = 0; n < N; n += 16) {
                const i64 i = c.start + j;
                const F B = i < in.pending ? load_n(in.B(i, g) + n, N - n) : load_n(in.new_B(i, g) + n, N - n);
                store(s.B + j * s.lanes + n, B);
            }
    for (i64 q = 0; q < c.queries(); q++) {
        const i64 t = c.kept + q;
        const float* C = in.C(c.start + t, g);
        float* dots = s.dots + q * s.width;
        if (c.panels) all_dots(C, s.B, s.lanes, N, t + 1, dots);
        else {
            all_dots(C, in.B(c.start, g), N, N, c.kept, dots);
            all_dots(C, in.new_B(c.start + c.kept, g), channels, N, t + 1 - c.kept, dots + c.kept);
        }
        for (i64 j = t + 1; j < padded(t + 1); j++) dots[j] = 0;
    }
}

// y (queries, H · P) of one head, a few tokens
template <class T>
INLINE void few_tokens(const Inputs<T>& in, const SSDScratch& s, const Chunk& c, i64 g, i64 head, const float* S, float* y) {
    const i64 H = in.a.heads, P = in.a.head_dim, N = in.a.state, new_start = c.start + c.kept;
    for (i64 q = 0; q < c.queries(); q++) {
        i64 p = 0;
        const auto some = [&](auto W, auto n) {
            one<W>(in.C(new_start + q, g), S + p, N, P, s.from_start[c.kept + q], s.weights + q * s.width,
                   in.x(c.start, head) + p, c.kept, in.new_x(new_start, head) + p, in.channels(), c.kept + q + 1,
                   in.a.D[head], y + q * H * P + p, n);
        };
        for (; p + 64 <= P; p += 64) some(Constant<4>(), Constant<16>());
        for (; p + 16 <= P; p += 16) some(Constant<1>(), Constant<16>());
        if (p < P) some(Constant<1>(), (int)(P - p));
    }
}

// y (queries, H · P) of one head, and the state after the chunk where it advances
template <class T>
INLINE void many_tokens(const Inputs<T>& in, const SSDScratch& s, const Chunk& c, i64 g, i64 h, i64 head, const float* S,
                        float* after, float* y) {
    const i64 H = in.a.heads, P = in.a.head_dim, N = in.a.state, channels = in.channels(), new_start = c.start + c.kept;
    const double* decay = s.decay + h * s.width;
    for (i64 j = 0; c.advance && j < c.count; j += 16)
        store(s.to_end + j, exp_since(decay + j, decay[c.count - 1]) * load(s.dt + h * s.width + j));
    for (i64 p = 0; p < P; p += 16) {
        const int n = min(16, P - p);
        load_panel(s.S_panel, S + p, P, N, n);
        load_panel(s.x_panel, in.x(c.start, head) + p, P, c.kept, n);
        if (c.queries() > 0) load_panel(s.x_panel + 16 * c.kept, in.new_x(new_start, head) + p, channels, c.queries(), n);
        unroll6(c.queries(), [&](i64 q, auto rows) {
            F sum[rows];
            for (int r = 0; r < rows; r++) sum[r] = zero();
            panel_product<rows>(sum, in.C(new_start + q, g), channels, 1, s.S_panel, N);
            for (int r = 0; r < rows; r++) sum[r] = sum[r] * set(s.from_start[c.kept + q + r]);
            const i64 t = c.kept + q;
            panel_product<rows>(sum, s.weights + q * s.width, s.width, 1, s.x_panel, t + 1);
            for (int r = 0; r < rows; r++) {
                for (i64 j = t + 1; j <= t + r; j++)
                    sum[r] = fma(set(s.weights[(q + r) * s.width + j]), load(s.x_panel + 16 * j), sum[r]);
                store_n(y + (q + r) * H * P + p, fma(set(in.a.D[head]), load(s.x_panel + 16 * (t + r)), sum[r]), n);
            }
        });
        if (!c.advance) continue;
        for (i64 j = 0; j < c.count; j++) store(s.x_panel + 16 * j, load(s.x_panel + 16 * j) * set(s.to_end[j]));
        unroll6(N, [&](i64 k, auto rows) {
            F sum[rows];
            for (int r = 0; r < rows; r++) sum[r] = load(s.S_panel + 16 * (k + r)) * set(s.from_start[c.count - 1]);
            panel_product<rows>(sum, s.B + k, 1, s.lanes, s.x_panel, c.count);
            for (int r = 0; r < rows; r++) store_n(after + (k + r) * P + p, sum[r], n);
        });
    }
}

template <class T> INLINE void ssd_as(const SSD& a, Worker& worker) {
    const i64 H = a.heads, P = a.head_dim, G = a.groups, N = a.state, R = H / G, chunk = a.chunk, history = a.taps - 1;
    // heads of a tile: all compute the same dots, so no more tiles than keep every thread busy
    const i64 each = max(1, min(min(8, R), a.batch.count * H / (4 * worker.size))), blocks = ceil_div(R, each);
    const SSDScratch s = scratch_for(a, worker, each);

    for_each_tile(a.batch, worker, [&](const SeqSlice&) { return G * blocks; }, [&](const SeqSlice& seq, i64 tile) {
        RecurrentDescriptor& state = layer_of<RecurrentDescriptor>(a.batch, seq);
        Mamba2Buffers& buffers = state.buffers<Mamba2Buffers>();
        const i64 length = length_of(seq), pending = length - state.committed_pos, all = pending + seq.tokens;
        const i64 commit = next_committed_pos(state.committed_pos, length, seq.tokens, chunk) - state.committed_pos;
        const i64 g = tile / blocks, first_head = g * R + tile % blocks * each;
        const i64 heads = min(each, (g + 1) * R - first_head);
        const Inputs<T> in{a, seq, buffers, pending, 2 * chunk};

        for (i64 start = 0; start < all; start += chunk) {
            Chunk c{start, min(chunk, all - start), 0, false, false};
            c.kept = max(0, min(pending - start, c.count));
            c.advance = c.count == chunk && (start + c.count < all || start + c.count == commit);
            c.panels = c.queries() > 3 || c.advance;
            decays(in, s, c, first_head, heads);
            scores(in, s, c, g);
            for (i64 h = 0; h < heads; h++) {
                const i64 head = first_head + h;
                // after the committed position the state is needed, but not to be kept
                float* S = start > commit ? s.next + h * N * P : buffers.ssm_state + head * N * P;
                float* after = start + c.count <= commit ? S : s.next + h * N * P;
                const double* decay = s.decay + h * s.width;
                exps_of(s.from_start, decay, c.count);
                to_sixteens(s.shared, decay, s.dt + h * s.width, c.count);
                for (i64 q = 0; q < c.queries(); q++)
                    weights_of(s.weights + q * s.width, decay, c.kept + q, s.shared, s.dt + h * s.width, s.dots + q * s.width);
                float* y = a.y + ((seq.first + start + c.kept - pending) * H + head) * P;
                if (c.panels) many_tokens(in, s, c, g, h, head, S, after, y);
                else few_tokens(in, s, c, g, head, S, y);
            }
        }
        // what only this tile reads moves on at once, the rest when all tiles of the sequence are done
        const i64 tokens = seq.tokens, channels = in.channels();
        for (i64 h = first_head; h < first_head + heads; h++)
            shift_rows((T*)buffers.x + h * 2 * chunk * P, P, pending, commit, in.new_x(pending, h), channels, tokens, P);
        shift_rows(buffers.dt + first_head, H, pending, commit, a.dt + seq.first * H + first_head, H, tokens, heads);
        if (!last_of(state.tiles_done, G * blocks)) return;
        for (i64 i = 0; i < G; i++)
            shift_rows((T*)buffers.B + i * 2 * chunk * N, N, pending, commit, in.new_B(pending, i), channels, tokens, N);
        shift_rows((T*)buffers.conv_state, channels, history + pending, commit, a.conv_in + seq.first * a.stride, a.stride,
                   tokens, channels);
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
