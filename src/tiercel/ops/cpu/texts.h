// Pieces of a batch, and what a state's words mean.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace ISA {
using namespace tiercel;

INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 most(i64 a, i64 b) { return a > b ? a : b; }
INLINE i64 parts(i64 count, i64 each) { return (count + each - 1) / each; }
INLINE i64 padded(i64 count) { return parts(count, 16) * 16; }

INLINE i64 length_of(const Row& row) { return ((const StateWords*)row.state)->length; }
INLINE AttentionWords& attention_of(const Texts& texts, const Row& row) { return *(AttentionWords*)(row.state + texts.part); }
INLINE RecurrentWords& recurrent_of(const Texts& texts, const Row& row) { return *(RecurrentWords*)(row.state + texts.part); }

// Keys and values of one kv head: a row of P for every token, PAGE of them in a row.
template <class T> struct Cache {
    char* const* pages;
    i64 keys, values, P;  // bytes of a page before the head's

    T* at(i64 start, i64 token) const { return (T*)(pages[(uint64_t)token / PAGE] + start) + (uint64_t)token % PAGE * P; }
    T* k(i64 token) const { return at(keys, token); }
    T* v(i64 token) const { return at(values, token); }
};
template <class T> INLINE Cache<T> cache_of(const Texts& texts, const Row& row, i64 h, i64 kv_heads, i64 P) {
    const i64 start = attention_of(texts, row).start, head = PAGE * P * sizeof(T);
    return {((const StateWords*)row.state)->pages, start + h * head, start + (kv_heads + h) * head, P};
}

// Every piece of every row: `count` says how many a row has, `body` does one.
template <class Count, class Body> INLINE void each_piece(const Texts& texts, Team& team, Count count, Body body) {
    i64 all = 0;
    for (i64 b = 0; b < texts.count; b++) all += count(texts.rows[b]);
    for (i64 piece; (piece = team.take(all)) >= 0;) {
        const Row* row = texts.rows;
        for (i64 n; piece >= (n = count(*row)); row++) piece -= n;
        body(*row, piece);
    }
}

// Whether this was the last of `count` pieces: what all of them read may change now.
INLINE bool last_of(i64& finished, i64 count) {
    if (__atomic_add_fetch(&finished, 1, __ATOMIC_ACQ_REL) < count) return false;
    __atomic_store_n(&finished, 0, __ATOMIC_RELEASE);
    return true;
}

// Ask for memory that will be read soon: hardware looks ahead only to the end of a page.
INLINE void fetch(const void* at, i64 bytes) {
    for (i64 i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)at + i, 0, 2);
}

template <int N> struct Constant {
    constexpr operator int() const { return N; }
};

// `body(first, how many)` for rows, six at a time; how many is a constant, so that sums stay in registers.
template <class Body> INLINE void by_six(i64 rows, Body body) {
    i64 r = 0;
    for (; r + 6 <= rows; r += 6) body(r, Constant<6>());
    switch (rows - r) {
        case 5: body(r, Constant<5>()); break;
        case 4: body(r, Constant<4>()); break;
        case 3: body(r, Constant<3>()); break;
        case 2: body(r, Constant<2>()); break;
        case 1: body(r, Constant<1>()); break;
        default: break;
    }
}

// Bytes of scratch, handed out one after another.
struct Scratch {
    char* at;
    template <class T> T* take(i64 count) {
        T* p = (T*)at;
        at += (count * (i64)sizeof(T) + 63) / 64 * 64;
        return p;
    }
};

template <class T> INLINE void copy(T* to, const float* from, i64 count) {
    for (i64 i = 0; i < count; i += 16) store_n(to + i, load_n(from + i, count - i), count - i);
}

// Turn the first 2 · half dims by the angles of this token, and scale all.
template <class T>
INLINE void rotate(T* to, const float* x, const float* cos, const float* sin, i64 half, i64 dims, float scale) {
    const F s = set(scale);
    for (i64 i = 0; i < half; i += 16) {
        const int n = half - i;
        const F u = load_n(x + i, n), w = load_n(x + half + i, n), c = load_n(cos + i, n), d = load_n(sin + i, n);
        store_n(to + i, (u * c - w * d) * s, n);
        store_n(to + half + i, (w * c + u * d) * s, n);
    }
    for (i64 i = 2 * half; i < dims; i += 16) store_n(to + i, load_n(x + i, dims - i) * s, dims - i);
}

// ── the boundary of a recurrent state moves ──

// The token S will stand before after so many more: as late as it may while all of them can still be cut.
INLINE i64 next_base(i64 base, i64 length, i64 added, i64 chunk) {
    return most(base, (length + added - least(added, chunk)) / chunk * chunk);
}

// One buffer of open inputs: forget `shift` of its `used` rows and of the `count` new ones that follow, `width` values
// each.  Rows lie `apart` in the buffer, new ones `stride`.
template <class T>
INLINE void carry(T* rows, i64 apart, i64 used, i64 shift, const float* added, i64 stride, i64 count, i64 width) {
    const i64 kept = most(used - shift, 0), from = most(shift - used, 0);
    if (shift > 0) {
        if (apart == width) memmove(rows, rows + shift * apart, kept * apart * sizeof(T));
        else for (i64 i = 0; i < kept; i++) memmove(rows + i * apart, rows + (i + shift) * apart, width * sizeof(T));
    }
    for (i64 i = from; i < count; i++) copy(rows + (kept + i - from) * apart, added + i * stride, width);
}

}  // namespace ISA
