// Paged attention. Keys of a block are stored (head, D, block_size), values (head, block_size, D): a vector of keys is
// VW tokens of one dimension, so scores need no horizontal sums, and a vector of values is VW dimensions of one token.
//
// A query's result does not depend on what is computed beside it, nor by how many threads. Its KV is cut at fixed
// positions into splits of SPLIT tokens, each walked in tiles of TILE tokens with a running maximum from nothing; the
// splits' results are merged in order, whether one thread did them all or several did one each. A tile or split that a
// query does not see changes nothing.
//
// D head size, R rows: (query, head) pairs of one key/value head, the heads of a query adjacent.
#pragma once
#include <algorithm>
#include <cmath>

#include "pool.h"
#include "simd.h"

namespace shoal {

constexpr int TILE = 64;
constexpr int SPLIT = 256;  // a multiple of TILE; some 10 us of memory traffic, so that one long sequence feeds all threads
constexpr int TILE_VECTORS = TILE / VW;
#if defined(__AVX512F__)
constexpr int ATTENTION_ROWS = 12, FEW_ROWS = 6;
#else
constexpr int ATTENTION_ROWS = 6, FEW_ROWS = 2;
#endif
constexpr int MAX_HEAD_DIM = 256;
constexpr int PAD = 16;  // values are stored in rows of D rounded up to this: whole vectors; what the padding holds is never used

struct Attention {
  const float* q;
  int64_t q_stride;  // floats between tokens
  const void* keys;  // of bfloat16 if kv_bfloat16, else of float32
  const void* values;
  const int32_t* query_starts;
  const int32_t* seen;    // of each query: it sees tokens [unseen, seen) of its sequence's, which only grow from one to
  const int32_t* unseen;  // the next; null: from the first on
  const int32_t* block_tables;
  int64_t table_stride;
  float* out;  // (T, N, D)
  float* lse;  // (T, N) or null
  int heads, kv_heads, head_dim, block_size, num_blocks;
  float scale, soft_cap;
  int kv_bfloat16;
  int table_length;  // blocks that a row of block_tables has room for
  int group, skipped;  // query heads that share a key/value head; of the first group the first so many are not here
};

static inline int padded(int head_dim) { return (head_dim + PAD - 1) / PAD * PAD; }
static inline vf load_kv(const float* p) { return load(p); }
static inline vf load_kv(const uint16_t* p) { return load_bf16(p); }
// Into the second-level cache, for later: blocks lie anywhere, so no hardware prefetcher knows the next one.
static inline void fetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

// scores[r][t] = q[r] . keys[t], d in order, for NT vectors of tokens; as many of the next tile are fetched meanwhile.
template <int ROWS, int NT, class KV>
static void score(const float* q, const KV* const* key_vectors, const KV* const* next, int block_size, int head_dim,
                  float* scores) {
  vf c[ROWS][NT];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < NT; ++t) c[r][t] = zero();
  for (int d = 0; d < head_dim; ++d) {
    vf k[NT];
#pragma GCC unroll 16
    for (int t = 0; t < NT; ++t) {
      k[t] = load_kv(key_vectors[t] + (int64_t)d * block_size);
      fetch(next[t] + (int64_t)d * block_size);
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const vf a = set1(q[r * MAX_HEAD_DIM + d]);
#pragma GCC unroll 16
      for (int t = 0; t < NT; ++t) c[r][t] = fma(a, k[t], c[r][t]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < NT; ++t) store(scores + r * TILE + t * VW, c[r][t]);
}

template <int NT, int ROWS, class KV>
static void score_rows(int rows, const float* q, const KV* const* keys, const KV* const* next, int block_size,
                       int head_dim, float* scores) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return score<ROWS, NT>(q, keys, next, block_size, head_dim, scores);
    return score_rows<NT, ROWS - 1>(rows, q, keys, next, block_size, head_dim, scores);
  }
}

