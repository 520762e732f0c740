// Units of rows of W, as both streaming kernels copy them into shared memory.

#pragma once

#include "row.cuh"

constexpr int UNIT = 8;
constexpr int OUTPUTS = ACT ? UNIT / 2 : UNIT;

// Row of W that lies at `local` of a unit: consecutive rows, or gate rows and then up rows; past the end the last one.
__device__ inline int weight_row(int unit, int local, int n) {
  return min(unit * OUTPUTS + local % OUTPUTS, n - 1) + local / OUTPUTS * n;
}

// Where a row lies in a stage whose rows have so many bytes. Eight threads that read 16 bytes each touch 64 bytes of an even
// row and of the next: odd rows lie apart, half a line of banks further.
__device__ constexpr int row_at(int row, int bytes) { return row / 2 * bytes + row % 2 * (UNIT / 2 * bytes + 64); }
__device__ constexpr int rows_bytes(int bytes) { return UNIT * bytes + 64; }
