// A mixture of experts without its router's product: the choice, and every expert's products with its own tokens.
//
//   route     weights and experts of every token from the router's scores
//   experts   y = act(gate x) · up x, act(up x) or W x, for every pair of a token and one of its experts
//   combine   y = Σ w · y of a token's pairs, in the order in which they were chosen
//
// Between the three, pairs stand sorted by expert, a token's rank among them found by every thread for itself: counting
// is cheaper than waiting.  Formula: ops/moe.py.  Letters: E experts, K active ones.
#include "activation.h"
#include "matmul.h"

namespace tiercel {

struct Route {
    const float *scores, *correction;  // (tokens, E), (E)
    float* weights;                    // (tokens, K)
    int32_t* chosen;                   // (tokens, K)
    i64 tokens, experts, active, groups, active_groups;
    float eps, scale;
    bool sigmoid, renormalize;
};
struct ExpertMatrix { const uint8_t* weight; i64 format; };
struct Experts {
    const ExpertMatrix *gate, *up;  // (E); gate: nullptr without
    const float* x;                 // (tokens, inputs), or (pairs, inputs) sorted
    const int32_t* chosen;
    float *y, *u;                   // (pairs, outputs) sorted; u: for up x where there is a gate
    i64 inputs, outputs, tokens, experts, active;
    int activation;                 // −1: none
    bool sorted, exact;             // x is; inputs stay float32
};
struct Combine { const float *y, *weights; const int32_t* chosen; float* out; i64 width, tokens, experts, active; };

}  // namespace tiercel

#if defined(TIERCEL_BINDINGS)

#include "bindings.h"

namespace tiercel {

static KernelHandle route{"route"}, experts{"experts"}, combine{"combine"};

BINDINGS(m) {
    m.def("route", [](Address scores, Address correction, Address weights, Address chosen, i64 tokens, i64 count, i64 active,
                      i64 groups, i64 active_groups, float eps, float scale, bool sigmoid, bool renormalize) {
        launch(route,
               Route{ptr<float>(scores), ptr<float>(correction), ptr<float>(weights), ptr<int32_t>(chosen), tokens, count,
                     active, groups, active_groups, eps, scale, sigmoid, renormalize},
               tokens * count < SMALL / 4, {values(scores, tokens, count)},
               {values(weights, tokens, active), values(chosen, tokens, active)});
    });
    m.def("experts", [](Address gate, Address up, Address x, Address chosen, Address y, Address u, i64 inputs, i64 outputs,
                        i64 tokens, i64 count, i64 active, int activation, bool sorted, bool exact) {
        const i64 pairs = tokens * active;
        launch(experts,
               Experts{ptr<ExpertMatrix>(gate), ptr<ExpertMatrix>(up), ptr<float>(x), ptr<int32_t>(chosen), ptr<float>(y),
                       ptr<float>(u), inputs, outputs, tokens, count, active, activation, sorted, exact},
               pairs * inputs * outputs < SMALL, {values(x, sorted ? pairs : tokens, inputs), values(chosen, pairs, 1)},
               {values(y, pairs, outputs), values(u, pairs, outputs)});
    });
    m.def("combine", [](Address y, Address weights, Address chosen, Address out, i64 width, i64 tokens, i64 count, i64 active) {
        const i64 pairs = tokens * active;
        launch(combine,
               Combine{ptr<float>(y), ptr<float>(weights), ptr<int32_t>(chosen), ptr<float>(out), width, tokens, count, active},
               pairs * width < SMALL, {values(y, pairs, width), values(weights, pairs, 1), values(chosen, pairs, 1)},
               {values(out, tokens, width)});
    });
}

}  // namespace tiercel

#else

