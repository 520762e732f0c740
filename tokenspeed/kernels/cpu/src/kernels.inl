// Kernels written once over sixteen lanes; included by one source file per instruction set, after its simd header.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels.h"

namespace {

using namespace simd;
using ts::Format;
using ts::KvFormat;
using ts::Layout;
using ts::Rows;
using ts::Scales;

#include "gemv.inl"
#include "planes.inl"
#include "rows.inl"
#include "noise.inl"
#include "attention.inl"

constexpr ts::Kernels make(const char* name) {
  return {name, tile, unpack_row, quantize, rms_norm, add_rows, act_mul, swiglu_clamped, rotate, store_kv, attend, combine, argmax,
          planes_tile, planes_row, screen_tile, weigh_look, refine, gumbel, tile_maxima, add_scaled, mass};
}

}  // namespace
