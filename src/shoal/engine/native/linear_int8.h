// int8 weights times dynamically quantised activations.
//
// Weights: symmetric, one scale for each output feature, stored as w + 128 so that they are the unsigned side of the
// byte dot product. Activations: symmetric, one scale for each row and GROUP of k, so that an outlier costs its own
// group precision and no other row anything. sum (w + 128) a = sum w a + 128 sum a, and sum a is known per group: the
// accumulators start at -128 sum a.
//
// Panel layout: k in fours, [k / 4][NR][4].
#pragma once
#include "linear.h"

namespace shoal {

constexpr int GROUP = 32;
#if defined(__AVX512F__)
constexpr int INT8_ROWS = 6;  // 6 x 2 integer and 6 x 2 float accumulators
using vi = __m512i;
static inline vi load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
static inline vi set1_int(int32_t x) { return _mm512_set1_epi32(x); }
static inline vf to_float(vi x) { return _mm512_cvtepi32_ps(x); }
#if defined(__AVX512VNNI__)
static inline vi dot4(vi sums, vi weights, int32_t activations) {
  return _mm512_dpbusd_epi32(sums, weights, _mm512_set1_epi32(activations));
}
#else
static inline vi dot4(vi sums, vi weights, int32_t activations) {
  // Without VNNI the byte product would saturate at 16 bits; widen to 16 and add pairs, even and odd k apart.
  const __m512i a = _mm512_set1_epi32(activations);
  const __m512i mask = _mm512_set1_epi16(0xff);
  const __m512i even_w = _mm512_and_si512(weights, mask), odd_w = _mm512_srli_epi16(weights, 8);
  const __m512i even_a = _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8), odd_a = _mm512_srai_epi16(a, 8);
  return _mm512_add_epi32(sums, _mm512_add_epi32(_mm512_madd_epi16(even_w, even_a), _mm512_madd_epi16(odd_w, odd_a)));
}
#endif
#else
constexpr int INT8_ROWS = 3;
using vi = __m256i;
static inline vi load_bytes(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline vi set1_int(int32_t x) { return _mm256_set1_epi32(x); }
static inline vf to_float(vi x) { return _mm256_cvtepi32_ps(x); }
static inline vi dot4(vi sums, vi weights, int32_t activations) {
  const __m256i a = _mm256_set1_epi32(activations);
  const __m256i even_w = _mm256_and_si256(weights, _mm256_set1_epi16(0xff)), odd_w = _mm256_srli_epi16(weights, 8);
  const __m256i even_a = _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), odd_a = _mm256_srai_epi16(a, 8);
  return _mm256_add_epi32(sums, _mm256_add_epi32(_mm256_madd_epi16(even_w, even_a), _mm256_madd_epi16(odd_w, odd_a)));
}
#endif

// 1 over the step of a symmetric scale. A peak so small that this overflows counts as zero.
static inline float inverse_step(float most) { return most > 1e-36f ? 127.0f / most : 0.0f; }

struct QuantisedRows {  // of x
  int8_t* bytes;        // (T, k_padded)
  float* scales;        // (T, groups)
  int32_t* offsets;     // (T, groups): -128 * sum of the group
  int groups;
  static size_t size(int rows, int k_padded) { return (size_t)rows * (k_padded + k_padded / GROUP * 8) + 64; }
  QuantisedRows(void* memory, int rows, int k_padded) : groups(k_padded / GROUP) {
    scales = (float*)memory;
    offsets = (int32_t*)(scales + (size_t)rows * groups);
    bytes = (int8_t*)(offsets + (size_t)rows * groups);
  }
};

static void quantise_row(const float* x, int k, int k_padded, int8_t* bytes, float* scales, int32_t* offsets) {
  for (int g = 0; g * GROUP < k_padded; ++g) {
    alignas(64) float values[GROUP];
    const int count = std::min(GROUP, k - g * GROUP);
    for (int i = 0; i < GROUP; ++i) values[i] = i < count ? x[g * GROUP + i] : 0.0f;
    vf peak = zero();
    for (int i = 0; i < GROUP; i += VW) peak = max(peak, max(load(values + i), sub(zero(), load(values + i))));
    const float most = largest(peak);
    const float inverse = inverse_step(most);
    int32_t total = 0;
    for (int i = 0; i < GROUP; i += VW) store(values + i, round(mul(load(values + i), set1(inverse))));
    for (int i = 0; i < GROUP; ++i) {
      const int32_t q = (int32_t)values[i];
      bytes[g * GROUP + i] = (int8_t)q;
      total += q;
    }
    scales[g] = most / 127.0f;
    offsets[g] = -128 * total;
  }
}

