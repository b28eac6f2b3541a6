// A file's blocks ⇄ panels: the same bits in another order, so unpacking restores the file's bytes.
//
// Inside a file's block quants lie in runs: `run` bytes hold the lowest fields of run values, then the next higher ones.
#include "kernels.h"

namespace tiercel {

// rows first … first + count − 1 (first a multiple of 16) between a file's blocks and panels
struct Repack { uint8_t *blocks, *panels; i64 inputs, outputs, first, count; int format; };
// panels of bf16 → twelve bits (bf12.h); without `out` masked each panel's highest exponent and what it will take, with
// it those exponents, and where the panels begin stands at its start
struct CompressBF12 { const uint8_t* panels; uint8_t* out; i64* sizes; uint8_t* highest; i64 inputs, outputs; };

}  // namespace tiercel

#if defined(TIERCEL_BINDINGS)

#include "bindings.h"

namespace tiercel {

static KernelHandle repack{"repack"}, unpack_rows{"unpack_rows"}, compress_bf12{"compress_bf12"};

BINDINGS(m) {
    m.def("repack", [](Address blocks, Address panels, i64 inputs, i64 outputs, i64 first, i64 count, int format) {
        launch(repack, Repack{ptr<uint8_t>(blocks), ptr<uint8_t>(panels), inputs, outputs, first, count, format}, false,
               {}, {});
    });
    m.def("unpack_rows", [](Address blocks, Address panels, i64 inputs, i64 outputs, i64 first, i64 count, int format) {
        launch(unpack_rows, Repack{ptr<uint8_t>(blocks), ptr<uint8_t>(panels), inputs, outputs, first, count, format},
               false, {}, {});
    });
    m.def("compress_bf12", [](Address panels, Address out, Address sizes, Address highest, i64 inputs, i64 outputs) {
        launch(compress_bf12,
               CompressBF12{ptr<uint8_t>(panels), ptr<uint8_t>(out), ptr<i64>(sizes), ptr<uint8_t>(highest), inputs,
                            outputs},
               false, {}, {});
    });
}

}  // namespace tiercel

#else

#include "bf12.h"
#include "formats.h"

