// Collectives among processes of one host over a file that all of them map.
//
// Rank r of a group owns a seat in the file's header, a buffer of two halves and a ring to each other rank. Collectives
// are cut into operations of at most a piece. Operation k (from 1) uses half k % 2 of every buffer; a rank raises its
// `posted` to 2k when its input lies there, to 2k + 1 when a second phase's does, and its `finished` to k when it has
// read all that it needs. It writes a half again, in operation k + 2, only when all have finished k. Counters only grow
// and are 64 bits wide, so a value is never met twice. Sums add ranks in order: all get the same bits.
//
// Ranks may be more than cores: whoever waits spins for some microseconds, then sleeps on the counter (a futex). It
// wakes now and then to see whether the other lives: a rank holds a lock on a byte of the file, which the kernel takes
// from the dead. The first rank that finds another late, gone or out of step marks the group as broken for all.
#pragma once
#include <sched.h>
#include <time.h>

#include "comm_file.h"
#include "comm_sums.h"

namespace shoal {

inline double comm_now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

class SharedComm {
 public:
  // Null with a message in `error`, which has room for `room` characters.
  static SharedComm* attach(const char* path, int rank, int size, double timeout, char* error, int64_t room) {
    SharedComm* comm = new SharedComm(path, rank, size, timeout);
    if (comm->file_.memory && comm->size_ != size)
      comm->file_.refuse("a group of %d ranks, not of %d", comm->size_, size);
    else if (comm->file_.memory && !(comm->seated_ = comm->sit_down()))
      comm->file_.refuse("rank %d is taken by another process", rank);
    if (comm->seated_) return comm;
    snprintf(error, room, "%s", comm->file_.error);
    delete comm;
    return nullptr;
  }
  ~SharedComm() {
    if (seated_) seat(rank_).state.store(SEAT_LEFT, std::memory_order_release);
  }

  void abort() { file_.break_up(comm_status(COMM_ABORTED)); }

  int all_reduce(char* x, int64_t count, int dtype) {
    const int64_t width = width_of(dtype), most = (size_ == 2 ? piece_ : half_) / width;
    return by_pieces(call(ALL_REDUCE, dtype, count), count, most, [&](int64_t first, int64_t n) {
      char* part = x + first * width;
      return size_ == 2 || n * width <= SMALL ? reduce_together(part, n, dtype) : reduce_by_shares(part, n, dtype);
    });
  }

  // out holds `size` tensors of `bytes` each.
  int all_gather(const char* x, int64_t bytes, char* out) {
    return by_pieces(call(ALL_GATHER, 0, bytes), bytes, piece_, [&](int64_t first, int64_t n) {
      std::memcpy(buffer(rank_), x + first, n);
      if (int status = meet(0)) return status;
      for (int r = 0; r < size_; ++r) std::memcpy(out + r * bytes + first, r == rank_ ? x + first : buffer(r), n);
      return (int)COMM_OK;
    });
  }

  // x holds `size` tensors of `count` elements each.
  int reduce_scatter(const char* x, int64_t count, int dtype, char* out) {
    const int64_t width = width_of(dtype), most = half_ / width / size_;
    return by_pieces(call(REDUCE_SCATTER, dtype, count), count, most, [&](int64_t first, int64_t n) {
      for (int r = 0; r < size_; ++r)
        if (r != rank_) std::memcpy(buffer(rank_) + r * n * width, x + (r * count + first) * width, n * width);
      if (int status = meet(0)) return status;
      const char* from[MAX_COMM_RANKS];
      for (int r = 0; r < size_; ++r) from[r] = buffer(r) + rank_ * n * width;
      from[rank_] = x + (rank_ * count + first) * width;
      sum_ranks(out + first * width, n, dtype, from, size_);
      return (int)COMM_OK;
    });
  }

  int broadcast(char* x, int64_t bytes, int source) {
    return by_pieces(call(BROADCAST, source, bytes), bytes, piece_, [&](int64_t first, int64_t n) {
      if (rank_ == source) {
        std::memcpy(buffer(rank_), x + first, n);
        post(0);
        return (int)COMM_OK;
      }
      if (int status = meet_one(source, 0)) return status;
      std::memcpy(x + first, buffer(source), n);
      return (int)COMM_OK;
    });
  }

