// Kernels written once over sixteen lanes; included by one source file per instruction set, after its simd header.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.h"

namespace {

using namespace simd;
using ts::Format;
using ts::Layout;
using ts::Rows;
using ts::Scales;

inline int32_t quad(const int8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

// The eight quads of a block, widened to bytes.
template <Format Fmt>
inline void load_quads(const uint8_t* p, W (&w)[8]) {
  constexpr Layout l = ts::layout(Fmt);
  if constexpr (l.bits == 8) {
    for (int i = 0; i < 8; ++i) w[i] = load_bytes(p + 64 * i);
  } else if constexpr (l.bits >= 4) {  // four vectors of nibbles: quad i low, quad i + 4 high; then planes of the top bits
    for (int i = 0; i < 4; ++i) {
      const W v = load_bytes(p + 64 * i);
      w[i] = low_nibbles(v);
      w[i + 4] = high_nibbles(v);
    }
    if constexpr (l.bits == 5) {  // bit i of a byte belongs to quad i
      const W v = load_bytes(p + 256);
      w[0] = or_bytes(w[0], shift_mask<-4>(v, 0x10));
      w[1] = or_bytes(w[1], shift_mask<-3>(v, 0x10));
      w[2] = or_bytes(w[2], shift_mask<-2>(v, 0x10));
      w[3] = or_bytes(w[3], shift_mask<-1>(v, 0x10));
      w[4] = or_bytes(w[4], shift_mask<0>(v, 0x10));
      w[5] = or_bytes(w[5], shift_mask<1>(v, 0x10));
      w[6] = or_bytes(w[6], shift_mask<2>(v, 0x10));
      w[7] = or_bytes(w[7], shift_mask<3>(v, 0x10));
    } else if constexpr (l.bits == 6) {  // two vectors of bit pairs: quads 0..3, quads 4..7
      for (int h = 0; h < 2; ++h) {
        const W v = load_bytes(p + 256 + 64 * h);
        w[4 * h + 0] = or_bytes(w[4 * h + 0], shift_mask<-4>(v, 0x30));
        w[4 * h + 1] = or_bytes(w[4 * h + 1], shift_mask<-2>(v, 0x30));
        w[4 * h + 2] = or_bytes(w[4 * h + 2], shift_mask<0>(v, 0x30));
        w[4 * h + 3] = or_bytes(w[4 * h + 3], shift_mask<2>(v, 0x30));
      }
    }
    if constexpr (l.table) {
      for (int i = 0; i < 8; ++i) w[i] = look_up(w[i]);
    }
  } else {  // two vectors of bit pairs, and for three bits a plane of the third
    for (int h = 0; h < 2; ++h) {
      const W v = load_bytes(p + 64 * h);
      w[4 * h + 0] = shift_mask<0>(v, 0x03);
      w[4 * h + 1] = shift_mask<2>(v, 0x03);
      w[4 * h + 2] = shift_mask<4>(v, 0x03);
      w[4 * h + 3] = shift_mask<6>(v, 0x03);
    }
    if constexpr (l.bits == 3) {
      const W v = load_bytes(p + 128);
      w[0] = or_bytes(w[0], shift_mask<-2>(v, 0x04));
      w[1] = or_bytes(w[1], shift_mask<-1>(v, 0x04));
      w[2] = or_bytes(w[2], shift_mask<0>(v, 0x04));
      w[3] = or_bytes(w[3], shift_mask<1>(v, 0x04));
      w[4] = or_bytes(w[4], shift_mask<2>(v, 0x04));
      w[5] = or_bytes(w[5], shift_mask<3>(v, 0x04));
      w[6] = or_bytes(w[6], shift_mask<4>(v, 0x04));
      w[7] = or_bytes(w[7], shift_mask<5>(v, 0x04));
    }
  }
}

// Factors of a block: value = scale[h] * (q - bias) - least[h], for its halves h (equal unless scales come per 16).
struct Factors {
  F scale[2], least[2];
};

inline const uint16_t* halves(const uint8_t* p) { return reinterpret_cast<const uint16_t*>(p); }

template <Format Fmt>
inline Factors load_factors(const uint8_t* p, const uint8_t* super) {
  constexpr Layout l = ts::layout(Fmt);
  Factors f{};
  if constexpr (l.scales == Scales::Half) {
    f.scale[0] = load_f16(halves(p));
  } else if constexpr (l.scales == Scales::HalfMin) {
    f.scale[0] = load_f16(halves(p));
    f.least[0] = sub(set(0.0f), load_f16(halves(p + 32)));
  } else {
    const F d = load_f16(halves(super));
    constexpr int parts = l.sixteen() ? 2 : 1;
    for (int h = 0; h < parts; ++h) {
      if constexpr (l.has_min()) {
        f.scale[h] = mul(d, load_u8(p + 16 * h));
        f.least[h] = mul(load_f16(halves(super + 32)), load_u8(p + 16 * (parts + h)));
      } else {
        f.scale[h] = mul(d, load_s8(reinterpret_cast<const int8_t*>(p) + 16 * h));
      }
    }
  }
  return f;
}

constexpr int kAhead = 2048;  // bytes: weights are read once, and the hardware's own prefetch stops at each 4 KiB

// `Count` rows of activations against one tile. Each row's arithmetic is the same whatever Count is.
template <Format Fmt, int Count>
void tile_rows(const uint8_t* p, const Rows& rows, int64_t first, float* out, int64_t stride, int valid) {
  constexpr Layout l = ts::layout(Fmt);
  constexpr bool wide = l.bits == 8 || l.table;
  const int64_t blocks = rows.cols / ts::kBlock;
  F acc[Count];
  for (int m = 0; m < Count; ++m) acc[m] = set(0.0f);
  const uint8_t* super = nullptr;
  for (int64_t b = 0; b < blocks; ++b) {
    if constexpr (l.has_super()) {
      if (b % ts::kSuper == 0) {
        super = p;
        p += l.super_bytes();
      }
    }
    for (int at = 0; at < l.block_bytes(); at += 64) __builtin_prefetch(p + kAhead + at);
    W w[8];
    load_quads<Fmt>(p, w);
    const Factors f = load_factors<Fmt>(p + l.weight_bytes(), super);
    p += l.block_bytes();
    for (int m = 0; m < Count; ++m) {
      const int64_t row = first + m;
      const int8_t* hi = rows.hi + row * rows.cols + b * ts::kBlock;
      const int8_t* lo = rows.lo + row * rows.cols + b * ts::kBlock;
      const float scale = rows.scale[row * blocks + b];
      const int32_t* sums = rows.sums + (row * blocks + b) * 2;
      constexpr int parts = l.sixteen() ? 2 : 1;
      for (int h = 0; h < parts; ++h) {
        const int32_t total = parts == 2 ? sums[h] : sums[0] + sums[1];
        I x = int_set(0), y = int_set(-l.bias * total);
        for (int i = 8 / parts * h; i < 8 / parts * (h + 1); ++i) {
          x = dot<wide>(x, w[i], quad(hi + 4 * i));
          y = dot<wide>(y, w[i], quad(lo + 4 * i));
        }
        acc[m] = fma(to_float(int_scaled_add(x, y)), mul(f.scale[h], set(scale)), acc[m]);
        if constexpr (l.has_min()) acc[m] = fma(f.least[h], set(-scale * static_cast<float>(total)), acc[m]);
      }
    }
  }
  for (int m = 0; m < Count; ++m) store_some(out + (first + m) * stride, acc[m], valid);
}

template <Format Fmt>
inline F load_plain(const uint8_t* p) {
  if constexpr (Fmt == Format::F32) return load(reinterpret_cast<const float*>(p));
  else if constexpr (Fmt == Format::F16) return load_f16(halves(p));
  else return load_bf16(halves(p));
}

// Two sums, of even and odd columns, hide the latency of one.
template <Format Fmt, int Count>
void plain_rows(const uint8_t* p, const Rows& rows, int64_t first, float* out, int64_t stride, int valid) {
  constexpr int step = ts::kRows * ts::plain_bytes(Fmt);
  F even[Count], odd[Count];
  for (int m = 0; m < Count; ++m) even[m] = odd[m] = set(0.0f);
  const float* x = rows.x + first * rows.cols;
  int64_t k = 0;
  for (; k + 1 < rows.cols; k += 2, p += 2 * step) {
    const F a = load_plain<Fmt>(p), b = load_plain<Fmt>(p + step);
    for (int m = 0; m < Count; ++m) {
      even[m] = fma(a, set(x[m * rows.cols + k]), even[m]);
      odd[m] = fma(b, set(x[m * rows.cols + k + 1]), odd[m]);
    }
  }
  if (k < rows.cols) {
    for (int m = 0; m < Count; ++m) even[m] = fma(load_plain<Fmt>(p), set(x[m * rows.cols + k]), even[m]);
  }
  for (int m = 0; m < Count; ++m) store_some(out + (first + m) * stride, add(even[m], odd[m]), valid);
}

template <Format Fmt, int Count>
inline void some_rows(const uint8_t* tile, const Rows& rows, int64_t first, float* out, int64_t stride, int valid) {
  if constexpr (ts::is_plain(Fmt)) plain_rows<Fmt, Count>(tile, rows, first, out, stride, valid);
  else tile_rows<Fmt, Count>(tile, rows, first, out, stride, valid);
}

template <Format Fmt>
void all_rows(const uint8_t* tile, const Rows& rows, float* out, int64_t stride, int valid) {
  int64_t m = 0;
  for (; m + 8 <= rows.count; m += 8) some_rows<Fmt, 8>(tile, rows, m, out, stride, valid);
  if (m + 4 <= rows.count) { some_rows<Fmt, 4>(tile, rows, m, out, stride, valid); m += 4; }
  if (m + 2 <= rows.count) { some_rows<Fmt, 2>(tile, rows, m, out, stride, valid); m += 2; }
  if (m < rows.count) some_rows<Fmt, 1>(tile, rows, m, out, stride, valid);
}

template <Format Fmt>
void one_row(const uint8_t* p, int row, int64_t cols, float* out) {
  if constexpr (ts::is_plain(Fmt)) {
    constexpr int size = ts::plain_bytes(Fmt);
    for (int64_t k = 0; k < cols; ++k) {
      float lanes[ts::kRows];
      store(lanes, load_plain<Fmt>(p + k * ts::kRows * size));
      out[k] = lanes[row];
    }
    return;
  }
  constexpr Layout l = ts::layout(Fmt);
  const uint8_t* super = nullptr;
  for (int64_t b = 0; b < cols / ts::kBlock; ++b) {
    if constexpr (l.has_super()) {
      if (b % ts::kSuper == 0) {
        super = p;
        p += l.super_bytes();
      }
    }
    W w[8];
    load_quads<Fmt>(p, w);
    const Factors f = load_factors<Fmt>(p + l.weight_bytes(), super);
    p += l.block_bytes();
    float scale[2][ts::kRows], least[2][ts::kRows];
    for (int h = 0; h < 2; ++h) {
      const int from = l.sixteen() ? h : 0;
      store(scale[h], f.scale[from]);
      store(least[h], l.has_min() ? f.least[from] : set(0.0f));
    }
    for (int i = 0; i < 8; ++i) {
      uint8_t bytes[64];
      std::memcpy(bytes, &w[i], 64);
      for (int j = 0; j < 4; ++j) {
        const int q = bytes[4 * row + j] - l.bias;
        out[b * ts::kBlock + 4 * i + j] = scale[i / 4][row] * static_cast<float>(q) - least[i / 4][row];
      }
    }
  }
}

#define TS_EACH_FORMAT(X) \
  X(F32) X(F16) X(BF16) X(Q8_0) X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K) X(IQ4_NL) X(IQ4_XS)

void tile(Format format, const uint8_t* data, const Rows& rows, float* out, int64_t stride, int valid) {
  switch (format) {
#define TS_CASE(name) case Format::name: return all_rows<Format::name>(data, rows, out, stride, valid);
    TS_EACH_FORMAT(TS_CASE)
#undef TS_CASE
  }
}

void unpack_row(Format format, const uint8_t* data, int row, int64_t cols, float* out) {
  switch (format) {
#define TS_CASE(name) case Format::name: return one_row<Format::name>(data, row, cols, out);
    TS_EACH_FORMAT(TS_CASE)
#undef TS_CASE
  }
}

// Blocks of 32: scale is the largest magnitude / 127, hi the rounded quotient, lo what it leaves in 1/256 steps.
void quantize(const float* x, int64_t cols, int8_t* hi, int8_t* lo, float* scale, int32_t* sums) {
  for (int64_t b = 0; b < cols / ts::kBlock; ++b, x += 32, hi += 32, lo += 32) {
    const F v[2] = {load(x), load(x + 16)};
    const float largest = max_lane(max(abs(v[0]), abs(v[1])));
    const float step = largest / 127.0f;
    const F inverse = set(largest > 0 ? 127.0f / largest : 0.0f);
    scale[b] = step / 256.0f;
    for (int h = 0; h < 2; ++h) {
      const F quotient = mul(v[h], inverse);
      const F whole = max(set(-127.0f), min(set(127.0f), round(quotient)));
      const F rest = max(set(-128.0f), min(set(127.0f), round(mul(sub(quotient, whole), set(256.0f)))));
      store_s8(hi + 16 * h, whole);
      store_s8(lo + 16 * h, rest);
      sums[2 * b + h] = static_cast<int32_t>(sum(fma(whole, set(256.0f), rest)));
    }
  }
}

// exp for float32: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2], relative error about 2e-7 (Cephes expf coefficients).
inline F exp(F x) {
  x = max(set(-103.0f), min(set(88.3f), x));
  const F n = round(mul(x, set(1.44269504088896341f)));
  F r = fma(n, set(-0.693359375f), x);
  r = fma(n, set(2.12194440e-4f), r);
  F p = set(1.9875691500e-4f);
  p = fma(p, r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  p = add(fma(mul(p, r), r, r), set(1.0f));
  return scale_by_power(p, n);
}

// The same for x <= 0, and exactly 0 where it would be too small to count, -inf included.
inline F exp_or_zero(F x) { return keep_above(exp(x), x, -87.0f); }

void rms_norm(const float* x, const float* weight, int64_t cols, float eps, float* out) {
  F a = set(0.0f), b = set(0.0f);
  int64_t i = 0;
  for (; i + 32 <= cols; i += 32) {
    const F u = load(x + i), v = load(x + i + 16);
    a = fma(u, u, a);
    b = fma(v, v, b);
  }
  float total = sum(add(a, b));
  for (; i < cols; ++i) total += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(total / static_cast<float>(cols) + eps);
  for (i = 0; i + 16 <= cols; i += 16) store(out + i, mul(mul(load(x + i), set(factor)), load(weight + i)));
  for (; i < cols; ++i) out[i] = x[i] * factor * weight[i];
}

void add_rows(const float* a, const float* b, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, add(load(a + i), load(b + i)));
  for (; i < n; ++i) out[i] = a[i] + b[i];
}

// silu(g) u, or the tanh form of gelu(g) times u; both are g / (1 + exp(-t)) u.
void act_mul(const float* gate, const float* up, int64_t n, bool silu, float* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const int count = static_cast<int>(std::min<int64_t>(16, n - i));
    const F g = load_some(gate + i, count), u = load_some(up + i, count);
    const F cubed = mul(mul(g, g), g);
    const F t = silu ? g : mul(set(1.5957691216057308f), fma(set(0.044715f), cubed, g));
    const F y = div(g, add(set(1.0f), exp(sub(set(0.0f), t))));
    store_some(out + i, mul(y, u), count);
  }
}

