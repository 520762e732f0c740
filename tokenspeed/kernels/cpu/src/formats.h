// Packed weights as the kernels read them: tiles of 16 rows, blocks of 32 columns, the rows of a tile interleaved.
//
// A tile is its blocks one after the other. A block holds 32 columns of 16 rows: eight quads of four columns, each quad 64
// bytes (row 0's four, row 1's four, ...), or packed into fewer bits as below; then its scales, 16 of each kind. Formats
// with super-blocks put the float16 factors of 256 columns before every eighth block. Sizes equal the file's, but for
// 6-bit scales, which take a byte.
#pragma once
#include <cstdint>

namespace ts {

enum class Format : int32_t { F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4, Planes };

constexpr int kLayoutVersion = 2;  // to be raised with every change of what follows: packed copies lie on disks
constexpr int kRows = 16;   // rows of a tile
constexpr int kBlock = 32;  // columns of a block
constexpr int kSuper = 8;   // blocks that share super-block factors

// How a block's columns are scaled.
enum class Scales {
  Half,       // d                     value = d (q - bias)
  Power,      // u8 e                  value = 2^(e - 128) (q - bias)
  HalfMin,    // d, m                  value = d q + m
  SuperMin,   // u8 s, u8 m; D, M      value = D s q - M m
  SuperMin16, // the same for each 16 columns
  Super,      // i8 s; D               value = D s (q - bias)
  Super16,    // the same for each 16 columns
};

// What four-bit codes stand for, raised by the bias.
enum class Table { None, Iq4, E2m1 };

alignas(16) constexpr uint8_t kIq4Values[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
alignas(16) constexpr uint8_t kE2m1Values[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};  // of halves

struct Layout {
  int bits;        // of a stored weight: 2, 3, 4, 5, 6 or 8
  Scales scales;
  int bias;        // what q has been raised by to be unsigned
  Table table;
  constexpr bool sixteen() const { return scales == Scales::SuperMin16 || scales == Scales::Super16; }
  constexpr bool has_min() const { return scales == Scales::HalfMin || scales == Scales::SuperMin || scales == Scales::SuperMin16; }
  constexpr bool has_super() const { return scales != Scales::Half && scales != Scales::HalfMin && scales != Scales::Power; }
  constexpr bool wide() const { return bits == 8 || table == Table::Iq4; }  // codes beyond 127
  constexpr int weight_bytes() const { return kRows * kBlock * bits / 8; }
  constexpr int scale_bytes() const {
    switch (scales) {
      case Scales::Half: return 32;
      case Scales::HalfMin: return 64;
      case Scales::SuperMin: return 32;
      case Scales::SuperMin16: return 64;
      case Scales::Super:
      case Scales::Power: return 16;
      default: return 32;
    }
  }
  constexpr int super_bytes() const { return !has_super() ? 0 : has_min() ? 64 : 32; }
  constexpr int block_bytes() const { return weight_bytes() + scale_bytes(); }
};

constexpr Layout layout(Format f) {
  switch (f) {
    case Format::Q8_0: return {8, Scales::Half, 128, Table::None};
    case Format::Q4_0: return {4, Scales::Half, 8, Table::None};
    case Format::Q4_1: return {4, Scales::HalfMin, 0, Table::None};
    case Format::Q5_0: return {5, Scales::Half, 16, Table::None};
    case Format::Q5_1: return {5, Scales::HalfMin, 0, Table::None};
    case Format::Q2_K: return {2, Scales::SuperMin16, 0, Table::None};
    case Format::Q3_K: return {3, Scales::Super16, 4, Table::None};
    case Format::Q4_K: return {4, Scales::SuperMin, 0, Table::None};
    case Format::Q5_K: return {5, Scales::SuperMin, 0, Table::None};
    case Format::Q6_K: return {6, Scales::Super16, 32, Table::None};
    case Format::IQ4_NL: return {4, Scales::Half, 128, Table::Iq4};
    case Format::IQ4_XS: return {4, Scales::Super, 128, Table::Iq4};
    case Format::MXFP4: return {4, Scales::Power, 12, Table::E2m1};
    default: return {0, Scales::Half, 0, Table::None};
  }
}

constexpr bool is_plain(Format f) { return f == Format::F32 || f == Format::F16 || f == Format::BF16; }
constexpr int plain_bytes(Format f) { return f == Format::F32 ? 4 : 2; }

// Q8_0 in two planes, so that the high one can be read alone: q + 128 = 16 h + l. A block of the high plane is its nibbles
// h as any 4-bit block, the float16 factors, and for each row the length of its l - 7.5 in sixths, rounded up. The low plane
// of a tile is four parts of four rows each, so that few lines hold one row: part i has the rows i, i + 4, i + 8 and i + 12,
// and of each row of a block 16 bytes, whose low nibbles are columns 0 to 15. The high planes of all tiles come first.
constexpr int64_t kHighBlock = 256 + 32 + 16, kLowBlock = 256;
constexpr int64_t high_bytes(int64_t cols) { return cols / kBlock * kHighBlock; }
constexpr int64_t low_bytes(int64_t cols) { return cols / kBlock * kLowBlock; }

// Bytes of one tile of `cols` columns.
constexpr int64_t tile_bytes(Format f, int64_t cols) {
  if (f == Format::Planes) return high_bytes(cols) + low_bytes(cols);
  if (is_plain(f)) return kRows * cols * plain_bytes(f);
  const Layout l = layout(f);
  return cols / kBlock * l.block_bytes() + cols / (kBlock * kSuper) * l.super_bytes();
}

}  // namespace ts
