// Q8_0 in two nibble planes: a first look by the high plane with a bound on what the low one can add, and exact products.

// While one plane of a tile is used, fetch the one that comes after it: `bytes` of it for each block.
template <int Bytes>
inline void fetch_plane(const uint8_t* p, int64_t block) {
  for (int at = 0; at < Bytes; at += 64) __builtin_prefetch(p + block * Bytes + at);
}

// Sums of the high plane, in halves, and how far the low plane can take them. low: of the tile, where it comes next.
template <int Count, bool Bound>
inline void high_plane(const uint8_t* p, const uint8_t* low, const Rows& rows, int64_t first, const float* reach, F (&acc)[Count], F (&bound)[Count]) {
  const int64_t blocks = rows.cols / ts::kBlock;
  for (int m = 0; m < Count; ++m) acc[m] = bound[m] = set(0.0f);
  for (int64_t b = 0; b < blocks; ++b, p += ts::kHighBlock) {
    if constexpr (Bound) fetch_plane<ts::kHighBlock>(p + 1024, 0);
    else fetch_plane<ts::kLowBlock>(low, b);
    W w[8];
    load_quads<Format::Q4_0>(p, w);
    const F d = load_f16(halves(p + 256));
    const F length = Bound ? mul(abs(d), load_u8(p + 288)) : d;
    for (int m = 0; m < Count; ++m) {
      const int64_t at = (first + m) * blocks + b;
      const int8_t* hi = rows.hi + at * ts::kBlock;
      const int8_t* lo = rows.lo + at * ts::kBlock;
      I x = int_set(0), y = int_set(0);
      for (int i = 0; i < 8; ++i) {
        x = dot<false>(x, w[i], quad(hi + 4 * i));
        y = dot<false>(y, w[i], quad(lo + 4 * i));
      }
      const I total = int_add(int_shift<5>(int_scaled_add(x, y)), int_set(-241 * (rows.sums[2 * at] + rows.sums[2 * at + 1])));
      acc[m] = fma(to_float(total), mul(d, set(0.5f * rows.scale[at])), acc[m]);
      if constexpr (Bound) bound[m] = fma(length, set(reach[at]), bound[m]);
    }
  }
}

inline I low_sums(W v, const int8_t* hi, const int8_t* lo) {
  const W left = low_nibbles(v), right = high_nibbles(v);
  const I x = dot_lanes(dot_lanes(int_set(0), left, load_lanes(hi)), right, load_lanes(hi + 16));
  const I y = dot_lanes(dot_lanes(int_set(0), left, load_lanes(lo)), right, load_lanes(lo + 16));
  return int_scaled_add(x, y);
}

inline F low_step(F acc, I sums, const uint8_t* high, const Rows& rows, int64_t at) {
  const I total = int_add(int_shift<1>(sums), int_set(-15 * (rows.sums[2 * at] + rows.sums[2 * at + 1])));
  return fma(to_float(total), mul(load_f16(halves(high + 256)), set(0.5f * rows.scale[at])), acc);
}

inline F low_plane(const uint8_t* high, const uint8_t* low, const Rows& rows, int64_t row) {
  const int64_t blocks = rows.cols / ts::kBlock;
  F acc = set(0.0f);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t at = row * blocks + b;
    const int8_t* hi = rows.hi + at * ts::kBlock;
    const int8_t* lo = rows.lo + at * ts::kBlock;
    I t[4];
    fetch_plane<ts::kHighBlock>(high + ts::high_bytes(rows.cols), b);
    for (int i = 0; i < 4; ++i) t[i] = low_sums(load_bytes(low + (i * blocks + b) * 64), hi, lo);
    acc = low_step(acc, gather_sums(t[0], t[1], t[2], t[3]), high + b * ts::kHighBlock, rows, at);
  }
  return acc;
}

// What sixteen products seen by the high plane alone come to once scaled and with noise, and at most: bounds become upper
// ends, with room for rounding here and in the sampler. Gives the largest of both.
void weigh_look(const float* near, float* bound, const float* noise, float inverse, float* value, float* most) {
  const F n = mul(load(near), set(inverse)), v = noise ? add(n, load(noise)) : n;
  const F slack = fma(add(abs(n), abs(v)), set(1e-6f), set(2e-4f));
  const F top = add(fma(load(bound), set(inverse * 1.000001f), v), slack);
  store(bound, top);
  *value = max_lane(v);
  *most = max_lane(top);
}

// Exact products of the rows of one part of a tile, the same bits as planes_tile gives; the other lanes mean nothing.
void refine(const uint8_t* high, const uint8_t* low, const Rows& rows, int64_t row, int part, const float* near, float* out) {
  const int64_t blocks = rows.cols / ts::kBlock;
  F acc = set(0.0f);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t at = row * blocks + b;
    const I t = low_sums(load_bytes(low + (part * blocks + b) * 64), rows.hi + at * ts::kBlock, rows.lo + at * ts::kBlock);
    acc = low_step(acc, gather_sums(t, t, t, t), high + b * ts::kHighBlock, rows, at);
  }
  store(out, add(load(near), acc));
}

template <int Count>
void planes_rows(const uint8_t* high, const uint8_t* low, const Rows& rows, int64_t first, float* out, int64_t stride, int valid) {
  F acc[Count], unused[Count];
  high_plane<Count, false>(high, low, rows, first, nullptr, acc, unused);
  for (int m = 0; m < Count; ++m) {
    store_some(out + (first + m) * stride, add(acc[m], low_plane(high, low, rows, first + m)), valid);
  }
}

void planes_tile(const uint8_t* high, const uint8_t* low, const Rows& rows, float* out, int64_t stride, int valid) {
  int64_t m = 0;
  for (; m + 4 <= rows.count; m += 4) planes_rows<4>(high, low, rows, m, out, stride, valid);
  for (; m < rows.count; ++m) planes_rows<1>(high, low, rows, m, out, stride, valid);
}

template <int Count>
void screen_rows(const uint8_t* high, const Rows& rows, int64_t first, const float* reach, float* near, float* bound, int64_t stride) {
  F acc[Count], most[Count];
  high_plane<Count, true>(high, nullptr, rows, first, reach, acc, most);
  for (int m = 0; m < Count; ++m) {
    store(near + (first + m) * stride, acc[m]);
    store(bound + (first + m) * stride, most[m]);
  }
}

void screen_tile(const uint8_t* high, const Rows& rows, const float* reach, float* near, float* bound, int64_t stride) {
  int64_t m = 0;
  for (; m + 4 <= rows.count; m += 4) screen_rows<4>(high, rows, m, reach, near, bound, stride);
  if (m + 2 <= rows.count) { screen_rows<2>(high, rows, m, reach, near, bound, stride); m += 2; }
  if (m < rows.count) screen_rows<1>(high, rows, m, reach, near, bound, stride);
}

void planes_row(const uint8_t* high, const uint8_t* low, int row, int64_t cols, float* out) {
  const int64_t blocks = cols / ts::kBlock;
  for (int64_t b = 0; b < blocks; ++b, high += ts::kHighBlock, out += ts::kBlock) {
    const uint8_t* fine = low + (row % 4 * blocks + b) * 64 + row / 4 * 16;
    float d[ts::kRows];
    store(d, load_f16(halves(high + 256)));
    for (int k = 0; k < ts::kBlock; ++k) {
      const int shift = 4 * (k / 16), h = high[64 * (k % 16 / 4) + 4 * row + k % 4] >> shift & 15, l = fine[k % 16] >> shift & 15;
      out[k] = d[row] * static_cast<float>(16 * h + l - 128);
    }
  }
}