void rotate(float* head, const float* cosines, const float* sines, int half) {
  for (int i = 0; i < half; i += 16) {
    const int count = std::min(16, half - i);
    const F a = load_some(head + i, count), b = load_some(head + half + i, count);
    const F c = load_some(cosines + i, count), s = load_some(sines + i, count);
    store_some(head + i, sub(mul(a, c), mul(b, s)), count);
    store_some(head + half + i, add(mul(b, c), mul(a, s)), count);
  }
}

void to_bf16(const float* x, int64_t n, uint16_t* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store_bf16(out + i, load(x + i));
  if (i < n) {
    uint16_t rest[16];
    store_bf16(rest, load_some(x + i, static_cast<int>(n - i)));
    std::memcpy(out + i, rest, 2 * static_cast<size_t>(n - i));
  }
}

template <class T>
inline const T* entry(const ts::AttentionTask& t, int64_t position, bool value) {
  const uint8_t* page = t.kv + t.table[position / t.page_size] * t.page_bytes;
  return reinterpret_cast<const T*>(page + (value ? t.value_bytes : 0) + position % t.page_size * t.token_bytes + t.head_bytes);
}

inline F widen(const uint16_t* p) { return load_bf16(p); }
inline F widen(const float* p) { return load(p); }

// Dot products of Q query rows and K keys, the sums kept apart until the end.
template <class T, int Q, int K>
inline void score_block(const float* const* q, const T* const* k, int head_dim, float (*out)[4]) {
  F acc[Q][K];
  for (auto& row : acc) for (auto& x : row) x = set(0.0f);
  for (int d = 0; d < head_dim; d += 16) {
    F keys[K];
    for (int j = 0; j < K; ++j) keys[j] = widen(k[j] + d);
    for (int i = 0; i < Q; ++i) {
      const F x = load(q[i] + d);
      for (int j = 0; j < K; ++j) acc[i][j] = fma(x, keys[j], acc[i][j]);
    }
  }
  for (int i = 0; i < Q; ++i) for (int j = 0; j < K; ++j) out[i][j] = sum(acc[i][j]);
}

