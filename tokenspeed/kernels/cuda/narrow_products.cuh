// Products of narrow weights: 8 rows of W and 64 bytes of each, of which thread (g, t) of a warp, g = lane / 4 and t = lane % 4,
// holds the t-th 16 bytes of row g; times one row x of the same columns, or up to eight by e4m3.
//
// W is the first factor of an mma and x the second. Of the sixteen rows of the first factor the upper eight are the same rows
// of W with other columns; of the eight columns of the second factor 0 has x of the first half's columns, 1 of the second
// half's. So each element of W is multiplied once, by as few instructions as can be; sums 0 and 3 of thread (g, 0) are the
// halves of row g. Columns of integers have two planes, the second one in columns 2 and 3, whose sums thread (g, 1) has. So
// has a second row of x; four fill the columns, and eight are two such products by the same registers of W.
// Which columns a thread holds is of no matter as long as it is the same ones of W and of x.

#pragma once

#include "row.cuh"

// Two codes of e2m1 as bf16, of a word shifted so that their signs are top bits, and so that their other bits are 6 to 8.
__device__ inline u32 e2m1_pair(u32 signs, u32 others) { return signs & 0x80008000u | others & 0x01c001c0u; }

// What a warp has of x in registers at a time, and its sums. Wide: several rows of x lie in shared memory as float16, else as
// e4m3.
template <int Format, bool HalfScales, int Rows, bool Wide>
struct Products {
  static constexpr bool INTEGER = Format == INT8 || Format == INT4;
  // Columns of an mma's second factor that are in use.
  static constexpr int USED = INTEGER ? 4 : Rows < 4 ? 2 * Rows : 8;
  static constexpr int PRODUCTS = Rows > 4 ? 2 : 1;
  u32 mask = held_constant(0xf0f0f0f0u);
  float sums[2 * PRODUCTS][4];  // two of each, as one product waits for the one before it into the same

  __device__ void clear() {
    for (int i = 0; i < 2 * PRODUCTS; ++i)
      for (int j = 0; j < 4; ++j) sums[i][j] = 0;
  }

  // Where thread (g, t)'s part of the first 64 bytes' columns of x begins, in bytes. apart: planes, or rows.
  __device__ static u32 x_at(int g, int t, int apart) {
    int half = g % 2;
    if (Format == INT8) return g / 2 * apart + t * 16 + half * 8;
    if (Format == INT4) return g / 2 * apart + t * 32 + half * 16;
    return Format == E4M3 ? g / 2 * apart + (t * 16 + half * 8) * (1 + Wide) : t * 16 + half * 64;
  }
  // Bytes of x of 64 bytes of W.
  static constexpr int X_STEP = (INTEGER || !Wide ? 512 : 1024) / bits_of(Format);

  // 64 bytes of each row; `x` from x_at, `x_scale` and `scales` where they have some.
  __device__ void add(u32 (&held)[4], u32 x, int apart, bool wanted, uint4 w, float x_scale, const u8* scales) {
    if (Format == E4M3) {
      u32 words[] = {w.x, w.z, w.y, w.w}, low[4], high[4];
      for (int j = 0; j < 4; ++j) low[j] = halves(words[j]), high[j] = halves(words[j] >> 16);
      for (int i = 0; i < PRODUCTS; ++i) {
        u32 wide[4];
        load_columns(wide, held, x + i * 4 * apart, wanted);
        multiply_tile<true>(sums[2 * i], low[0], low[1], high[0], high[1], wide[0], wide[1]);
        multiply_tile<true>(sums[2 * i + 1], low[2], low[3], high[2], high[3], wide[2], wide[3]);
      }
    } else if (Format == INT8) {
      int whole[4] = {};
      load_two(held, x, wanted);
      multiply_bytes(whole, w.x, w.z, w.y, w.w, held[0], held[1]);
      sums[0][0] += float(whole[0] + whole[3]) * x_scale;
    } else if (Format == INT4) {
      int whole[4] = {};
      u32 words[] = {w.x, w.y, w.z, w.w}, low[4], high[4], group = *reinterpret_cast<const u16*>(scales);
      for (int j = 0; j < 4; ++j) low[j] = upper_nibbles(words[j] << 4, mask), high[j] = upper_nibbles(words[j], mask);
      load_four(held, x, wanted);
      multiply_bytes(whole, low[0], low[2], high[0], high[2], held[0], held[1]);
      multiply_bytes(whole, low[1], low[3], high[1], high[3], held[2], held[3]);
      sums[0][0] += float(whole[0] + whole[3]) * (x_scale * (HalfScales ? widen_half(group) : widen(group)));
    } else {
      u32 words[] = {w.x, w.y, w.z, w.w}, exponents = *reinterpret_cast<const u32*>(scales);
      for (int j = 0; j < 2; ++j) {
        float block[4] = {};
        u32 first = words[2 * j], second = words[2 * j + 1];
        load_four(held, x + j * 128, wanted);
        multiply_tile<false>(block, e2m1_pair(first << 12, first << 6), e2m1_pair(second << 12, second << 6),
                             e2m1_pair(first << 8, first << 2), e2m1_pair(second << 8, second << 2), held[0], held[1]);
        multiply_tile<false>(block, e2m1_pair(first << 4, first >> 2), e2m1_pair(second << 4, second >> 2),
                             e2m1_pair(first, first >> 6), e2m1_pair(second, second >> 6), held[2], held[3]);
        float left = __uint_as_float((j ? exponents << 7 : exponents << 23) & 0x7f800000u);
        float right = __uint_as_float((j ? exponents >> 1 : exponents << 15) & 0x7f800000u);
        sums[0][0] += block[0] * left;
        sums[1][3] += block[3] * right;
      }
    }
  }

  // Eight columns of float16.
  __device__ static void load_columns(u32 (&wide)[4], u32 (&held)[4], u32 x, bool wanted) {
    if (Wide)
      load_four(held, x, wanted);
    else
      load_two(held, x, wanted);
    for (int i = 0; i < 4; ++i) wide[i] = Wide ? held[i] : halves(held[i / 2] >> i % 2 * 16);
  }

  // Into `to`, of the warp's columns: sums of a unit, of one row of x after the other. By the threads that arrive at the
  // stage's barrier afterwards.
  __device__ void store(float* to, int g, int t) const {
    for (int i = 0; i < PRODUCTS; ++i) {
      float sum = (sums[2 * i][0] + sums[2 * i + 1][0]) + (sums[2 * i][3] + sums[2 * i + 1][3]);
      if (INTEGER) {
        sum = sums[0][0] * (t == 0 ? 256.0f : 1.0f);
        sum += __shfl_down_sync(~0u, sum, 1);
      }
      for (int row = 0; row < 4 && row < Rows; ++row) {
        float of_row = row == 0 ? sum : __shfl_down_sync(~0u, sum, row);
        if (t == 0) to[(i * 4 + row) * 8 + g] = of_row;
      }
    }
  }
};
