// The Mamba-2 scan of training (mixers/mamba2/varlen.py): decays inside a chunk, layouts by head and group, states from
// chunk to chunk; forward and backward.
#include "ops/cpu/train.h"

namespace tiercel {

struct DecayWeights {  // high, low: (chunks · H, Q);  scores, dscores: (chunks · G, Q, Q);  w: (chunks · H · Q, Q)
    const float *high, *low, *scores;
    Values w;
    float *dscores, *rows, *columns;
    i64 chunks, heads, groups, chunk;
};
// A scan's tensors lie by token (T, H, P), by head (K, H, Q, P) or by group (K, G, Q, H / G · P); scales are (T, H).
struct Layout { i64 chunks, chunk, heads, groups, head_dim; };
// by_head = scale · x, by_group = other_scale · x, dots (T, H) = Σ by_group · with; scale nullptr: 1
struct ToHeads { Values x, by_head, by_group, with; const float *scale, *other_scale; float* dots; Layout layout; };
// y = by_head + scale · by_group + D x
struct FromHeads { Values by_head, by_group, x, y; const float *scale, *D; Layout layout; };
// du = by_head + scale · by_group;  dx = dt du + D dy, dots (T, H) = Σ x du, left (T, H) = Σ x scale by_group
struct FromHeadsBackward { Values by_head, by_group, x, dy, dx; const float *scale, *dt, *D; float *dots, *left; Layout layout; };
// x, y: states (K, G, N, H / G · P);  g, dg: (rows, H, C, C), C = count chunks of a row
struct StatePassing { Values x, y; const float* g; float* dg; i64 count, state; int back; Layout layout; };

}  // namespace tiercel

#if defined(TIERCEL_BINDINGS)

namespace tiercel {

static KernelHandle decay_weights{"decay_weights"}, decay_weights_backward{"decay_weights_backward"},
    to_heads{"to_heads"}, from_heads{"from_heads"}, from_heads_backward{"from_heads_backward"},
    state_passing{"state_passing"}, state_passing_grad{"state_passing_grad"};

using LayoutTuple = std::tuple<i64, i64, i64, i64, i64>;  // chunks, tokens of one, heads, groups, head dim

static Layout layout(const LayoutTuple& l) {
    return {std::get<0>(l), std::get<1>(l), std::get<2>(l), std::get<3>(l), std::get<4>(l)};
}
static i64 size(const LayoutTuple& l) { return std::get<0>(l) * std::get<1>(l) * std::get<2>(l) * std::get<4>(l); }

BINDINGS(m) {
    m.def("decay_weights",
          [](Address high, Address low, Address scores, const ValuesTuple& w, i64 K, i64 H, i64 G, i64 Q) {
              launch_openmp(decay_weights,
                            DecayWeights{ptr<float>(high), ptr<float>(low), ptr<float>(scores), values(w), nullptr,
                                         nullptr, nullptr, K, H, G, Q},
                            K * H * Q * Q);
          });
    m.def("decay_weights_backward", [](Address high, Address low, Address scores, const ValuesTuple& dw,
                                       Address dscores, Address rows, Address columns, i64 K, i64 H, i64 G, i64 Q) {
        launch_openmp(decay_weights_backward,
                      DecayWeights{ptr<float>(high), ptr<float>(low), ptr<float>(scores), values(dw),
                                   ptr<float>(dscores), ptr<float>(rows), ptr<float>(columns), K, H, G, Q},
                      K * H * Q * Q);
    });
    m.def("to_heads", [](const ValuesTuple& x, Address scale, Address other_scale, const ValuesTuple& by_head,
                         const ValuesTuple& by_group, const ValuesTuple& with, Address dots, const LayoutTuple& l) {
        launch_openmp(to_heads,
                      ToHeads{values(x), values(by_head), values(by_group), values(with), ptr<float>(scale),
                              ptr<float>(other_scale), ptr<float>(dots), layout(l)},
                      size(l));
    });
    m.def("from_heads", [](const ValuesTuple& by_head, const ValuesTuple& by_group, Address scale, const ValuesTuple& x,
                           Address D, const ValuesTuple& y, const LayoutTuple& l) {
        launch_openmp(from_heads,
                      FromHeads{values(by_head), values(by_group), values(x), values(y), ptr<float>(scale),
                                ptr<float>(D), layout(l)},
                      size(l));
    });
    m.def("from_heads_backward", [](const ValuesTuple& by_head, const ValuesTuple& by_group, Address scale,
                                    const ValuesTuple& x, const ValuesTuple& dy, Address dt, Address D,
                                    const ValuesTuple& dx, Address dots, Address left, const LayoutTuple& l) {
        launch_openmp(
            from_heads_backward,
            FromHeadsBackward{values(by_head), values(by_group), values(x), values(dy), values(dx), ptr<float>(scale),
                              ptr<float>(dt), ptr<float>(D), ptr<float>(dots), ptr<float>(left), layout(l)},
            size(l));
    });
    m.def("state_passing", [](const ValuesTuple& x, Address g, const ValuesTuple& y, i64 count, i64 state, int back,
                              const LayoutTuple& l) {
        launch_openmp(state_passing,
                      StatePassing{values(x), values(y), ptr<float>(g), nullptr, count, state, back, layout(l)},
                      size(l) * state);
    });
    m.def("state_passing_grad",
          [](const ValuesTuple& x, const ValuesTuple& y, Address dg, i64 count, i64 state, const LayoutTuple& l) {
              launch_openmp(state_passing_grad,
                            StatePassing{values(x), values(y), nullptr, ptr<float>(dg), count, state, 0, layout(l)},
                            size(l) * state);
          });
}

}  // namespace tiercel

