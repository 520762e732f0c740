// What `products.cuh` and a device give `experts_tall.cu`, by a host's threads.

#pragma once

#include "row.cuh"

constexpr int LINE = 128;

inline int swizzled(int row, int chunk) { return row * LINE + (chunk % 8 ^ row % 8) * 16; }
// Of 16 bytes each, as the device's; the rest of a descriptor is always the same.
inline u64 matrix(u32 address, int leading) {
  if (address % 1024) refuse("a matrix is out of line");
  return address >> 4;
}
inline void products_see() {}
inline void products_fence() {}
inline void products_commit() {}
// By all of a warp at once, as all these are.
template <int Left>
void products_wait() {
  __syncwarp();
}
template <int Count>
void hold(float (&d)[Count]) {}

// A byte of a row of a matrix whose lines lie swizzled.
inline const u8* place_of(u64 matrix, int row, int byte) {
  u32 at = u32(matrix << 4) + row * LINE + byte;
  return at_address(at ^ (at >> 7 & 7) << 4, 1);
}
template <bool Narrow, int Count>
void multiply_few(float (&d)[Count], u64 from, u64 by, int adds) {
  int warp = threadIdx.x / 32 % 4, group = lane_of / 4, part = lane_of % 4;
  for (int i = 0; i < Count; ++i) {
    int row = warp * 16 + group + i / 2 % 2 * 8, column = i / 4 * 8 + part * 2 + i % 2;
    float sum = adds ? d[i] : 0;
    for (int byte = 0; byte < 32; byte += 2) {
      u16 a, b;
      std::memcpy(&a, place_of(from, row, byte), 2);
      std::memcpy(&b, place_of(by, column, byte), 2);
      if (Narrow)
        sum += widen_half(halves(a) & 0xffff) * widen_half(halves(b) & 0xffff) + widen_half(halves(a) >> 16) * widen_half(halves(b) >> 16);
      else
        sum += widen(a) * widen(b);
    }
    d[i] = sum;
  }
}