template <class T>
inline void score_some(int rows, int keys, const float* const* q, const T* const* k, int head_dim, float (*out)[4]) {
  if (rows == 4 && keys == 4) return score_block<T, 4, 4>(q, k, head_dim, out);
  for (int i = 0; i < rows; ++i) {
    if (keys == 4) {
      score_block<T, 1, 4>(q + i, k, head_dim, out + i);
    } else {
      for (int j = 0; j < keys; ++j) {
        float cell[1][4];
        score_block<T, 1, 1>(q + i, k + j, head_dim, cell);
        out[i][j] = cell[0][0];
      }
    }
  }
}

inline bool sees(const ts::AttentionTask& t, int64_t query, int64_t key) {
  return key <= query && (t.window == 0 || key > query - t.window);
}

// Scores of up to four rows; a key that a row does not see gets -inf.
template <class T>
void scores_of(const ts::AttentionTask& t, int first, int rows, int64_t width) {
  const float none = -std::numeric_limits<float>::infinity();
  const float* q[4];
  for (int i = 0; i < rows; ++i) q[i] = t.q + (first + i) / t.group * t.q_stride + (first + i) % t.group * t.head_dim;
  for (int i = 0; i < rows; ++i) std::fill_n(t.scores + (first + i) * width, width, none);
  const int64_t last = t.first_position + (first + rows - 1) / t.group;
  const int64_t end = std::min(t.end, last + 1);
  for (int64_t key = t.live; key < end; key += 4) {
    const int some = static_cast<int>(std::min<int64_t>(4, end - key));
    const T* k[4];
    for (int n = 0; n < some; ++n) k[n] = entry<T>(t, key + n, false);
    float cells[4][4];
    score_some<T>(rows, some, q, k, t.head_dim, cells);
    for (int i = 0; i < rows; ++i) {
      const int64_t query = t.first_position + (first + i) / t.group;
      float* out = t.scores + (first + i) * width + key - t.begin;
      for (int n = 0; n < some; ++n) if (sees(t, query, key + n)) out[n] = cells[i][n] * t.scale;
    }
  }
}

