// From the file's rows to tiles.
#pragma once
#include <cstdint>

#include "formats.h"

namespace ts {

// Pack up to 16 whole rows, in the file's format, into a tile of tile_bytes(format, cols); rows that it has left are zero.
void pack_tile(Format format, const uint8_t* source, int rows, int64_t cols, uint8_t* out);

// Bytes of a row in the file's format.
int64_t file_row_bytes(Format format, int64_t cols);

// Up to sixteen Q8_0 rows into a tile's part of the high plane and of the low one.
void pack_planes(const uint8_t* source, int rows, int64_t cols, uint8_t* high, uint8_t* low);

}  // namespace ts