namespace ISA {
using namespace tiercel;

// ── the choice ──

// the numbers of the k largest of x, the first of equal ones first
INLINE void top_k(const float* x, i64 count, i64 k, int32_t* out) {
    for (i64 i = 0, found = 0; i < count; i++) {
        if (found == k && !(x[i] > x[out[k - 1]])) continue;
        i64 j = found < k ? found++ : k - 1;
        for (; j > 0 && x[i] > x[out[j - 1]]; j--) out[j] = out[j - 1];
        out[j] = (int32_t)i;
    }
}

// s: `padded` room
INLINE void probabilities(const float* scores, i64 count, bool of_each, float* s) {
    if (of_each) {
        for (i64 i = 0; i < count; i += 16) store_n(s + i, sigmoid(load_n(scores + i, count - i)), count - i);
        return;
    }
    float largest = scores[0], total = 0.0f;
    for (i64 i = 1; i < count; i++) largest = scores[i] > largest ? scores[i] : largest;
    for (i64 i = 0; i < count; i += 16) store_n(s + i, exp(load_n(scores + i, count - i) - set(largest)), count - i);
    for (i64 i = 0; i < count; i++) total += s[i];
    for (i64 i = 0; i < count; i++) s[i] /= total;
}

// −∞ for all experts outside of the groups whose two best have the largest sum
INLINE void keep_groups(const Route& a, float* c, float* sums, int32_t* kept) {
    const i64 each = a.experts / a.groups;
    for (i64 g = 0; g < a.groups; g++) {
        int32_t best[2];
        top_k(c + g * each, each, 2, best);
        sums[g] = c[g * each + best[0]] + c[g * each + best[1]];
    }
    top_k(sums, a.groups, a.active_groups, kept);
    for (i64 g = 0; g < a.groups; g++) {
        bool out = true;
        for (i64 i = 0; i < a.active_groups; i++) out = out && kept[i] != g;
        for (i64 i = 0; out && i < each; i++) c[g * each + i] = -INFINITY;
    }
}

void route(const void* args, Worker& worker) {
    const Route& a = *(const Route*)args;
    float* s = nullptr;
    for_each_token(a.tokens, worker, [&](i64 t) {
        if (s == nullptr) s = (float*)worker.scratch(4 * padded(a.experts) * sizeof(float));
        float *c = s + padded(a.experts), *sums = c + padded(a.experts), *weights = a.weights + t * a.active;
        int32_t *kept = (int32_t*)(sums + padded(a.experts)), *chosen = a.chosen + t * a.active;
        probabilities(a.scores + t * a.experts, a.experts, a.sigmoid, s);
        for (i64 i = 0; i < a.experts; i++) c[i] = a.correction ? s[i] + a.correction[i] : s[i];
        if (a.active_groups < a.groups) keep_groups(a, c, sums, kept);
        top_k(c, a.experts, a.active, chosen);
        float total = 0.0f;
        for (i64 k = 0; k < a.active; k++) total += s[chosen[k]];
        for (i64 k = 0; k < a.active; k++) {
            weights[k] = a.renormalize ? s[chosen[k]] / (total + a.eps) : s[chosen[k]];
            weights[k] *= a.scale;
        }
    });
}

// ── pairs by expert ──

struct Sorted {
    int32_t *starts = nullptr, *pairs = nullptr;  // (E + 1) where an expert's pairs begin; (pairs) each one's number, token · K + k

    static i64 bytes(i64 pairs, i64 experts) { return lines((experts + 1) * 4) + lines(pairs * 4); }
    Sorted() = default;
    Sorted(const int32_t* chosen, i64 count, i64 experts, void* room)
        : starts((int32_t*)room), pairs((int32_t*)((char*)room + lines((experts + 1) * 4))) {
        memset(starts, 0, (experts + 1) * 4);
        for (i64 i = 0; i < count; i++) starts[chosen[i] + 1]++;
        for (i64 e = 0; e < experts; e++) starts[e + 1] += starts[e];
        for (i64 i = 0; i < count; i++) pairs[starts[chosen[i]]++] = (int32_t)i;
        for (i64 e = experts; e > 0; e--) starts[e] = starts[e - 1];  // each stands at its end
        starts[0] = 0;
    }
    i64 parts(i64 e) const { return ceil_div(starts[e + 1] - starts[e], TOKENS); }  // of its tokens
};

// ── products ──

// The inputs of one part of an expert's tokens, as a format's product reads them.
struct Inputs {
    const Method* method = nullptr;
    char* memory = nullptr;
    i64 expert = -1, begin = 0;

