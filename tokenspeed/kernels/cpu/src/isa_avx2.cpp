#if defined(__x86_64__)
#include "simd_avx2.h"

#include "kernels.inl"

namespace ts {
const Kernels* avx2_kernels() {
  static constexpr Kernels table = make("avx2");
  return &table;
}
}  // namespace ts
#endif
