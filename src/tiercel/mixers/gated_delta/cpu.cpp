// The gated delta rule, see mixers/gated_delta/chunked.py:
//
//     u_t = β_t (v_t − exp(a_t) Sᵀ k_t − Σ_{j<t} exp(a_t − a_j) (k_t · k_j) u_j)
//     o_t =       exp(a_t) Sᵀ q_t + Σ_{j≤t} exp(a_t − a_j) (q_t · k_j) u_j
//
// Every output is the same chain of operations whether its token comes alone or with a whole prompt: the state's rows in
// order, then j in order from the start of the chunk; dot products in sixteen lanes.  One token reads S once, for k and
// for q, and does not write it; more go six at a time through panels of sixteen channels.
#include "ops/cpu/scan.h"

namespace tiercel {

struct GatedDeltaBuffers {  // in the order of GatedDelta's `buffers()`
    void *conv_state, *k;   // (K − 1 + 2 chunk, C), (G, 2 chunk, K): as the convolution leaves it, not normalised
    float *g, *u;           // (2 chunk, H), (H, 2 chunk, V)
    float* ssm_state;       // (H, K, V), before token `committed_pos`
};
struct GatedDelta {  // o (T, H · V) from q | k | v as CausalConv1d left them; u (T, H · V) is for this op alone
    BatchMetadata batch;
    const float *qkv, *b, *dt, *dt_bias, *A, *conv_in;  // b and dt: (T, H) of the projections; A = −exp(A_log)
    float *o, *u;
    i64 stride, key_heads, value_heads, key_dim, value_dim, taps, chunk;
    float beta_max;
    bool tiled;  // value head h reads key head h mod key_heads, else h / (value_heads / key_heads)
};

}  // namespace tiercel

#if defined(TIERCEL_BINDINGS)

#include "ops/cpu/bindings.h"

namespace tiercel {

static KernelHandle gated_delta{"gated_delta"};

BINDINGS(m) {
    m.def("gated_delta", [](const MetadataTuple& t, Address qkv, Address b, Address dt, Address dt_bias, Address A,
                            Address conv_in, Address o, Address u, i64 stride, i64 G, i64 H, i64 K, i64 V, i64 taps,
                            i64 chunk, float beta_max, bool tiled) {
        const i64 T = tokens_of(t), C = 2 * G * K + H * V;
        const BatchMetadata batch = metadata(t);
        launch(gated_delta,
               GatedDelta{batch, ptr<float>(qkv), ptr<float>(b), ptr<float>(dt), ptr<float>(dt_bias), ptr<float>(A),
                          ptr<float>(conv_in), ptr<float>(o), ptr<float>(u), stride, G, H, K, V, taps, chunk, beta_max,
                          tiled},
               H * K * V < SMALL,
               {values(qkv, T, C), values(b, T, H), values(dt, T, H), values(conv_in, T, C, stride)},
               {state_of(batch), values(o, T, H * V), values(u, T, H * V)});
    });
}

}  // namespace tiercel

#else

