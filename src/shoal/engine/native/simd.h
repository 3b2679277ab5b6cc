// One vector of floats, 16 wide with AVX-512 and 8 wide with AVX2, and the few operations the kernels need on it.
//
// Products and sums are always fused through fma(): the compiler must not choose, or two kernels that compute the same
// element for different batch sizes would round differently.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace shoal {

#if defined(__AVX512F__)
constexpr int VW = 16;
using vf = __m512;
static inline vf load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, vf v) { _mm512_storeu_ps(p, v); }
static inline vf set1(float x) { return _mm512_set1_ps(x); }
static inline vf zero() { return _mm512_setzero_ps(); }
static inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vf load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
static inline vf zero_if_minus_infinity(vf v) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, _mm512_set1_ps(-__builtin_inff()), _CMP_NEQ_OQ), v);
}
// Lanes [low, high) of v, others -infinity.
static inline vf keep_range(vf v, int low, int high) {
  const uint32_t below_high = high >= 16 ? 0xffffu : (high <= 0 ? 0u : (1u << high) - 1);
  const uint32_t below_low = low <= 0 ? 0u : (low >= 16 ? 0xffffu : (1u << low) - 1);
  return _mm512_mask_blend_ps((__mmask16)(below_high & ~below_low), _mm512_set1_ps(-__builtin_inff()), v);
}
#else
constexpr int VW = 8;
using vf = __m256;
static inline vf load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, vf v) { _mm256_storeu_ps(p, v); }
static inline vf set1(float x) { return _mm256_set1_ps(x); }
static inline vf zero() { return _mm256_setzero_ps(); }
static inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
static inline vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
static inline vf round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vf load_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline vf zero_if_minus_infinity(vf v) {
  return _mm256_and_ps(v, _mm256_cmp_ps(v, _mm256_set1_ps(-__builtin_inff()), _CMP_NEQ_OQ));
}
static inline vf keep_range(vf v, int low, int high) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i ge_low = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(low - 1));
  const __m256i lt_high = _mm256_cmpgt_epi32(_mm256_set1_epi32(high), lane);
  const __m256 keep = _mm256_castsi256_ps(_mm256_and_si256(ge_low, lt_high));
  return _mm256_blendv_ps(_mm256_set1_ps(-__builtin_inff()), v, keep);
}
#endif

// Horizontal sums and maxima always pair lanes the same way, so they are as reproducible as a loop.
static inline float sum(vf v) {
  float lanes[VW];
  store(lanes, v);
  for (int width = VW / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
static inline float largest(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
#endif
}

// exp by 2^n * polynomial (the coefficients are Cephes' expf, relative error about 1e-7). exp(-inf) is 0. Adding `magic`
// leaves the rounded quotient in the low bits, from where a shift takes it into the exponent.
static inline vf exp(vf x) {
  const vf lowest = set1(-87.33654f), magic = set1(12582912.0f);  // 1.5 * 2^23
  const vf clamped = max(min(x, set1(88.0f)), lowest);
  const vf shifted = fma(clamped, set1(1.44269504088896341f), magic), n = sub(shifted, magic);
  vf r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  vf p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
#if defined(__AVX512F__)
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  const __mmask16 seen = _mm512_cmp_ps_mask(x, lowest, _CMP_GE_OQ);
  return _mm512_castsi512_ps(_mm512_maskz_add_epi32(seen, _mm512_castps_si512(p), exponent));
#else
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  const vf y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
  return _mm256_and_ps(y, _mm256_cmp_ps(x, lowest, _CMP_GE_OQ));
#endif
}

static inline vf sigmoid(vf x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x)))); }
static inline vf tanh(vf x) { return fma(set1(2.0f), sigmoid(add(x, x)), set1(-1.0f)); }

static inline uint16_t to_bf16(float x) {  // round to nearest even
  if (x != x) return 0x7fc0;  // NaN stays NaN: rounding could carry its bits over into an infinity
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline float from_bf16(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

enum Activation { SILU = 0, GELU_TANH = 1 };

static inline vf activate(vf x, int kind) {
  if (kind == SILU) return mul(x, sigmoid(x));
  // gelu(x) ~ x sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3)
  const vf u2 = mul(mul(x, set1(1.5957691216057308f)), fma(mul(x, x), set1(0.044715f), set1(1.0f)));
  return mul(x, sigmoid(u2));
}

}  // namespace shoal
