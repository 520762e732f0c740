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
inline W look_up(W codes, const uint8_t (&values)[16]) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(values)));
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
inline I int_add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
template <int Left>
inline I int_shift(I v) { return {_mm256_slli_epi32(v.a, Left), _mm256_slli_epi32(v.b, Left)}; }
inline I int_xor(I x, I y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
template <int Right>
inline I int_shift_right(I v) { return {_mm256_srai_epi32(v.a, Right), _mm256_srai_epi32(v.b, Right)}; }
// The halves of unsigned 64-bit products of each lane with m.
inline void mul_wide_half(__m256i a, __m256i by, __m256i* high, __m256i* low) {
  const __m256i even = _mm256_mul_epu32(a, by), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), by);
  *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}
inline void mul_wide(I a, uint32_t m, I* high, I* low) {
  const __m256i by = _mm256_set1_epi32(static_cast<int32_t>(m));
  mul_wide_half(a.a, by, &high->a, &low->a);
  mul_wide_half(a.b, by, &high->b, &low->b);
}
inline I bits_of(F v) { return {_mm256_castps_si256(v.a), _mm256_castps_si256(v.b)}; }
inline F float_of_bits(I v) { return {_mm256_castsi256_ps(v.a), _mm256_castsi256_ps(v.b)}; }
inline __m256 unsigned_half(__m256i v) {  // by halves of 16 bits; both steps round at most once
  const __m256 low = _mm256_cvtepi32_ps(_mm256_and_si256(v, _mm256_set1_epi32(0xffff)));
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(v, 16)), _mm256_set1_ps(65536.0f), low);
}
inline F unsigned_to_float(I v) { return {unsigned_half(v.a), unsigned_half(v.b)}; }
// Sixteen activations for each group of four lanes; acc[r] += sum over j < 4 of w[4 r + j] * a[4 (r % 4) + j], w below 16.
using A = __m256i;
inline A load_lanes(const int8_t* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline I dot_lanes(I acc, W w, A a) { return {dot_half<false>(acc.a, w.a, a), dot_half<false>(acc.b, w.b, a)}; }
// Lane 4 j + i is the sum of t_i's lanes 4 j to 4 j + 3.
inline I gather_sums(I t0, I t1, I t2, I t3) {
  return {_mm256_hadd_epi32(_mm256_hadd_epi32(t0.a, t1.a), _mm256_hadd_epi32(t2.a, t3.a)),
          _mm256_hadd_epi32(_mm256_hadd_epi32(t0.b, t1.b), _mm256_hadd_epi32(t2.b, t3.b))};
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
// Thirty-two, the even ones and the odd ones.
inline void load_bf16_apart(const uint16_t* p, F* even, F* odd) {
  const W both = load_bytes(reinterpret_cast<const uint8_t*>(p));
  const __m256i top = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
  *even = {_mm256_castsi256_ps(_mm256_slli_epi32(both.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(both.b, 16))};
  *odd = {_mm256_castsi256_ps(_mm256_and_si256(both.a, top)), _mm256_castsi256_ps(_mm256_and_si256(both.b, top))};
}
inline __m256 in_quarters(__m256 x) {  // quarters 0, 2, 1, 3
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8));
}
inline void take_apart(F first, F second, F* even, F* odd) {
  *even = {in_quarters(_mm256_shuffle_ps(first.a, first.b, 0x88)), in_quarters(_mm256_shuffle_ps(second.a, second.b, 0x88))};
  *odd = {in_quarters(_mm256_shuffle_ps(first.a, first.b, 0xdd)), in_quarters(_mm256_shuffle_ps(second.a, second.b, 0xdd))};
}
inline void put_together(F even, F odd, F* first, F* second) {
  const F x = {in_quarters(even.a), in_quarters(even.b)}, y = {in_quarters(odd.a), in_quarters(odd.b)};
  *first = {_mm256_unpacklo_ps(x.a, y.a), _mm256_unpackhi_ps(x.a, y.a)};
  *second = {_mm256_unpacklo_ps(x.b, y.b), _mm256_unpackhi_ps(x.b, y.b)};
}
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
// Sixteen e4m3 values over 256: their bits, moved, are those of a float16.
inline F load_e4m3(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<short>(0xbfff)));
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
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
inline __m256 sums_of_8(const F* v) {
  const auto pair = [&](int i) { return _mm256_hadd_ps(_mm256_add_ps(v[i].a, v[i].b), _mm256_add_ps(v[i + 1].a, v[i + 1].b)); };
  const __m256 x = _mm256_hadd_ps(pair(0), pair(2)), y = _mm256_hadd_ps(pair(4), pair(6));
  return _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
}
// Lane i is the sum of v[i]'s lanes.
inline F sums_of_16(const F* v) { return {sums_of_8(v), sums_of_8(v + 8)}; }
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
