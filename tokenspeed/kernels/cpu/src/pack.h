// From the file's rows to tiles.
#pragma once
#include <cstdint>

#include "formats.h"

namespace ts {

// Pack rows [first, first + 16) of a matrix of `rows` rows; rows past the end are zero. `source` holds whole rows in the
// file's format, `row_bytes` each; `out` takes tile_bytes(format, cols).
void pack_tile(Format format, const uint8_t* source, int64_t rows, int64_t cols, int64_t row_bytes, int64_t first, uint8_t* out);

// Bytes of a row in the file's format.
int64_t file_row_bytes(Format format, int64_t cols);

// Sixteen Q8_0 rows from `first` into a tile's part of the high plane and of the low one.
void pack_planes(const uint8_t* source, int64_t rows, int64_t cols, int64_t first, uint8_t* high, uint8_t* low);

}  // namespace ts
