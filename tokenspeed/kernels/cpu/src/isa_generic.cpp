#include "simd_generic.h"

#include "kernels.inl"

namespace ts {
const Kernels* generic_kernels() {
  static constexpr Kernels table = make("generic");
  return &table;
}
}  // namespace ts
