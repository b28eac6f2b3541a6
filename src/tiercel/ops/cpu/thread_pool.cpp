#include "thread_pool.h"

#include <cassert>
#include <chrono>
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

#if defined(_OPENMP)
#include <omp.h>
#endif

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
static inline void cpu_relax() { _mm_pause(); }
#else
static inline void cpu_relax() { std::this_thread::yield(); }
#endif

namespace tiercel {

namespace {

constexpr int SPIN = 4000;       // turns before a waiting thread yields its core: about 40 µs
constexpr int SPIN_IDLE = 20000;  // between two runs, before a thread goes to sleep

void pause_or_yield(int& turns) {
    if (++turns < SPIN) cpu_relax();
    else std::this_thread::yield();
}

struct Scratch {
    void* memory = nullptr;
    size_t bytes = 0;
    ~Scratch() { std::free(memory); }
};
thread_local Scratch scratch_;
thread_local Ops* recording_ = nullptr;

class ThreadPool {
public:
    static ThreadPool& get() {
        if (pool_ == nullptr) {
            pool_ = new ThreadPool;  // never destroyed: threads may outlive static destruction
#if defined(__unix__) || defined(__APPLE__)
            pthread_atfork(nullptr, nullptr, [] { pool_ = nullptr; });  // threads do not survive a fork
#endif
        }
        return *pool_;
    }

    void run(const std::vector<Op>& ops, int size, std::vector<double>* seconds = nullptr) {
        std::lock_guard<std::mutex> one(entry_);  // one run at a time: the cores are shared anyway
        if (ops.empty()) return;
        if (ops.size() > capacity_) {
            progress_.reset(new Progress[ops.size()]);
            capacity_ = ops.size();
        } else {
            for (size_t i = 0; i < ops.size(); i++) {
                progress_[i].next.store(0, std::memory_order_relaxed);
                progress_[i].total.store(-1, std::memory_order_relaxed);
                progress_[i].done.store(0, std::memory_order_relaxed);
                progress_[i].owner.store(0, std::memory_order_relaxed);
            }
        }
        ops_ = &ops;
        size_ = size;
        seconds_ = seconds;
        if (size > 1) {
            grow(size - 1);
            open_.store(true, std::memory_order_seq_cst);
            {
                std::lock_guard<std::mutex> lock(sleep_);
                round_.fetch_add(1, std::memory_order_release);
            }
            wake_.notify_all();
        }
        work(0);
        if (size > 1) {  // threads that have not arrived by now are not needed
            open_.store(false, std::memory_order_seq_cst);
            int turns = 0;
            while (inside_.load(std::memory_order_seq_cst) != 0) pause_or_yield(turns);
        }
    }

private:
    void work(int id) {
        size_t complete = 0;  // ops known to be complete
        const std::vector<Op>& ops = *ops_;
        for (size_t i = 0; i < ops.size(); i++) {
            if (ops[i].wait)
                for (; complete < i; complete++) await(complete, id);
            if (!ops[i].serial || id == 0) execute(i, id);
            if (id == 0 && seconds_) {
                for (; complete <= i; complete++) await(complete, id);
                seconds_->push_back(std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count());
            }
        }
        if (id == 0)
            for (; complete < ops.size(); complete++) await(complete, id);
    }

    void execute(size_t i, int id) {
        const Op& op = (*ops_)[i];
        if (op.serial && progress_[i].owner.exchange(1, std::memory_order_acq_rel)) return;
        Worker worker{id, op.serial ? 1 : size_, &progress_[i], false};
        op.kernel(op.args, worker);
    }

    void await(size_t i, int id) {
        int turns = 0;
        while (!progress_[i].complete()) {
            pause_or_yield(turns);
            if (turns == SPIN / 8 && (*ops_)[i].serial) execute(i, id);  // the thread that should is not there
        }
    }

    void grow(int workers) {
        while (workers_ < workers) {
            const int id = ++workers_;
            std::thread([this, id, seen = round_.load()] { worker_loop(id, seen); }).detach();
        }
    }

