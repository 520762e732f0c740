// Sixteen lanes at a time with AVX-512 (F, BW, VL, VNNI). W is 64 weight bytes, I sixteen int32, F sixteen float32.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {  // each set has functions of these names: they must not be merged when linked
namespace simd {

using W = __m512i;
using I = __m512i;
using F = __m512;

inline W load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline W low_nibbles(W w) { return _mm512_and_si512(w, _mm512_set1_epi8(0x0f)); }
inline W high_nibbles(W w) { return _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi8(0x0f)); }
inline W or_bytes(W a, W b) { return _mm512_or_si512(a, b); }
// (w >> Right, or << -Right) & mask, per byte; the mask must drop what crosses from the neighbouring byte.
template <int Right>
inline W shift_mask(W w, uint8_t mask) {
  if constexpr (Right >= 0) w = _mm512_srli_epi16(w, Right);
  else w = _mm512_slli_epi16(w, -Right);
  return _mm512_and_si512(w, _mm512_set1_epi8(static_cast<char>(mask)));
}

inline W look_up(W codes, const uint8_t (&values)[16]) {
  const __m128i table = _mm_load_si128(reinterpret_cast<const __m128i*>(values));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), codes);
}

inline I int_set(int32_t v) { return _mm512_set1_epi32(v); }
inline I int_scaled_add(I hi, I lo) { return _mm512_add_epi32(_mm512_slli_epi32(hi, 8), lo); }  // 256 hi + lo
// acc[r] += sum over j < 4 of w[4 r + j] (unsigned) * a[j] (signed). The flag is for units without unsigned weights.
template <bool Wide>
inline I dot(I acc, W w, int32_t a) { return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(a)); }

inline I int_add(I a, I b) { return _mm512_add_epi32(a, b); }
template <int Left>
inline I int_shift(I v) { return _mm512_slli_epi32(v, Left); }
inline I int_xor(I a, I b) { return _mm512_xor_si512(a, b); }
template <int Right>
inline I int_shift_right(I v) { return _mm512_srai_epi32(v, Right); }
// The halves of unsigned 64-bit products of each lane with m.
inline void mul_wide(I a, uint32_t m, I* high, I* low) {
  const I by = _mm512_set1_epi32(static_cast<int32_t>(m));
  const I even = _mm512_mul_epu32(a, by), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), by);
  *low = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  *high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
}
inline I bits_of(__m512 v) { return _mm512_castps_si512(v); }
inline __m512 float_of_bits(I v) { return _mm512_castsi512_ps(v); }
inline __m512 unsigned_to_float(I v) { return _mm512_cvtepu32_ps(v); }
// Sixteen activations for each group of four lanes; acc[r] += sum over j < 4 of w[4 r + j] * a[4 (r % 4) + j], w below 16.
using A = __m512i;
inline A load_lanes(const int8_t* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline I dot_lanes(I acc, W w, A a) { return _mm512_dpbusd_epi32(acc, w, a); }
// Lane 4 j + i is the sum of t_i's lanes 4 j to 4 j + 3.
inline I gather_sums(I t0, I t1, I t2, I t3) {
  const I a = int_add(_mm512_unpacklo_epi32(t0, t1), _mm512_unpackhi_epi32(t0, t1));
  const I b = int_add(_mm512_unpacklo_epi32(t2, t3), _mm512_unpackhi_epi32(t2, t3));
  return int_add(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

inline F set(float v) { return _mm512_set1_ps(v); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline F load_some(const float* p, int n) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p); }
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline void store_some(float* p, F v, int n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v); }
inline F to_float(I v) { return _mm512_cvtepi32_ps(v); }
inline F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline F load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
// Thirty-two, the even ones and the odd ones.
inline void load_bf16_apart(const uint16_t* p, F* even, F* odd) {
  const __m512i both = _mm512_loadu_si512(p);
  *even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  *odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000))));
}
inline void take_apart(F first, F second, F* even, F* odd) {
  const __m512i at = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  *even = _mm512_permutex2var_ps(first, at, second);
  *odd = _mm512_permutex2var_ps(first, _mm512_add_epi32(at, _mm512_set1_epi32(1)), second);
}
inline void put_together(F even, F odd, F* first, F* second) {
  const __m512i at = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  *first = _mm512_permutex2var_ps(even, at, odd);
  *second = _mm512_permutex2var_ps(even, _mm512_add_epi32(at, _mm512_set1_epi32(8)), odd);
}
inline void store_bf16(uint16_t* p, F v) {  // round to nearest even
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}
inline F load_u8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline F load_s8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// Sixteen e4m3 values over 256: their bits, moved, are those of a float16.
inline F load_e4m3(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<short>(0xbfff))));
}
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }  // a b + c
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F abs(F a) { return _mm512_abs_ps(a); }
// v where x > limit, else 0.
inline F keep_above(F v, F x, float limit) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_GT_OQ), v);
}
inline float sum(F v) { return _mm512_reduce_add_ps(v); }
inline F sums_of_4(F v, F w, F x, F y) {  // of each quarter's lanes
  const F a = add(_mm512_unpacklo_ps(v, w), _mm512_unpackhi_ps(v, w)), b = add(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  return add(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
}
inline F sums_of_quarters(F a, F b) { return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); }
// Lane i is the sum of v[i]'s lanes. Without a loop: or compilers keep the vectors in memory all the time.
inline F sums_of_16(const F* v) {
  const F a = sums_of_4(v[0], v[1], v[2], v[3]), b = sums_of_4(v[4], v[5], v[6], v[7]);
  const F c = sums_of_4(v[8], v[9], v[10], v[11]), d = sums_of_4(v[12], v[13], v[14], v[15]);
  return sums_of_quarters(sums_of_quarters(a, b), sums_of_quarters(c, d));
}
inline float max_lane(F v) { return _mm512_reduce_max_ps(v); }
inline F round(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// v times 2^n; n holds whole numbers.
inline F scale_by_power(F v, F n) { return _mm512_scalef_ps(v, n); }
// Sixteen floats in [-128, 127], whole numbers, to int8.
inline void store_s8(int8_t* p, F v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
}

}  // namespace simd
}  // namespace