// exp(s - max) in place; a row that sees no key here has max -inf and sum 0.
void soften(const ts::AttentionTask& t, int rows, int64_t width) {
  const float none = -std::numeric_limits<float>::infinity();
  for (int r = 0; r < rows; ++r) {
    float* s = t.scores + r * width;
    F top = set(none);
    for (int64_t j = 0; j < width; j += 16) top = max(top, load(s + j));
    t.max[r] = max_lane(top);
    t.sum[r] = 0.0f;
    if (t.max[r] == none) continue;
    F total = set(0.0f);
    for (int64_t j = 0; j < width; j += 16) {
      const F e = exp_or_zero(sub(load(s + j), set(t.max[r])));
      store(s + j, e);
      total = add(total, e);
    }
    t.sum[r] = sum(total);
  }
}

template <class T, int Q, int V>
inline void weigh_block(const ts::AttentionTask& t, int first, int d, int64_t width) {
  F acc[Q][V];
  for (auto& row : acc) for (auto& x : row) x = set(0.0f);
  const int64_t end = std::min(t.end, t.first_position + (first + Q - 1) / t.group + 1);
  for (int64_t key = t.live; key < end; ++key) {
    const T* v = entry<T>(t, key, true) + d;
    F values[V];
    for (int n = 0; n < V; ++n) values[n] = widen(v + 16 * n);
    for (int i = 0; i < Q; ++i) {
      const F p = set(t.scores[(first + i) * width + key - t.begin]);
      for (int n = 0; n < V; ++n) acc[i][n] = fma(p, values[n], acc[i][n]);
    }
  }
  for (int i = 0; i < Q; ++i) for (int n = 0; n < V; ++n) store(t.out + (first + i) * t.head_dim + d + 16 * n, acc[i][n]);
}

