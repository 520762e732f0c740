// Products of a warpgroup (wgmma), what they want of shared memory, and copies through tensor maps: Hopper's.

#include "row.cuh"

constexpr int LINE = 128;

// Eight rows of a line swap their chunks of 16 bytes, so that a column of chunks touches all banks.
__device__ inline int swizzled(int row, int chunk) { return row * LINE + (chunk % 8 ^ row % 8) * 16; }

// Where products find a matrix whose lines of 128 bytes lie swizzled in shared memory. Between eight lines and the next
// are 1024 bytes; `leading` bytes lie between halves, where lines run along a product's columns.
__device__ inline u64 matrix(u32 address, int leading) {
  return (u64(address) & 0x3ffff) >> 4 | u64(leading >> 4) << 16 | u64(1024 >> 4) << 32 | 1ull << 62;
}

// What this thread wrote into shared memory is seen by products that are asked for after the next barrier.
__device__ inline void products_see() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ inline void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most so many groups of products are under way.
template <int Left>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
}
// What products write, or read, is not touched before this.
template <int Count>
__device__ inline void hold(float (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int Count>
__device__ inline void hold(u32 (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

#define FLOATS8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FLOATS32(d, i) FLOATS8(d, i), FLOATS8(d, i + 8), FLOATS8(d, i + 16), FLOATS8(d, i + 24)
#define NAMES16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES32 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES64 \
  NAMES32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
          "%59,%60,%61,%62,%63"

// d = [d +] 64 rows of a times 128 rows of b, 16 columns of each.
__device__ inline void multiply(float (&d)[64], u64 a, u64 b, int add) {
  asm volatile(
      "{ .reg .pred add;\n"
      "setp.ne.b32 add, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES64 "}, %64, %65, add, 1, 1, 0, 0; }"
      : FLOATS32(d, 0), FLOATS32(d, 32) : "l"(a), "l"(b), "r"(add));
}
// d += 64 rows of a, held by the threads, times 16 rows of b, 128 or 64 columns.
__device__ inline void multiply(float (&d)[64], const u32* a, u64 b) {
  asm volatile(
      "{ .reg .pred add;\n"
      "setp.ne.b32 add, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES64 "}, {%64,%65,%66,%67}, %68, add, 1, 1, 1; }"
      : FLOATS32(d, 0), FLOATS32(d, 32) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ inline void multiply(float (&d)[32], const u32* a, u64 b) {
  asm volatile(
      "{ .reg .pred add;\n"
      "setp.ne.b32 add, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES32 "}, {%32,%33,%34,%35}, %36, add, 1, 1, 1; }"
      : FLOATS32(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// d = [d +] 64 rows of a times 8 to 64 rows of b, 32 bytes of each: columns of bf16, or of e4m3.
#define FEW(rows, kind, flags, names, a, b, add, ...) \
  asm volatile("{ .reg .pred add;\n" \
               "setp.ne.b32 add, %" add ", 0;\n" \
               "wgmma.mma_async.sync.aligned.m64n" rows kind " {" names "}, %" a ", %" b ", add, 1, 1" flags "; }" \
               : __VA_ARGS__ : "l"(from), "l"(by), "r"(adds))
#define FLOATS4(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
template <bool Narrow>
__device__ void multiply_few(float (&d)[4], u64 from, u64 by, int adds) {
  if (Narrow)
    FEW("8", "k32.f32.e4m3.e4m3", "", "%0,%1,%2,%3", "4", "5", "6", FLOATS4(d));
  else
    FEW("8", "k16.f32.bf16.bf16", ", 0, 0", "%0,%1,%2,%3", "4", "5", "6", FLOATS4(d));
}
template <bool Narrow>
__device__ void multiply_few(float (&d)[8], u64 from, u64 by, int adds) {
  if (Narrow)
    FEW("16", "k32.f32.e4m3.e4m3", "", "%0,%1,%2,%3,%4,%5,%6,%7", "8", "9", "10", FLOATS8(d, 0));
  else
    FEW("16", "k16.f32.bf16.bf16", ", 0, 0", "%0,%1,%2,%3,%4,%5,%6,%7", "8", "9", "10", FLOATS8(d, 0));
}
template <bool Narrow>
__device__ void multiply_few(float (&d)[16], u64 from, u64 by, int adds) {
  if (Narrow)
    FEW("32", "k32.f32.e4m3.e4m3", "", NAMES16, "16", "17", "18", FLOATS8(d, 0), FLOATS8(d, 8));
  else
    FEW("32", "k16.f32.bf16.bf16", ", 0, 0", NAMES16, "16", "17", "18", FLOATS8(d, 0), FLOATS8(d, 8));
}
template <bool Narrow>
__device__ void multiply_few(float (&d)[32], u64 from, u64 by, int adds) {
  if (Narrow)
    FEW("64", "k32.f32.e4m3.e4m3", "", NAMES32, "32", "33", "34", FLOATS32(d, 0));
  else
    FEW("64", "k16.f32.bf16.bf16", ", 0, 0", NAMES32, "32", "33", "34", FLOATS32(d, 0));
}
