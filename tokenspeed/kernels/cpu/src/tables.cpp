// Which kernel tables this processor can run, best first.
#include <string>

#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace ts {
namespace {

#if defined(__aarch64__)
bool has_dot_products() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__APPLE__)
  return true;  // every Apple processor that runs macOS
#else
  return false;
#endif
}
#endif

}  // namespace

const Kernels* kernels_for(const std::string& isa) {
  const Kernels* usable[4] = {};
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  if (avx512) usable[count++] = avx512_kernels();
  if (avx2) usable[count++] = avx2_kernels();
#elif defined(__aarch64__)
  if (has_dot_products()) usable[count++] = neon_kernels();
#endif
  usable[count++] = generic_kernels();
  for (int i = 0; i < count; ++i) {
    if (isa.empty() || isa == usable[i]->name) return usable[i];
  }
  return nullptr;
}

}  // namespace ts