#else

namespace ISA {
using namespace tiercel;

// ── the weights inside a chunk: w_tj = exp(a_t − a_j) s_tj, a in two numbers ──

INLINE F decay(const DecayWeights& a, i64 head, i64 t, i64 j) {
    const float *high = a.high + head * a.chunk, *low = a.low + head * a.chunk;
    const F lag = set(high[t]) - load(high + j) + (set(low[t]) - load(low + j));
    return exp(min(max(lag, set(-60.0f)), zero()));
}

// scores are zero for j > t; chunk is a multiple of 16
void decay_weights(const void* args, Worker& worker) {
    const DecayWeights& a = *(const DecayWeights*)args;
    const i64 Q = a.chunk, heads = a.chunks * a.heads, shared = a.heads / a.groups;
    for (i64 tile; (tile = worker.next_tile(heads)) >= 0;) {
        const float* scores = a.scores + tile / shared * Q * Q;
        for (i64 t = 0; t < Q; t++) {
            for (i64 j = 0; j <= t; j += 16) store_n(a.w, tile * Q + t, j, decay(a, tile, t, j) * load(scores + t * Q + j), 16);
            for (i64 j = (t / 16 + 1) * 16; j < Q; j += 16) store_n(a.w, tile * Q + t, j, zero(), 16);
        }
    }
}

// w holds its gradient; dscores (chunks · G, Q, Q), not masked; of x = dw ∘ w without its diagonal: rows (chunks · H, Q)
// sums over j, columns (chunks · H, Q / 16, Q) sums over sixteen t
void decay_weights_backward(const void* args, Worker& worker) {
    const DecayWeights& a = *(const DecayWeights*)args;
    const i64 Q = a.chunk, blocks = Q / 16, shared = a.heads / a.groups;
    for (i64 tile; (tile = worker.next_tile(a.chunks * a.groups * blocks)) >= 0;) {
        const i64 group = tile / blocks, block = blocks - 1 - tile % blocks;
        float* dscores = a.dscores + group * Q * Q;
        const float* scores = a.scores + group * Q * Q;
        for (i64 head = group * shared; head < (group + 1) * shared; head++) {
            float* columns = a.columns + (head * blocks + block) * Q;
            for (i64 j = 0; j < Q; j += 16) store(columns + j, zero());
            for (i64 t = block * 16; t < block * 16 + 16; t++) {
                F row = zero();
                for (i64 j = 0; j < Q; j += 16) {
                    float* ds = dscores + t * Q + j;
                    const bool first = head == group * shared;
                    if (j > t) {
                        if (first) store(ds, zero());
                        continue;
                    }
                    const F dw = load_n(a.w, head * Q + t, j, 16) * decay(a, head, t, j);
                    store(ds, first ? dw : load(ds) + dw);
                    F x = dw * load(scores + t * Q + j);
                    if (t < j + 16) {
                        float v[16];
                        store(v, x);
                        v[t - j] = 0;
                        x = load(v);
                    }
                    row = row + x;
                    store(columns + j, load(columns + j) + x);
                }
                a.rows[head * Q + t] = sum(row);
            }
        }
    }
}

// ── layouts ──

INLINE float scale_at(const float* scale, i64 at) { return scale ? scale[at] : 1.0f; }

// by head a row is P values; by group, where a token's heads of one group lie side by side, a part of one
INLINE i64 head_row(const Layout& l, i64 t, i64 h) { return (t / l.chunk * l.heads + h) * l.chunk + t % l.chunk; }
INLINE i64 group_row(const Layout& l, i64 t, i64 h) {
    return (t / l.chunk * l.groups + h / (l.heads / l.groups)) * l.chunk + t % l.chunk;
}
INLINE i64 group_column(const Layout& l, i64 h) { return h % (l.heads / l.groups) * l.head_dim; }

template <class Body> INLINE void for_each_head(const Layout& l, Worker& worker, Body body) {
    constexpr i64 TOKENS = 8;
    const i64 tokens = l.chunks * l.chunk;
    for (i64 tile; (tile = worker.next_tile(ceil_div(tokens, TOKENS))) >= 0;)
        for (i64 t = tile * TOKENS; t < min(tokens, (tile + 1) * TOKENS); t++)
            for (i64 h = 0; h < l.heads; h++) body(t, h, t * l.heads + h);
}

void to_heads(const void* args, Worker& worker) {
    const ToHeads& a = *(const ToHeads*)args;
    const Layout& l = a.layout;
    for_each_head(l, worker, [&](i64 t, i64 h, i64 th) {
        const F scale = set(scale_at(a.scale, th)), other = set(scale_at(a.other_scale, th));
        const i64 row = group_row(l, t, h), column = group_column(l, h);
        F dot = zero();
        for (i64 p = 0; p < l.head_dim; p += 16) {
            const int n = (int)min(16, l.head_dim - p);
            const F x = load_n(a.x, t, h * l.head_dim + p, n);
            store_n(a.by_head, head_row(l, t, h), p, x * scale, n);
            if (!a.by_group.at) continue;
            store_n(a.by_group, row, column + p, x * other, n);
            if (a.with.at) dot = fma(x * other, load_n(a.with, row, column + p, n), dot);
        }
        if (a.with.at) a.dots[th] = sum(dot);
    });
}

void from_heads(const void* args, Worker& worker) {
    const FromHeads& a = *(const FromHeads*)args;
    const Layout& l = a.layout;
    for_each_head(l, worker, [&](i64 t, i64 h, i64 th) {
        const F D = set(a.D ? a.D[h] : 0.0f), scale = set(scale_at(a.scale, th));
        for (i64 p = 0; p < l.head_dim; p += 16) {
            const int n = (int)min(16, l.head_dim - p);
            F y = load_n(a.by_head, head_row(l, t, h), p, n);
            if (a.by_group.at) y = fma(load_n(a.by_group, group_row(l, t, h), group_column(l, h) + p, n), scale, y);
            if (a.D) y = fma(load_n(a.x, t, h * l.head_dim + p, n), D, y);
            store_n(a.y, t, h * l.head_dim + p, y, n);
        }
    });
}

void from_heads_backward(const void* args, Worker& worker) {
    const FromHeadsBackward& a = *(const FromHeadsBackward*)args;
    const Layout& l = a.layout;
    for_each_head(l, worker, [&](i64 t, i64 h, i64 th) {
        const F D = set(a.D ? a.D[h] : 0.0f), scale = set(scale_at(a.scale, th)), dt = set(a.dt[th]);
        F dots = zero(), left = zero();
        for (i64 p = 0; p < l.head_dim; p += 16) {
            const int n = (int)min(16, l.head_dim - p);
            const F x = load_n(a.x, t, h * l.head_dim + p, n);
            F du = load_n(a.by_head, head_row(l, t, h), p, n);
            if (a.by_group.at) {
                const F from = load_n(a.by_group, group_row(l, t, h), group_column(l, h) + p, n) * scale;
                left = fma(x, from, left);
                du = du + from;
            }
            dots = fma(x, du, dots);
            store_n(a.dx, t, h * l.head_dim + p, fma(load_n(a.dy, t, h * l.head_dim + p, n), D, du * dt), n);
        }
        a.dots[th] = sum(dots);
        if (a.by_group.at) a.left[th] = sum(left);
    });
}

// ── states from chunk to chunk ──

// what chunks hand on: y_c = Σ_{k<c} g_ck x_k, back y_c = Σ_{k>c} g_kc x_k
void state_passing(const void* args, Worker& worker) {
    const StatePassing& a = *(const StatePassing*)args;
    const Layout& l = a.layout;
    const i64 C = a.count, rows = l.chunks / C, shared = l.heads / l.groups;
    for (i64 tile; (tile = worker.next_tile(rows * l.groups * a.state)) >= 0;) {
        const i64 n = tile % a.state, group = tile / a.state % l.groups, row = tile / a.state / l.groups;
        const auto at = [&](i64 c) { return ((row * C + c) * l.groups + group) * a.state + n; };
        for (i64 h = 0; h < shared; h++) {
            const float* g = a.g + (row * l.heads + group * shared + h) * C * C;
            for (i64 p = h * l.head_dim; p < (h + 1) * l.head_dim; p += 16) {
                const int some = (int)min(16, (h + 1) * l.head_dim - p);
                for (i64 c = 0; c < C; c++) {
                    F sum = zero();
                    for (i64 k = a.back ? c + 1 : 0; k < (a.back ? C : c); k++)
                        sum = fma(set(a.back ? g[k * C + c] : g[c * C + k]), load_n(a.x, at(k), p, some), sum);
                    store_n(a.y, at(c), p, sum, some);
                }
            }
        }
    }
}

// dg_ck = Σ y_c x_k for k < c, else 0
void state_passing_grad(const void* args, Worker& worker) {
    const StatePassing& a = *(const StatePassing*)args;
    const Layout& l = a.layout;
    const i64 C = a.count, rows = l.chunks / C, shared = l.heads / l.groups;
    for (i64 tile; (tile = worker.next_tile(rows * l.heads * C)) >= 0;) {
        const i64 c = tile % C, head = tile / C % l.heads, row = tile / C / l.heads, column = head % shared * l.head_dim;
        float* dg = a.dg + tile * C;
        const auto at = [&](i64 chunk) { return ((row * C + chunk) * l.groups + head / shared) * a.state; };
        for (i64 k = 0; k < C; k++) {
            F dot = zero();
            for (i64 n = 0; k < c && n < a.state; n++)
                for (i64 p = 0; p < l.head_dim; p += 16) {
                    const int some = (int)min(16, l.head_dim - p);
                    dot = fma(load_n(a.y, at(c) + n, column + p, some), load_n(a.x, at(k) + n, column + p, some), dot);
                }
            dg[k] = sum(dot);
        }
    }
}

REGISTER_KERNEL("decay_weights", decay_weights);
REGISTER_KERNEL("decay_weights_backward", decay_weights_backward);
REGISTER_KERNEL("to_heads", to_heads);
REGISTER_KERNEL("from_heads", from_heads);
REGISTER_KERNEL("from_heads_backward", from_heads_backward);
REGISTER_KERNEL("state_passing", state_passing);
REGISTER_KERNEL("state_passing_grad", state_passing_grad);

}  // namespace ISA

#endif