namespace ISA {
using namespace tiercel;

// quants of one block, a byte each, from or to `runs` runs of RUN bytes with 8 / WIDTH fields; SHIFT: above what is rows
template <int RUN, int WIDTH, int SHIFT, bool BACK> INLINE void fields(uint8_t* block, uint8_t* q, int runs) {
    constexpr int FIELDS = 8 / WIDTH, MASK = (1 << WIDTH) - 1;
    for (int r = 0; r < runs; r++, block += RUN, q += RUN * FIELDS)
        for (int f = 0; f < FIELDS; f++)
            for (int i = 0; i < RUN; i++) {
                if (BACK) block[i] = (uint8_t)((f ? block[i] : 0) | ((q[f * RUN + i] >> SHIFT) & MASK) << (f * WIDTH));
                else q[f * RUN + i] = (uint8_t)((SHIFT ? q[f * RUN + i] : 0) | ((block[i] >> (f * WIDTH)) & MASK) << SHIFT);
            }
}

// bit j of a 32-bit word belongs to value j
template <bool BACK> INLINE void word(uint8_t* block, uint8_t* q) {
    for (int i = 0; i < 32; i++) {
        if (BACK) block[i / 8] = (uint8_t)((i % 8 ? block[i / 8] : 0) | ((q[i] >> 4) & 1) << (i % 8));
        else q[i] = (uint8_t)(q[i] | ((block[i / 8] >> (i % 8)) & 1) << 4);
    }
}

// the same bytes at `step` bytes from row to row in the panel
template <bool BACK> INLINE void move_bytes(uint8_t* block, uint8_t* panel, int bytes) {
    if (BACK) memcpy(block, panel, bytes);
    else memcpy(panel, block, bytes);
}

// What differs between the formats: `head` moves the scales of row `r`, `values` the quants.
template <class Q, bool BACK> struct Block;

#define HEAD_D(at) move_bytes<BACK>(b + (at), h + 2 * r, 2)
#define HEAD_M(at) move_bytes<BACK>(b + (at), h + 32 + 2 * r, 2)

template <bool BACK> struct Block<Q4_0, BACK> {
    static constexpr int BYTES_ = 18;
    INLINE void head(uint8_t* b, uint8_t* h, int r) { HEAD_D(0); }
    INLINE void values(uint8_t* b, uint8_t* q) { fields<16, 4, 0, BACK>(b + 2, q, 1); }
};
template <bool BACK> struct Block<Q4_1, BACK> {
    static constexpr int BYTES_ = 20;
    INLINE void head(uint8_t* b, uint8_t* h, int r) { HEAD_D(0); HEAD_M(2); }
    INLINE void values(uint8_t* b, uint8_t* q) { fields<16, 4, 0, BACK>(b + 4, q, 1); }
};
template <bool BACK> struct Block<Q5_0, BACK> {
    static constexpr int BYTES_ = 22;
    INLINE void head(uint8_t* b, uint8_t* h, int r) { HEAD_D(0); }
    INLINE void values(uint8_t* b, uint8_t* q) { fields<16, 4, 0, BACK>(b + 6, q, 1); word<BACK>(b + 2, q); }
};
template <bool BACK> struct Block<Q5_1, BACK> {
    static constexpr int BYTES_ = 24;
    INLINE void head(uint8_t* b, uint8_t* h, int r) { HEAD_D(0); HEAD_M(2); }
    INLINE void values(uint8_t* b, uint8_t* q) { fields<16, 4, 0, BACK>(b + 8, q, 1); word<BACK>(b + 4, q); }
};
template <bool BACK> INLINE void signed_bytes(uint8_t* b, uint8_t* q) {
    for (int i = 0; i < 32; i++) {
        if (BACK) b[i] = q[i] ^ 128;
        else q[i] = b[i] ^ 128;
    }
}
template <bool BACK> struct Block<Q8_0, BACK> {
    static constexpr int BYTES_ = 34;
    INLINE void head(uint8_t* b, uint8_t* h, int r) { HEAD_D(0); }
    INLINE void values(uint8_t* b, uint8_t* q) { signed_bytes<BACK>(b + 2, q); }
};
template <bool BACK> struct Block<Q4_K, BACK> {
    static constexpr int BYTES_ = 144;
    INLINE void head(uint8_t* b, uint8_t* h, int r) {
        HEAD_D(0); HEAD_M(2);
        for (int i = 0; i < 3; i++) move_bytes<BACK>(b + 4 + 4 * i, h + 64 + 64 * i + 4 * r, 4);
    }
    INLINE void values(uint8_t* b, uint8_t* q) { fields<32, 4, 0, BACK>(b + 16, q, 4); }
};
template <bool BACK> struct Block<Q5_K, BACK> {
    static constexpr int BYTES_ = 176;
    INLINE void head(uint8_t* b, uint8_t* h, int r) { Block<Q4_K, BACK>::head(b, h, r); }
    INLINE void values(uint8_t* b, uint8_t* q) { fields<32, 4, 0, BACK>(b + 48, q, 4); fields<32, 1, 4, BACK>(b + 16, q, 1); }
};
template <bool BACK> struct Block<Q6_K, BACK> {
    static constexpr int BYTES_ = 210;
    INLINE void head(uint8_t* b, uint8_t* h, int r) {
        HEAD_D(208);
        for (int i = 0; i < 4; i++) move_bytes<BACK>(b + 192 + 4 * i, h + 32 + 64 * i + 4 * r, 4);
    }
    INLINE void values(uint8_t* b, uint8_t* q) { fields<64, 4, 0, BACK>(b, q, 2); fields<32, 2, 4, BACK>(b + 128, q, 2); }
};
template <bool BACK> struct Block<Q3_K, BACK> {
    static constexpr int BYTES_ = 110;
    INLINE void head(uint8_t* b, uint8_t* h, int r) {
        HEAD_D(108);
        for (int i = 0; i < 3; i++) move_bytes<BACK>(b + 96 + 4 * i, h + 32 + 64 * i + 4 * r, 4);
    }
    INLINE void values(uint8_t* b, uint8_t* q) { fields<32, 2, 0, BACK>(b + 32, q, 2); fields<32, 1, 2, BACK>(b, q, 1); }
};
template <bool BACK> struct Block<Q2_K, BACK> {
    static constexpr int BYTES_ = 84;
    INLINE void head(uint8_t* b, uint8_t* h, int r) {
        HEAD_D(80); HEAD_M(82);
        for (int i = 0; i < 4; i++) move_bytes<BACK>(b + 4 * i, h + 64 + 64 * i + 4 * r, 4);
    }
    INLINE void values(uint8_t* b, uint8_t* q) { fields<32, 2, 0, BACK>(b + 16, q, 2); }
};
template <bool BACK> struct Block<Int8, BACK> {
    static constexpr int BYTES_ = 32;
    INLINE void head(uint8_t*, uint8_t*, int) {}
    INLINE void values(uint8_t* b, uint8_t* q) { signed_bytes<BACK>(b, q); }
};
template <bool BACK> struct Block<NF4, BACK> {  // the first of two values in the high nibble, as bitsandbytes has them
    static constexpr int BYTES_ = 36;
    INLINE void head(uint8_t* b, uint8_t* h, int r) { move_bytes<BACK>(b, h + 4 * r, 4); }
    INLINE void values(uint8_t* b, uint8_t* q) {
        for (int i = 0; i < 32; i++) {
            if (BACK) b[4 + i] = (uint8_t)(q[2 * i] << 4 | q[2 * i + 1]);
            else { q[2 * i] = b[4 + i] >> 4; q[2 * i + 1] = b[4 + i] & 15; }
        }
    }
};

// quants of sixteen rows (256 bytes apart) ⇄ the planes of 32 inputs
template <int PLANES, bool BACK> INLINE void planes(uint8_t* q, uint8_t* p) {
    constexpr int low = PLANES & NIBBLES ? 4 : PLANES & BITS2 ? 2 : 0;
    for (int r = 0; r < 16; r++, q += 256, p += 4) {
        uint32_t v[8];
        uint8_t* at = p;
        memcpy(v, q, 32);
        if (BACK) memset(v, 0, 32);
        if constexpr (PLANES & BYTES) {
            for (int g = 0; g < 8; g++) BACK ? memcpy(v + g, at + 64 * g, 4) : memcpy(at + 64 * g, v + g, 4);
        } else if constexpr (PLANES & NIBBLES) {
            for (int i = 0; i < 4; i++) {
                uint32_t x = (v[i] & 0x0f0f0f0fu) | (v[i + 4] & 0x0f0f0f0fu) << 4;
                if (BACK) {
                    memcpy(&x, at + 64 * i, 4);
                    v[i] = x & 0x0f0f0f0fu;
                    v[i + 4] = (x >> 4) & 0x0f0f0f0fu;
                } else memcpy(at + 64 * i, &x, 4);
            }
            at += 256;
        }
        if constexpr (PLANES & BITS2) {
            constexpr int shift = PLANES & NIBBLES ? 4 : 0;
            for (int h = 0; h < 2; h++) {
                uint32_t x = 0;
                if (BACK) memcpy(&x, at + 64 * h, 4);
                for (int f = 0; f < 4; f++) {
                    if (BACK) v[4 * h + f] |= ((x >> 2 * f) & 0x03030303u) << shift;
                    else x |= ((v[4 * h + f] >> shift) & 0x03030303u) << 2 * f;
                }
                if (!BACK) memcpy(at + 64 * h, &x, 4);
            }
            at += 128;
        }
        if constexpr (PLANES & BITS1) {
            uint32_t x = 0;
            if (BACK) memcpy(&x, at, 4);
            for (int g = 0; g < 8; g++) {
                if (BACK) v[g] |= ((x >> g) & 0x01010101u) << low;
                else x |= ((v[g] >> low) & 0x01010101u) << g;
            }
            if (!BACK) memcpy(at, &x, 4);
        }
        if (BACK) memcpy(q, v, 32);
    }
}

template <class Q, bool BACK> void convert(const Repack& a, Worker& worker) {
    using B = Block<Q, BACK>;
    const i64 blocks = (a.inputs + Q::BLOCK - 1) / Q::BLOCK, bytes = panel_bytes<Q>(a.inputs);
    const i64 row = ROW_SCALE<Q> ? 4 + a.inputs : blocks * B::BYTES_;
    alignas(64) uint8_t q[16 * 256];
    for (i64 tile; (tile = worker.next_tile((a.count + 15) / 16)) >= 0;) {
        uint8_t* panel = a.panels + (a.first / 16 + tile) * bytes;
        const int rows = a.count - tile * 16 < 16 ? a.count - tile * 16 : 16;
        uint8_t* from = a.blocks + tile * 16 * row;
        if (rows < 16 && !BACK) memset(panel, 0, bytes);
        if (ROW_SCALE<Q>)
            for (int r = 0; r < rows; r++) move_bytes<BACK>(from + r * row, panel + 4 * r, 4);
        for (i64 b = 0; b < blocks; b++) {
            uint8_t* to = panel + PANEL_HEAD<Q> + b * BLOCK_BYTES<Q>;
            if (rows < 16 || ROW_SCALE<Q>) memset(q, 0, sizeof q);
            if (BACK)
                for (int part = 0; part < Q::BLOCK / 32; part++) planes<Q::PLANES_, true>(q + 32 * part, to + Q::HEAD + part * plane_bytes(Q::PLANES_));
            for (int r = 0; r < rows; r++) {
                uint8_t* at = from + r * row + (ROW_SCALE<Q> ? 4 : 0) + b * B::BYTES_;
                B::head(at, to, r);
                if (ROW_SCALE<Q> && (b + 1) * 32 > a.inputs) {  // a last block that is not full
                    uint8_t some[32] = {};
                    const i64 n = a.inputs - b * 32;
                    if (!BACK) memcpy(some, at, n);
                    B::values(some, q + 256 * r);
                    if (BACK) memcpy(at, some, n);
                } else B::values(at, q + 256 * r);
            }
            if (!BACK)
                for (int part = 0; part < Q::BLOCK / 32; part++) planes<Q::PLANES_, false>(q + 32 * part, to + Q::HEAD + part * plane_bytes(Q::PLANES_));
        }
    }
}

// numbers: sixteen rows' values for one input (f32) or two (bf16); `count` of these rows ⇄ one panel
template <class T, int PAIR, bool BACK> INLINE void convert_numbers(T* rows, T* panel, i64 inputs, i64 count) {
    const i64 padded = (inputs + PAIR - 1) / PAIR * PAIR;
    if (!BACK && (count < 16 || padded != inputs)) memset(panel, 0, 16 * padded * sizeof(T));
    for (i64 r = 0; r < count; r++)
        for (i64 k = 0; k < inputs; k++) {
            T& value = panel[k / PAIR * PAIR * 16 + r * PAIR + k % PAIR];
            if (BACK) rows[r * inputs + k] = value;
            else value = rows[r * inputs + k];
        }
}

template <class T, int PAIR, bool BACK> void numbers(const Repack& a, Worker& worker) {
    const i64 padded = (a.inputs + PAIR - 1) / PAIR * PAIR;
    T* wide = nullptr;
    for (i64 tile; (tile = worker.next_tile((a.count + 15) / 16)) >= 0;) {
        const i64 p = a.first / 16 + tile, left = a.count - tile * 16;
        T* panel = (T*)a.panels + p * 16 * padded;
        if (a.format == FORMAT_BF16_12) {
            if (wide == nullptr) wide = (T*)worker.scratch(16 * padded * sizeof(T));
            expand_bf12_panel(bf12_panel(a.panels, p), padded / 2, (uint8_t*)wide);
            panel = wide;
        }
        convert_numbers<T, PAIR, BACK>((T*)a.blocks + tile * 16 * a.inputs, panel, a.inputs, left < 16 ? left : 16);
    }
}

template <bool BACK> void any(const void* args, Worker& worker) {
    const Repack& a = *(const Repack*)args;
    if (a.format == FORMAT_F32) numbers<uint32_t, 1, BACK>(a, worker);
    else if (a.format == FORMAT_BF16 || a.format == FORMAT_BF16_12) numbers<uint16_t, 2, BACK>(a, worker);
    else { WITH_FORMAT(a.format, (convert<Q, BACK>(a, worker))) }
}

// ── bfloat16 panels → bf12 bits ──

struct CodedBlock {  // four vectors of a block, and whether all their exponents have a code
    I vectors[4];
    ushorts missed[PARTS];
};

INLINE CodedBlock read_block(const uint8_t* panel, i64 v, i64 vectors, int highest) {
    CodedBlock r;
    EACH r.missed[i] = ushorts{};
    for (int j = 0; j < 4; j++) {
        r.vectors[j] = v + j < vectors ? loadi(panel + 64 * (v + j)) : seti(0);
        EACH {
            const ushorts e = ((ushorts)r.vectors[j].p[i] >> 7) & 255, code = (uint16_t)highest - e;
            r.missed[i] |= (ushorts)(code > 14) & (ushorts)(e != 0);
        }
    }
    return r;
}

INLINE bool fits(const CodedBlock& block) {
    I any;
    EACH any.p[i] = (vi)block.missed[i];
    int32_t n[16], all = 0;
    storei(n, any);
    for (int i = 0; i < 16; i++) all |= n[i];
    return all == 0;
}

// the highest of the fifteen neighbours that hold most values
INLINE int highest_exponent(const uint8_t* panel, i64 values) {
    uint32_t count[4][256] = {};
    const uint16_t* x = (const uint16_t*)panel;
    for (i64 i = 0; i < values; i += 4)  // four counts: one after another would wait for the last
        for (int j = 0; j < 4; j++) count[j][x[i + j] >> 7 & 255]++;
    int best = 15;
    int64_t most_values = -1;
    for (int highest = 15; highest < 256; highest++) {
        int64_t covered = 0;
        for (int e = highest - 14; e <= highest; e++)
            for (int j = 0; j < 4; j++) covered += count[j][e];
        if (covered > most_values) { most_values = covered; best = highest; }
    }
    return best;
}

void compress_bf12(const void* args, Worker& worker) {
    const CompressBF12& a = *(const CompressBF12*)args;
    const i64 vectors = (a.inputs + 1) / 2;
    for (i64 p; (p = worker.next_tile((a.outputs + 15) / 16)) >= 0;) {
        const uint8_t* panel = a.panels + p * vectors * 64;
        if (a.out == nullptr) a.highest[p] = (uint8_t)highest_exponent(panel, vectors * 32);
        const int highest = a.highest[p];
        if (a.out == nullptr) {
            i64 bytes = bf12_head_bytes(vectors);
            for (i64 v = 0; v < vectors; v += 4) bytes += fits(read_block(panel, v, vectors, highest)) ? CODED_BYTES : RAW_BYTES;
            a.sizes[p] = bytes;
            continue;
        }
        uint8_t* to = (uint8_t*)bf12_panel(a.out, p);
        memset(to, 0, bf12_head_bytes(vectors));
        for (int i = 0; i < 32; i++) ((uint16_t*)to)[i] = (uint16_t)(i % 16 < 15 ? (highest - i % 16) << 7 : 0);
        uint8_t *flags = to + 64, *at = to + bf12_head_bytes(vectors);
        for (i64 v = 0; v < vectors; v += 4) {
            const CodedBlock block = read_block(panel, v, vectors, highest);
            if (!fits(block)) {
                flags[v / 32] |= 1 << v / 4 % 8;
                for (int j = 0; j < 4; j++, at += 64) storei(at, block.vectors[j]);
                continue;
            }
            I codes = seti(0);
            for (int j = 0; j < 4; j++) EACH {
                const ushorts x = (ushorts)block.vectors[j].p[i], e = (x >> 7) & 255;
                const ushorts code = (((uint16_t)highest - e) & (ushorts)(e != 0)) | ((ushorts)(e == 0) & 15);
                codes.p[i] |= (vi)(code << (4 * j));
                *((bytes_half_u*)(at + 64 + 32 * j) + i) = __builtin_convertvector((shorts)((x >> 8 & 128) | (x & 127)), bytes_half);
            }
            storei(at, codes);
            at += CODED_BYTES;
        }
    }
}

REGISTER_KERNEL("repack", any<false>);
REGISTER_KERNEL("unpack_rows", any<true>);
REGISTER_KERNEL("compress_bf12", compress_bf12);

}  // namespace ISA

#endif
