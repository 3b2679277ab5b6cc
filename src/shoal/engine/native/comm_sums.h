// Sums over the tensors of several ranks: element by element ((x0 + x1) + x2) + ..., the same on whichever rank.
#pragma once
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace shoal {

enum CommDtype { COMM_FLOAT32 = 0, COMM_BFLOAT16 = 1, COMM_INT32 = 2, COMM_INT64 = 3 };

inline int64_t width_of(int dtype) { return dtype == COMM_INT64 ? 8 : dtype == COMM_BFLOAT16 ? 2 : 4; }

// As to_bf16, lane by lane.
static inline void store_bf16(uint16_t* to, vf v) {
#if defined(__AVX512F__)
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i high = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  high = _mm512_mask_mov_epi32(high, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(high));
#else
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i high = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i kept = _mm256_blendv_epi8(high, _mm256_set1_epi32(0x7fc0), nan);
  _mm_storeu_si128((__m128i*)to, _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1)));
#endif
}

static inline vf load_as_float(const float* p) { return load(p); }
static inline vf load_as_float(const uint16_t* p) { return load_bf16(p); }
static inline float as_float(float x) { return x; }
static inline float as_float(uint16_t x) { return from_bf16(x); }
static inline void store_from_float(float* p, vf v) { store(p, v); }
static inline void store_from_float(uint16_t* p, vf v) { store_bf16(p, v); }
static inline void put_float(float* p, float x) { *p = x; }
static inline void put_float(uint16_t* p, float x) { *p = to_bf16(x); }

// bfloat16 (uint16_t) is added in float32 and rounded once.
template <class T>
void sum_floats(T* to, int64_t n, const char* const* from, int ranks) {
  auto source = [&](int r) { return (const T*)from[r]; };
  int64_t i = 0;
  for (; i + VW <= n; i += VW) {
    vf total = load_as_float(source(0) + i);
    for (int r = 1; r < ranks; ++r) total = add(total, load_as_float(source(r) + i));
    store_from_float(to + i, total);
  }
  for (; i < n; ++i) {
    float total = as_float(source(0)[i]);
    for (int r = 1; r < ranks; ++r) total += as_float(source(r)[i]);
    put_float(to + i, total);
  }
}

// Integers wrap around, as in torch. By blocks that stay in the first-level cache, for the compiler to vectorise.
template <class Unsigned>
void sum_integers(Unsigned* to, int64_t n, const char* const* from, int ranks) {
  constexpr int64_t BLOCK = 512;
  for (int64_t first = 0; first < n; first += BLOCK) {
    const int64_t count = n - first < BLOCK ? n - first : BLOCK;
    Unsigned total[BLOCK];
    std::memcpy(total, (const Unsigned*)from[0] + first, count * sizeof(Unsigned));
    for (int r = 1; r < ranks; ++r) {
      const Unsigned* more = (const Unsigned*)from[r] + first;
      for (int64_t i = 0; i < count; ++i) total[i] += more[i];
    }
    std::memcpy(to + first, total, count * sizeof(Unsigned));
  }
}

// to[i] = from[0][i] + from[1][i] + ..., in this order. `to` may be one of them.
inline void sum_ranks(char* to, int64_t n, int dtype, const char* const* from, int ranks) {
  if (dtype == COMM_FLOAT32)
    sum_floats((float*)to, n, from, ranks);
  else if (dtype == COMM_BFLOAT16)
    sum_floats((uint16_t*)to, n, from, ranks);
  else if (dtype == COMM_INT32)
    sum_integers((uint32_t*)to, n, from, ranks);
  else
    sum_integers((uint64_t*)to, n, from, ranks);
}

}  // namespace shoal
