#include "pack.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>

namespace ts {
namespace {

// One block of 32 columns of one row, out of the file: unsigned codes, and its scales as the tile stores them.
struct Columns {
  uint8_t q[kBlock];
  uint16_t half[2];   // d, m
  uint8_t bytes[4];   // s, s', m, m' in the order they are stored
};

struct SuperFactors {
  uint16_t d = 0, least = 0;
};

uint16_t half_at(const uint8_t* p) {
  uint16_t v;
  std::memcpy(&v, p, 2);
  return v;
}

void nibbles(const uint8_t* p, uint8_t* q) {  // elements 0..15 low, 16..31 high
  for (int i = 0; i < 16; ++i) {
    q[i] = p[i] & 15;
    q[i + 16] = p[i] >> 4;
  }
}

void fifth_bits(const uint8_t* p, uint8_t* q) {
  for (int b = 0; b < 4; ++b) {  // bit i of a byte to bit 4 of byte i: copy the byte eight times, keep one bit of each
    uint64_t lanes = p[b] * 0x0101010101010101ull & 0x8040201008040201ull, codes;
    lanes = (lanes + 0x7f7f7f7f7f7f7f7full) >> 3 & 0x1010101010101010ull;
    std::memcpy(&codes, q + 8 * b, 8);
    codes |= lanes;
    std::memcpy(q + 8 * b, &codes, 8);
  }
}

// Scale and min j of the twelve bytes that hold eight 6-bit pairs in Q4_K and Q5_K.
void six_bit_pair(const uint8_t* p, int j, uint8_t* scale, uint8_t* least) {
  if (j < 4) {
    *scale = p[j] & 63;
    *least = p[j + 4] & 63;
  } else {
    *scale = static_cast<uint8_t>((p[j + 4] & 15) | (p[j - 4] >> 6 << 4));
    *least = static_cast<uint8_t>((p[j + 4] >> 4) | (p[j] >> 6 << 4));
  }
}

// Q3_K: sixteen 6-bit scales, low nibbles in bytes 0..7, top bit pairs in bytes 8..11, raised by 32.
int8_t six_bit_scale(const uint8_t* p, int j) {
  const int low = j < 8 ? p[j] & 15 : p[j - 8] >> 4;
  const int high = p[8 + j % 4] >> (j / 4 * 2) & 3;
  return static_cast<int8_t>((low | high << 4) - 32);
}

template <Format F>
void read_small(const uint8_t* p, Columns* c) {
  c->half[0] = half_at(p);
  c->half[1] = layout(F).has_min() ? half_at(p + 2) : uint16_t{0};
  switch (F) {
    case Format::Q8_0:
      for (int i = 0; i < 32; ++i) c->q[i] = p[2 + i] ^ 0x80;  // raised by 128
      break;
    case Format::Q4_0:
    case Format::IQ4_NL: nibbles(p + 2, c->q); break;
    case Format::Q4_1: nibbles(p + 4, c->q); break;
    case Format::MXFP4:  // [e][16 bytes of nibbles]
      c->bytes[0] = p[0];
      nibbles(p + 1, c->q);
      break;
    case Format::Q5_0:
      nibbles(p + 6, c->q);
      fifth_bits(p + 2, c->q);
      break;
    default:  // Q5_1
      nibbles(p + 8, c->q);
      fifth_bits(p + 4, c->q);
  }
}

// Block j of a super-block of 256.
template <Format F>
void read_super(const uint8_t* p, int j, Columns* c, SuperFactors* factors) {
  const int half = j / 4, shift = j % 4 * 2;  // of formats that keep four runs of 32 in one span of bytes
  switch (F) {
    case Format::Q2_K: {  // [16 scales, 4 + 4 bits][64 bytes of pairs][d][dmin]
      *factors = {half_at(p + 80), half_at(p + 82)};
      for (int i = 0; i < 32; ++i) c->q[i] = p[16 + 32 * half + i] >> shift & 3;
      for (int h = 0; h < 2; ++h) {
        c->bytes[h] = p[2 * j + h] & 15;
        c->bytes[2 + h] = p[2 * j + h] >> 4;
      }
      break;
    }
    case Format::Q3_K: {  // [32 bytes of third bits][64 bytes of pairs][12 scales][d]; a third bit of 0 means minus 4
      *factors = {half_at(p + 108), 0};
      for (int i = 0; i < 32; ++i) c->q[i] = static_cast<uint8_t>((p[32 + 32 * half + i] >> shift & 3) | (p[i] >> j & 1) << 2);
      for (int h = 0; h < 2; ++h) c->bytes[h] = static_cast<uint8_t>(six_bit_scale(p + 96, 2 * j + h));
      break;
    }
    case Format::Q4_K: {  // [d][dmin][12 scales][128 bytes of nibbles]
      *factors = {half_at(p), half_at(p + 2)};
      for (int i = 0; i < 32; ++i) c->q[i] = p[16 + 32 * (j / 2) + i] >> (j % 2 * 4) & 15;
      six_bit_pair(p + 4, j, &c->bytes[0], &c->bytes[1]);
      break;
    }
    case Format::Q5_K: {  // [d][dmin][12 scales][32 bytes of fifth bits][128 bytes of nibbles]
      *factors = {half_at(p), half_at(p + 2)};
      for (int i = 0; i < 32; ++i) {
        c->q[i] = static_cast<uint8_t>((p[48 + 32 * (j / 2) + i] >> (j % 2 * 4) & 15) | (p[16 + i] >> j & 1) << 4);
      }
      six_bit_pair(p + 4, j, &c->bytes[0], &c->bytes[1]);
      break;
    }
    case Format::Q6_K: {  // [128 bytes of nibbles][64 bytes of pairs][16 scales][d]
      *factors = {half_at(p + 208), 0};
      const uint8_t* low = p + 64 * half + 32 * (j % 2);
      for (int i = 0; i < 32; ++i) {
        c->q[i] = static_cast<uint8_t>((low[i] >> (j % 4 / 2 * 4) & 15) | (p[128 + 32 * half + i] >> shift & 3) << 4);
      }
      for (int h = 0; h < 2; ++h) c->bytes[h] = p[192 + 2 * j + h];
      break;
    }
    default: {  // IQ4_XS: [d][top bit pairs of scales: u16][4 bytes of scale nibbles][128 bytes of codes]
      *factors = {half_at(p), 0};
      nibbles(p + 8 + 16 * j, c->q);
      const int low = p[4 + j / 2] >> (j % 2 * 4) & 15, high = half_at(p + 2) >> (2 * j) & 3;
      c->bytes[0] = static_cast<uint8_t>((low | high << 4) - 32);
    }
  }
}

constexpr int file_block_bytes(Format f) {
  switch (f) {
    case Format::MXFP4: return 17;
    case Format::Q8_0: return 34;
    case Format::Q4_0:
    case Format::IQ4_NL: return 18;
    case Format::Q4_1: return 20;
    case Format::Q5_0: return 22;
    case Format::Q5_1: return 24;
    case Format::Q2_K: return 84;
    case Format::Q3_K: return 110;
    case Format::Q4_K: return 144;
    case Format::Q5_K: return 176;
    case Format::Q6_K: return 210;
    case Format::IQ4_XS: return 136;
    case Format::Planes: return 34;
    default: return 0;
  }
}

// Put the codes of one row into the block, a quad at a time, in the bit layout that load_quads reads.
template <int Bits>
void place_bits(const uint8_t* q, int row, uint8_t* out) {
  const auto put = [row, out](int vector, uint32_t bits) { std::memcpy(out + 64 * vector + 4 * row, &bits, 4); };
  uint32_t quads[8];
  std::memcpy(quads, q, 32);
  if constexpr (Bits == 8) {
    for (int i = 0; i < 8; ++i) put(i, quads[i]);
  } else if constexpr (Bits >= 4) {
    for (int i = 0; i < 4; ++i) put(i, (quads[i] & 0x0f0f0f0fu) | (quads[i + 4] & 0x0f0f0f0fu) << 4);
    if constexpr (Bits == 5) {
      uint32_t top = 0;
      for (int i = 0; i < 8; ++i) top |= (quads[i] >> 4 & 0x01010101u) << i;
      put(4, top);
    }
    if constexpr (Bits == 6) {
      uint32_t top[2] = {};
      for (int i = 0; i < 8; ++i) top[i / 4] |= (quads[i] >> 4 & 0x03030303u) << (2 * (i % 4));
      put(4, top[0]);
      put(5, top[1]);
    }
  } else {
    uint32_t low[2] = {};
    for (int i = 0; i < 8; ++i) low[i / 4] |= (quads[i] & 0x03030303u) << (2 * (i % 4));
    put(0, low[0]);
    put(1, low[1]);
    if constexpr (Bits == 3) {
      uint32_t top = 0;
      for (int i = 0; i < 8; ++i) top |= (quads[i] >> 2 & 0x01010101u) << i;
      put(2, top);
    }
  }
}

template <Format F>
void place_scales(const Columns& c, int row, uint8_t* out) {
  constexpr Layout l = layout(F);
  if constexpr (l.scales == Scales::Power) {
    out[row] = c.bytes[0];
    return;
  }
  if constexpr (!l.has_super()) {
    std::memcpy(out + 2 * row, &c.half[0], 2);
    if (l.has_min()) std::memcpy(out + 32 + 2 * row, &c.half[1], 2);
    return;
  }
  for (int i = 0; i < l.scale_bytes() / kRows; ++i) out[16 * i + row] = c.bytes[i];
}

// Four rows of four 16-bit elements each, to four columns of four.
void transpose(const uint64_t* in, uint64_t* out) {
  constexpr uint64_t kEven = 0x0000ffff0000ffffull, kLow = 0xffffffffull;
  const uint64_t ab[2] = {(in[0] & kEven) | (in[1] & kEven) << 16, (in[0] >> 16 & kEven) | (in[1] & ~kEven)};
  const uint64_t cd[2] = {(in[2] & kEven) | (in[3] & kEven) << 16, (in[2] >> 16 & kEven) | (in[3] & ~kEven)};
  for (int i = 0; i < 2; ++i) {
    out[i] = (ab[i] & kLow) | cd[i] << 32;
    out[i + 2] = ab[i] >> 32 | (cd[i] & ~kLow);
  }
}

void pack_halves(const uint8_t* source, int64_t cols, uint8_t* out) {  // a whole tile; cols is a multiple of 4
  for (int64_t k = 0; k < cols; k += 4) {
    for (int r = 0; r < kRows; r += 4) {
      uint64_t in[4], turned[4];
      for (int i = 0; i < 4; ++i) std::memcpy(in + i, source + ((r + i) * cols + k) * 2, 8);
      transpose(in, turned);
      for (int i = 0; i < 4; ++i) std::memcpy(out + ((k + i) * kRows + r) * 2, turned + i, 8);
    }
  }
}

void pack_plain(int size, const uint8_t* source, int rows, int64_t cols, uint8_t* out) {
  if (size == 2 && rows == kRows && cols % 4 == 0 && std::endian::native == std::endian::little) return pack_halves(source, cols, out);
  for (int64_t k = 0; k < cols; ++k) {
    for (int r = 0; r < rows; ++r) std::memcpy(out + (k * kRows + r) * size, source + (r * cols + k) * size, static_cast<size_t>(size));
  }
}

template <Format F>
void pack_blocks(const uint8_t* source, int rows, int64_t cols, uint8_t* out) {
  constexpr Layout l = layout(F);
  constexpr int per = l.has_super() ? kSuper : 1, size = file_block_bytes(F);
  const int64_t row_bytes = cols / kBlock / per * size;
  for (int r = 0; r < rows; ++r) {
    const uint8_t* p = source + r * row_bytes;
    uint8_t *at = out, *super = nullptr;
    for (int64_t b = 0; b < cols / kBlock; ++b, at += l.block_bytes()) {
      Columns c;
      if constexpr (l.has_super()) {
        if (b % kSuper == 0) {
          super = at;
          at += l.super_bytes();
        }
        SuperFactors factors;
        read_super<F>(p + b / per * size, static_cast<int>(b % kSuper), &c, &factors);
        std::memcpy(super + 2 * r, &factors.d, 2);
        if (l.has_min()) std::memcpy(super + 32 + 2 * r, &factors.least, 2);
      } else {
        read_small<F>(p + b * size, &c);
      }
      place_bits<l.bits>(c.q, r, at);
      place_scales<F>(c, r, at + l.weight_bytes());
    }
  }
}

}  // namespace

int64_t file_row_bytes(Format f, int64_t cols) {
  if (is_plain(f)) return cols * plain_bytes(f);
  return cols / (layout(f).has_super() ? kBlock * kSuper : kBlock) * file_block_bytes(f);
}

void pack_tile(Format f, const uint8_t* source, int rows, int64_t cols, uint8_t* out) {
  if (rows < kRows) std::memset(out, 0, static_cast<size_t>(tile_bytes(f, cols)));
  switch (f) {
    case Format::Q8_0: return pack_blocks<Format::Q8_0>(source, rows, cols, out);
    case Format::Q4_0: return pack_blocks<Format::Q4_0>(source, rows, cols, out);
    case Format::Q4_1: return pack_blocks<Format::Q4_1>(source, rows, cols, out);
    case Format::Q5_0: return pack_blocks<Format::Q5_0>(source, rows, cols, out);
    case Format::Q5_1: return pack_blocks<Format::Q5_1>(source, rows, cols, out);
    case Format::Q2_K: return pack_blocks<Format::Q2_K>(source, rows, cols, out);
    case Format::Q3_K: return pack_blocks<Format::Q3_K>(source, rows, cols, out);
    case Format::Q4_K: return pack_blocks<Format::Q4_K>(source, rows, cols, out);
    case Format::Q5_K: return pack_blocks<Format::Q5_K>(source, rows, cols, out);
    case Format::Q6_K: return pack_blocks<Format::Q6_K>(source, rows, cols, out);
    case Format::IQ4_NL: return pack_blocks<Format::IQ4_NL>(source, rows, cols, out);
    case Format::IQ4_XS: return pack_blocks<Format::IQ4_XS>(source, rows, cols, out);
    case Format::MXFP4: return pack_blocks<Format::MXFP4>(source, rows, cols, out);
    default: return pack_plain(plain_bytes(f), source, rows, cols, out);
  }
}

namespace {

// A row's length of l - 7.5 in a block, in sixths and rounded up, by -sum l (l - 15), which is 0 to 32 * 56.
std::array<uint8_t, 32 * 56 + 1> low_lengths(int64_t blocks) {
  const double rounding = static_cast<double>(2 * blocks + 8) * 724 * 0x1p-24;  // of the sums, per unit of the activations' length
  std::array<uint8_t, 32 * 56 + 1> lengths;
  for (size_t i = 0; i < lengths.size(); ++i) {
    const double squares = 32 * 56.25 - static_cast<double>(i);
    lengths[i] = static_cast<uint8_t>(std::min(255.0, std::ceil(6 * (std::sqrt(squares) + rounding))));
  }
  return lengths;
}

}  // namespace

void pack_planes(const uint8_t* source, int rows, int64_t cols, uint8_t* high, uint8_t* low) {
  const int64_t blocks = cols / kBlock;
  if (rows < kRows) {
    std::memset(high, 0, static_cast<size_t>(high_bytes(cols)));
    std::memset(low, 0, static_cast<size_t>(low_bytes(cols)));
  }
  const auto lengths = low_lengths(blocks);
  for (int r = 0; r < rows; ++r) {
    const uint8_t* p = source + r * blocks * 34;
    for (int64_t b = 0; b < blocks; ++b, p += 34) {
      uint8_t* coarse = high + b * kHighBlock;
      uint8_t* fine = low + (r % 4 * blocks + b) * 64 + r / 4 * 16;
      uint32_t quads[8];
      std::memcpy(quads, p + 2, 32);
      for (auto& quad : quads) quad ^= 0x80808080u;
      int32_t sum = 0;
      for (int i = 0; i < 4; ++i) {
        const uint32_t coarse_quad = (quads[i] >> 4 & 0x0f0f0f0fu) | (quads[i + 4] & 0xf0f0f0f0u);
        const uint32_t fine_quad = (quads[i] & 0x0f0f0f0fu) | (quads[i + 4] & 0x0f0f0f0fu) << 4;
        std::memcpy(coarse + 64 * i + 4 * r, &coarse_quad, 4);
        std::memcpy(fine + 4 * i, &fine_quad, 4);
      }
      for (int k = 0; k < kBlock; ++k) sum += (p[2 + k] & 15) * (15 - (p[2 + k] & 15));
      std::memcpy(coarse + 256 + 2 * r, p, 2);
      coarse[288 + r] = lengths[static_cast<size_t>(sum)];
    }
  }
}

}  // namespace ts
