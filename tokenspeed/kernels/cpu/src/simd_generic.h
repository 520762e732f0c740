// The same sixteen lanes in plain C++, left to the compiler to vectorise. For processors without a header of their own.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {  // each set has functions of these names: they must not be merged when linked
namespace simd {

struct W { uint8_t b[64]; };
struct I { int32_t v[16]; };
struct F { float v[16]; };

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  uint32_t exponent = (h >> 10) & 31, mantissa = h & 1023;
  float value;
  if (exponent == 0) {
    value = std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -value : value;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | (mantissa << 13);
  std::memcpy(&value, &bits, 4);
  return value;
}

template <class Fn>
inline F lanes(Fn fn) { F r; for (int i = 0; i < 16; ++i) r.v[i] = fn(i); return r; }

inline W load_bytes(const uint8_t* p) { W w; std::memcpy(w.b, p, 64); return w; }
inline W low_nibbles(W w) { for (auto& x : w.b) x &= 15; return w; }
inline W high_nibbles(W w) { for (auto& x : w.b) x >>= 4; return w; }
inline W or_bytes(W a, W b) { for (int i = 0; i < 64; ++i) a.b[i] |= b.b[i]; return a; }
template <int Right>
inline W shift_mask(W w, uint8_t mask) {
  for (auto& x : w.b) x = static_cast<uint8_t>(Right >= 0 ? x >> (Right >= 0 ? Right : 0) : x << (Right < 0 ? -Right : 0)) & mask;
  return w;
}
inline W look_up(W codes, const uint8_t (&values)[16]) { for (auto& x : codes.b) x = values[x]; return codes; }
inline I int_set(int32_t v) { I r; for (auto& x : r.v) x = v; return r; }
inline I int_scaled_add(I hi, I lo) { for (int i = 0; i < 16; ++i) lo.v[i] += 256 * hi.v[i]; return lo; }
template <bool Wide>
inline I dot(I acc, W w, int32_t a) {
  int8_t b[4];
  std::memcpy(b, &a, 4);
  for (int r = 0; r < 16; ++r) {
    const uint8_t* x = w.b + 4 * r;
    acc.v[r] += x[0] * b[0] + x[1] * b[1] + x[2] * b[2] + x[3] * b[3];
  }
  return acc;
}
inline I int_add(I a, I b) { for (int i = 0; i < 16; ++i) a.v[i] += b.v[i]; return a; }
template <int Left>
inline I int_shift(I v) { for (auto& x : v.v) x *= 1 << Left; return v; }
inline I int_xor(I a, I b) { for (int i = 0; i < 16; ++i) a.v[i] ^= b.v[i]; return a; }
template <int Right>
inline I int_shift_right(I v) { for (auto& x : v.v) x >>= Right; return v; }
// The halves of unsigned 64-bit products of each lane with m.
inline void mul_wide(I a, uint32_t m, I* high, I* low) {
  for (int i = 0; i < 16; ++i) {
    const uint64_t p = static_cast<uint64_t>(static_cast<uint32_t>(a.v[i])) * m;
    high->v[i] = static_cast<int32_t>(p >> 32);
    low->v[i] = static_cast<int32_t>(p);
  }
}
inline I bits_of(F v) { I r; std::memcpy(r.v, v.v, 64); return r; }
inline F float_of_bits(I v) { F r; std::memcpy(r.v, v.v, 64); return r; }
inline F unsigned_to_float(I v) { return lanes([&](int i) { return static_cast<float>(static_cast<uint32_t>(v.v[i])); }); }
// Sixteen activations for each group of four lanes; acc[r] += sum over j < 4 of w[4 r + j] * a[4 (r % 4) + j], w below 16.
using A = const int8_t*;
inline A load_lanes(const int8_t* p) { return p; }
inline I dot_lanes(I acc, W w, A a) {
  for (int k = 0; k < 64; ++k) acc.v[k / 4] += w.b[k] * a[k % 16];
  return acc;
}
// Lane 4 j + i is the sum of t_i's lanes 4 j to 4 j + 3.
inline I gather_sums(I t0, I t1, I t2, I t3) {
  I r;
  for (int j = 0; j < 4; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int32_t* t = (i == 0 ? t0 : i == 1 ? t1 : i == 2 ? t2 : t3).v + 4 * j;
      r.v[4 * j + i] = t[0] + t[1] + t[2] + t[3];
    }
  }
  return r;
}
inline F set(float v) { return lanes([=](int) { return v; }); }
inline F load(const float* p) { F r; std::memcpy(r.v, p, 64); return r; }
inline F load_some(const float* p, int n) { return lanes([=](int i) { return i < n ? p[i] : 0.0f; }); }
inline void store(float* p, F v) { std::memcpy(p, v.v, 64); }
inline void store_some(float* p, F v, int n) { std::memcpy(p, v.v, 4 * static_cast<size_t>(n)); }
inline F to_float(I v) { return lanes([&](int i) { return static_cast<float>(v.v[i]); }); }
inline F load_f16(const uint16_t* p) { return lanes([=](int i) { return half_to_float(p[i]); }); }
inline F load_bf16(const uint16_t* p) {
  return lanes([=](int i) { const uint32_t bits = static_cast<uint32_t>(p[i]) << 16; float f; std::memcpy(&f, &bits, 4); return f; });
}
// Thirty-two, the even ones and the odd ones.
inline void load_bf16_apart(const uint16_t* p, F* even, F* odd) {
  const F x[2] = {load_bf16(p), load_bf16(p + 16)};
  for (int i = 0; i < 16; ++i) {
    even->v[i] = x[i / 8].v[i % 8 * 2];
    odd->v[i] = x[i / 8].v[i % 8 * 2 + 1];
  }
}
inline void take_apart(F first, F second, F* even, F* odd) {
  for (int i = 0; i < 16; ++i) {
    even->v[i] = (i < 8 ? first : second).v[i % 8 * 2];
    odd->v[i] = (i < 8 ? first : second).v[i % 8 * 2 + 1];
  }
}
inline void put_together(F even, F odd, F* first, F* second) {
  for (int i = 0; i < 32; ++i) (i < 16 ? first : second)->v[i % 16] = (i % 2 ? odd : even).v[i / 2];
}
inline void store_bf16(uint16_t* p, F v) {
  for (int i = 0; i < 16; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &v.v[i], 4);
    p[i] = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}