// out[r][0 .. ND vectors) = out * factors[r] + sum_t weights[r][t] * values[t], t in order.
template <int ROWS, int ND, class KV>
static void weigh(const float* weights, const float* factors, const KV* const* value_rows, const KV* const* next,
                  int tokens, int offset, float* out) {
  vf c[ROWS][ND];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
    for (int d = 0; d < ND; ++d) c[r][d] = mul(set1(factors[r]), load(out + r * MAX_HEAD_DIM + offset + d * VW));
  for (int t = 0; t < tokens; ++t) {
    vf v[ND];
#pragma GCC unroll 16
    for (int d = 0; d < ND; ++d) {
      v[d] = load_kv(value_rows[t] + offset + d * VW);
      fetch(next[t] + offset + d * VW);
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const vf a = set1(weights[r * TILE + t]);
#pragma GCC unroll 16
      for (int d = 0; d < ND; ++d) c[r][d] = fma(a, v[d], c[r][d]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
    for (int d = 0; d < ND; ++d) store(out + r * MAX_HEAD_DIM + offset + d * VW, c[r][d]);
}

template <int ND, int ROWS, class KV>
static void weigh_rows(int rows, const float* weights, const float* factors, const KV* const* values,
                       const KV* const* next, int tokens, int offset, float* out) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return weigh<ROWS, ND>(weights, factors, values, next, tokens, offset, out);
    return weigh_rows<ND, ROWS - 1>(rows, weights, factors, values, next, tokens, offset, out);
  }
}

// What a row has so far: softmax(scores) V = out / total, both scaled by exp(-most).
struct Sums {
  alignas(64) float out[ATTENTION_ROWS * MAX_HEAD_DIM];
  alignas(64) float total[ATTENTION_ROWS * VW];  // lane by lane; summed across at the end
  alignas(64) float most[VW];  // a row a lane

  void clear(int rows, int head_dim) {
    store(most, set1(-__builtin_inff()));
    for (int r = 0; r < rows; ++r) {
      store(total + r * VW, zero());
      for (int d = 0; d < head_dim; d += VW) store(out + r * MAX_HEAD_DIM + d, zero());
    }
  }
};

// Rows [first, first + rows) of one sequence and one key/value head: what a thread works on.
struct Task {
  int sequence, kv_head, first, rows;
  int begin, end;  // positions that any of the rows sees, begin rounded down to a tile
  const int32_t* table;
  int low[ATTENTION_ROWS], high[ATTENTION_ROWS];  // each row sees positions [low, high)
  alignas(64) float q[ATTENTION_ROWS * MAX_HEAD_DIM];  // times scale
  alignas(64) float scores[ATTENTION_ROWS * TILE];
  alignas(64) float factors[VW];  // a row a lane: what rescales the sums so far to the tile's maximum
};
static_assert(ATTENTION_ROWS <= VW, "a row a lane");

// Softmax weights of a tile, and the factors that rescale what the rows have so far. Step by step for all rows, so that
// no row waits for another's maximum.
static void soften(const Attention& a, Task& t, Sums& s, int tile_start) {
  alignas(64) float peaks[VW], shifts[VW];
  store(peaks, set1(-__builtin_inff()));
  for (int r = 0; r < t.rows; ++r) {
    float* scores = t.scores + r * TILE;
    const int low = t.low[r] - tile_start, high = t.high[r] - tile_start;
    vf peak = set1(-__builtin_inff());
    for (int v = 0; v < TILE_VECTORS; ++v) {
      vf x = load(scores + v * VW);
      if (a.soft_cap > 0) x = mul(tanh(mul(x, set1(1.0f / a.soft_cap))), set1(a.soft_cap));
      if (low > v * VW || high < (v + 1) * VW) x = keep_range(x, low - v * VW, high - v * VW);
      if (a.soft_cap > 0 || low > v * VW || high < (v + 1) * VW) store(scores + v * VW, x);
      peak = max(peak, x);
    }
    peaks[r] = largest(peak);
  }
  const vf before = load(s.most), most = max(before, load(peaks));
  const vf shift = zero_if_minus_infinity(most);  // a row that has seen nothing: its weights are exp(-inf - 0)
  store(s.most, most);
  store(shifts, shift);
  store(t.factors, exp(sub(before, shift)));
  for (int r = 0; r < t.rows; ++r) {
    float* scores = t.scores + r * TILE;
    vf total = mul(load(s.total + r * VW), set1(t.factors[r]));
    for (int v = 0; v < TILE_VECTORS; ++v) {
      const vf weight = exp(sub(load(scores + v * VW), set1(shifts[r])));
      store(scores + v * VW, weight);
      total = add(total, weight);
    }
    store(s.total + r * VW, total);
  }
}

// Where the vectors of keys and the rows of values of one tile lie.
template <class KV>
struct TileAddresses {
  int tokens, vectors;
  const KV* keys[TILE_VECTORS];
  const KV* values[TILE];

  void find(const Attention& a, const Task& t, int tile_start) {
    tokens = std::min(TILE, t.end - tile_start), vectors = (tokens + VW - 1) / VW;
    const int d_padded = padded(a.head_dim);
    const int32_t* block = t.table + tile_start / a.block_size;  // blocks and tiles are cut at multiples of VW
    int v = 0, i = 0;
    for (int offset = tile_start % a.block_size; v < vectors; offset = 0, ++block) {
      const int64_t head = (int64_t)*block * a.kv_heads + t.kv_head;
      const KV* head_keys = (const KV*)a.keys + head * a.head_dim * a.block_size;
      const KV* head_values = (const KV*)a.values + head * a.block_size * d_padded;
      for (int at = offset; at < a.block_size && v < vectors; at += VW) keys[v++] = head_keys + at;
      for (int at = offset; at < a.block_size && i < tokens; ++at) values[i++] = head_values + (int64_t)at * d_padded;
    }
    // What is beyond the end is never read, but may be fetched.
    for (; v < TILE_VECTORS; ++v) keys[v] = keys[0];
    for (; i < TILE; ++i) values[i] = values[0];
  }
};

// Rows times vectors fill the registers: all rows a pair of vectors at a time, or the few rows of a decode four.
template <class KV, int ROWS, int WIDTH>
static void attend_rows(const Attention& a, Task& t, Sums& s, const TileAddresses<KV>& tile,
                        const TileAddresses<KV>& next, int tile_start) {
  int v = 0, d = 0;
  for (; v + WIDTH <= tile.vectors; v += WIDTH)
    score_rows<WIDTH, ROWS>(t.rows, t.q, tile.keys + v, next.keys + v, a.block_size, a.head_dim, t.scores + v * VW);
  for (; v < tile.vectors; ++v)
    score_rows<1, ROWS>(t.rows, t.q, tile.keys + v, next.keys + v, a.block_size, a.head_dim, t.scores + v * VW);
  soften(a, t, s, tile_start);
  const int d_padded = padded(a.head_dim);
  for (; d + WIDTH * VW <= d_padded; d += WIDTH * VW)
    weigh_rows<WIDTH, ROWS>(t.rows, t.scores, t.factors, tile.values, next.values, tile.tokens, d, s.out);
  for (; d < d_padded; d += VW) weigh_rows<1, ROWS>(t.rows, t.scores, t.factors, tile.values, next.values, tile.tokens, d, s.out);
}

// One split of a task, from nothing.
template <class KV>
static void attend_split(const Attention& a, Task& t, int split, Sums& s) {
  s.clear(t.rows, a.head_dim);
  const int end = std::min(t.end, (split + 1) * SPLIT);
  TileAddresses<KV> tiles[2];
  int at = std::max(t.begin, split * SPLIT);
  tiles[0].find(a, t, at);
  for (int i = 0; at < end; at += TILE, i ^= 1) {
    tiles[i ^ 1].find(a, t, at + TILE < t.end ? at + TILE : at);
    if (t.rows <= FEW_ROWS)
      attend_rows<KV, FEW_ROWS, 4>(a, t, s, tiles[i], tiles[i ^ 1], at);
    else
      attend_rows<KV, ATTENTION_ROWS, 2>(a, t, s, tiles[i], tiles[i ^ 1], at);
  }
}

static void merge(Sums& into, const Sums& next, int rows, int head_dim) {
  alignas(64) float keeps[VW], takes[VW];
  const vf before = load(into.most), other = load(next.most), most = max(before, other);
  const vf shift = zero_if_minus_infinity(most);
  store(keeps, exp(sub(before, shift)));
  store(takes, exp(sub(other, shift)));
  store(into.most, most);
  for (int r = 0; r < rows; ++r) {
    const vf keep = set1(keeps[r]), take = set1(takes[r]);
    float* to = into.out + r * MAX_HEAD_DIM;
    const float* from = next.out + r * MAX_HEAD_DIM;
    for (int d = 0; d < head_dim; d += VW) store(to + d, fma(load(from + d), take, mul(load(to + d), keep)));
    float* total = into.total + r * VW;
    store(total, fma(load(next.total + r * VW), take, mul(load(total), keep)));
  }
}

static int num_queries(const Attention& a, int sequence) { return a.query_starts[sequence + 1] - a.query_starts[sequence]; }
static int first_seen(const Attention& a, int query) { return a.unseen ? a.unseen[query] : 0; }
// Of a sequence: where its first query begins to see, and its last one ends.
static int begin_of(const Attention& a, int sequence) { return first_seen(a, a.query_starts[sequence]); }
static int end_of(const Attention& a, int sequence) { return a.seen[a.query_starts[sequence + 1] - 1]; }

// Query heads that read one key/value head.
static int first_head(const Attention& a, int kv_head) { return std::max(0, kv_head * a.group - a.skipped); }
static int num_heads(const Attention& a, int kv_head) {
  return std::min(a.heads, (kv_head + 1) * a.group - a.skipped) - first_head(a, kv_head);
}

static void set_rows(const Attention& a, Task& t) {
  const int group = num_heads(a, t.kv_head), start = a.query_starts[t.sequence];
  for (int r = 0; r < t.rows; ++r) {
    const int query = start + (t.first + r) / group, head = first_head(a, t.kv_head) + (t.first + r) % group;
    const float* q = a.q + query * a.q_stride + (int64_t)head * a.head_dim;
    for (int d = 0; d < a.head_dim; ++d) t.q[r * MAX_HEAD_DIM + d] = q[d] * a.scale;
    t.low[r] = first_seen(a, query), t.high[r] = a.seen[query];
  }
  t.table = a.block_tables + t.sequence * a.table_stride;
  t.begin = t.low[0] / TILE * TILE;
  t.end = t.high[t.rows - 1];
}

static void write_rows(const Attention& a, const Task& t, const Sums& s) {
  const int group = num_heads(a, t.kv_head);
  for (int r = 0; r < t.rows; ++r) {
    const int64_t token = a.query_starts[t.sequence] + (t.first + r) / group;
    const int64_t at = token * a.heads + first_head(a, t.kv_head) + (t.first + r) % group;
    const float total = sum(load(s.total + r * VW)), inverse = total > 0 ? 1.0f / total : 0;  // 0: it saw nothing
    for (int d = 0; d < a.head_dim; ++d) a.out[at * a.head_dim + d] = s.out[r * MAX_HEAD_DIM + d] * inverse;
    if (a.lse) a.lse[at] = s.most[r] + logf(total);
  }
}

// How one sequence is handed out: tasks are (tile of rows, key/value head); of a long one each split is a part.
struct Share {
  int first_part, first_task;
  int tiles, splits;  // tiles of the key/value head with most query heads; splits is 0 where a part is a whole task
  int first_sums;     // of `splits` for each task
};

struct Buffers {  // of one thread
  Task task;
  Sums sums, split;
};

template <class KV>
static void attend_part(const Attention& a, const Share& share, int sequence, int local, Buffers& buffers, Sums* splits,
                        std::atomic<int>* pending) {
  Task& t = buffers.task;
  const int number = share.splits ? local / share.splits : local;
  // One head after the other: the keys and values that neighbouring parts read are the same.
  t.sequence = sequence;
  t.kv_head = number / share.tiles;
  const Tiles tiles(num_queries(a, sequence) * num_heads(a, t.kv_head), ATTENTION_ROWS);
  if (number % share.tiles >= tiles.count) return;  // a key/value head with fewer query heads here than others have
  t.first = tiles.begin(number % share.tiles);
  t.rows = tiles.size(number % share.tiles);
  set_rows(a, t);
  Sums& sums = buffers.sums;
  if (!share.splits) {
    sums.clear(t.rows, a.head_dim);
    for (int split = t.begin / SPLIT; split * SPLIT < t.end; ++split) {
      attend_split<KV>(a, t, split, buffers.split);
      merge(sums, buffers.split, t.rows, a.head_dim);
    }
    return write_rows(a, t, sums);
  }
  Sums* own = splits + share.first_sums + (int64_t)number * share.splits;
  attend_split<KV>(a, t, local % share.splits, own[local % share.splits]);
  // Whoever finishes the last split of a task merges them all, in order.
  if (pending[share.first_task + number].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
  sums.clear(t.rows, a.head_dim);
  for (int split = 0; split < share.splits; ++split) merge(sums, own[split], t.rows, a.head_dim);
  write_rows(a, t, sums);
}

// Whether every block that will be read is one of the cache, and the counts fit each other.
static bool is_valid(const Attention& a, int sequences, int tokens) {
  if (a.query_starts[0] != 0 || a.query_starts[sequences] != tokens) return false;
  for (int i = 0; i < sequences; ++i) {
    if (num_queries(a, i) < 0) return false;
    if (num_queries(a, i) == 0) continue;
    int low = 0, high = 0;
    for (int query = a.query_starts[i]; query < a.query_starts[i + 1]; ++query) {
      if (first_seen(a, query) < low || a.seen[query] < high) return false;
      low = first_seen(a, query), high = a.seen[query];
    }
    if ((high + a.block_size - 1) / a.block_size > a.table_length) return false;
    const int32_t* table = a.block_tables + i * a.table_stride;
    for (int at = begin_of(a, i) / TILE * TILE / a.block_size; at * a.block_size < high; ++at)
      if (table[at] < 0 || table[at] >= a.num_blocks) return false;
  }
  return true;
}

static void attention(Pool& pool, const Attention& a, int sequences) {
  int group = 0;  // of the key/value head with most query heads
  for (int kv_head = 0; kv_head < a.kv_heads; ++kv_head) group = std::max(group, num_heads(a, kv_head));
  Share* shares = (Share*)pool.plan(sizeof(Share) * (sequences + 1));
  int64_t work = 0;  // in positions that tasks see, about
  auto seen = [&](int i) { return num_queries(a, i) ? end_of(a, i) - begin_of(a, i) : 0; };
  for (int i = 0; i < sequences; ++i) {
    shares[i].tiles = Tiles(num_queries(a, i) * group, ATTENTION_ROWS).count;
    work += (int64_t)shares[i].tiles * a.kv_heads * seen(i);
  }
  int parts = 0, tasks = 0, sums = 0;
  for (int i = 0; i <= sequences; ++i) {
    Share& share = shares[i];
    share.first_part = parts, share.first_task = tasks, share.first_sums = sums;
    if (i == sequences) break;
    // A task that is much of all the work would be waited for at the end.
    const bool is_long = pool.size() > 1 && seen(i) > SPLIT && seen(i) > work / (4 * pool.size());
    share.splits = is_long ? (end_of(a, i) + SPLIT - 1) / SPLIT : 0;
    parts += share.tiles * a.kv_heads * std::max(1, share.splits);
    tasks += share.tiles * a.kv_heads;
    sums += share.tiles * a.kv_heads * share.splits;
  }
  const size_t sums_bytes = sizeof(Sums) * sums;
  Sums* splits = (Sums*)pool.shared(sums_bytes + sizeof(std::atomic<int>) * tasks);
  auto* pending = (std::atomic<int>*)((char*)splits + sums_bytes);
  for (int i = 0; i < sequences; ++i)
    for (int task = shares[i].first_task; task < shares[i + 1].first_task; ++task)
      new (pending + task) std::atomic<int>(shares[i].splits);
  pool.run(parts, [&](int part, int thread) {
    const Share* next = std::upper_bound(shares, shares + sequences + 1, part,
                                         [](int value, const Share& share) { return value < share.first_part; });
    const int sequence = (int)(next - shares) - 1, local = part - shares[sequence].first_part;
    Buffers& buffers = *(Buffers*)pool.scratch(thread, sizeof(Buffers));
    auto attend = a.kv_bfloat16 ? attend_part<uint16_t> : attend_part<float>;
    attend(a, shares[sequence], sequence, local, buffers, splits, pending);
  });
}

}  // namespace shoal