template <int ROWS, int NP>
static void multiply_int8(const QuantisedRows& x, int row, int k_padded, const uint8_t* w, int64_t panel_stride,
                          const float* column_scales, float* sums, int64_t sums_stride) {
  vf total[ROWS][NP * NV];
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < NP * NV; ++v) total[m][v] = zero();
  for (int g = 0; g < x.groups; ++g) {
    vi c[ROWS][NP * NV];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 16
      for (int v = 0; v < NP * NV; ++v) c[m][v] = set1_int(x.offsets[(int64_t)(row + m) * x.groups + g]);
    const int8_t* bytes = x.bytes + (int64_t)row * k_padded + g * GROUP;
    for (int i = 0; i < GROUP; i += 4) {
      vi b[NP * NV];
#pragma GCC unroll 16
      for (int v = 0; v < NP * NV; ++v) {
        const uint8_t* p = w + v / NV * panel_stride + (int64_t)(g * GROUP + i) * NR + v % NV * VW * 4;
        b[v] = load_bytes(p);
        if (ROWS <= 2) _mm_prefetch((const char*)p + 4096, _MM_HINT_T0);
      }
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m) {
        int32_t a;
        std::memcpy(&a, bytes + (int64_t)m * k_padded + i, 4);
#pragma GCC unroll 16
        for (int v = 0; v < NP * NV; ++v) c[m][v] = dot4(c[m][v], b[v], a);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
      const vf scale = set1(x.scales[(int64_t)(row + m) * x.groups + g]);
#pragma GCC unroll 16
      for (int v = 0; v < NP * NV; ++v) total[m][v] = fma(to_float(c[m][v]), scale, total[m][v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < NP * NV; ++v)
      store(sums + v / NV * sums_stride + (int64_t)m * NR + v % NV * VW,
            mul(total[m][v], load(column_scales + v * VW)));
}

template <int NP, int ROWS>
static void multiply_int8_rows(int rows, const QuantisedRows& x, int row, int k_padded, const uint8_t* w,
                               int64_t panel_stride, const float* column_scales, float* sums, int64_t sums_stride) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS)
      return multiply_int8<ROWS, NP>(x, row, k_padded, w, panel_stride, column_scales, sums, sums_stride);
    return multiply_int8_rows<NP, ROWS - 1>(rows, x, row, k_padded, w, panel_stride, column_scales, sums, sums_stride);
  }
}

static void linear_int8(Pool& pool, const Packed& w, const float* x, int64_t ldx, int rows, int activation, float* y,
                        int64_t ldy) {
  const QuantisedRows q(pool.shared(QuantisedRows::size(rows, w.k_padded)), rows, w.k_padded);
  const int rows_per_part = std::max(1, std::min(16, rows / (2 * pool.size())));
  auto quantise = [&](int part, int) {
    for (int m = part * rows_per_part; m < std::min(rows, (part + 1) * rows_per_part); ++m)
      quantise_row(x + m * ldx, w.k, w.k_padded, q.bytes + (int64_t)m * w.k_padded, q.scales + (int64_t)m * q.groups,
                   q.offsets + (int64_t)m * q.groups);
  };
  const int quantise_parts = (rows + rows_per_part - 1) / rows_per_part;
  if (rows < 8)
    for (int part = 0; part < quantise_parts; ++part) quantise(part, 0);
  else
    pool.run(quantise_parts, quantise);

  const Cut cut(rows, w.panels, (int64_t)w.k_padded * NR, 0.5 * w.k_padded * NR, pool.size());
  const int64_t stride = (int64_t)w.k_padded * NR;
  pool.run(cut.row_blocks * cut.panel_runs, [&](int part, int thread) {
    const int first_row = part / cut.panel_runs * cut.row_block, panel = part % cut.panel_runs * cut.panel_run;
    const int count = std::min(cut.row_block, rows - first_row), panels = std::min(cut.panel_run, w.panels - panel);
    float* sums = pool.scratch(thread, sizeof(float) * NR * (size_t)count * panels);
    const int64_t sums_stride = (int64_t)count * NR;
    const uint8_t* weights = (const uint8_t*)w.weights + panel * stride;
    const float* scales = w.scales + (int64_t)panel * NR;
    int p = 0;
    if (count <= INT8_ROWS / 3)
      for (; p + 2 <= panels; p += 2)
        multiply_int8_rows<2, INT8_ROWS / 3>(count, q, first_row, w.k_padded, weights + p * stride, stride, scales + p * NR,
                                             sums + p * sums_stride, sums_stride);
    const Tiles tiles(count, INT8_ROWS);
    for (; p < panels; ++p)
      for (int i = 0; i < tiles.count; ++i) {
        const int m = tiles.begin(i);
        multiply_int8_rows<1, INT8_ROWS>(tiles.size(i), q, first_row + m, w.k_padded, weights + p * stride, stride,
                                         scales + p * NR, sums + p * sums_stride + (int64_t)m * NR, sums_stride);
      }
    for (p = 0; p < panels; ++p)
      write_panel(w, panel + p, count, sums + p * sums_stride, activation, y + first_row * ldy, ldy);
  });
}

}  // namespace shoal
