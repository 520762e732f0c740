#if defined(__x86_64__)
#include "simd_avx512.h"

#include "kernels.inl"

namespace ts {
const Kernels* avx512_kernels() {
  static constexpr Kernels table = make("avx512");
  return &table;
}
}  // namespace ts
#endif
