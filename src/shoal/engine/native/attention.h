// Paged attention. Keys of a block are stored (head, D, block_size), values (head, block_size, D): a vector of keys is
// VW tokens of one dimension, so scores need no horizontal sums, and a vector of values is VW dimensions of one token.
//
// The KV of a sequence is walked in tiles of TILE tokens at fixed positions with a running maximum, so a query's result
// does not depend on which other queries are computed beside it: a tile that it does not see adds exact zeros.
//
// D head size, R rows (query heads of one key/value head times queries).
#pragma once
#include <algorithm>
#include <cmath>

#include "pool.h"
#include "simd.h"

namespace shoal {

constexpr int TILE = 64;
constexpr int TILE_VECTORS = TILE / VW;
#if defined(__AVX512F__)
constexpr int ATTENTION_ROWS = 12;
#else
constexpr int ATTENTION_ROWS = 6;
#endif
constexpr int MAX_HEAD_DIM = 256;

struct Attention {
  const float* q;
  int64_t q_stride;  // floats between tokens
  const void* keys;  // of bfloat16 if kv_bfloat16, else of float32
  const void* values;
  const int32_t* query_starts;
  const int32_t* context_lens;
  const int32_t* block_tables;
  int64_t table_stride;
  float* out;  // (T, N, D)
  float* lse;  // (T, N) or null
  int heads, kv_heads, head_dim, block_size;
  float scale, soft_cap;
  int window;  // 0: none
  int kv_bfloat16;
};

static inline vf load_kv(const float* p) { return load(p); }
static inline vf load_kv(const uint16_t* p) { return load_bf16(p); }

// scores[r][t] = q[r] . keys[t], d in order, for `count` vectors of tokens.
template <int ROWS, int NT, class KV>
static void score(const float* q, const KV* const* key_vectors, int block_size, int head_dim, float* scores) {
  vf c[ROWS][NT];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < NT; ++t) c[r][t] = zero();
  for (int d = 0; d < head_dim; ++d) {
    vf k[NT];
#pragma GCC unroll 16
    for (int t = 0; t < NT; ++t) k[t] = load_kv(key_vectors[t] + (int64_t)d * block_size);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const vf a = set1(q[r * head_dim + d]);
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
static void score_rows(int rows, const float* q, const KV* const* keys, int block_size, int head_dim, float* scores) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return score<ROWS, NT>(q, keys, block_size, head_dim, scores);
    return score_rows<NT, ROWS - 1>(rows, q, keys, block_size, head_dim, scores);
  }
}

// out[r][0 .. ND vectors) += sum_t weights[r][t] * values[t], t in order.
template <int ROWS, int ND, class KV>
static void weigh(const float* weights, const KV* const* value_rows, int tokens, int offset, float* out, int head_dim) {
  vf c[ROWS][ND];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
    for (int d = 0; d < ND; ++d) c[r][d] = load(out + r * head_dim + offset + d * VW);
  for (int t = 0; t < tokens; ++t) {
    vf v[ND];
#pragma GCC unroll 16
    for (int d = 0; d < ND; ++d) v[d] = load_kv(value_rows[t] + offset + d * VW);
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
    for (int d = 0; d < ND; ++d) store(out + r * head_dim + offset + d * VW, c[r][d]);
}

template <int ND, int ROWS, class KV>
static void weigh_rows(int rows, const float* weights, const KV* const* values, int tokens, int offset, float* out,
                       int head_dim) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return weigh<ROWS, ND>(weights, values, tokens, offset, out, head_dim);
    return weigh_rows<ND, ROWS - 1>(rows, weights, values, tokens, offset, out, head_dim);
  }
}

struct Rows {  // running state of one task
  alignas(64) float q[ATTENTION_ROWS * MAX_HEAD_DIM];
  alignas(64) float out[ATTENTION_ROWS * MAX_HEAD_DIM];
  alignas(64) float scores[ATTENTION_ROWS * TILE];
  alignas(64) float total[ATTENTION_ROWS * VW];  // of the weights, lane by lane; summed across at the end
  float most[ATTENTION_ROWS];
  int position[ATTENTION_ROWS];
};

