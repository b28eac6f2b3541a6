// The Mamba-1 scan: S = exp(dt A) ∘ S + B ⊗ dt x, y = (C S + D x) · silu(z), channels in lanes.
#include "texts.h"

namespace ISA {

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

template <class T> INLINE void scan_as(const Scan& a, Team& team) {
    const i64 I = a.inner, N = a.state, chunk = a.chunk, history = a.taps - 1;
    constexpr i64 CHANNELS = 64;
    i64 longest = 1;
    for (i64 i = 0; i < a.texts.count; i++) longest = most(longest, a.texts.rows[i].tokens);
    Scratch scratch{(char*)team.scratch((16 * N + 2 * chunk * N + longest * CHANNELS) * sizeof(float) + 4 * 64)};
    float* S = scratch.take<float>(16 * N);
    float* Bs = scratch.take<float>(2 * chunk * N);         // of the open inputs
    float* dts = scratch.take<float>(longest * CHANNELS);   // of the new ones

    each_piece(a.texts, team, [&](const Row&) { return parts(I, CHANNELS); }, [&](const Row& row, i64 piece) {
        RecurrentWords& words = recurrent_of(a.texts, row);
        const i64 length = length_of(row), open = length - words.base;
        const i64 cut = next_base(words.base, length, row.tokens, chunk) - words.base;  // counted in open inputs
        const bool trimmed = words.running_length != length;
        const T* x = (const T*)words.x;
        if (trimmed || (cut > 0 && cut <= open))
            for (i64 j = 0; j < open; j++)
                for (i64 n = 0; n < N; n += 16)
                    store_n(Bs + j * N + n, load_n((const T*)words.B + j * N + n, N - n), N - n);
        const i64 stop = least(I, (piece + 1) * CHANNELS);
        for (i64 c = piece * CHANNELS; c < stop; c += 16) {
            const int some = least(16, stop - c);
            const auto take = [&](const float* from) { for (i64 n = 0; n < N; n++) store(S + 16 * n, load_n(from + n * I + c, some)); };
            const auto keep = [&](float* to) { for (i64 n = 0; n < N; n++) store_n(to + n * I + c, load(S + 16 * n), some); };
            const auto again = [&](i64 first, i64 last) {
                for (i64 j = first; j < last; j++)
                    step(S, a.A + c, I, some, load_n(words.dt + j * I + c, some), load_n(x + j * I + c, some), Bs + j * N, nullptr, N);
            };
            const bool behind = cut > 0 && cut <= open;  // the boundary lies among the old inputs
            if (trimmed) {
                take(words.S);
                again(0, behind ? cut : open);
                if (behind) {
                    keep(words.S);
                    again(cut, open);
                }
            } else {
                if (behind) {
                    take(words.S);
                    again(0, cut);
                    keep(words.S);
                }
                take(words.running);
            }
            const F bias = load_n(a.dt_bias + c, some), D = load_n(a.D + c, some);
            for (i64 t = 0; t < row.tokens; t++) {
                const i64 token = row.first + t;
                const F dt = softplus(load_n(a.dt + token * I + c, some) + bias), in = load_n(a.x + token * I + c, some);
                const F y = step(S, a.A + c, I, some, dt, in, a.B + token * N, a.C + token * N, N);
                store_n(a.y + token * I + c, fma(D, in, y) * silu(load_n(a.z + token * a.stride + c, some)), some);
                store(dts + t * CHANNELS + c % CHANNELS, dt);
                if (open + t + 1 == cut) keep(words.S);
            }
            keep(words.running);
        }
        const i64 c = piece * CHANNELS, width = stop - c;
        carry((T*)words.x + c, I, open, cut, a.x + row.first * I + c, I, row.tokens, width);
        carry(words.dt + c, I, open, cut, dts, CHANNELS, row.tokens, width);
        if (!last_of(words.finished, parts(I, CHANNELS))) return;
        carry((T*)words.B, N, open, cut, a.B + row.first * N, N, row.tokens, N);
        carry((T*)words.columns, I, history + open, cut, a.columns + row.first * a.stride, a.stride, row.tokens, I);
        words.base += cut;
        words.running_length = length + row.tokens;
    });
}

void selective_scan(const void* args, Team& team) {
    const Scan& a = *(const Scan*)args;
    if (a.texts.bf16) scan_as<bf16>(a, team);
    else scan_as<float>(a, team);
}

void scan(Kernels& k) { k.scan = selective_scan; }

}  // namespace ISA