  // x holds what goes to ranks 0, 1, ... in order, `send_bytes` of each; out what comes from them. A buffer begins with
  // a table of how many bytes its rank sends to whom, from which all see alike how many operations it takes.
  int all_to_all(const char* x, const int64_t* send_bytes, char* out, const int64_t* receive_bytes) {
    const int64_t table_bytes = CommLayout::round_up(size_ * 8, 64), region = (half_ - table_bytes) / size_ / 64 * 64;
    auto in_piece = [&](int64_t bytes, int64_t done) { return std::max<int64_t>(0, std::min(region, bytes - done)); };
    int64_t longest = 0;
    return by_pieces(call(ALL_TO_ALL, 0, 0), longest, region, [&](int64_t done, int64_t) {
      std::memcpy(buffer(rank_), send_bytes, size_ * 8);
      const char *from = x, *own = x;
      for (int r = 0; r < size_; from += send_bytes[r++])
        if (r == rank_)
          own = from;
        else
          std::memcpy(buffer(rank_) + table_bytes + r * region, from + done, in_piece(send_bytes[r], done));
      if (int status = meet(0)) return status;
      char* to = out;
      for (int r = 0; r < size_; to += receive_bytes[r++]) {
        int64_t sent[MAX_COMM_RANKS];
        std::memcpy(sent, buffer(r), size_ * 8);
        if (sent[rank_] != receive_bytes[r]) return fail(COMM_DIFFERS, r, rank_);
        for (int other = 0; other < size_; ++other)
          if (other != r) longest = std::max(longest, sent[other]);
        if (r != rank_)
          std::memcpy(to + done, buffer(r) + table_bytes + rank_ * region, in_piece(receive_bytes[r], done));
        else if (done == 0)
          std::memcpy(to, own, receive_bytes[r]);
      }
      return (int)COMM_OK;
    });
  }

  // Both wait patiently, for the other may be computing a pipeline's whole stage, and come back with COMM_AGAIN from
  // time to time, so that the caller can attend to its signals.
  int send(const char* x, int64_t bytes, int to) {
    Ring& ring = file_.ring(rank_, to);
    do {
      if (int reason = broken()) return reason;
      const uint64_t piece = ring.head.value.load(std::memory_order_relaxed);
      const uint64_t taken = piece < RING_SLOTS ? 0 : piece - RING_SLOTS + 1;
      if (int status = await(ring.tail, taken, to, true)) return status;
      Slot* slot = (Slot*)(file_.memory + file_.layout.slot(rank_, to, piece));
      const int64_t n = std::min(bytes - sent_[to], file_.layout.slot_bytes);
      slot->message_bytes = bytes;
      std::memcpy(slot + 1, x + sent_[to], n);
      set(ring.head, piece + 1);
      sent_[to] += n;
    } while (sent_[to] < bytes);
    sent_[to] = 0;
    return COMM_OK;
  }
  int receive(char* x, int64_t bytes, int from) {
    Ring& ring = file_.ring(from, rank_);
    do {
      if (int reason = broken()) return reason;
      const uint64_t piece = ring.tail.value.load(std::memory_order_relaxed);
      if (int status = await(ring.head, piece + 1, from, true)) return status;
      const Slot* slot = (const Slot*)(file_.memory + file_.layout.slot(from, rank_, piece));
      if (slot->message_bytes != bytes) return fail(COMM_DIFFERS, from, rank_);
      const int64_t n = std::min(bytes - received_[from], file_.layout.slot_bytes);
      std::memcpy(x + received_[from], slot + 1, n);
      set(ring.tail, piece + 1);
      received_[from] += n;
    } while (received_[from] < bytes);
    received_[from] = 0;
    return COMM_OK;
  }

 private:
  enum Call { ALL_REDUCE = 1, ALL_GATHER, REDUCE_SCATTER, BROADCAST, ALL_TO_ALL };
  static constexpr int64_t SMALL = 16 * 1024;   // bytes up to which every rank adds up everything: one phase less
  static constexpr int64_t PIECE = 128 * 1024;  // while one is read from the second-level cache the next is written
  static constexpr double SLICE = 0.02;         // seconds of sleep after which a rank looks whether the other lives
  static constexpr double PATIENCE = 0.2;       // seconds of a patient wait

  SharedComm(const char* path, int rank, int size, double timeout) : file_(path), rank_(rank), timeout_(timeout) {
    size_ = (int)file_.layout.size;
    half_ = file_.layout.half_bytes;
    piece_ = std::min(half_, PIECE);
    cpu_set_t cores;
    const bool known = sched_getaffinity(0, sizeof cores, &cores) == 0;
    // Where ranks share cores, spinning keeps from them the very rank that is waited for.
    spin_seconds_ = known && CPU_COUNT(&cores) >= size ? 50e-6 : 5e-6;
  }

