// Packed weights times rows of activations, and one row unpacked.
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
    if constexpr (l.table != ts::Table::None) {
      for (int i = 0; i < 8; ++i) w[i] = look_up(w[i], l.table == ts::Table::Iq4 ? ts::kIq4Values : ts::kE2m1Values);
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
  } else if constexpr (l.scales == Scales::Power) {
    f.scale[0] = scale_by_power(set(1.0f), sub(load_u8(p), set(128.0f)));
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

// Weights are read once, and the hardware's own prefetch stops at each 4 KiB. Where a block is little work for its bytes it
// is followed best into the second level, others further ahead into the first (measured on Zen 4: bytes at 30 and 22 GB/s,
// five bits at 16 and 19).
template <Layout L>
inline void prefetch(const uint8_t* p) {
  constexpr bool light = L.bits == 8;
  constexpr int ahead = light ? 1024 : 2048;
  for (int at = 0; at < L.block_bytes(); at += 64) __builtin_prefetch(p + ahead + at, 0, light ? 2 : 3);
}

// `Count` rows of activations against one tile. Each row's arithmetic is the same whatever Count is.
template <Format Fmt, int Count>
void tile_rows(const uint8_t* p, const Rows& rows, int64_t first, float* out, int64_t stride, int valid) {
  constexpr Layout l = ts::layout(Fmt);
  constexpr bool wide = l.wide();
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
    prefetch<l>(p);
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
  X(F32) X(F16) X(BF16) X(Q8_0) X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K) X(IQ4_NL) X(IQ4_XS) \
  X(MXFP4)

void tile(Format format, const uint8_t* data, const Rows& rows, float* out, int64_t stride, int valid) {
  switch (format) {
#define TS_CASE(name) case Format::name: return all_rows<Format::name>(data, rows, out, stride, valid);
    TS_EACH_FORMAT(TS_CASE)
#undef TS_CASE
    case Format::Planes: break;  // it has kernels of its own
  }
}

void unpack_row(Format format, const uint8_t* data, int row, int64_t cols, float* out) {
  switch (format) {
#define TS_CASE(name) case Format::name: return one_row<Format::name>(data, row, cols, out);
    TS_EACH_FORMAT(TS_CASE)
#undef TS_CASE
    case Format::Planes: break;  // it has kernels of its own
  }
}
