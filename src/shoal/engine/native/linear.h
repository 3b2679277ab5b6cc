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

// Rows of x times NP neighbouring panels over [0, k): sums += into rows of `sums` (panel, row, NR). `ahead` is
// weights that will be read later: as many bytes as this call reads are fetched into the second-level cache meanwhile.
template <class W, int ROWS, int NP>
static void multiply(const float* x, int64_t ldx, const W* w, int64_t panel_stride, int k, float* sums,
                     int64_t sums_stride, bool first, const char* ahead) {
  vf c[ROWS][NP * NV];
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < NP * NV; ++v)
      c[m][v] = first ? zero() : load(sums + v / NV * sums_stride + m * NR + v % NV * VW);
  for (int i = 0; i < k; ++i) {
    if (ROWS > 4) _mm_prefetch(ahead + (int64_t)i * 64, _MM_HINT_T1);
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
      const vf a = set1(x[m * ldx + i]);
#pragma GCC unroll 16
      for (int v = 0; v < NP * NV; ++v) c[m][v] = fma(a, b[v], c[m][v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < NP * NV; ++v) store(sums + v / NV * sums_stride + m * NR + v % NV * VW, c[m][v]);
}

template <class W, int NP, int ROWS>
static void multiply_rows(int rows, const float* x, int64_t ldx, const W* w, int64_t panel_stride, int k, float* sums,
                          int64_t sums_stride, bool first, const char* ahead = nullptr) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return multiply<W, ROWS, NP>(x, ldx, w, panel_stride, k, sums, sums_stride, first, ahead);
    return multiply_rows<W, NP, ROWS - 1>(rows, x, ldx, w, panel_stride, k, sums, sums_stride, first, ahead);
  }
}

// What happens to the sums of one panel on their way out: bias, activation of gated pairs, the ragged last panel.
static void write_panel(const Packed& w, int panel, int rows, const float* sums, int activation, float* y, int64_t ldy) {
  const int width = w.gated ? NR / 2 : NR;
  const int first = panel * width;
  const int count = std::min(width, w.n - first);
  const float* bias = w.bias ? w.bias + (int64_t)panel * NR : nullptr;
  for (int m = 0; m < rows; ++m) {
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

template <class W>
static void linear_part(const Packed& w, const float* x, int64_t ldx, int rows, int panel, int panels, int activation,
                        float* y, int64_t ldy, float* sums) {
  const int64_t stride = (int64_t)w.k * NR;
  const W* weights = (const W*)w.weights + panel * stride;
  const int64_t sums_stride = (int64_t)rows * NR;
  if (rows <= MAX_ROWS / 3) {  // few rows: several panels at once, or too few sums would be under way to hide latency
    int p = 0;
    if (rows <= MAX_ROWS / 6)
      for (; p + 4 <= panels; p += 4)
        multiply_rows<W, 4, MAX_ROWS / 6>(rows, x, ldx, weights + p * stride, stride, w.k, sums + p * sums_stride,
                                          sums_stride, true);
    for (; p + 2 <= panels; p += 2)
      multiply_rows<W, 2, MAX_ROWS / 3>(rows, x, ldx, weights + p * stride, stride, w.k, sums + p * sums_stride,
                                        sums_stride, true);
    for (; p < panels; ++p)
      multiply_rows<W, 1, MAX_ROWS>(rows, x, ldx, weights + p * stride, stride, w.k, sums + p * sums_stride,
                                    sums_stride, true);
  } else {
    const Tiles tiles(rows, MAX_ROWS);
    const int k_blocks = tiles.count == 1 ? 1 : (w.k + K_BLOCK - 1) / K_BLOCK;
    const int k_block = (w.k + k_blocks - 1) / k_blocks;
    for (int p = 0; p < panels; ++p)
      for (int k = 0; k < w.k; k += k_block) {
        const W* block = weights + p * stride + (int64_t)k * NR;
        const int depth = std::min(k_block, w.k - k);
        for (int i = 0; i < tiles.count; ++i) {
          // The second and third tile fetch the next block, which lies right behind: the first of them would wait for
          // memory otherwise. A lone tile runs a page ahead of itself. Beyond the last panel a prefetch is ignored.
          const int64_t line = (int64_t)(i - 1) * depth * 64;
          const bool fetch_next = i > 0 && line < (int64_t)sizeof(W) * NR * depth;
          const char* next = (const char*)(block + (int64_t)depth * NR) + line;
          const int m = tiles.begin(i);
          multiply_rows<W, 1, MAX_ROWS>(tiles.size(i), x + m * ldx + k, ldx, block, stride, depth,
                                        sums + p * sums_stride + (int64_t)m * NR, sums_stride, k == 0,
                                        fetch_next ? next : (const char*)block + (tiles.count == 1 ? 4096 : 0));
        }
      }
  }
  for (int p = 0; p < panels; ++p) write_panel(w, panel + p, rows, sums + p * sums_stride, activation, y, ldy);
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
  pool.run(cut.row_blocks * cut.panel_runs, [&](int part, int thread) {
    const int first_row = part / cut.panel_runs * cut.row_block, panel = part % cut.panel_runs * cut.panel_run;
    const int count = std::min(cut.row_block, rows - first_row), panels = std::min(cut.panel_run, w.panels - panel);
    float* sums = pool.scratch(thread, sizeof(float) * NR * (size_t)count * panels);
    linear_part<W>(w, x + first_row * ldx, ldx, count, panel, panels, activation, y + first_row * ldy, ldy, sums);
  });
}

}  // namespace shoal