inline F load_u8(const uint8_t* p) { return lanes([=](int i) { return static_cast<float>(p[i]); }); }
inline F load_s8(const int8_t* p) { return lanes([=](int i) { return static_cast<float>(p[i]); }); }
// Sixteen e4m3 values over 256: their bits, moved, are those of a float32 over 2^112.
inline F load_e4m3(const uint8_t* p) {
  return lanes([=](int i) {
    const uint32_t bits = static_cast<uint32_t>(p[i] & 0x80) << 24 | static_cast<uint32_t>(p[i] & 0x7f) << 20;
    float f;
    std::memcpy(&f, &bits, 4);
    return f * 0x1p112f;
  });
}
inline F add(F a, F b) { return lanes([&](int i) { return a.v[i] + b.v[i]; }); }
inline F sub(F a, F b) { return lanes([&](int i) { return a.v[i] - b.v[i]; }); }
inline F mul(F a, F b) { return lanes([&](int i) { return a.v[i] * b.v[i]; }); }
inline F div(F a, F b) { return lanes([&](int i) { return a.v[i] / b.v[i]; }); }
inline F fma(F a, F b, F c) { return lanes([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline F max(F a, F b) { return lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline F min(F a, F b) { return lanes([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline F abs(F a) { return lanes([&](int i) { return std::fabs(a.v[i]); }); }
// v where x > limit, else 0.
inline F keep_above(F v, F x, float limit) { return lanes([&](int i) { return x.v[i] > limit ? v.v[i] : 0.0f; }); }
inline float sum(F v) {
  for (int n = 8; n; n /= 2) for (int i = 0; i < n; ++i) v.v[i] += v.v[i + n];
  return v.v[0];
}
// Lane i is the sum of v[i]'s lanes.
inline F sums_of_16(const F* v) { return lanes([=](int i) { return sum(v[i]); }); }
inline float max_lane(F v) { float m = v.v[0]; for (float x : v.v) m = x > m ? x : m; return m; }
inline F round(F v) { return lanes([&](int i) { return std::nearbyintf(v.v[i]); }); }
inline F scale_by_power(F v, F n) {
  return lanes([&](int i) { return std::isnan(n.v[i]) ? n.v[i] : std::ldexp(v.v[i], static_cast<int>(n.v[i])); });
}
inline void store_s8(int8_t* p, F v) { for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(std::nearbyintf(v.v[i])); }

}  // namespace simd
}  // namespace
