// Threads that stay, and ops that run on them one after another.
//
// An op is a kernel and its arguments.  Every thread of the team runs every op and takes pieces of it from a shared
// counter; which thread computes a piece never changes the piece.  Between two ops the team waits for its last thread
// only where the second touches what the first wrote (see Hazards).  A list of ops that was recorded once can be run
// again and again without Python: that is how a decode step costs no call overhead.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace tiercel {

struct Team {
    int id, size;
    std::atomic<int64_t>* next;  // the running op's counter

    // the next piece of `count`, or −1 when none is left
    int64_t take(int64_t count) {
        const int64_t i = next->fetch_add(1, std::memory_order_relaxed);
        return i < count ? i : -1;
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
    bool alone; // small: thread 0 does it all
    alignas(16) unsigned char args[MOST];
};

class Ops {  // in order, with the places where the team has to wait
public:
    void add(Kernel kernel, const void* args, size_t bytes, bool alone, const std::vector<Range>& reads,
             const std::vector<Range>& writes);
    void run(int threads);
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

void record(Ops* into);  // nullptr: stop
void set_threads(int n);
int threads();

}  // namespace tiercel
