// The same sixteen lanes as two AVX2 halves (AVX2, FMA, F16C).
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {  // each set has functions of these names: they must not be merged when linked
namespace simd {

struct W { __m256i a, b; };
struct I { __m256i a, b; };
struct F { __m256 a, b; };

inline W load_bytes(const uint8_t* p) {
  const auto* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline W low_nibbles(W w) {
  const __m256i m = _mm256_set1_epi8(0x0f);
  return {_mm256_and_si256(w.a, m), _mm256_and_si256(w.b, m)};
}
inline W high_nibbles(W w) { return low_nibbles({_mm256_srli_epi16(w.a, 4), _mm256_srli_epi16(w.b, 4)}); }
inline W or_bytes(W x, W y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
template <int Right>
inline W shift_mask(W w, uint8_t mask) {
  const __m256i m = _mm256_set1_epi8(static_cast<char>(mask));
  if constexpr (Right >= 0) w = {_mm256_srli_epi16(w.a, Right), _mm256_srli_epi16(w.b, Right)};
  else w = {_mm256_slli_epi16(w.a, -Right), _mm256_slli_epi16(w.b, -Right)};
  return {_mm256_and_si256(w.a, m), _mm256_and_si256(w.b, m)};
}
// IQ4_NL's sixteen values (ggml), raised by 128.
alignas(16) inline constexpr uint8_t kCodes[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
inline W look_up(W codes) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kCodes)));
  return {_mm256_shuffle_epi8(table, codes.a), _mm256_shuffle_epi8(table, codes.b)};
}
inline I int_set(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
inline I int_scaled_add(I hi, I lo) {
  return {_mm256_add_epi32(_mm256_slli_epi32(hi.a, 8), lo.a), _mm256_add_epi32(_mm256_slli_epi32(hi.b, 8), lo.b)};
}
// Weights up to 127 go through maddubs, whose int16 pair sums then cannot saturate; wider ones are multiplied as int16.
template <bool Wide>
inline __m256i dot_half(__m256i acc, __m256i w, __m256i a) {
  const __m256i ones = _mm256_set1_epi16(1);
  if constexpr (!Wide) return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, a), ones));
  const __m256i even_w = _mm256_and_si256(w, _mm256_set1_epi16(0xff)), odd_w = _mm256_srli_epi16(w, 8);
  const __m256i even_a = _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), odd_a = _mm256_srai_epi16(a, 8);
  return _mm256_add_epi32(acc, _mm256_add_epi32(_mm256_madd_epi16(even_w, even_a), _mm256_madd_epi16(odd_w, odd_a)));
}
template <bool Wide>
inline I dot(I acc, W w, int32_t a) {
  const __m256i v = _mm256_set1_epi32(a);
  return {dot_half<Wide>(acc.a, w.a, v), dot_half<Wide>(acc.b, w.b, v)};
}
inline F set(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F load_some(const float* p, int n) {
  float t[16] = {};
  std::memcpy(t, p, 4 * static_cast<size_t>(n));
  return load(t);
}
inline void store(float* p, F v) { _mm256_storeu_ps(p, v.a); _mm256_storeu_ps(p + 8, v.b); }
inline void store_some(float* p, F v, int n) {
  float t[16];
  store(t, v);
  std::memcpy(p, t, 4 * static_cast<size_t>(n));
}
inline F to_float(I v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
inline F load_f16(const uint16_t* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
inline __m256 widen_bf16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline F load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
inline void store_bf16(uint16_t* p, F v) {
  uint32_t bits[16];
  std::memcpy(bits, &v, 64);
  for (int i = 0; i < 16; ++i) p[i] = static_cast<uint16_t>((bits[i] + 0x7fff + ((bits[i] >> 16) & 1)) >> 16);
}
inline F load_u8(const uint8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)))};
}
inline F load_s8(const int8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(x, 8)))};
}
inline F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F abs(F x) {
  const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)};
}
// v where x > limit, else 0.
inline F keep_above(F v, F x, float limit) {
  const __m256 at = _mm256_set1_ps(limit);
  return {_mm256_and_ps(v.a, _mm256_cmp_ps(x.a, at, _CMP_GT_OQ)), _mm256_and_ps(v.b, _mm256_cmp_ps(x.b, at, _CMP_GT_OQ))};
}
inline float sum(F v) {
  float t[8];
  _mm256_storeu_ps(t, _mm256_add_ps(v.a, v.b));
  return ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]));
}
inline float max_lane(F v) {
  float t[8];
  _mm256_storeu_ps(t, _mm256_max_ps(v.a, v.b));
  float m = t[0];
  for (float x : t) m = x > m ? x : m;
  return m;
}
inline F round(F v) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(v.a, mode), _mm256_round_ps(v.b, mode)};
}
inline __m256 power_half(__m256 v, __m256 n) {  // two steps, so that exponents down to the subnormals survive
  const __m256i i = _mm256_cvtps_epi32(n), h = _mm256_srai_epi32(i, 1), bias = _mm256_set1_epi32(127);
  const __m256i r = _mm256_sub_epi32(i, h);
  v = _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(h, bias), 23)));
  return _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(r, bias), 23)));
}
inline F scale_by_power(F v, F n) { return {power_half(v.a, n.a), power_half(v.b, n.b)}; }
inline void store_s8(int8_t* p, F v) {
  int32_t t[16];
  const __m256i x = _mm256_cvtps_epi32(v.a), y = _mm256_cvtps_epi32(v.b);
  std::memcpy(t, &x, 32);
  std::memcpy(t + 8, &y, 32);
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(t[i]);
}

}  // namespace simd
}  // namespace
