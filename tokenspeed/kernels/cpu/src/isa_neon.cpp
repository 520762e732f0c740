#if defined(__aarch64__)
#include "simd_neon.h"

#include "kernels.inl"

namespace ts {
const Kernels* neon_kernels() {
  static constexpr Kernels table = make("neon");
  return &table;
}
}  // namespace ts
#endif
