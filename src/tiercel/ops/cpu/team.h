// Threads that stay, and ops that run on them one after another.
//
// An op is a kernel and its arguments.  The threads of a team run through the ops and take pieces of each from a shared
// counter; which thread computes a piece never changes the piece.  Before an op that touches what earlier ones wrote
// (see Hazards in team.cpp) a thread waits until the pieces of those are done, not until the other threads have come:
// one that the system has taken off its core holds nobody up unless it has a piece in hand.  A list of ops that was
// recorded once can be run again and again without Python: that is how a decode step costs no call overhead.
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

struct Team {
    int id, size;
    Progress* op;
    bool holds;  // a piece

    // the next piece of `count`, or −1 when none is left; asking says that the last one is done
    int64_t take(int64_t count) {
        if (holds) op->done.fetch_add(1, std::memory_order_release);
        const int32_t i = op->next.fetch_add(1, std::memory_order_acq_rel);
        if (i == 0) op->total.store((int32_t)count, std::memory_order_release);
        holds = i < count;
        return holds ? i : -1;
    }
    // 64-byte aligned memory of this thread, valid until the next call; contents are not kept
    void* scratch(size_t bytes);
};

using Kernel = void (*)(const void* args, Team& team);

struct Range {
    const void* at;
    size_t bytes;
};

struct Op {
    static constexpr size_t MOST = 256;
    Kernel kernel;
    bool wait;  // for all earlier ops to be complete on all threads
    bool alone;  // small: one thread does it all
    alignas(16) unsigned char args[MOST];
};

class Ops {  // in order, with the places where the team has to wait
public:
    void add(Kernel kernel, const void* args, size_t bytes, bool alone, const std::vector<Range>& reads,
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
void submit(Kernel kernel, const void* args, size_t bytes, bool alone, const std::vector<Range>& reads,
            const std::vector<Range>& writes);

// Runs the op on torch's threads, for one that stands among torch's own ops: those threads spin for a while after each of
// them, and a team beside them would have to share their cores.
void submit_among(Kernel kernel, const void* args, size_t bytes, bool alone);

void record(Ops* into);  // nullptr: stop
void set_threads(int n);
int threads();

}  // namespace tiercel
