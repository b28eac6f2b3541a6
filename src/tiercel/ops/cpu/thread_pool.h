// A thread pool, and lists of ops that run on it in order.
//
// An op is a kernel and its arguments.  Every thread runs through the ops and takes tiles of each from a shared counter;
// which thread computes a tile never changes the tile.  Before an op that touches what earlier ones wrote (see Hazards in
// thread_pool.cpp) a thread waits until the tiles of those are done, not until the other threads arrive: a preempted
// thread delays the others only if it owns an unfinished tile.  A list of ops that was recorded once can be run again
// without Python: a decode step has no call overhead.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace tiercel {

struct Progress {  // of one op in one run
    std::atomic<int32_t> next{0}, total{-1}, done{0}, owner{0};

    bool complete() const {
        const int32_t all = total.load(std::memory_order_acquire);
        return all >= 0 && done.load(std::memory_order_acquire) >= all;
    }
};

struct Worker {
    int id, size;
    Progress* op;
    bool holds;  // a tile

    // the next tile of `count`, or −1 when none is left; asking marks the last one as done
    int64_t next_tile(int64_t count) {
        if (holds) op->done.fetch_add(1, std::memory_order_release);
        const int32_t i = op->next.fetch_add(1, std::memory_order_acq_rel);
        if (i == 0) op->total.store((int32_t)count, std::memory_order_release);
        holds = i < count;
        return holds ? i : -1;
    }
    // 64-byte aligned memory of this thread, valid until the next call; contents are not kept
    void* scratch(size_t bytes);
};

using Kernel = void (*)(const void* args, Worker& worker);

struct Range {
    const void* at;
    size_t bytes;
};

struct Op {
    static constexpr size_t MAX_ARG_BYTES = 256;
    Kernel kernel;
    bool wait;  // for all earlier ops to be complete on all threads
    bool serial;  // small: one thread does it all
    alignas(16) unsigned char args[MAX_ARG_BYTES];
};

class Ops {  // in order, with the places where threads have to wait
public:
    void add(Kernel kernel, const void* args, size_t bytes, bool serial, const std::vector<Range>& reads,
             const std::vector<Range>& writes);
    void run(int threads);
    std::vector<double> profile(int threads);  // seconds of each op, every one waited for
    const std::vector<Op>& all() const { return ops_; }
    size_t size() const { return ops_.size(); }
    size_t waits() const;
    void clear();

private:
    std::vector<Op> ops_;
    std::vector<Range> read_, written_;  // since the last wait
};

// Runs the op now; and notes it when this thread is recording.
void submit(Kernel kernel, const void* args, size_t bytes, bool serial, const std::vector<Range>& reads,
            const std::vector<Range>& writes);

// Runs the op on torch's threads, for one among torch's own ops: those threads spin for a while after each op, and a
// second pool would have to share their cores.
void submit_openmp(Kernel kernel, const void* args, size_t bytes, bool serial);

void record(Ops* into);  // nullptr: stop
void set_threads(int n);
int threads();

}  // namespace tiercel
