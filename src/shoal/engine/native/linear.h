// y = x W^T for packed weights. A panel holds NR output features, k after k, so that the inner loop reads weights in
// one stream. Every output element is one chain of fused multiply-adds over k in order, whatever the number of rows:
// a row's result does not depend on what else is in the batch.
//
// T rows (tokens), N output features, K input features.
#pragma once
#include <algorithm>
#include <cmath>

#include "pool.h"
#include "simd.h"

namespace shoal {

constexpr int NV = 2;        // vectors in a panel's row
constexpr int NR = NV * VW;  // output features in a panel
#if defined(__AVX512F__)
constexpr int MAX_ROWS = 12;  // 12 x 2 accumulators, 2 weights, 1 broadcast of 32 registers
#else
constexpr int MAX_ROWS = 6;  // 6 x 2 accumulators, 2 weights, 1 broadcast of 16 registers
#endif
constexpr int K_BLOCK = 256;   // a panel's share of k that stays in the first-level cache: 32 KiB with AVX-512
constexpr int ROW_BLOCK = 240;  // rows whose partial sums are kept at a time

enum Precision { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

struct Packed {
  int precision;
  int n;         // output features; of a gated pair, of each half
  int k;         // input features
  int gated;     // panels hold NR / 2 gates, then their NR / 2 ups
  int panels;
  int k_padded;  // int8: k rounded up to the group
  void* weights;
  float* scales;  // int8: one for each column of each panel
  float* bias;    // one for each column of each panel, or null
};

// Column of panel p -> feature, and which half of a gated pair; false where the panel is padding.
static inline bool feature_of(const Packed& w, int panel, int column, int* feature, int* half) {
  const int width = w.gated ? NR / 2 : NR;
  *half = column / width;
  *feature = panel * width + column % width;
  return *feature < w.n;
}

static inline vf load_weights(const float* p) { return load(p); }
static inline vf load_weights(const uint16_t* p) { return load_bf16(p); }

// Rows of x, as they lie: for few rows, which are read once.
template <int ROWS>
struct StridedRows {
  const float* data;
  int64_t stride;
  float at(int m, int i) const { return data[m * stride + i]; }
};

// A tile of rows, k after k: one stream to read, where the rows themselves would share a few sets of the first-level
// cache (K = 1536 is 6 KiB a row) and push the weights out.
template <int ROWS>
struct PackedRows {
  const float* data;
  float at(int m, int i) const { return data[(int64_t)i * ROWS + m]; }
};

// Rows of x times NP neighbouring panels over [0, k): sums += into rows of `sums` (panel, row, NR). With every k, LINES
// cache lines from `ahead` on, weights that will be read later, are fetched into the second-level cache.
template <class W, int ROWS, int NP, int LINES, class Rows>
static void multiply(Rows x, const W* w, int64_t panel_stride, int k, float* sums, int64_t sums_stride, bool first,
                     const char* ahead, int64_t ahead_step = 64 * LINES) {
  vf c[ROWS][NP * NV];
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < NP * NV; ++v)
      c[m][v] = first ? zero() : load(sums + v / NV * sums_stride + m * NR + v % NV * VW);
  for (int i = 0; i < k; ++i) {
#pragma GCC unroll 2
    for (int line = 0; line < LINES; ++line) _mm_prefetch(ahead + i * ahead_step + line * 64, _MM_HINT_T1);
    vf b[NP * NV];
#pragma GCC unroll 16
    for (int v = 0; v < NP * NV; ++v) {
      const W* p = w + v / NV * panel_stride + (int64_t)i * NR + v % NV * VW;
      b[v] = load_weights(p);
      // With few rows the loop runs at the speed of memory: ask ahead for what the hardware's prefetcher, which stops
      // at page ends, would miss.
      if (ROWS <= 4 && (v % NV == 0 || sizeof(W) == 4)) _mm_prefetch((const char*)p + 4096, _MM_HINT_T0);
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
      const vf a = set1(x.at(m, i));
#pragma GCC unroll 16
      for (int v = 0; v < NP * NV; ++v) c[m][v] = fma(a, b[v], c[m][v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < NP * NV; ++v) store(sums + v / NV * sums_stride + m * NR + v % NV * VW, c[m][v]);
}

// At most MOST rows as they lie, from nothing over all of k.
template <class W, int NP, int MOST>
static void multiply_few(int rows, const float* x, int64_t ldx, const W* w, int64_t panel_stride, int k, float* sums,
                         int64_t sums_stride) {
  if constexpr (MOST > 0) {
    // A lone tile of more than 4 rows runs a page ahead of itself.
    constexpr int LINES = MOST > 4 ? sizeof(W) * NR / 64 : 0;
    if (rows == MOST)
      return multiply<W, MOST, NP, LINES>(StridedRows<MOST>{x, ldx}, w, panel_stride, k, sums, sums_stride, true,
                                          (const char*)w + 4096);
    return multiply_few<W, NP, MOST - 1>(rows, x, ldx, w, panel_stride, k, sums, sums_stride);
  }
}

template <class W, int ROWS = MAX_ROWS>
static void multiply_tile(int rows, const float* packed, const W* w, int k, float* sums, bool first, const char* ahead, int64_t step) {
  if constexpr (ROWS >= MAX_ROWS / 2) {  // of two or more tiles as equal as can be, none is smaller
    if (rows == ROWS) return multiply<W, ROWS, 1, 1>(PackedRows<ROWS>{packed}, w, 0, k, sums, 0, first, ahead, step);
    return multiply_tile<W, ROWS - 1>(rows, packed, w, k, sums, first, ahead, step);
  }
}

// Rows [0, count) of x, k after k.
static void pack_rows(const float* x, int64_t ldx, int count, int k, float* to) {
  int m = 0;
  for (; m + 4 <= count; m += 4) {
    const float* from = x + m * ldx;
    int i = 0;
    for (; i + 4 <= k; i += 4) {
      __m128 r0 = _mm_loadu_ps(from + i), r1 = _mm_loadu_ps(from + ldx + i);
      __m128 r2 = _mm_loadu_ps(from + 2 * ldx + i), r3 = _mm_loadu_ps(from + 3 * ldx + i);
      _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
      float* at = to + (int64_t)i * count + m;
      _mm_storeu_ps(at, r0);
      _mm_storeu_ps(at + count, r1);
      _mm_storeu_ps(at + 2 * count, r2);
      _mm_storeu_ps(at + 3 * count, r3);
    }
    for (; i < k; ++i)
      for (int r = 0; r < 4; ++r) to[(int64_t)i * count + m + r] = from[r * ldx + i];
  }
  for (; m < count; ++m)
    for (int i = 0; i < k; ++i) to[(int64_t)i * count + m] = x[m * ldx + i];
}

// What happens to the sums of one panel on their way out: bias, activation of gated pairs, the ragged last panel.
static void write_panel(const Packed& w, int panel, int rows, const float* sums, int activation, float* y, int64_t ldy) {
  const int width = w.gated ? NR / 2 : NR;
  const int first = panel * width;
  const int count = std::min(width, w.n - first);
  const float* bias = w.bias ? w.bias + (int64_t)panel * NR : nullptr;
  for (int m = 0; m < rows; ++m) {
    // Rows of y lie pages apart: a store would wait for its line, and for the page's address.
    __builtin_prefetch(y + std::min(m + 8, rows - 1) * ldy + first, 1, 2);
    __builtin_prefetch(y + std::min(m + 8, rows - 1) * ldy + first + count - 1, 1, 2);
    alignas(64) float out[NR];
    for (int v = 0; v < NV; ++v) {
      vf value = load(sums + (int64_t)m * NR + v * VW);
      if (bias) value = add(value, load(bias + v * VW));
      store(out + v * VW, value);
    }
    if (w.gated)
      for (int v = 0; v < NV / 2; ++v)
        store(out + v * VW, mul(activate(load(out + v * VW), activation), load(out + (v + NV / 2) * VW)));
    float* to = y + m * ldy + first;
    if (count == width)
      for (int v = 0; v < width / VW; ++v) store(to + v * VW, load(out + v * VW));
    else
      std::memcpy(to, out, sizeof(float) * count);
  }
}

// Few rows: several panels at once, or too few sums would be under way to hide latency.
template <class W>
static void few_rows_part(const Packed& w, const float* x, int64_t ldx, int rows, int panel, int panels, float* sums) {
  const int64_t stride = (int64_t)w.k * NR, sums_stride = (int64_t)rows * NR;
  const W* weights = (const W*)w.weights + panel * stride;
  int p = 0;
  if (rows <= MAX_ROWS / 6)
    for (; p + 4 <= panels; p += 4)
      multiply_few<W, 4, MAX_ROWS / 6>(rows, x, ldx, weights + p * stride, stride, w.k, sums + p * sums_stride, sums_stride);
  if (rows <= MAX_ROWS / 3)
    for (; p + 2 <= panels; p += 2)
      multiply_few<W, 2, MAX_ROWS / 3>(rows, x, ldx, weights + p * stride, stride, w.k, sums + p * sums_stride, sums_stride);
  for (; p < panels; ++p)
    multiply_few<W, 1, MAX_ROWS>(rows, x, ldx, weights + p * stride, stride, w.k, sums + p * sums_stride, sums_stride);
}

// Tiles of packed rows: each K_BLOCK of a panel is read by all tiles while it is in the first-level cache.
template <class W>
static void tiles_part(const Packed& w, const Tiles& tiles, const float* packed, int panel, int panels, float* sums) {
  const int64_t stride = (int64_t)w.k * NR, sums_stride = (int64_t)tiles.rows * NR;
  const W* weights = (const W*)w.weights + panel * stride;
  const int k_blocks = (w.k + K_BLOCK - 1) / K_BLOCK, k_block = (w.k + k_blocks - 1) / k_blocks;
  const int64_t step = ((int64_t)sizeof(W) * NR + tiles.count - 1) / tiles.count;
  for (int p = 0; p < panels; ++p)
    for (int k = 0; k < w.k; k += k_block) {
      const W* block = weights + p * stride + (int64_t)k * NR;
      const int depth = std::min(k_block, w.k - k);
      const char* next = (const char*)(block + (int64_t)depth * NR);
      for (int i = 0; i < tiles.count; ++i) {
        // The last tiles fetch the next block, which lies right behind: the first would wait for memory otherwise.
        // Beyond the last panel a prefetch is ignored.
        const int m = tiles.begin(i);
        multiply_tile<W>(tiles.size(i), packed + (int64_t)m * w.k + (int64_t)k * tiles.size(i), block, depth,
                         sums + p * sums_stride + (int64_t)m * NR, k == 0,
                         next + i * depth * step, step);
      }
    }
}

// Cuts an operation into parts: blocks of rows times runs of panels. A part takes some 10 us, long beside what handing
// it out costs and short beside the operation, at the end of which threads wait for each other.
struct Cut {
  int row_block, row_blocks, panel_run, panel_runs;
  Cut(int rows, int panels, int64_t panel_bytes, double flops_per_row, int threads) {
    row_blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
    row_block = (rows + row_blocks - 1) / row_blocks;
    const double panel_us = std::max(row_block * flops_per_row / 150e3, panel_bytes / 15e3);
    const int most = std::max(1, panels * row_blocks / (2 * threads));
    panel_run = std::max(1, std::min(most, (int)(10 / panel_us)));
    if (panel_run > 4) panel_run = panel_run / 4 * 4;
    panel_runs = (panels + panel_run - 1) / panel_run;
  }
};

template <class W>
static void linear_float(Pool& pool, const Packed& w, const float* x, int64_t ldx, int rows, int activation, float* y,
                         int64_t ldy) {
  const Cut cut(rows, w.panels, (int64_t)w.k * NR * sizeof(W), 2.0 * w.k * NR, pool.size());
  const Tiles blocks(rows, cut.row_block);
  float* packed = nullptr;
  if (rows > MAX_ROWS) {
    packed = (float*)pool.shared(sizeof(float) * rows * (size_t)w.k);
    const int most_tiles = (cut.row_block + MAX_ROWS - 1) / MAX_ROWS;
    pool.run(blocks.count * most_tiles, [&](int part, int) {
      const int block = part / most_tiles, tile = part % most_tiles;
      const Tiles tiles(blocks.size(block), MAX_ROWS);
      if (tile >= tiles.count) return;
      const int first = blocks.begin(block) + tiles.begin(tile);
      pack_rows(x + first * ldx, ldx, tiles.size(tile), w.k, packed + (int64_t)first * w.k);
    });
  }
  pool.run(blocks.count * cut.panel_runs, [&](int part, int thread) {
    const int block = part / cut.panel_runs, first_row = blocks.begin(block), count = blocks.size(block);
    const int panel = part % cut.panel_runs * cut.panel_run, panels = std::min(cut.panel_run, w.panels - panel);
    float* sums = pool.scratch(thread, sizeof(float) * NR * (size_t)count * panels);
    if (packed)
      tiles_part<W>(w, Tiles(count, MAX_ROWS), packed + (int64_t)first_row * w.k, panel, panels, sums);
    else
      few_rows_part<W>(w, x + first_row * ldx, ldx, count, panel, panels, sums);
    for (int p = 0; p < panels; ++p)
      write_panel(w, panel + p, count, sums + (int64_t)p * count * NR, activation, y + first_row * ldy, ldy);
  });
}

}  // namespace shoal
