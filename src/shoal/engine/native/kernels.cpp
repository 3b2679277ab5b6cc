// The C interface of the kernels: plain pointers, counts and strides in elements; called through ctypes.
#include <sys/mman.h>

#include <system_error>

#include "attention.h"
#include "comm.h"
#include "linear.h"
#include "linear_int8.h"
#include "race.h"

using namespace shoal;

namespace {

int rows_per_part(Pool& pool, int rows) { return std::max(4, (rows + pool.size() * 4 - 1) / (pool.size() * 4)); }

template <class Body>
void for_rows(Pool& pool, int rows, const Body& body) {
  const int step = rows_per_part(pool, rows);
  pool.run((rows + step - 1) / step, [&](int part, int) {
    for (int row = part * step; row < std::min(rows, (part + 1) * step); ++row) body(row);
  });
}

// y = x / rms(x) * weight; lanes that a short last vector lacks are handled one by one.
void norm_row(const float* x, const float* weight, float eps, float* y, int n) {
  vf squares = zero();
  const int whole = n / VW * VW;
  for (int i = 0; i < whole; i += VW) squares = fma(load(x + i), load(x + i), squares);
  float total = sum(squares);
  for (int i = whole; i < n; ++i) total += x[i] * x[i];
  const float factor = 1.0f / sqrtf(total / n + eps);
  for (int i = 0; i < whole; i += VW) store(y + i, mul(mul(load(x + i), set1(factor)), load(weight + i)));
  for (int i = whole; i < n; ++i) y[i] = x[i] * factor * weight[i];
}

void rotate_row(float* x, const float* cos_sin, int head_dim) {
  const int half = head_dim / 2;
  int i = 0;
  for (; i + VW <= half; i += VW) {
    const vf c = load(cos_sin + i), s = load(cos_sin + half + i), low = load(x + i), high = load(x + half + i);
    store(x + i, fma(low, c, sub(zero(), mul(high, s))));
    store(x + half + i, fma(high, c, mul(low, s)));
  }
  for (; i < half; ++i) {
    const float c = cos_sin[i], s = cos_sin[half + i], low = x[i], high = x[half + i];
    x[i] = low * c - high * s;
    x[half + i] = high * c + low * s;
  }
}

void convert(float from, float* to) { *to = from; }
void convert(float from, uint16_t* to) { *to = to_bf16(from); }

template <class KV>
void write_kv(Pool& pool, KV* keys, KV* values, const float* k, const float* v, int64_t stride, const int32_t* slots,
              int rows, int kv_heads, int head_dim, int block_size) {
  const int step = rows_per_part(pool, rows);
  pool.run((rows + step - 1) / step, [&](int part, int) {
    const int end = std::min(rows, (part + 1) * step);
    for (int row = part * step, count; row < end; row += count) {
      const int64_t block = slots[row] / block_size, offset = slots[row] % block_size;
      // Tokens of a prompt lie side by side in a block: a line of keys is then written once, not once a token.
      count = 1;
      while (row + count < end && offset + count < block_size && slots[row + count] == slots[row] + count) ++count;
      for (int h = 0; h < kv_heads; ++h) {
        const int64_t head = block * kv_heads + h, from = row * stride + (int64_t)h * head_dim;
        KV* key = keys + head * head_dim * block_size + offset;
        KV* value = values + (head * block_size + offset) * padded(head_dim);
        for (int d = 0; d < head_dim; ++d)
          for (int i = 0; i < count; ++i) convert(k[from + i * stride + d], key + (int64_t)d * block_size + i);
        for (int i = 0; i < count; ++i)
          for (int d = 0; d < head_dim; ++d) convert(v[from + i * stride + d], value + i * padded(head_dim) + d);
      }
    }
  });
}

constexpr int PACK_BLOCK = 64;  // of k: a panel's share of it is 8 KiB of floats, which stay in the first-level cache

// Rows of a weight matrix, all of one panel, to its columns: `feature` is the first one's, `half` 1 for the ups of a gated
// pair. All rows write to the same lines, so they take turns every few k.
void pack_features(const Packed& w, const float* rows, int64_t stride, int feature, int count, int half) {
  const int width = w.gated ? NR / 2 : NR;
  const int64_t panel = feature / width, column = feature % width + half * width;
  float inverse[NR];
  for (int i = 0; w.precision == INT8 && i < count; ++i) {
    float most = 0;
    for (int k = 0; k < w.k; ++k) most = std::max(most, fabsf(rows[i * stride + k]));
    inverse[i] = inverse_step(most);
    w.scales[panel * NR + column + i] = most / 127.0f;
  }
  const int depth = w.precision == INT8 ? w.k_padded : w.k;
  for (int begin = 0; begin < depth; begin += PACK_BLOCK) {
    const int end = std::min(depth, begin + PACK_BLOCK);
    for (int i = 0; i < count; ++i) {
      const float* row = rows + i * stride;
      if (w.precision == FLOAT32) {
        float* to = (float*)w.weights + panel * w.k * NR + column + i;
        for (int k = begin; k < end; ++k) to[(int64_t)k * NR] = row[k];
      } else if (w.precision == BFLOAT16) {
        uint16_t* to = (uint16_t*)w.weights + panel * w.k * NR + column + i;
        for (int k = begin; k < end; ++k) to[(int64_t)k * NR] = to_bf16(row[k]);
      } else {
        uint8_t* to = (uint8_t*)w.weights + panel * w.k_padded * NR;
        for (int k = begin; k < end; ++k) {
          const int q = k < w.k ? (int)nearbyintf(row[k] * inverse[i]) : 0;
          to[((int64_t)(k / 4) * NR + column + i) * 4 + k % 4] = (uint8_t)(q + 128);
        }
      }
    }
  }
}

void unpack_feature(const Packed& w, int64_t feature, float* to) {
  const int64_t panel = feature / NR, column = feature % NR;
  if (w.precision == FLOAT32) {
    const float* from = (const float*)w.weights + panel * w.k * NR + column;
    for (int k = 0; k < w.k; ++k) to[k] = from[(int64_t)k * NR];
  } else if (w.precision == BFLOAT16) {
    const uint16_t* from = (const uint16_t*)w.weights + panel * w.k * NR + column;
    for (int k = 0; k < w.k; ++k) to[k] = from_bf16(from[(int64_t)k * NR]);
  } else {
    const uint8_t* from = (const uint8_t*)w.weights + panel * w.k_padded * NR;
    const float scale = w.scales[panel * NR + column];
    for (int k = 0; k < w.k; ++k) to[k] = (from[((int64_t)(k / 4) * NR + column) * 4 + k % 4] - 128) * scale;
  }
}

// The lowest index of the largest element; the first NaN wins, so that it is noticed, as in torch.
int64_t argmax_row(const float* p, int n) {
  constexpr int UNROLL = 4;
  vf peaks[UNROLL];
  for (auto& peak : peaks) peak = set1(-__builtin_inff());
  vf poison = zero();
  int i = 0;
  for (; i + UNROLL * VW <= n; i += UNROLL * VW)
    for (int u = 0; u < UNROLL; ++u) {
      const vf value = load(p + i + u * VW);
      peaks[u] = max(peaks[u], value);
      poison = fma(value, zero(), poison);  // NaN and infinities leave NaN here
    }
  float most = largest(max(max(peaks[0], peaks[1]), max(peaks[2], peaks[3])));
  bool odd = sum(poison) != 0.0f;
  for (; i < n; ++i) {
    most = std::max(most, p[i]);
    odd |= !(p[i] - p[i] == 0.0f);
  }
  if (odd)
    for (i = 0; i < n; ++i)
      if (p[i] != p[i]) return i;
  for (i = 0; i + 1 < n && p[i] != most;) ++i;
  return i;
}

// What a call returns: 0, or why nothing was computed. Counts and shapes are the caller's to check; what only the data
// can tell, an index that would read beyond a buffer, is checked here, where it costs next to nothing.
enum Status { OK = 0, CLOSED = 1, OUT_OF_RANGE = 2 };

template <class Body>
int with(Pool* pool, const Body& body) {
  if (!pool) return CLOSED;
  const std::lock_guard<std::mutex> turn(pool->turn());
  return body() ? OK : OUT_OF_RANGE;
}

template <class Int>
bool in_range(const Int* values, int count, int64_t limit) {
  for (int i = 0; i < count; ++i)
    if (values[i] < 0 || values[i] >= limit) return false;
  return true;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Null where the system refuses the threads.
Pool* shoal_pool_create(int threads) {
  try {
    return new Pool(threads);
  } catch (const std::system_error&) {
    return nullptr;
  }
}
void shoal_pool_destroy(Pool* pool) { delete pool; }

// Memory for packed weights, in huge pages where the system has them: the matrices are read front to back every step.
void* shoal_allocate(int64_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  madvise(memory, bytes, MADV_HUGEPAGE);
  return memory;
}
void shoal_free(void* memory, int64_t bytes) { munmap(memory, bytes); }

int shoal_size_of_packed() { return sizeof(Packed); }
int shoal_size_of_attention() { return sizeof(Attention); }
int shoal_panel_width() { return NR; }
int shoal_group() { return GROUP; }
int64_t shoal_weight_bytes(const Packed* w) {
  const int64_t elements = (int64_t)w->panels * NR;
  return w->precision == FLOAT32 ? elements * w->k * 4 : w->precision == BFLOAT16 ? elements * w->k * 2 : elements * w->k_padded;
}

// Pack features [first, first + count) of half `half` (0 but for the ups of a gated pair) from rows of floats.
int shoal_pack(Pool* pool, Packed* w, const float* rows, int64_t stride, int first, int count, int half) {
  return with(pool, [&] {
    if (count == 0) return true;
    const int width = w->gated ? NR / 2 : NR, panel = first / width;
    pool->run((first + count - 1) / width - panel + 1, [&](int part, int) {
      const int begin = std::max(first, (panel + part) * width);
      const int end = std::min(first + count, (panel + part + 1) * width);
      pack_features(*w, rows + (begin - first) * stride, stride, begin, end - begin, half);
    });
    return true;
  });
}

int shoal_linear(Pool* pool, const Packed* w, const float* x, int64_t ldx, int rows, int activation, float* y,
                 int64_t ldy) {
  return with(pool, [&] {
    if (rows == 0) return true;
    if (w->precision == FLOAT32)
      linear_float<float>(*pool, *w, x, ldx, rows, activation, y, ldy);
    else if (w->precision == BFLOAT16)
      linear_float<uint16_t>(*pool, *w, x, ldx, rows, activation, y, ldy);
    else
      linear_int8(*pool, *w, x, ldx, rows, activation, y, ldy);
    return true;
  });
}

// Rows of the packed matrix itself, as floats.
int shoal_embedding(Pool* pool, const Packed* w, const int64_t* ids, int count, float* y, int64_t ldy) {
  return with(pool, [&] {
    if (!in_range(ids, count, w->n)) return false;
    for_rows(*pool, count, [&](int i) { unpack_feature(*w, ids[i], y + i * ldy); });
    return true;
  });
}

int shoal_rms_norm(Pool* pool, const float* x, int64_t ldx, const float* weight, float eps, float* y, int rows, int n) {
  return with(pool, [&] {
    for_rows(*pool, rows, [&](int i) { norm_row(x + i * ldx, weight, eps, y + (int64_t)i * n, n); });
    return true;
  });
}

int shoal_add_rms_norm(Pool* pool, const float* x, float* residual, const float* weight, float eps, float* y, int rows,
                       int n) {
  return with(pool, [&] {
    for_rows(*pool, rows, [&](int row) {
      const float* from = x + (int64_t)row * n;
      float* to = residual + (int64_t)row * n;
      int i = 0;
      for (; i + VW <= n; i += VW) store(to + i, add(load(to + i), load(from + i)));
      for (; i < n; ++i) to[i] += from[i];
      norm_row(to, weight, eps, y + (int64_t)row * n, n);
    });
    return true;
  });
}

// cos_sin has `positions_known` rows.
int shoal_rope(Pool* pool, float* qkv, int64_t stride, const int64_t* positions, const float* cos_sin,
               int positions_known, int rows, int heads, int kv_heads, int head_dim, const float* q_norm,
               const float* k_norm, float eps) {
  return with(pool, [&] {
    if (!in_range(positions, rows, positions_known)) return false;
    for_rows(*pool, rows, [&](int row) {
      const float* angles = cos_sin + positions[row] * head_dim;
      for (int h = 0; h < heads + kv_heads; ++h) {
        float* x = qkv + row * stride + (int64_t)h * head_dim;
        const float* norm = h < heads ? q_norm : k_norm;
        if (norm) norm_row(x, norm, eps, x, head_dim);
        rotate_row(x, angles, head_dim);
      }
    });
    return true;
  });
}

int shoal_write_kv(Pool* pool, void* keys, void* values, const float* k, const float* v, int64_t stride,
                   const int32_t* slots, int64_t num_slots, int rows, int kv_heads, int head_dim, int block_size,
                   int bfloat16) {
  return with(pool, [&] {
    if (!in_range(slots, rows, num_slots)) return false;
    if (bfloat16)
      write_kv(*pool, (uint16_t*)keys, (uint16_t*)values, k, v, stride, slots, rows, kv_heads, head_dim, block_size);
    else
      write_kv(*pool, (float*)keys, (float*)values, k, v, stride, slots, rows, kv_heads, head_dim, block_size);
    return true;
  });
}

int shoal_attention(Pool* pool, const Attention* a, int sequences, int tokens) {
  return with(pool, [&] {
    if (!is_valid(*a, sequences, tokens)) return false;
    attention(*pool, *a, sequences);
    return true;
  });
}

int shoal_argmax(Pool* pool, const float* x, int64_t ldx, int rows, int n, int64_t* out) {
  return with(pool, [&] {
    pool->run(rows, [&](int row, int) { out[row] = argmax_row(x + row * ldx, n); });
    return true;
  });
}

// seeds, indices and positions of each row, 64 bits wide; see race.h.
int shoal_draw(Pool* pool, const float* weights, int64_t stride, int rows, int n, const uint64_t* seeds,
               const uint64_t* indices, const uint64_t* positions, int64_t* out) {
  return with(pool, [&] {
    pool->run(rows, [&](int row, int) {
      out[row] = race_row(weights + row * stride, n, seeds[row], (uint32_t)indices[row], (uint32_t)positions[row]);
    });
    return true;
  });
}

// --- ranks of one host: see comm.h; what a call returns is in comm_file.h ---

int shoal_comm_create(const char* path, int64_t size, int64_t buffer_bytes) {
  return comm_create(path, size, buffer_bytes);
}
// Null, with a message in `error`, where the file is not that of a group of this size or the seat is taken.
SharedComm* shoal_comm_attach(const char* path, int rank, int size, double timeout, char* error, int64_t room) {
  return SharedComm::attach(path, rank, size, timeout, error, room);
}
void shoal_comm_close(SharedComm* comm) { delete comm; }
void shoal_comm_abort(SharedComm* comm) { comm->abort(); }
// The same from outside of the group. 0, or 1 with a message.
int shoal_comm_abort_path(const char* path, char* error, int64_t room) {
  CommFile file(path);
  if (file.memory) file.break_up(comm_status(COMM_ABORTED));
  snprintf(error, room, "%s", file.error);
  return file.memory == nullptr;
}
int shoal_comm_all_reduce(SharedComm* comm, void* x, int64_t count, int dtype) {
  return comm->all_reduce((char*)x, count, dtype);
}
int shoal_comm_all_gather(SharedComm* comm, const void* x, int64_t bytes, void* out) {
  return comm->all_gather((const char*)x, bytes, (char*)out);
}
int shoal_comm_reduce_scatter(SharedComm* comm, const void* x, int64_t count, int dtype, void* out) {
  return comm->reduce_scatter((const char*)x, count, dtype, (char*)out);
}
int shoal_comm_broadcast(SharedComm* comm, void* x, int64_t bytes, int source) {
  return comm->broadcast((char*)x, bytes, source);
}
int shoal_comm_all_to_all(SharedComm* comm, const void* x, const int64_t* send_bytes, void* out,
                          const int64_t* receive_bytes) {
  return comm->all_to_all((const char*)x, send_bytes, (char*)out, receive_bytes);
}
int shoal_comm_send(SharedComm* comm, const void* x, int64_t bytes, int to) {
  return comm->send((const char*)x, bytes, to);
}
int shoal_comm_receive(SharedComm* comm, void* x, int64_t bytes, int from) {
  return comm->receive((char*)x, bytes, from);
}

}  // extern "C"
#pragma GCC visibility pop