// Softmax weights of one row over a tile; rescales what the row has so far.
static void soften(const Attention& a, Rows& s, int r, int tile_start) {
  float* scores = s.scores + r * TILE;
  const int high = s.position[r] + 1 - tile_start;
  const int low = a.window ? s.position[r] + 1 - a.window - tile_start : 0;
  vf x[TILE_VECTORS];
  vf peak = set1(-__builtin_inff());
  for (int v = 0; v < TILE_VECTORS; ++v) {
    x[v] = load(scores + v * VW);
    if (a.soft_cap > 0) x[v] = mul(tanh(mul(x[v], set1(1.0f / a.soft_cap))), set1(a.soft_cap));
    if (low > v * VW || high < (v + 1) * VW) x[v] = keep_range(x[v], low - v * VW, high - v * VW);
    peak = max(peak, x[v]);
  }
  const float most = std::max(s.most[r], largest(peak));
  if (most == -__builtin_inff()) {  // nothing seen yet, nothing here
    for (int v = 0; v < TILE_VECTORS; ++v) store(scores + v * VW, zero());
    return;
  }
  vf total = load(s.total + r * VW);
  if (most != s.most[r]) {
    const vf factor = exp(set1(s.most[r] - most));
    total = mul(total, factor);
    for (int d = 0; d < a.head_dim; d += VW)
      store(s.out + r * a.head_dim + d, mul(load(s.out + r * a.head_dim + d), factor));
    s.most[r] = most;
  }
  for (int v = 0; v < TILE_VECTORS; ++v) {
    const vf weight = exp(sub(x[v], set1(most)));
    store(scores + v * VW, weight);
    total = add(total, weight);
  }
  store(s.total + r * VW, total);
}

// Asks for the KV of a tile while the one before it is computed: blocks lie anywhere, so no hardware prefetcher will.
static void prefetch_tile(const Attention& a, const int32_t* table, int kv_head, int tile_start, int tokens, int bytes) {
  const int64_t head_size = (int64_t)a.head_dim * a.block_size * bytes, block_stride = head_size * a.kv_heads;
  for (int at = tile_start; at < tile_start + tokens; at += a.block_size) {
    const int64_t offset = table[at / a.block_size] * block_stride + kv_head * head_size;
    for (int64_t line = 0; line < head_size; line += 64) _mm_prefetch((const char*)a.keys + offset + line, _MM_HINT_T1);
    for (int64_t line = 0; line < head_size; line += 64) _mm_prefetch((const char*)a.values + offset + line, _MM_HINT_T1);
  }
}

template <class KV>
static void attend_tile(const Attention& a, Rows& s, int rows, const int32_t* table, int kv_head, int tile_start,
                        int tokens) {
  const int64_t head_size = (int64_t)a.head_dim * a.block_size, block_stride = head_size * a.kv_heads;
  const KV* keys[TILE_VECTORS];
  const KV* values[TILE];
  const int vectors = (tokens + VW - 1) / VW;
  const int32_t* block = table + tile_start / a.block_size;  // blocks are cut at multiples of VW, tiles at multiples of both
  int v = 0, t = 0;
  for (int offset = tile_start % a.block_size; v < vectors; offset = 0, ++block) {
    const int64_t base = *block * block_stride + kv_head * head_size;
    for (int at = offset; at < a.block_size && v < vectors; at += VW) keys[v++] = (const KV*)a.keys + base + at;
    for (int at = offset; at < a.block_size && t < tokens; ++at)
      values[t++] = (const KV*)a.values + base + (int64_t)at * a.head_dim;
  }
  constexpr int HALF = ATTENTION_ROWS / 2;  // times 4 vectors fill the registers
  for (int r = 0; r < rows; r += HALF) {
    const int count = std::min(HALF, rows - r);
    const float* q = s.q + r * a.head_dim;
    float* scores = s.scores + r * TILE;
    v = 0;
    if constexpr (VW == 16)
      for (; v + 4 <= vectors; v += 4) score_rows<4, HALF>(count, q, keys + v, a.block_size, a.head_dim, scores + v * VW);
    for (; v + 2 <= vectors; v += 2) score_rows<2, HALF>(count, q, keys + v, a.block_size, a.head_dim, scores + v * VW);
    for (; v < vectors; ++v) score_rows<1, HALF>(count, q, keys + v, a.block_size, a.head_dim, scores + v * VW);
  }
  for (int r = 0; r < rows; ++r) soften(a, s, r, tile_start);

  for (int r = 0; r < rows; r += HALF) {
    const int count = std::min(HALF, rows - r);
    const float* weights = s.scores + r * TILE;
    float* out = s.out + r * a.head_dim;
    int d = 0;
    if constexpr (VW == 16)
      for (; d + 4 * VW <= a.head_dim; d += 4 * VW) weigh_rows<4, HALF>(count, weights, values, tokens, d, out, a.head_dim);
    for (; d + 2 * VW <= a.head_dim; d += 2 * VW) weigh_rows<2, HALF>(count, weights, values, tokens, d, out, a.head_dim);
    for (; d < a.head_dim; d += VW) weigh_rows<1, HALF>(count, weights, values, tokens, d, out, a.head_dim);
  }
}