    void worker_loop(int id, int64_t seen) {
        for (;;) {
            int turns = 0;
            while (round_.load(std::memory_order_acquire) == seen && turns < SPIN_IDLE) {
                cpu_relax();
                turns++;
            }
            if (round_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(sleep_);
                wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
            }
            seen = round_.load(std::memory_order_acquire);
            inside_.fetch_add(1, std::memory_order_seq_cst);
            if (open_.load(std::memory_order_seq_cst) && id < size_) work(id);
            inside_.fetch_sub(1, std::memory_order_seq_cst);
        }
    }

    static ThreadPool* pool_;
    std::mutex entry_, sleep_;
    std::condition_variable wake_;
    int workers_ = 0, size_ = 1;
    const std::vector<Op>* ops_ = nullptr;
    std::vector<double>* seconds_ = nullptr;
    std::unique_ptr<Progress[]> progress_;
    size_t capacity_ = 0;
    alignas(64) std::atomic<int64_t> round_{0};
    alignas(64) std::atomic<bool> open_{false};
    alignas(64) std::atomic<int> inside_{0};
};

ThreadPool* ThreadPool::pool_ = nullptr;
int threads_ = 1;

// Hazards: an op has to wait when it reads or writes what an earlier one wrote since the last wait, or writes what one reads.
bool overlap(const std::vector<Range>& a, const std::vector<Range>& b) {
    for (const Range& x : a)
        for (const Range& y : b) {
            const char *p = (const char*)x.at, *q = (const char*)y.at;
            if (p < q + y.bytes && q < p + x.bytes) return true;
        }
    return false;
}

}  // namespace

void* Worker::scratch(size_t bytes) {
    if (bytes > scratch_.bytes) {
        std::free(scratch_.memory);
        scratch_.bytes = (bytes + (1 << 16)) / 64 * 64;
        scratch_.memory = std::aligned_alloc(64, scratch_.bytes);
        if (scratch_.memory == nullptr) std::abort();
    }
    return scratch_.memory;
}

void Ops::add(Kernel kernel, const void* args, size_t bytes, bool serial, const std::vector<Range>& reads,
              const std::vector<Range>& writes) {
    if (bytes > Op::MAX_ARG_BYTES) throw std::logic_error("an op's arguments are too large");
    Op op;
    op.kernel = kernel;
    op.serial = serial;
    std::memcpy(op.args, args, bytes);
    op.wait = overlap(reads, written_) || overlap(writes, written_) || overlap(writes, read_);
    if (op.wait) {
        read_.clear();
        written_.clear();
    }
    read_.insert(read_.end(), reads.begin(), reads.end());
    written_.insert(written_.end(), writes.begin(), writes.end());
    ops_.push_back(op);
}

void Ops::run(int threads) { ThreadPool::get().run(ops_, threads); }

std::vector<double> Ops::profile(int threads) {
    std::vector<double> at;
    const double begin = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    ThreadPool::get().run(ops_, threads, &at);
    for (size_t i = at.size(); i-- > 1;) at[i] -= at[i - 1];
    if (!at.empty()) at[0] -= begin;
    return at;
}

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

void submit(Kernel kernel, const void* args, size_t bytes, bool serial, const std::vector<Range>& reads,
            const std::vector<Range>& writes) {
    if (recording_) recording_->add(kernel, args, bytes, serial, reads, writes);
    thread_local Ops now;
    now.clear();
    now.add(kernel, args, bytes, serial, reads, writes);
    now.run(serial ? 1 : threads_);
}

void submit_openmp(Kernel kernel, const void* args, size_t bytes, bool serial) {
#if defined(_OPENMP)
    Progress progress;
#pragma omp parallel if (!serial)
    {
        Worker worker{omp_get_thread_num(), omp_get_num_threads(), &progress, false};
        kernel(args, worker);
    }
#else
    submit(kernel, args, bytes, serial, {}, {});
#endif
}

void record(Ops* into) { recording_ = into; }
void set_threads(int n) { threads_ = n < 1 ? 1 : n; }
int threads() { return threads_; }

}  // namespace tiercel
