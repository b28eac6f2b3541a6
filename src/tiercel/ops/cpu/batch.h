// The sequences of a batch and what their descriptors say.
#pragma once

#include "tiles.h"

#if !defined(TIERCEL_BINDINGS)

namespace ISA {

INLINE i64 length_of(const SeqSlice& seq) { return ((const StateDescriptor*)seq.descriptor)->length; }
template <class Descriptor> INLINE Descriptor& layer_of(const BatchMetadata& batch, const SeqSlice& seq) {
    return *(Descriptor*)(seq.descriptor + batch.layer);
}

// Every tile of every seq: `count` says how many a seq has, `body` does one.
template <class Count, class Body> INLINE void for_each_tile(const BatchMetadata& batch, Worker& worker, Count count, Body body) {
    i64 all = 0;
    for (i64 b = 0; b < batch.count; b++) all += count(batch.seqs[b]);
    for (i64 tile; (tile = worker.next_tile(all)) >= 0;) {
        const SeqSlice* seq = batch.seqs;
        for (i64 n; tile >= (n = count(*seq)); seq++) tile -= n;
        body(*seq, tile);
    }
}

// Whether this was the last of `count` tiles: what all of them read may be changed from here.
INLINE bool last_of(i64& finished, i64 count) {
    if (__atomic_add_fetch(&finished, 1, __ATOMIC_ACQ_REL) < count) return false;
    __atomic_store_n(&finished, 0, __ATOMIC_RELEASE);
    return true;
}

// Prefetch: the hardware prefetcher stops at the end of a page.
INLINE void fetch(const void* at, i64 bytes) {
    for (i64 i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)at + i, 0, 2);
}

// `body(first, how many)` for rows, six at a time; how many is a constant, so that sums stay in registers.
template <class Body> INLINE void unroll6(i64 rows, Body body) {
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

// Bump allocator over scratch memory.
struct Scratch {
    char* at;
    template <class T> T* alloc(i64 count) {
        T* p = (T*)at;
        at += (count * (i64)sizeof(T) + 63) / 64 * 64;
        return p;
    }
};

template <class T> INLINE void copy(T* to, const float* from, i64 count) {
    for (i64 i = 0; i < count; i += 16) store_n(to + i, load_n(from + i, count - i), count - i);
}

// ── the boundary of a recurrent state moves ──

// The committed position after `added` more tokens: as late as it may be while all of them can still be trimmed.
INLINE i64 next_committed_pos(i64 base, i64 length, i64 added, i64 chunk) {
    return max(base, (length + added - min(added, chunk)) / chunk * chunk);
}

// One buffer of pending inputs: drop `shift` of its `used` rows and of the `count` new ones that follow, `width` values
// each.  Rows lie `apart` in the buffer, new ones `stride`.
template <class T>
INLINE void shift_rows(T* rows, i64 apart, i64 used, i64 shift, const float* added, i64 stride, i64 count, i64 width) {
    const i64 kept = max(used - shift, 0), from = max(shift - used, 0);
    if (shift > 0) {
        if (apart == width) memmove(rows, rows + shift * apart, kept * apart * sizeof(T));
        else for (i64 i = 0; i < kept; i++) memmove(rows + i * apart, rows + (i + shift) * apart, width * sizeof(T));
    }
    for (i64 i = from; i < count; i++) copy(rows + (kept + i - from) * apart, added + i * stride, width);
}

}  // namespace ISA

#endif