// Queries [first, first + count) of one sequence for one key/value head.
static void attend(const Attention& a, Rows& s, int sequence, int kv_head, int first, int count) {
  const int group = a.heads / a.kv_heads, rows = count * group, d = a.head_dim;
  const int start = a.query_starts[sequence], queries = a.query_starts[sequence + 1] - start;
  const int context = a.context_lens[sequence];
  for (int r = 0; r < rows; ++r) {
    const int query = first + r / group;
    const float* q = a.q + (start + query) * a.q_stride + (int64_t)(kv_head * group + r % group) * d;
    for (int i = 0; i < d; i += VW) {
      store(s.q + r * d + i, mul(load(q + i), set1(a.scale)));
      store(s.out + r * d + i, zero());
    }
    s.most[r] = -__builtin_inff();
    store(s.total + r * VW, zero());
    s.position[r] = context - queries + query;
  }
  const int32_t* table = a.block_tables + sequence * a.table_stride;
  const int end = s.position[rows - 1] + 1;
  const int begin = a.window ? std::max(0, s.position[0] + 1 - a.window) / TILE * TILE : 0;
  prefetch_tile(a, table, kv_head, begin, std::min(TILE, end - begin), a.kv_bfloat16 ? 2 : 4);
  for (int tile = begin; tile < end; tile += TILE) {
    if (tile + TILE < end)
      prefetch_tile(a, table, kv_head, tile + TILE, std::min(TILE, end - tile - TILE), a.kv_bfloat16 ? 2 : 4);
    const int tokens = std::min(TILE, end - tile);
    if (a.kv_bfloat16)
      attend_tile<uint16_t>(a, s, rows, table, kv_head, tile, tokens);
    else
      attend_tile<float>(a, s, rows, table, kv_head, tile, tokens);
  }
  for (int r = 0; r < rows; ++r) {
    const int64_t at = (int64_t)(start + first + r / group) * a.heads + kv_head * group + r % group;
    const float total = sum(load(s.total + r * VW));
    for (int i = 0; i < d; i += VW) store(a.out + at * d + i, div(load(s.out + r * d + i), set1(total)));
    if (a.lse) a.lse[at] = s.most[r] + logf(total);
  }
}

static void attention(Pool& pool, const Attention& a, int sequences) {
  const int group = a.heads / a.kv_heads;
  const int per_task = std::max(1, ATTENTION_ROWS / group);
  int* first_task = (int*)pool.shared(sizeof(int) * (sequences + 1));
  first_task[0] = 0;
  for (int i = 0; i < sequences; ++i) {
    const int queries = a.query_starts[i + 1] - a.query_starts[i];
    first_task[i + 1] = first_task[i] + (queries + per_task - 1) / per_task * a.kv_heads;
  }
  pool.run(first_task[sequences], [&](int part, int) {
    const int sequence = (int)(std::upper_bound(first_task, first_task + sequences + 1, part) - first_task) - 1;
    const int local = part - first_task[sequence];
    const int queries = a.query_starts[sequence + 1] - a.query_starts[sequence];
    // One head after the other: the keys and values that neighbouring parts read are the same.
    const int tiles = (queries + per_task - 1) / per_task, first = local % tiles * per_task;
    static thread_local Rows rows;
    attend(a, rows, sequence, local / tiles, first, std::min(per_task, queries - first));
  });
}

}  // namespace shoal
