// A small pool of threads that run the parts of one operation at a time.
//
// Parts are handed out by a counter, so a thread that the system takes off its core delays one part and not the whole
// operation: OpenMP's barriers stall for milliseconds there. Who computes a part never changes its result.
#pragma once
#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace shoal {

// Rows cut into tiles of at most `most`, as equal as can be: a last tile of few rows would run at a fraction of the rate.
struct Tiles {
  int rows, count;
  Tiles(int rows, int most) : rows(rows), count((rows + most - 1) / most) {}
  int begin(int tile) const { return (int)((int64_t)rows * tile / count); }
  int size(int tile) const { return begin(tile + 1) - begin(tile); }
};

class Pool {
 public:
  explicit Pool(int threads) : scratch_(threads < 1 ? 1 : threads) {
    try {
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
    } catch (...) {
      stop();
      throw;
    }
  }
  ~Pool() {
    stop();
    for (auto& buffer : scratch_) std::free(buffer.data);
    std::free(shared_.data);
    std::free(plan_.data);
  }
  Pool(const Pool&) = delete;

  int size() const { return (int)workers_.size() + 1; }

  // Held by whoever computes: a pool runs one operation at a time.
  std::mutex& turn() { return turn_; }

  // Calls body(part, thread) for each part in [0, parts) and returns when all are done.
  template <class Body>
  void run(int parts, const Body& body) {
    if (parts <= MOST_PARTS) return hand_out(parts, body);
    const Tiles runs(parts, 4096);
    hand_out(runs.count, [&](int i, int thread) {
      for (int part = runs.begin(i); part < runs.begin(i + 1); ++part) body(part, thread);
    });
  }

  // Memory of one thread, of at least this size; contents are lost when it grows.
  float* scratch(int thread, size_t bytes) { return (float*)grown(scratch_[thread], bytes); }
  // Memory of the operation, shared by its threads. One buffer: an operation takes it once.
  void* shared(size_t bytes) { return grown(shared_, bytes); }
  // Another one, for how the operation is handed out.
  void* plan(size_t bytes) { return grown(plan_, bytes); }

 private:
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
  };
  static constexpr int MOST_PARTS = 0xfffff;
  static constexpr int SPIN = 4000;  // pauses, about 100 us: longer than the Python between two operations of a step

  // A ticket is the job's number (24 bits), how many parts it has (20) and the next to be handed out (20): one word,
  // so that a thread that comes late can never take a part of one job by the count of another.
  static uint64_t job_of(uint64_t ticket) { return ticket >> 40; }
  static int parts_of(uint64_t ticket) { return (int)(ticket >> 20 & 0xfffff); }
  static int next_of(uint64_t ticket) { return (int)(ticket & 0xfffff); }

  static void* grown(Buffer& buffer, size_t bytes) {
    if (buffer.size < bytes) {
      std::free(buffer.data);
      buffer.size = (bytes + 4095) / 4096 * 4096;
      buffer.data = std::aligned_alloc(64, buffer.size);
    }
    return buffer.data;
  }

  // `parts` is at most MOST_PARTS.
  template <class Body>
  void hand_out(int parts, const Body& body) {
    if (parts <= 1 || workers_.empty()) {
      for (int part = 0; part < parts; ++part) body(part, 0);
      return;
    }
    body_ = [](const void* context, int part, int thread) { (*(const Body*)context)(part, thread); };
    context_ = &body;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t job = job_of(ticket_.load(std::memory_order_relaxed)) + 1;
    ticket_.store(job << 40 | (uint64_t)parts << 20, std::memory_order_release);
    announce();
    take_parts(job & 0xffffff, 0);
    // The last parts may be with a thread that the system took off its core: after a while, let it have this one.
    for (int i = 0; done_.load(std::memory_order_acquire) != parts; ++i)
      if (i < SPIN)
        _mm_pause();
      else
        sched_yield();
  }

  void stop() {
    stopping_.store(true);
    announce();
    for (auto& worker : workers_) worker.join();
  }

  void announce() {
    signal_.fetch_add(1, std::memory_order_seq_cst);  // ordered before the look at sleepers_, as work() orders the two
    if (sleepers_.load(std::memory_order_seq_cst) > 0)
      syscall(SYS_futex, &signal_, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
  }

  // body_ and context_ are read only after a part was taken: the job cannot end, nor the next begin, before it is done.
  void take_parts(uint64_t job, int thread) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (job_of(ticket) == job && next_of(ticket) < parts_of(ticket)) {
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
      body_(context_, next_of(ticket), thread);
      done_.fetch_add(1, std::memory_order_release);
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }

  void work(int thread) {
    uint32_t seen = 0;
    while (!stopping_.load(std::memory_order_relaxed)) {
      uint32_t signal = signal_.load(std::memory_order_acquire);
      for (int i = 0; signal == seen && i < SPIN; ++i) {
        _mm_pause();
        signal = signal_.load(std::memory_order_acquire);
      }
      if (signal == seen) {
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        syscall(SYS_futex, &signal_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
        continue;
      }
      seen = signal;
      take_parts(job_of(ticket_.load(std::memory_order_acquire)), thread);
    }
  }

  void (*volatile body_)(const void*, int, int) = nullptr;
  const void* volatile context_ = nullptr;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int> done_{0};
  alignas(64) std::atomic<uint32_t> signal_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> workers_;
  std::vector<Buffer> scratch_;
  Buffer shared_, plan_;
  std::mutex turn_;
};

}  // namespace shoal