  // The lock says that this process lives; a system without such locks has timeouts alone. It belongs to the open file,
  // so other users of the file in this process do not end it.
  bool sit_down() {
    struct flock lock = seat_lock(rank_);
    if (fcntl(file_.descriptor, F_OFD_SETLK, &lock) != 0) {
      if (errno == EAGAIN || errno == EACCES) return false;
      has_locks_ = false;
    }
    int32_t empty = SEAT_EMPTY;
    return seat(rank_).state.compare_exchange_strong(empty, SEAT_TAKEN, std::memory_order_acq_rel);
  }
  bool is_gone(int rank) {
    const int32_t state = seat(rank).state.load(std::memory_order_acquire);
    if (state != SEAT_TAKEN || !has_locks_) return state == SEAT_LEFT;
    struct flock lock = seat_lock(rank);
    return fcntl(file_.descriptor, F_OFD_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;
  }
  static struct flock seat_lock(int rank) {
    struct flock lock{};
    lock.l_type = F_WRLCK, lock.l_whence = SEEK_SET, lock.l_start = rank, lock.l_len = 1;
    return lock;
  }

  Seat& seat(int rank) { return file_.header().seats[rank]; }
  char* buffer(int rank) { return file_.memory + file_.layout.buffer(rank, operation_ % 2); }
  int broken() { return file_.header().broken.load(std::memory_order_relaxed); }
  int fail(CommKind kind, int rank, int other = 0) { return file_.break_up(comm_status(kind, rank, other)); }

  // All that must be the same on every rank, in one word.
  static uint64_t call(Call kind, int detail, int64_t count) {
    return (uint64_t)kind << 56 | (uint64_t)detail << 48 | ((uint64_t)count & 0xffffffffffff);
  }

  // `count` may still grow while the first piece is under way. At least one operation, so that ranks notice each other
  // even where there is nothing to move.
  template <class Body>
  int by_pieces(uint64_t call, const int64_t& count, int64_t most, const Body& body) {
    int64_t first = 0;
    do {
      if (int reason = broken()) return reason;
      ++operation_;
      call_ = call;
      for (int r = 0; r < size_; ++r)  // this half was last used two operations ago: all must have read it
        if (int status = await(seat(r).finished, operation_ < 2 ? 0 : operation_ - 2, r)) return status;
      seat(rank_).calls[operation_ % 2].store(call, std::memory_order_relaxed);
      if (int status = body(first, std::min(most, count - first))) return status;
      set(seat(rank_).finished, operation_);
      first += most;
    } while (first < count);
    return COMM_OK;
  }
  void post(int phase) { set(seat(rank_).posted, 2 * operation_ + phase); }
  int meet_one(int rank, int phase) {
    if (int status = await(seat(rank).posted, 2 * operation_ + phase, rank)) return status;
    if (seat(rank).calls[operation_ % 2].load(std::memory_order_relaxed) == call_) return COMM_OK;
    return fail(COMM_DIFFERS, std::min(rank, rank_), std::max(rank, rank_));
  }
  int meet(int phase) {
    post(phase);
    for (int r = 0; r < size_; ++r)
      if (r != rank_)
        if (int status = meet_one(r, phase)) return status;
    return COMM_OK;
  }

  int reduce_together(char* part, int64_t n, int dtype) {
    std::memcpy(buffer(rank_), part, n * width_of(dtype));
    if (int status = meet(0)) return status;
    const char* from[MAX_COMM_RANKS];
    for (int r = 0; r < size_; ++r) from[r] = r == rank_ ? part : buffer(r);
    sum_ranks(part, n, dtype, from, size_);
    return COMM_OK;
  }
  // Each rank adds up one share and posts the sum in its buffer, where its input of that share would be: no other rank
  // reads it there.
  int reduce_by_shares(char* part, int64_t n, int dtype) {
    const int64_t width = width_of(dtype);
    auto begin = [&](int r) { return (r == size_ ? n : n * r / size_ / 16 * 16) * width; };
    auto bytes = [&](int r) { return begin(r + 1) - begin(r); };
    for (int r = 0; r < size_; ++r)
      if (r != rank_) std::memcpy(buffer(rank_) + begin(r), part + begin(r), bytes(r));
    if (int status = meet(0)) return status;
    const char* from[MAX_COMM_RANKS];
    for (int r = 0; r < size_; ++r) from[r] = (r == rank_ ? part : buffer(r)) + begin(rank_);
    sum_ranks(part + begin(rank_), bytes(rank_) / width, dtype, from, size_);
    std::memcpy(buffer(rank_) + begin(rank_), part + begin(rank_), bytes(rank_));
    if (int status = meet(1)) return status;
    for (int r = 0; r < size_; ++r)
      if (r != rank_) std::memcpy(part + begin(r), buffer(r) + begin(r), bytes(r));
    return COMM_OK;
  }

  // --- waiting ---

  static void set(Counter& counter, uint64_t value) {
    counter.value.store(value, std::memory_order_seq_cst);  // before the look at sleepers, as sleep_on orders the two
    if (counter.sleepers.load(std::memory_order_seq_cst)) comm_wake(counter);
  }
  static bool reached(Counter& counter, uint64_t target) {
    return counter.value.load(std::memory_order_acquire) >= target;
  }

  // Until the counter, which is for `rank` to raise, has reached `target`.
  int await(Counter& counter, uint64_t target, int rank, bool patient = false) {
    if (reached(counter, target)) return COMM_OK;
    const double until = comm_now() + spin_seconds_;
    do
      for (int i = 0; i < 32; ++i) {
        if (reached(counter, target)) return COMM_OK;
        _mm_pause();
      }
    while (comm_now() < until);
    Seat& own = seat(rank_);
    own.counter_offset.store((char*)&counter - file_.memory, std::memory_order_relaxed);
    own.target.store(target, std::memory_order_relaxed);
    own.waits_for.store(rank + 1, std::memory_order_release);
    const int status = sleep_until(counter, target, rank, patient);
    if (status >> 16 != COMM_AGAIN) own.waits_for.store(0, std::memory_order_relaxed);
    return status;
  }
  int sleep_until(Counter& counter, uint64_t target, int rank, bool patient) {
    double waited = 0, last = comm_now();
    while (true) {
      const uint64_t seen = counter.value.load(std::memory_order_acquire);
      if (seen >= target) return COMM_OK;
      if (int reason = broken()) return reason;
      if (patient && waited >= PATIENCE) return comm_status(COMM_AGAIN);
      if (!patient && waited >= timeout_) return fail(COMM_LATE, culprit(rank));
      const bool in_vain = !sleep_on(counter, seen);
      if (in_vain && is_gone(rank) && !reached(counter, target)) return fail(COMM_GONE, rank);
      const double now = comm_now();
      waited += std::min(now - last, 5 * SLICE);  // if longer, it was this process that stood still
      last = now;
    }
  }
  // False if it was not woken.
  bool sleep_on(Counter& counter, uint64_t seen) {
    const timespec slice{0, (long)(SLICE * 1e9)};
    counter.sleepers.fetch_add(1, std::memory_order_seq_cst);
    long woken = 0;
    if (counter.value.load(std::memory_order_seq_cst) == seen && !broken())
      woken = syscall(SYS_futex, &counter.value, FUTEX_WAIT, (uint32_t)seen, &slice, nullptr, 0);
    const bool in_vain = woken != 0 && errno == ETIMEDOUT;
    counter.sleepers.fetch_sub(1, std::memory_order_seq_cst);
    return !in_vain;
  }
  // Who is at fault if `rank` is late: it may itself be waiting for another. Whoever has what it waits for, and does
  // not go on, is the one.
  int culprit(int rank) {
    int suspect = rank;
    for (int i = 0; i < size_; ++i) {
      Seat& s = seat(suspect);
      const int next = s.waits_for.load(std::memory_order_acquire) - 1;
      if (next < 0) return suspect;
      Counter& counter = *(Counter*)(file_.memory + s.counter_offset.load(std::memory_order_relaxed));
      if (reached(counter, s.target.load(std::memory_order_relaxed))) return suspect;
      suspect = next;
    }
    return rank;  // they wait in a circle
  }

  CommFile file_;
  int rank_, size_;
  bool seated_ = false, has_locks_ = true;
  double timeout_, spin_seconds_;
  int64_t half_, piece_;
  uint64_t operation_ = 0, call_ = 0;
  int64_t sent_[MAX_COMM_RANKS] = {}, received_[MAX_COMM_RANKS] = {};  // of messages under way
};

}  // namespace shoal