namespace ISA {
using namespace tiercel;

// x / √(Σ x² + 1e-6) · by, `padded(n)` floats with zeros at the end
template <class T> INLINE void normalize(float* out, const T* x, i64 n, float by) {
    F squares = zero();
    for (i64 i = 0; i < n; i += 16) {
        const F v = load_n(x + i, min(16, n - i));
        squares = fma(v, v, squares);
    }
    const F factor = set(by / __builtin_sqrtf(sum(squares) + 1e-6f));
    for (i64 i = 0; i < n; i += 16) store(out + i, load_n(x + i, min(16, n - i)) * factor);
}

INLINE float first_of(F x) {
    float lanes[16];
    store(lanes, x);
    return lanes[0];
}

// exp(a_t − a_j) for j ≤ t and zeros to a whole vector; less than a denormal is no contribution
INLINE void decays_of(float* out, const double* a, i64 t) {
    const F tiny = set(1.1754944e-38f);
    for (i64 j = 0; j <= t; j += 16) {
        F v = exp_since(a + j, a[t]);
        EACH v.p[i] = v.p[i] < tiny.p[i] ? vf{} : v.p[i];
        store(out + j, v);
    }
}

// One token and 16 · W channels: S is read once for both products.
template <int W, class Lanes>
INLINE void one(const GatedDelta& a, const float* k, const float* q, const float* S, float decay, const float* wk,
                const float* wq, const float* old, i64 kept, const float* fresh, i64 apart, i64 count, const float* v,
                float beta, float* u, float* o, Lanes n) {
    const i64 V = a.value_dim;
    F sk[W], sq[W];
    for (int i = 0; i < W; i++) sk[i] = sq[i] = zero();
    for (i64 r = 0; r < a.key_dim; r++) {
        const F ck = set(k[r]), cq = set(q[r]);
        for (int i = 0; i < W; i++) {
            const F s = load_n(S + r * V + 16 * i, n);
            sk[i] = fma(ck, s, sk[i]);
            sq[i] = fma(cq, s, sq[i]);
        }
    }
    for (int i = 0; i < W; i++) {
        sk[i] = sk[i] * set(decay);
        sq[i] = sq[i] * set(decay);
    }
    for (i64 j = 0; j < count; j++) {
        const float* row = j < kept ? old + j * V : fresh + (j - kept) * apart;
        const F ck = set(wk[j]), cq = set(wq[j]);
        for (int i = 0; i < W; i++) {
            const F s = load_n(row + 16 * i, n);
            sk[i] = fma(ck, s, sk[i]);
            sq[i] = fma(cq, s, sq[i]);
        }
    }
    for (int i = 0; i < W; i++) {
        const F value = (load_n(v + 16 * i, n) - sk[i]) * set(beta);
        store_n(u + 16 * i, value, n);
        store_n(o + 16 * i, fma(set(wq[count]), value, sq[i]), n);
    }
}

template <class T> INLINE void gated_delta_as(const GatedDelta& a, Worker& worker) {
    const i64 G = a.key_heads, H = a.value_heads, K = a.key_dim, V = a.value_dim, R = H / G, chunk = a.chunk;
    const i64 channels = 2 * G * K + H * V, lanes = padded(K), width = padded(chunk + 1), history = a.taps - 1;
    i64 most_new = 1;
    for (i64 i = 0; i < a.batch.count; i++) most_new = max(most_new, min(chunk, a.batch.seqs[i].tokens));
    const i64 floats = (chunk + most_new) * lanes + 5 * most_new * width + K * V + 16 * (2 * most_new + max(K, chunk) + chunk) +
                       4 * width;
    Scratch scratch{(char*)worker.scratch(floats * sizeof(float) + width * sizeof(double) + 16 * 64)};
    float* ks = scratch.alloc<float>(chunk * lanes);
    float* qs = scratch.alloc<float>(most_new * lanes);
    float* kk = scratch.alloc<float>(most_new * width);  // k_t · k_j
    float* qk = scratch.alloc<float>(most_new * width);
    float* decays = scratch.alloc<float>(most_new * width);
    float* wk = scratch.alloc<float>(most_new * width);
    float* wq = scratch.alloc<float>(most_new * width);
    float* next = scratch.alloc<float>(K * V);  // the state beyond the boundary
    float* from_start = scratch.alloc<float>(width);
    float* to_end = scratch.alloc<float>(width);
    float* betas = scratch.alloc<float>(width);
    double* sums = scratch.alloc<double>(width);
    float* S_panel = scratch.alloc<float>(16 * max(K, chunk));
    float* u_panel = scratch.alloc<float>(16 * chunk);
    float* sk = scratch.alloc<float>(16 * most_new);
    float* sq = scratch.alloc<float>(16 * most_new);
    const float scale = 1.0f / __builtin_sqrtf((float)K);

    for_each_tile(a.batch, worker, [&](const SeqSlice&) { return H; }, [&](const SeqSlice& seq, i64 h) {
        RecurrentDescriptor& state = layer_of<RecurrentDescriptor>(a.batch, seq);
        GatedDeltaBuffers& buffers = state.buffers<GatedDeltaBuffers>();
        const i64 length = length_of(seq), pending = length - state.committed_pos, all = pending + seq.tokens, rows = 2 * chunk;
        const i64 commit = next_committed_pos(state.committed_pos, length, seq.tokens, chunk) - state.committed_pos;
        const i64 g = a.tiled ? h % G : h / R;
        const auto added = [&](i64 j) { return a.qkv + (seq.first + j - pending) * channels; };
        const auto at = [&](i64 j) { return (seq.first + j - pending) * H + h; };  // of a new token, in (T, H)
        const auto log_decay = [&](i64 j) {
            if (j < pending) return buffers.g[j * H + h];
            return a.A[h] * first_of(softplus(set(a.dt[at(j)] + a.dt_bias[h])));
        };
        float* old = buffers.u + h * rows * V;
        const float* S = buffers.ssm_state + h * K * V;

        for (i64 start = 0; start < all; start += chunk) {
            const i64 count = min(chunk, all - start), kept = max(0, min(pending - start, count)), queries = count - kept;
            const bool advance = count == chunk && (start + count < all || start + count == commit);
            double log_sum = 0;
            for (i64 j = 0; j < count; j++) sums[j] = log_sum += (double)log_decay(start + j);
            for (i64 j = count; j < width; j++) sums[j] = 0;
            exps_of(from_start, sums, count);
            for (i64 j = 0; j < count; j++) {
                const i64 i = start + j;
                if (i < pending) normalize(ks + j * lanes, (const T*)buffers.k + (g * rows + i) * K, K, 1.0f);
                else normalize(ks + j * lanes, added(i) + (G + g) * K, K, 1.0f);
            }
            for (i64 r = 0; r < queries; r++) {
                const i64 t = kept + r;
                normalize(qs + r * lanes, added(start + t) + g * K, K, scale);
                betas[r] = a.beta_max * first_of(set(1.0f) / (set(1.0f) + exp(set(-a.b[at(start + t)]))));
                all_dots(ks + t * lanes, ks, lanes, lanes, t + 1, kk + r * width);
                all_dots(qs + r * lanes, ks, lanes, lanes, t + 1, qk + r * width);
                decays_of(decays + r * width, sums, t);
                for (i64 j = t + 1; j < padded(t + 1); j++) kk[r * width + j] = qk[r * width + j] = 0;
                for (i64 j = 0; j <= t; j += 16) {
                    const F d = load(decays + r * width + j);
                    store(wk + r * width + j, d * load(kk + r * width + j));
                    store(wq + r * width + j, d * load(qk + r * width + j));
                }
            }
            float* u = a.u + (at(start + kept) - h) * V + h * V;
            float* o = a.o + (at(start + kept) - h) * V + h * V;
            const float* v = added(start + kept) + 2 * G * K + h * V;
            const float* earlier = old + start * V;  // u of this chunk's pending tokens
            if (queries <= 3 && !advance) {
                for (i64 r = 0; r < queries; r++) {
                    i64 p = 0;
                    const auto go = [&](auto W, auto n) {
                        one<W>(a, ks + (kept + r) * lanes, qs + r * lanes, S + p, from_start[kept + r], wk + r * width, wq + r * width,
                               earlier + p, kept, u + p, H * V, kept + r, v + r * channels + p, betas[r], u + r * H * V + p,
                               o + r * H * V + p, n);
                    };
                    for (; p + 64 <= V; p += 64) go(Constant<4>(), Constant<16>());
                    for (; p + 16 <= V; p += 16) go(Constant<1>(), Constant<16>());
                    if (p < V) go(Constant<1>(), (int)(V - p));
                }
                continue;
            }
            float* after = start + count <= commit ? buffers.ssm_state + h * K * V : next;
            for (i64 j = 0; advance && j < count; j += 16) store(to_end + j, exp_since(sums + j, sums[count - 1]));
            for (i64 p = 0; p < V; p += 16) {
                const int n = min(16, V - p);
                load_panel(S_panel, S + p, V, K, n);
                load_panel(u_panel, earlier + p, V, kept, n);
                unroll6(queries, [&](i64 r, auto some) {
                    F s[some];
                    for (int i = 0; i < some; i++) s[i] = zero();
                    panel_product<some>(s, ks + (kept + r) * lanes, lanes, 1, S_panel, K);
                    for (int i = 0; i < some; i++) store(sk + 16 * (r + i), s[i] * set(from_start[kept + r + i]));
                    for (int i = 0; i < some; i++) s[i] = zero();
                    panel_product<some>(s, qs + r * lanes, lanes, 1, S_panel, K);
                    for (int i = 0; i < some; i++) store(sq + 16 * (r + i), s[i] * set(from_start[kept + r + i]));
                });
                for (i64 r = 0; r < queries; r++) {
                    F s = load(sk + 16 * r);
                    for (i64 j = 0; j < kept + r; j++) s = fma(set(wk[r * width + j]), load(u_panel + 16 * j), s);
                    const F value = (load_n(v + r * channels + p, n) - s) * set(betas[r]);
                    store(u_panel + 16 * (kept + r), value);
                    store_n(u + r * H * V + p, value, n);
                }
                unroll6(queries, [&](i64 r, auto some) {
                    F s[some];
                    for (int i = 0; i < some; i++) s[i] = load(sq + 16 * (r + i));
                    panel_product<some>(s, wq + r * width, width, 1, u_panel, kept + r + 1);
                    for (int i = 0; i < some; i++) {
                        for (i64 j = kept + r + 1; j <= kept + r + i; j++)
                            s[i] = fma(set(wq[(r + i) * width + j]), load(u_panel + 16 * j), s[i]);
                        store_n(o + (r + i) * H * V + p, s[i], n);
                    }
                });
                if (!advance) continue;
                for (i64 j = 0; j < count; j++) store(u_panel + 16 * j, load(u_panel + 16 * j) * set(to_end[j]));
                unroll6(K, [&](i64 r, auto some) {
                    F s[some];
                    for (int i = 0; i < some; i++) s[i] = load(S_panel + 16 * (r + i)) * set(from_start[count - 1]);
                    panel_product<some>(s, ks + r, 1, lanes, u_panel, count);
                    for (int i = 0; i < some; i++) store_n(after + (r + i) * V + p, s[i], n);
                });
            }
            if (advance) S = after;
        }
        // what only this tile reads moves on at once, the rest when all tiles of the sequence are done
        shift_rows(old, V, pending, commit, a.u + (seq.first * H + h) * V, H * V, seq.tokens, V);
        if (!last_of(state.tiles_done, H)) return;
        const i64 from = max(commit - pending, 0), still = max(pending - commit, 0);
        if (commit) memmove(buffers.g, buffers.g + commit * H, still * H * sizeof(float));
        for (i64 j = from; j < seq.tokens; j++)
            for (i64 i = 0; i < H; i++) {
                const float dt = first_of(softplus(set(a.dt[(seq.first + j) * H + i] + a.dt_bias[i])));
                buffers.g[(still + j - from) * H + i] = a.A[i] * dt;
            }
        for (i64 i = 0; i < G; i++)
            shift_rows((T*)buffers.k + i * rows * K, K, pending, commit, added(pending) + (G + i) * K, channels, seq.tokens, K);
        shift_rows((T*)buffers.conv_state, channels, history + pending, commit, a.conv_in + seq.first * a.stride, a.stride,
                   seq.tokens, channels);
        state.committed_pos += commit;
    });
}

void gated_delta(const void* args, Worker& worker) {
    const GatedDelta& a = *(const GatedDelta*)args;
    if (a.batch.bf16) gated_delta_as<bf16>(a, worker);
    else gated_delta_as<float>(a, worker);
}

REGISTER_KERNEL("gated_delta", gated_delta);

}  // namespace ISA

#endif