template <class T, int Q>
void weigh(const ts::AttentionTask& t, int first, int64_t width) {
  int d = 0;
  for (; d + 64 <= t.head_dim; d += 64) weigh_block<T, Q, 4>(t, first, d, width);
  for (; d < t.head_dim; d += 16) weigh_block<T, Q, 1>(t, first, d, width);
}

template <class T>
void attend_to(const ts::AttentionTask& t) {
  const int rows = t.queries * t.group;
  const int64_t width = (t.end - t.begin + 15) / 16 * 16;
  for (int first = 0; first < rows; first += 4) scores_of<T>(t, first, std::min(4, rows - first), width);
  soften(t, rows, width);
  int first = 0;
  for (; first + 4 <= rows; first += 4) weigh<T, 4>(t, first, width);
  for (; first < rows; ++first) weigh<T, 1>(t, first, width);
}

void attend(const ts::AttentionTask& t) {
  if (t.wide) attend_to<float>(t);
  else attend_to<uint16_t>(t);
}

// One row's parts, in order, to their softmax-weighted mean.
void combine(const float* const* out, const float* maxima, const float* sums, int parts, int64_t stride, int head_dim, float* result) {
  float top = -std::numeric_limits<float>::infinity(), total = 0.0f;
  for (int p = 0; p < parts; ++p) top = std::max(top, maxima[p * stride]);
  for (int i = 0; i < head_dim; i += 16) store(result + i, set(0.0f));
  for (int p = 0; p < parts; ++p) {
    if (sums[p * stride] == 0.0f) continue;
    const float factor = std::exp(maxima[p * stride] - top);
    total += factor * sums[p * stride];
    for (int i = 0; i < head_dim; i += 16) store(result + i, fma(set(factor), load(out[p] + i), load(result + i)));
  }
  for (int i = 0; i < head_dim; i += 16) store(result + i, mul(load(result + i), set(1.0f / total)));
}

// Of equal largest values the first.
int64_t argmax(const float* x, int64_t n) {
  float best = -std::numeric_limits<float>::infinity();
  int64_t at = 0, i = 0;
  for (; i + 64 <= n; i += 64) {
    const F top = max(max(load(x + i), load(x + i + 16)), max(load(x + i + 32), load(x + i + 48)));
    const float value = max_lane(top);
    if (value > best) {
      best = value;
      for (int j = 0; j < 64; ++j) if (x[i + j] == value) { at = i + j; break; }
    }
  }
  for (; i < n; ++i) if (x[i] > best) { best = x[i]; at = i; }
  return at;
}

constexpr ts::Kernels make(const char* name) {
  return {name, tile, unpack_row, quantize, rms_norm, add_rows, act_mul, rotate, to_bf16, attend, combine, argmax};
}

}  // namespace
