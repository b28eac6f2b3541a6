#include "team.h"

#include <cassert>
#include <cstdlib>
#include <cstring>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
static inline void breathe() { _mm_pause(); }
#else
static inline void breathe() { std::this_thread::yield(); }
#endif

namespace tiercel {

namespace {

constexpr int SPIN = 4000;       // turns before a thread that waits lets others have the core: some 40 µs
constexpr int SPIN_IDLE = 20000;  // between two runs, before a thread goes to sleep

void pause_or_yield(int& turns) {
    if (++turns < SPIN) breathe();
    else std::this_thread::yield();
}

struct Scratch {
    void* memory = nullptr;
    size_t bytes = 0;
    ~Scratch() { std::free(memory); }
};
thread_local Scratch scratch_;
thread_local Ops* recording_ = nullptr;

class Pool {
public:
    static Pool& get() {
        if (pool_ == nullptr) {
            pool_ = new Pool;  // never destroyed: threads may outlive static destruction
#if defined(__unix__) || defined(__APPLE__)
            pthread_atfork(nullptr, nullptr, [] { pool_ = nullptr; });  // threads do not survive a fork
#endif
        }
        return *pool_;
    }

    void run(const std::vector<Op>& ops, int size) {
        std::lock_guard<std::mutex> one(entry_);  // one run at a time: the cores are shared anyway
        if (ops.empty()) return;
        if (ops.size() > capacity_) {
            counters_.reset(new std::atomic<int64_t>[ops.size()]);
            capacity_ = ops.size();
        }
        for (size_t i = 0; i < ops.size(); i++) counters_[i].store(0, std::memory_order_relaxed);
        grow(size - 1);
        ops_ = &ops;
        size_ = size;
        arrived_.store(0, std::memory_order_relaxed);
        phase_.store(0, std::memory_order_relaxed);
        finished_.store(0, std::memory_order_relaxed);
        if (size > 1) {
            {
                std::lock_guard<std::mutex> lock(sleep_);
                round_.fetch_add(1, std::memory_order_release);
            }
            wake_.notify_all();
        }
        work(0);
        int turns = 0;
        // all of them, also those that had nothing to do: nobody may see the next run's fields in this one
        while (size > 1 && finished_.load(std::memory_order_acquire) != workers_) pause_or_yield(turns);
    }

private:
    void work(int id) {
        Team team{id, size_, nullptr};
        int64_t waits = 0;
        for (size_t i = 0; i < ops_->size(); i++) {
            const Op& op = (*ops_)[i];
            if (op.wait) barrier(++waits);
            if (op.alone) {
                if (id != 0) continue;
                team.size = 1;
            }
            team.next = &counters_[i];
            op.kernel(op.args, team);
            team.size = size_;
        }
    }

    void barrier(int64_t number) {
        if (size_ == 1) return;
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == number * size_) {
            phase_.store(number, std::memory_order_release);
            return;
        }
        int turns = 0;
        while (phase_.load(std::memory_order_acquire) < number) pause_or_yield(turns);
    }

    void grow(int workers) {
        while ((int)workers_ < workers) {
            const int id = ++workers_;
            std::thread([this, id, seen = round_.load()] { live(id, seen); }).detach();
        }
    }

    void live(int id, int64_t seen) {
        for (;;) {
            int turns = 0;
            while (round_.load(std::memory_order_acquire) == seen && turns < SPIN_IDLE) {
                breathe();
                turns++;
            }
            if (round_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(sleep_);
                wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
            }
            seen++;
            if (id < size_) work(id);
            finished_.fetch_add(1, std::memory_order_release);
        }
    }

    static Pool* pool_;
    std::mutex entry_, sleep_;
    std::condition_variable wake_;
    int workers_ = 0, size_ = 1;
    const std::vector<Op>* ops_ = nullptr;
    std::unique_ptr<std::atomic<int64_t>[]> counters_;
    size_t capacity_ = 0;
    alignas(64) std::atomic<int64_t> round_{0};
    alignas(64) std::atomic<int64_t> arrived_{0};
    alignas(64) std::atomic<int64_t> phase_{0};
    alignas(64) std::atomic<int> finished_{0};
};

Pool* Pool::pool_ = nullptr;
int threads_ = 1;

bool meet(const std::vector<Range>& a, const std::vector<Range>& b) {
    for (const Range& x : a)
        for (const Range& y : b) {
            const char *p = (const char*)x.at, *q = (const char*)y.at;
            if (p < q + y.bytes && q < p + x.bytes) return true;
        }
    return false;
}

}  // namespace

void* Team::scratch(size_t bytes) {
    if (bytes > scratch_.bytes) {
        std::free(scratch_.memory);
        scratch_.bytes = (bytes + (1 << 16)) / 64 * 64;
        scratch_.memory = std::aligned_alloc(64, scratch_.bytes);
        if (scratch_.memory == nullptr) std::abort();
    }
    return scratch_.memory;
}

void Ops::add(Kernel kernel, const void* args, size_t bytes, bool alone, const std::vector<Range>& reads,
              const std::vector<Range>& writes) {
    if (bytes > Op::MOST) throw std::logic_error("an op's arguments are too large");
    Op op;
    op.kernel = kernel;
    op.alone = alone;
    std::memcpy(op.args, args, bytes);
    op.wait = meet(reads, written_) || meet(writes, written_) || meet(writes, read_);
    if (op.wait) {
        read_.clear();
        written_.clear();
    }
    read_.insert(read_.end(), reads.begin(), reads.end());
    written_.insert(written_.end(), writes.begin(), writes.end());
    ops_.push_back(op);
}

void Ops::run(int threads) { Pool::get().run(ops_, threads); }

size_t Ops::waits() const {
    size_t n = 0;
    for (const Op& op : ops_) n += op.wait;
    return n;
}

void Ops::clear() {
    ops_.clear();
    read_.clear();
    written_.clear();
}

void submit(Kernel kernel, const void* args, size_t bytes, bool alone, const std::vector<Range>& reads,
            const std::vector<Range>& writes) {
    if (recording_) recording_->add(kernel, args, bytes, alone, reads, writes);
    thread_local Ops now;
    now.clear();
    now.add(kernel, args, bytes, alone, reads, writes);
    now.run(alone ? 1 : threads_);
}

void record(Ops* into) { recording_ = into; }
void set_threads(int n) { threads_ = n < 1 ? 1 : n; }
int threads() { return threads_; }

}  // namespace tiercel
