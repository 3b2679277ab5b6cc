// The file that the ranks of one host map: where things are in it, how it is made, opened and given up.
//
// It holds a header with a seat for each rank, a buffer of two halves for each, and a ring from each rank to each other
// one. A rank holds a lock on a byte of the file while its process lives. How they are used is in comm.h.
#pragma once
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace shoal {

constexpr uint64_t COMM_MAGIC = 0x6d6f636c616f6873;  // "shoalcom"
constexpr int32_t COMM_VERSION = 2;                  // of the layout below
constexpr int MAX_COMM_RANKS = 64;
constexpr int RING_SLOTS = 8;
constexpr int64_t LEAST_HALF = 8192;  // holds an all-to-all's table and some bytes for each of 64 ranks

// What an operation returns: 0, or kind << 16 | rank << 8 | other rank.
enum CommKind {
  COMM_OK = 0,
  COMM_AGAIN = 1,    // a patient wait has not ended: call again with the same arguments
  COMM_LATE = 2,     // a rank did not come in time
  COMM_GONE = 3,     // a rank's process ended, or it left the group
  COMM_DIFFERS = 4,  // two ranks called different operations, or with different sizes
  COMM_ABORTED = 5,
};
inline int comm_status(CommKind kind, int rank = 0, int other = 0) { return kind << 16 | rank << 8 | other; }

// One rank writes it, others wait for it to grow. The futex is the low half of the value.
struct Counter {
  std::atomic<uint64_t> value;
  std::atomic<uint32_t> sleepers;
};
static_assert(std::atomic<uint64_t>::is_always_lock_free && sizeof(Counter) == 16, "shared between processes");

enum SeatState { SEAT_EMPTY = 0, SEAT_TAKEN = 1, SEAT_LEFT = 2 };

struct Seat {
  alignas(64) Counter posted;
  std::atomic<uint64_t> calls[2];  // what this rank computes in operations of either half, to be compared with others
  alignas(64) Counter finished;
  // What it sleeps for, to tell who holds up whom; `waits_for` is a rank + 1, or 0.
  alignas(64) std::atomic<int32_t> waits_for;
  std::atomic<int32_t> state;
  std::atomic<int64_t> counter_offset;
  std::atomic<uint64_t> target;
};

struct CommHeader {
  uint64_t magic;
  int32_t version, size;
  int64_t half_bytes, slot_bytes;
  alignas(64) std::atomic<int32_t> broken;  // the status that every call returns from then on
  Seat seats[MAX_COMM_RANKS];
};

// From one rank to another. Behind it RING_SLOTS slots: a head of 64 bytes, then a piece of a message. `head` says how
// many pieces were sent, `tail` how many were taken.
struct Ring {
  alignas(64) Counter head;
  alignas(64) Counter tail;
};
struct Slot {
  alignas(64) int64_t message_bytes;  // of the whole message
};

// Where things are in the file of a group.
struct CommLayout {
  int64_t size, half_bytes, slot_bytes;

  int64_t buffer(int rank, int half) const {
    return round_up(sizeof(CommHeader), 4096) + (rank * 2 + half) * half_bytes;
  }
  int64_t ring(int from, int to) const {
    return buffer((int)size, 0) + (from * (size - 1) + to - (to > from)) * ring_bytes();
  }
  int64_t slot(int from, int to, uint64_t piece) const {
    return ring(from, to) + (int64_t)sizeof(Ring) + (int64_t)(piece % RING_SLOTS) * slot_stride();
  }
  int64_t bytes() const { return buffer((int)size, 0) + size * (size - 1) * ring_bytes(); }
  int64_t slot_stride() const { return (int64_t)sizeof(Slot) + slot_bytes; }
  int64_t ring_bytes() const { return (int64_t)sizeof(Ring) + RING_SLOTS * slot_stride(); }
  static int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
};

// A rank's rings hold half as much as its buffer, all together: many ranks have many rings, and use few.
inline CommLayout comm_layout(int64_t size, int64_t buffer_bytes) {
  const int64_t half = std::max(LEAST_HALF, buffer_bytes / 2 / 64 * 64);
  const int64_t slot = half / RING_SLOTS / std::max<int64_t>(1, size - 1) / 64 * 64;
  return {size, half, std::max<int64_t>(1024, slot)};
}

// 0 or errno. The memory is reserved, so that a full file system is an error here and not a signal later.
inline int comm_create(const char* path, int64_t size, int64_t buffer_bytes) {
  const CommLayout layout = comm_layout(size, buffer_bytes);
  const int file = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (file < 0) return errno;
  int error;
  do error = posix_fallocate(file, 0, layout.bytes());
  while (error == EINTR);
  if (!error) {
    CommHeader header{};
    header.magic = COMM_MAGIC, header.version = COMM_VERSION, header.size = (int32_t)size;
    header.half_bytes = layout.half_bytes, header.slot_bytes = layout.slot_bytes;
    if (pwrite(file, &header, sizeof header, 0) != (ssize_t)sizeof header) error = EIO;
  }
  close(file);
  if (error) unlink(path);
  return error;
}

inline void comm_wake(Counter& counter) {
  syscall(SYS_futex, &counter.value, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// The file of a group, open and mapped.
struct CommFile {
  int descriptor = -1;
  char* memory = nullptr;  // null where `error` says why it is not a group's
  CommLayout layout{};
  char error[160] = "";

  explicit CommFile(const char* path) {
    descriptor = open(path, O_RDWR | O_CLOEXEC);
    CommHeader head;
    struct stat status;
    if (descriptor < 0 || fstat(descriptor, &status) != 0) {
      refuse("%s", strerror(errno));
    } else if (pread(descriptor, &head, sizeof head, 0) != (ssize_t)sizeof head || head.magic != COMM_MAGIC) {
      refuse("this is not the shared memory of a group");
    } else if (head.version != COMM_VERSION) {
      refuse("made by another version of shoal: its layout is %d, ours %d", head.version, COMM_VERSION);
    } else {
      layout = {head.size, head.half_bytes, head.slot_bytes};
      map(head, status.st_size);
    }
  }
  ~CommFile() {
    if (memory) munmap(memory, layout.bytes());
    if (descriptor >= 0) close(descriptor);
  }
  CommFile(const CommFile&) = delete;

  CommHeader& header() { return *(CommHeader*)memory; }
  Ring& ring(int from, int to) { return *(Ring*)(memory + layout.ring(from, to)); }

  template <class... Values>
  void refuse(const char* format, Values... values) {
    snprintf(error, sizeof error, format, values...);
  }

  // The first reason stands. Returns it.
  int break_up(int status) {
    int32_t none = 0;
    header().broken.compare_exchange_strong(none, status, std::memory_order_seq_cst);
    const int size = (int)layout.size;
    for (int r = 0; r < size; ++r) {
      comm_wake(header().seats[r].posted), comm_wake(header().seats[r].finished);
      for (int to = 0; to < size; ++to)
        if (to != r) comm_wake(ring(r, to).head), comm_wake(ring(r, to).tail);
    }
    return header().broken.load(std::memory_order_seq_cst);
  }

 private:
  void map(const CommHeader& head, int64_t bytes) {
    const bool sane = head.size >= 1 && head.size <= MAX_COMM_RANKS && head.half_bytes >= LEAST_HALF &&
                      head.half_bytes % 64 == 0 && head.slot_bytes > 0 && head.slot_bytes % 64 == 0;
    if (!sane) return refuse("the header is damaged");
    if (bytes < layout.bytes())
      return refuse("cut short: %lld of %lld bytes", (long long)bytes, (long long)layout.bytes());
    void* mapped = mmap(nullptr, layout.bytes(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, descriptor, 0);
    if (mapped == MAP_FAILED) return refuse("%s", strerror(errno));
    memory = (char*)mapped;
  }
};

}  // namespace shoal
