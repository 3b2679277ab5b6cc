// Collectives among processes of one host over a file that all of them map.
//
// Rank r of a group owns a buffer of two halves, which operations use in turn, and two counters: `posted` says how far
// it has written, `finished` how far it has read. Operation k (from 1) posts 2k when its input is there and 2k + 1 when
// a second phase is. A rank writes a half for the second time only when all have finished the operation before that.
// Tensors longer than half a buffer go in pieces, each an operation. Sums add ranks in order: all get the same bits.
//
// Ranks may be more than cores: whoever waits spins for some microseconds, then sleeps on the counter (a futex).
#pragma once
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace shoal {

constexpr uint64_t COMM_MAGIC = 0x73686f616c636d31;  // "shoalcm1": the layout below
constexpr int MAX_COMM_RANKS = 64;
constexpr int RING_SLOTS = 8;
constexpr int64_t RING_SLOT_BYTES = 256 * 1024;
constexpr int COMM_SPIN = 1500;  // pauses, some 30 us

enum CommDtype { COMM_FLOAT32 = 0, COMM_BFLOAT16 = 1, COMM_INT32 = 2, COMM_INT64 = 3 };
enum CommStatus { COMM_OK = 0, COMM_ABORTED = -1 };  // r + 1: rank r did not come

struct Counter {
  alignas(64) std::atomic<uint32_t> value;
  std::atomic<uint32_t> sleepers;
};

struct CommHeader {
  uint64_t magic;
  int64_t size, half_bytes;
  Counter aborted;
  Counter posted[MAX_COMM_RANKS], finished[MAX_COMM_RANKS];
};

struct Ring {  // from one rank to another; tensors are sent in pieces of a slot
  Counter head, tail;
  alignas(64) char slots[RING_SLOTS][RING_SLOT_BYTES];
};

inline int64_t comm_bytes(int64_t size, int64_t half_bytes) {
  const int64_t header = (sizeof(CommHeader) + 4095) / 4096 * 4096;
  return header + size * 2 * half_bytes + size * size * (int64_t)sizeof(Ring);
}

// 0 or errno. The memory is reserved, so that a full file system is an error here and not a signal later.
inline int comm_create(const char* path, int64_t size, int64_t half_bytes) {
  const int file = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (file < 0) return errno;
  int error = posix_fallocate(file, 0, comm_bytes(size, half_bytes));
  if (!error) {
    CommHeader header{};
    header.magic = COMM_MAGIC, header.size = size, header.half_bytes = half_bytes;
    if (pwrite(file, &header, sizeof header, 0) != (ssize_t)sizeof header) error = EIO;
  }
  close(file);
  if (error) unlink(path);
  return error;
}

inline double comm_now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

class SharedComm {
 public:
  // Null with errno: EINVAL where the file is not of such a group.
  static SharedComm* attach(const char* path, int rank, int size, double timeout) {
    const int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0) return nullptr;
    CommHeader header;
    const bool whole = pread(file, &header, sizeof header, 0) == (ssize_t)sizeof header;
    void* memory = MAP_FAILED;
    int64_t bytes = 0;
    if (whole && header.magic == COMM_MAGIC && header.size == size) {
      bytes = comm_bytes(size, header.half_bytes);
      if (lseek(file, 0, SEEK_END) >= bytes) memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    }
    close(file);
    if (memory == MAP_FAILED) {
      errno = EINVAL;
      return nullptr;
    }
    return new SharedComm((char*)memory, bytes, rank, size, timeout);
  }
  ~SharedComm() { munmap(memory_, bytes_); }

  void abort() {
    header_->aborted.value.store(1, std::memory_order_seq_cst);
    for (int r = 0; r < size_; ++r) {
      wake(header_->posted[r]), wake(header_->finished[r]);
      for (int to = 0; to < size_; ++to) wake(ring(r, to).head), wake(ring(r, to).tail);
    }
  }

  int all_reduce(char* x, int64_t count, int dtype) {
    const int64_t width = dtype == COMM_INT64 ? 8 : dtype == COMM_BFLOAT16 ? 2 : 4;
    return in_pieces(count, half_ / width, [&](int64_t first, int64_t n) {
      char* part = x + first * width;
      if (n * width <= SMALL) {
        std::memcpy(buffer(rank_), part, n * width);
        if (int status = meet(0)) return status;
        add(part, n, dtype, [&](int r) { return buffer(r); });
      } else {  // each rank adds up one share of it
        auto begin = [&](int r) { return n * r / size_ / 16 * 16; };
        auto end = [&](int r) { return r + 1 == size_ ? n : begin(r + 1); };
        for (int r = 0; r < size_; ++r)
          if (r != rank_) std::memcpy(buffer(rank_) + begin(r) * width, part + begin(r) * width, (end(r) - begin(r)) * width);
        if (int status = meet(0)) return status;
        const int64_t own = begin(rank_) * width, own_count = end(rank_) - begin(rank_);
        add(part + own, own_count, dtype, [&](int r) { return r == rank_ ? part + own : buffer(r) + own; });
        std::memcpy(buffer(rank_) + own, part + own, own_count * width);
        if (int status = meet(1)) return status;
        for (int r = 0; r < size_; ++r)
          if (r != rank_) std::memcpy(part + begin(r) * width, buffer(r) + begin(r) * width, (end(r) - begin(r)) * width);
      }
      return finish();
    });
  }

  // out holds `size` tensors of `bytes` each.
  int all_gather(const char* x, int64_t bytes, char* out) {
    return in_pieces(bytes, half_, [&](int64_t first, int64_t n) {
      std::memcpy(buffer(rank_), x + first, n);
      if (int status = meet(0)) return status;
      for (int r = 0; r < size_; ++r) std::memcpy(out + r * bytes + first, r == rank_ ? x + first : buffer(r), n);
      return finish();
    });
  }

  // x holds `size` tensors of `count` elements each.
  int reduce_scatter(const char* x, int64_t count, int dtype, char* out) {
    const int64_t width = dtype == COMM_INT64 ? 8 : dtype == COMM_BFLOAT16 ? 2 : 4;
    return in_pieces(count, half_ / width / size_, [&](int64_t first, int64_t n) {
      for (int r = 0; r < size_; ++r)
        if (r != rank_) std::memcpy(buffer(rank_) + r * n * width, x + (r * count + first) * width, n * width);
      if (int status = meet(0)) return status;
      const char* own = x + (rank_ * count + first) * width;
      add(out + first * width, n, dtype, [&](int r) { return r == rank_ ? own : buffer(r) + rank_ * n * width; });
      return finish();
    });
  }

  int broadcast(char* x, int64_t bytes, int source) {
    return in_pieces(bytes, half_, [&](int64_t first, int64_t n) {
      if (rank_ == source) {
        std::memcpy(buffer(rank_), x + first, n);
        post(0);
      } else {
        if (int status = await(header_->posted[source], 2 * operation_, source)) return status;
        std::memcpy(x + first, buffer(source), n);
      }
      return finish();
    });
  }

  // Sends to one rank while receiving from another: neither may wait for the other, or a circle of full rings would
  // stand still. Either side may be empty.
  int exchange(const char* x, int64_t send_bytes, int to, char* y, int64_t receive_bytes, int from) {
    double deadline = comm_now() + timeout_;
    int idle = 0;
    while (send_bytes || receive_bytes) {
      bool moved = false;
      if (send_bytes && has_room(ring(rank_, to))) push(ring(rank_, to), x, send_bytes), moved = true;
      if (receive_bytes && has_piece(ring(from, rank_))) pop(ring(from, rank_), y, receive_bytes), moved = true;
      if (moved) {
        idle = 0;
        deadline = comm_now() + timeout_;
        continue;
      }
      if (is_aborted()) return COMM_ABORTED;
      if (++idle < COMM_SPIN) {
        _mm_pause();
        continue;
      }
      if (comm_now() > deadline) return fail(receive_bytes ? from : to);
      if (receive_bytes)
        sleep_on(ring(from, rank_).head, ring(from, rank_).tail.value.load(std::memory_order_relaxed), 0.001);
      else
        sleep_on(ring(rank_, to).tail, ring(rank_, to).head.value.load(std::memory_order_relaxed) - RING_SLOTS, 0.001);
    }
    return COMM_OK;
  }

  // A receiver waits as long as it takes (`patient`): the sender may be computing for a pipeline's whole stage.
  int send(const char* x, int64_t bytes, int to) {
    Ring& r = ring(rank_, to);
    while (bytes) {
      const uint32_t head = r.head.value.load(std::memory_order_relaxed);
      if (int status = await(r.tail, head - RING_SLOTS + 1, to, true)) return status;
      push(r, x, bytes);
    }
    return COMM_OK;
  }
  int receive(char* x, int64_t bytes, int from) {
    Ring& r = ring(from, rank_);
    while (bytes) {
      const uint32_t tail = r.tail.value.load(std::memory_order_relaxed);
      if (int status = await(r.head, tail + 1, from, true)) return status;
      pop(r, x, bytes);
    }
    return COMM_OK;
  }

 private:
  static constexpr int64_t SMALL = 16 * 1024;  // bytes up to which every rank adds up everything: one phase less

  SharedComm(char* memory, int64_t bytes, int rank, int size, double timeout)
      : memory_(memory), bytes_(bytes), header_((CommHeader*)memory), rank_(rank), size_(size), timeout_(timeout) {
    half_ = header_->half_bytes;
    buffers_ = memory + (sizeof(CommHeader) + 4095) / 4096 * 4096;
    rings_ = (Ring*)(buffers_ + size * 2 * half_);
  }

  char* buffer(int r) { return buffers_ + (r * 2 + operation_ % 2) * half_; }
  Ring& ring(int from, int to) { return rings_[from * size_ + to]; }
  bool is_aborted() { return header_->aborted.value.load(std::memory_order_relaxed) != 0; }

  template <class Body>
  int in_pieces(int64_t count, int64_t most, const Body& body) {
    for (int64_t first = 0; first < count; first += most) {
      if (is_aborted()) return COMM_ABORTED;
      ++operation_;
      // This half was last used two operations ago: all must have read it.
      for (int r = 0; r < size_; ++r)
        if (int status = await(header_->finished[r], operation_ - 2, r)) return status;
      if (int status = body(first, std::min(most, count - first))) return status;
    }
    return COMM_OK;
  }
  void post(int phase) { set(header_->posted[rank_], 2 * operation_ + phase); }
  int meet(int phase) {
    post(phase);
    for (int r = 0; r < size_; ++r)
      if (int status = await(header_->posted[r], 2 * operation_ + phase, r)) return status;
    return COMM_OK;
  }
  int finish() {
    set(header_->finished[rank_], operation_);
    return COMM_OK;
  }

  void set(Counter& counter, uint32_t value) {
    counter.value.store(value, std::memory_order_seq_cst);  // ordered before the look at sleepers, as sleep_on orders them
    if (counter.sleepers.load(std::memory_order_seq_cst)) wake(counter);
  }
  void wake(Counter& counter) { syscall(SYS_futex, &counter.value, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }
  void sleep_on(Counter& counter, uint32_t seen, double seconds) {
    timespec t{(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
    counter.sleepers.fetch_add(1, std::memory_order_seq_cst);
    if (counter.value.load(std::memory_order_seq_cst) == seen && !is_aborted())
      syscall(SYS_futex, &counter.value, FUTEX_WAIT, seen, &t, nullptr, 0);
    counter.sleepers.fetch_sub(1, std::memory_order_seq_cst);
  }
  // Until the counter has reached `target`; counters wrap around, so it is the difference that counts.
  int await(Counter& counter, uint32_t target, int rank, bool patient = false) {
    for (int i = 0; i < COMM_SPIN; ++i) {
      if ((int32_t)(counter.value.load(std::memory_order_acquire) - target) >= 0) return COMM_OK;
      _mm_pause();
    }
    const double deadline = comm_now() + timeout_;
    while (true) {
      const uint32_t seen = counter.value.load(std::memory_order_acquire);
      if ((int32_t)(seen - target) >= 0) return COMM_OK;
      if (is_aborted()) return COMM_ABORTED;
      if (!patient && comm_now() > deadline) return fail(rank);
      sleep_on(counter, seen, 0.05);
    }
  }
  // The group is broken from then on, for all its ranks.
  int fail(int rank) {
    abort();
    return rank + 1;
  }

  bool has_room(Ring& r) {
    return r.head.value.load(std::memory_order_relaxed) - r.tail.value.load(std::memory_order_acquire) < RING_SLOTS;
  }
  bool has_piece(Ring& r) {
    return r.head.value.load(std::memory_order_acquire) != r.tail.value.load(std::memory_order_relaxed);
  }
  void push(Ring& r, const char*& x, int64_t& left) {
    const uint32_t head = r.head.value.load(std::memory_order_relaxed);
    const int64_t bytes = std::min(left, RING_SLOT_BYTES);
    std::memcpy(r.slots[head % RING_SLOTS], x, bytes);
    set(r.head, head + 1);
    x += bytes, left -= bytes;
  }
  void pop(Ring& r, char*& x, int64_t& left) {
    const uint32_t tail = r.tail.value.load(std::memory_order_relaxed);
    const int64_t bytes = std::min(left, RING_SLOT_BYTES);
    std::memcpy(x, r.slots[tail % RING_SLOTS], bytes);
    set(r.tail, tail + 1);
    x += bytes, left -= bytes;
  }

  // to[i] = sum over ranks, in order, of source(r)[i]. `to` may be one of the sources.
  template <class Source>
  void add(char* to, int64_t n, int dtype, const Source& source) {
    if (dtype == COMM_FLOAT32)
      sum_up<float>((float*)to, n, source);
    else if (dtype == COMM_INT32)
      sum_up<int32_t>((int32_t*)to, n, source);
    else if (dtype == COMM_INT64)
      sum_up<int64_t>((int64_t*)to, n, source);
    else
      sum_up_bf16((uint16_t*)to, n, source);
  }
  template <class T, class Source>
  void sum_up(T* to, int64_t n, const Source& source) {
    constexpr int64_t BLOCK = 512;
    for (int64_t first = 0; first < n; first += BLOCK) {
      const int64_t count = std::min(BLOCK, n - first);
      alignas(64) T total[BLOCK];
      std::memcpy(total, (const T*)source(0) + first, count * sizeof(T));
      for (int r = 1; r < size_; ++r) {
        const T* more = (const T*)source(r) + first;
        for (int64_t i = 0; i < count; ++i) total[i] += more[i];
      }
      std::memcpy(to + first, total, count * sizeof(T));
    }
  }
  template <class Source>
  void sum_up_bf16(uint16_t* to, int64_t n, const Source& source) {
    for (int64_t i = 0; i < n; ++i) {
      float total = 0;
      for (int r = 0; r < size_; ++r) total += from_bf16(((const uint16_t*)source(r))[i]);
      to[i] = to_bf16(total);
    }
  }

  char* memory_;
  int64_t bytes_;
  CommHeader* header_;
  int rank_, size_;
  double timeout_;
  int64_t half_;
  char* buffers_;
  Ring* rings_;
  uint32_t operation_ = 0;
};

}  // namespace shoal
