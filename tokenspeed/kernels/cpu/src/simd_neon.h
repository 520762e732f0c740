// The same sixteen lanes as four NEON quarters (ARMv8.2 with dot products).
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace {  // each set has functions of these names: they must not be merged when linked
namespace simd {

struct W { uint8x16_t v[4]; };
struct I { int32x4_t v[4]; };
struct F { float32x4_t v[4]; };

template <class R, class Fn>
inline R quarters(Fn fn) { R r; for (int i = 0; i < 4; ++i) r.v[i] = fn(i); return r; }

inline W load_bytes(const uint8_t* p) { return quarters<W>([=](int i) { return vld1q_u8(p + 16 * i); }); }
inline W low_nibbles(W w) { return quarters<W>([&](int i) { return vandq_u8(w.v[i], vdupq_n_u8(15)); }); }
inline W high_nibbles(W w) { return quarters<W>([&](int i) { return vshrq_n_u8(w.v[i], 4); }); }
inline W or_bytes(W a, W b) { return quarters<W>([&](int i) { return vorrq_u8(a.v[i], b.v[i]); }); }
template <int Right>
inline W shift_mask(W w, uint8_t mask) {
  return quarters<W>([&](int i) { return vandq_u8(vshlq_u8(w.v[i], vdupq_n_s8(-Right)), vdupq_n_u8(mask)); });
}
inline W look_up(W codes, const uint8_t (&values)[16]) { return quarters<W>([&](int i) { return vqtbl1q_u8(vld1q_u8(values), codes.v[i]); }); }

inline I int_set(int32_t v) { return quarters<I>([=](int) { return vdupq_n_s32(v); }); }
inline I int_scaled_add(I hi, I lo) { return quarters<I>([&](int i) { return vaddq_s32(vshlq_n_s32(hi.v[i], 8), lo.v[i]); }); }
// There is no unsigned by signed product here: w - 128 as signed, and 128 times the sum of a put back.
template <bool Wide>
inline I dot(I acc, W w, int32_t a) {
  const int8x16_t b = vreinterpretq_s8_s32(vdupq_n_s32(a));
  if constexpr (!Wide) {
    return quarters<I>([&](int i) { return vdotq_s32(acc.v[i], vreinterpretq_s8_u8(w.v[i]), b); });
  } else {
    int8_t parts[4];
    std::memcpy(parts, &a, 4);
    const int32x4_t back = vdupq_n_s32(128 * (parts[0] + parts[1] + parts[2] + parts[3]));
    return quarters<I>([&](int i) {
      return vdotq_s32(vaddq_s32(acc.v[i], back), vreinterpretq_s8_u8(veorq_u8(w.v[i], vdupq_n_u8(128))), b);
    });
  }
}

inline I int_add(I a, I b) { return quarters<I>([&](int i) { return vaddq_s32(a.v[i], b.v[i]); }); }
template <int Left>
inline I int_shift(I v) { return quarters<I>([&](int i) { return vshlq_n_s32(v.v[i], Left); }); }
inline I int_xor(I a, I b) { return quarters<I>([&](int i) { return veorq_s32(a.v[i], b.v[i]); }); }
template <int Right>
inline I int_shift_right(I v) { return quarters<I>([&](int i) { return vshrq_n_s32(v.v[i], Right); }); }
// The halves of unsigned 64-bit products of each lane with m.
inline void mul_wide(I a, uint32_t m, I* high, I* low) {
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t v = vreinterpretq_u32_s32(a.v[i]);
    const uint64x2_t left = vmull_n_u32(vget_low_u32(v), m), right = vmull_n_u32(vget_high_u32(v), m);
    low->v[i] = vreinterpretq_s32_u32(vcombine_u32(vmovn_u64(left), vmovn_u64(right)));
    high->v[i] = vreinterpretq_s32_u32(vcombine_u32(vshrn_n_u64(left, 32), vshrn_n_u64(right, 32)));
  }
}
inline I bits_of(F v) { return quarters<I>([&](int i) { return vreinterpretq_s32_f32(v.v[i]); }); }
inline F float_of_bits(I v) { return quarters<F>([&](int i) { return vreinterpretq_f32_s32(v.v[i]); }); }
inline F unsigned_to_float(I v) { return quarters<F>([&](int i) { return vcvtq_f32_u32(vreinterpretq_u32_s32(v.v[i])); }); }
// Sixteen activations for each group of four lanes; acc[r] += sum over j < 4 of w[4 r + j] * a[4 (r % 4) + j], w below 16.
using A = int8x16_t;
inline A load_lanes(const int8_t* p) { return vld1q_s8(p); }
inline I dot_lanes(I acc, W w, A a) {
  return quarters<I>([&](int i) { return vdotq_s32(acc.v[i], vreinterpretq_s8_u8(w.v[i]), a); });
}
// Lane 4 j + i is the sum of t_i's lanes 4 j to 4 j + 3.
inline I gather_sums(I t0, I t1, I t2, I t3) {
  return quarters<I>([&](int j) { return vpaddq_s32(vpaddq_s32(t0.v[j], t1.v[j]), vpaddq_s32(t2.v[j], t3.v[j])); });
}
inline F set(float v) { return quarters<F>([=](int) { return vdupq_n_f32(v); }); }
inline F load(const float* p) { return quarters<F>([=](int i) { return vld1q_f32(p + 4 * i); }); }
inline F load_some(const float* p, int n) {
  float t[16] = {};
  std::memcpy(t, p, 4 * static_cast<size_t>(n));
  return load(t);
}
inline void store(float* p, F v) { for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v.v[i]); }
inline void store_some(float* p, F v, int n) {
  float t[16];
  store(t, v);
  std::memcpy(p, t, 4 * static_cast<size_t>(n));
}
inline F to_float(I v) { return quarters<F>([&](int i) { return vcvtq_f32_s32(v.v[i]); }); }
inline F load_f16(const uint16_t* p) {
  return quarters<F>([=](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
inline F load_bf16(const uint16_t* p) {
  return quarters<F>([=](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
// Thirty-two, the even ones and the odd ones.
inline void load_bf16_apart(const uint16_t* p, F* even, F* odd) {
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t both = vreinterpretq_u32_u16(vld1q_u16(p + 8 * i));
    even->v[i] = vreinterpretq_f32_u32(vshlq_n_u32(both, 16));
    odd->v[i] = vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(0xffff0000)));
  }
}
inline void take_apart(F first, F second, F* even, F* odd) {
  const float32x4_t* x[2] = {first.v, second.v};
  for (int i = 0; i < 4; ++i) {
    even->v[i] = vuzp1q_f32(x[i / 2][i % 2 * 2], x[i / 2][i % 2 * 2 + 1]);
    odd->v[i] = vuzp2q_f32(x[i / 2][i % 2 * 2], x[i / 2][i % 2 * 2 + 1]);
  }
}
inline void put_together(F even, F odd, F* first, F* second) {
  F* x[2] = {first, second};
  for (int i = 0; i < 4; ++i) {
    x[i / 2]->v[i % 2 * 2] = vzip1q_f32(even.v[i], odd.v[i]);
    x[i / 2]->v[i % 2 * 2 + 1] = vzip2q_f32(even.v[i], odd.v[i]);
  }
}
inline void store_bf16(uint16_t* p, F v) {
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v.v[i]);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    vst1_u16(p + 4 * i, vshrn_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16));
  }
}
inline F load_u8(const uint8_t* p) {
  const uint8x16_t x = vld1q_u8(p);
  const uint16x8_t low = vmovl_u8(vget_low_u8(x)), high = vmovl_u8(vget_high_u8(x));
  const uint16x4_t parts[4] = {vget_low_u16(low), vget_high_u16(low), vget_low_u16(high), vget_high_u16(high)};
  return quarters<F>([&](int i) { return vcvtq_f32_u32(vmovl_u16(parts[i])); });
}
inline F load_s8(const int8_t* p) {
  const int8x16_t x = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_s8(vget_high_s8(x));
  const int16x4_t parts[4] = {vget_low_s16(low), vget_high_s16(low), vget_low_s16(high), vget_high_s16(high)};
  return quarters<F>([&](int i) { return vcvtq_f32_s32(vmovl_s16(parts[i])); });
}
// Sixteen e4m3 values over 256: their bits, moved, are those of a float16.
inline F load_e4m3(const uint8_t* p) {
  const int8x16_t x = vreinterpretq_s8_u8(vld1q_u8(p));
  const uint16x8_t mask = vdupq_n_u16(0xbfff);
  const uint16x8_t low = vandq_u16(vreinterpretq_u16_s16(vshll_n_s8(vget_low_s8(x), 7)), mask);
  const uint16x8_t high = vandq_u16(vreinterpretq_u16_s16(vshll_n_s8(vget_high_s8(x), 7)), mask);
  const uint16x4_t parts[4] = {vget_low_u16(low), vget_high_u16(low), vget_low_u16(high), vget_high_u16(high)};
  return quarters<F>([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(parts[i])); });
}
inline F add(F a, F b) { return quarters<F>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); }); }
inline F sub(F a, F b) { return quarters<F>([&](int i) { return vsubq_f32(a.v[i], b.v[i]); }); }
inline F mul(F a, F b) { return quarters<F>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); }); }
inline F div(F a, F b) { return quarters<F>([&](int i) { return vdivq_f32(a.v[i], b.v[i]); }); }
inline F fma(F a, F b, F c) { return quarters<F>([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); }); }
inline F max(F a, F b) { return quarters<F>([&](int i) { return vmaxq_f32(a.v[i], b.v[i]); }); }
inline F min(F a, F b) { return quarters<F>([&](int i) { return vminq_f32(a.v[i], b.v[i]); }); }
inline F abs(F a) { return quarters<F>([&](int i) { return vabsq_f32(a.v[i]); }); }
// v where x > limit, else 0.
inline F keep_above(F v, F x, float limit) {
  return quarters<F>([&](int i) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v.v[i]), vcgtq_f32(x.v[i], vdupq_n_f32(limit))));
  });
}
inline float sum(F v) { return vaddvq_f32(vaddq_f32(vaddq_f32(v.v[0], v.v[1]), vaddq_f32(v.v[2], v.v[3]))); }
// Lane i is the sum of v[i]'s lanes.
inline F sums_of_16(const F* v) {
  const auto four = [](F x) { return vaddq_f32(vaddq_f32(x.v[0], x.v[1]), vaddq_f32(x.v[2], x.v[3])); };
  return quarters<F>([&](int i) {
    const F* x = v + 4 * i;
    return vpaddq_f32(vpaddq_f32(four(x[0]), four(x[1])), vpaddq_f32(four(x[2]), four(x[3])));
  });
}
inline float max_lane(F v) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(v.v[0], v.v[1]), vmaxq_f32(v.v[2], v.v[3]))); }
inline F round(F v) { return quarters<F>([&](int i) { return vrndnq_f32(v.v[i]); }); }
inline F scale_by_power(F v, F n) {  // two steps, so that exponents down to the subnormals survive
  return quarters<F>([&](int i) {
    const int32x4_t whole = vcvtq_s32_f32(n.v[i]), half = vshrq_n_s32(whole, 1), rest = vsubq_s32(whole, half);
    const auto power = [](int32x4_t e) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(e, vdupq_n_s32(127)), 23)); };
    return vmulq_f32(vmulq_f32(v.v[i], power(half)), power(rest));
  });
}
inline void store_s8(int8_t* p, F v) {
  int32_t t[16];
  for (int i = 0; i < 4; ++i) vst1q_s32(t + 4 * i, vcvtnq_s32_f32(v.v[i]));
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(t[i]);
}

}  // namespace simd
}  // namespace