    void prepare(const Experts& a, const Linear& one, const Sorted& sorted, i64 e, i64 from, i64 to, const float** rows) {
        if (expert == e && begin == from) return;
        expert = e;
        begin = from;
        for (i64 i = from; i < to; i++) {
            const i64 at = sorted.starts[e] + i;
            rows[i - from] = a.x + (a.sorted ? at : sorted.pairs[at] / a.active) * a.inputs;
        }
        method->prepare(one, rows, to - from, memory);
    }
};

INLINE void activate_rows(const Experts& a, i64 begin, i64 end, i64 from, i64 to) {
    for (i64 r = begin; r < end; r++)
        for (i64 n = from; n < to; n += 16) {
            const i64 at = r * a.outputs + n, left = to - n;
            const F y = activate(a.activation, load_n(a.y + at, left));
            store_n(a.y + at, a.gate ? y * load_n(a.u + at, left) : y, left);
        }
}

void experts(const void* args, Worker& worker) {
    const Experts& a = *(const Experts*)args;
    const i64 pairs = a.tokens * a.active, panels = ceil_div(a.outputs, 16), most = min(a.experts, pairs);
    const ExpertMatrix* matrices[2] = {a.gate ? a.gate : a.up, a.gate ? a.up : nullptr};
    const bool alike = !a.gate || a.gate->format == a.up->format;  // both read the same inputs
    Inputs inputs[2];
    i64 row_bytes[2] = {0, 0}, room = 0;
    Linear one{nullptr, nullptr, nullptr, nullptr, nullptr, a.inputs, a.outputs, TOKENS + 1, 1.0f, 0};
    for (int i = 0; i < (alike ? 1 : 2); i++) {
        one.format = matrices[i]->format == FORMAT_BF16 ? FORMAT_BF16_12 : matrices[i]->format;  // some of a stack may be
        inputs[i].method = &method_of(one.format, a.exact);
        row_bytes[i] = inputs[i].method->row_bytes(one);
        room = max(room, inputs[i].method->room(one));
    }
    // As many tiles as there could be: what was chosen may be read with a tile in hand only, since a thread that comes
    // late to an op finds the memory of those before it in use again.
    const i64 each = max(1, min(panels, most * panels / (8 * worker.size))), groups = ceil_div(panels, each);
    Sorted sorted;
    const float** rows = nullptr;
    void* own = nullptr;
    i64 e = -1, before = 0, count = 0;  // tiles before those of expert e, and its own
    for (i64 tile; (tile = worker.next_tile((most + pairs / TOKENS) * groups)) >= 0;) {
        if (rows == nullptr) {
            char* memory = (char*)worker.scratch(Sorted::bytes(pairs, a.experts) + TOKENS * sizeof(float*) + lines(room) +
                                                 (row_bytes[0] + row_bytes[1]) * TOKENS + 128);
            sorted = Sorted(a.chosen, pairs, a.experts, memory);
            rows = (const float**)(memory += Sorted::bytes(pairs, a.experts));
            own = memory += TOKENS * sizeof(float*);
            inputs[0].memory = memory += lines(room);
            inputs[1].memory = memory + lines(row_bytes[0] * TOKENS);
        }
        for (; e < a.experts && tile >= before + count; count = e < a.experts ? sorted.parts(e) * groups : 0) {
            before += count;
            e++;
        }
        if (e == a.experts) continue;
        const i64 tokens = sorted.starts[e + 1] - sorted.starts[e], start = sorted.starts[e];
        const i64 begin = (tile - before) / groups * TOKENS, end = min(tokens, begin + TOKENS);
        const i64 first = (tile - before) % groups * each, last = min(panels, first + each);
        one.tokens = tokens;
        for (int i = 0; i < 2 && matrices[i]; i++) {
            Inputs& in = inputs[alike ? 0 : i];
            one.weight = matrices[i][e].weight;
            one.format = matrices[i][e].format;
            one.y = (i == 0 ? a.y : a.u) + start * a.outputs;
            in.prepare(a, one, sorted, e, begin, end, rows);
            one.quantized = (const uint8_t*)in.memory - begin * row_bytes[alike ? 0 : i];
            in.method->product(one, begin, end, first, last, own);
        }
        if (a.activation >= 0) activate_rows(a, start + begin, start + end, first * 16, min(a.outputs, last * 16));
    }
}

void combine(const void* args, Worker& worker) {
    const Combine& a = *(const Combine*)args;
    const i64 pairs = a.tokens * a.active;
    int32_t* place = nullptr;  // of every pair
    for_each_token(a.tokens, worker, [&](i64 t) {
        if (place == nullptr) {
            place = (int32_t*)worker.scratch(lines(pairs * 4) + Sorted::bytes(pairs, a.experts));
            const Sorted sorted(a.chosen, pairs, a.experts, (char*)place + lines(pairs * 4));
            for (i64 i = 0; i < pairs; i++) place[sorted.pairs[i]] = (int32_t)i;
        }
        for (i64 n = 0; n < a.width; n += 16) {
            F total = zero();
            for (i64 k = t * a.active; k < (t + 1) * a.active; k++)
                total = fma(set(a.weights[k]), load_n(a.y + place[k] * a.width + n, a.width - n), total);
            store_n(a.out + t * a.width + n, total, a.width - n);
        }
    });
}

REGISTER_KERNEL("route", route);
REGISTER_KERNEL("experts", experts);
REGISTER_KERNEL("combine", combine);

}  // namespace ISA

#endif
