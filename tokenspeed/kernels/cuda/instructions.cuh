// Single instructions of the streaming kernels and of attention, as functions: all that a host, which emulates them, lacks.

#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// A tensor in memory, for copies (CUtensorMap).
struct alignas(64) TensorMap {
  u64 words[16];
};

// Rounded to bf16.
__device__ inline u16 narrow(float v) {
  u16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}
// Two as bf16, the first in the lower half.
__device__ inline u32 pair(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ inline float exp2_fast(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
// The larger one, or what is no number.
__device__ inline float larger(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
// Two rounded to e4m3, the first in the lower half.
__device__ inline u16 e4m3_pair(float low, float high) {
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
// Two e4m3 values as float16, which holds them exactly.
__device__ inline u32 halves(u16 pair) {
  u32 r;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(pair));
  return r;
}
__device__ inline float widen_half(u32 bits) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"((u16)bits));
  return r;
}
// Two of bf16, 2^64 times as large.
__device__ inline u32 enlarged(u32 both) {
  u32 r;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(both), "r"(0x5f805f80));
  return r;
}
// Four bytes of two words, by the hexadecimal digits of `which`, the lowest first.
__device__ inline u32 bytes_of(u32 first, u32 second, u32 which) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(first), "r"(second), "r"(which));
  return r;
}
// Four codes in the upper halves of bytes, less 8, as 16 times as large bytes: (word ^ 0x80808080) & 0xf0f0f0f0.
__device__ inline u32 upper_nibbles(u32 word, u32 mask) {
  u32 r;
  asm("lop3.b32 %0, %1, 0x80808080, %2, 0x28;" : "=r"(r) : "r"(word), "r"(mask));
  return r;
}
// A constant that stays in a register, where the compiler would make it anew each time.
__device__ inline u32 held_constant(u32 value) {
  u32 r;
  asm volatile("mov.u32 %0, %1;" : "=r"(r) : "r"(value));
  return r;
}

// The highest and the lowest value that a thread of the warp has.
__device__ inline u32 most_of_warp(u32 v) { return __reduce_max_sync(~0u, v); }
__device__ inline u32 least_of_warp(u32 v) { return __reduce_min_sync(~0u, v); }

// Lets the next kernel of a chain start (programmatic dependent launch).
__device__ inline void let_next_start() { asm volatile("griddepcontrol.launch_dependents;"); }
// Until the kernel in front has ended and what it wrote is seen.
__device__ inline void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The memory a kernel is launched with.
__device__ inline u8* launched_memory() {
  extern __shared__ __align__(128) u8 memory[];
  return memory;
}

__device__ inline u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
// Reads 16 or 8 bytes of shared memory in the threads that want them; in others words stay as they are, which are multiplied
// for nothing.
__device__ inline void load_four(u32 (&words)[4], u32 from, bool wanted) {
  asm volatile(
      "{ .reg .pred wanted;\n"
      "setp.ne.u32 wanted, %5, 0;\n"
      "@wanted ld.shared.v4.u32 {%0,%1,%2,%3}, [%4]; }"
      : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3]) : "r"(from), "r"((u32)wanted));
}
__device__ inline void load_two(u32 (&words)[4], u32 from, bool wanted) {
  asm volatile(
      "{ .reg .pred wanted;\n"
      "setp.ne.u32 wanted, %3, 0;\n"
      "@wanted ld.shared.v2.u32 {%0,%1}, [%2]; }"
      : "+r"(words[0]), "+r"(words[1]) : "r"(from), "r"((u32)wanted));
}

__device__ inline void barrier_init(u64* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Barriers that were set up are seen by copies.
__device__ inline void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void expect_bytes(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until a phase of the barrier has ended.
__device__ inline void wait_barrier(u32 barrier, u32 parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(barrier), "r"(parity) : "memory");
}
// A barrier of all programs of a cluster, in two halves: what was written before the first is seen after the second.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// Into the shared memory of a program of the cluster, where it lies as `here` does.
__device__ inline void store_remote(const void* here, int rank, float v) {
  asm volatile(
      "{ .reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "st.shared::cluster.f32 [there], %2; }" ::"r"(shared_address(here)), "r"(rank), "f"(v) : "memory");
}
// The same, counted by that program's barrier.
__device__ inline void send_float(u32 to, int rank, float v, u32 barrier) {
  asm volatile(
      "{ .reg .b32 there, counted;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mapa.shared::cluster.u32 counted, %3, %1;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], %2, [counted]; }" ::"r"(to), "r"(rank), "f"(v),
      "r"(barrier) : "memory");
}
// Four floats at once.
__device__ inline void send_four(u32 to, int rank, float4 v, u32 barrier) {
  asm volatile(
      "{ .reg .b32 there, counted;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mapa.shared::cluster.u32 counted, %6, %1;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%2, %3, %4, %5}, [counted]; }" ::"r"(to), "r"(rank),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier) : "memory");
}
// A barrier of the first so many threads of a program.
template <int Threads>
__device__ void sync_first() {
  asm volatile("bar.sync 1, %0;" ::"n"(Threads) : "memory");
}
// A barrier of so many threads, one of the 15 that a program has beside that of all its threads.
template <int Threads>
__device__ void sync_team(int team) {
  asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "n"(Threads) : "memory");
}
__device__ inline u64 read_once_policy() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ inline u64 usual_policy() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// Whether this thread is the one of its warp that the hardware picks.
__device__ inline bool elected() {
  u32 r;
  asm volatile("{ .reg .pred picked;\nelect.sync _|picked, 0xffffffff;\nselp.u32 %0, 1, 0, picked; }" : "=r"(r));
  return r;
}
// Have `bytes` of global memory copied into shared memory; the barrier counts them.
__device__ inline void copy_bulk(u32 to, const u8* from, int bytes, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}
// A box of a tensor of five axes, by its first element's coordinates from the innermost axis on; zeros past an axis's end.
__device__ inline void copy_tensor(u32 to, const TensorMap& map, int c0, int c1, int c2, int c3, int c4, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3,%4,%5,%6,%7}], [%2], %8;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "l"(policy) : "memory");
}
// The same of 4 or 8 bytes by a thread; the barrier then counts an arrival of each thread once all that it asked for is there.
template <int Bytes>
__device__ void copy_few(u32 to, const u8* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(Bytes) : "memory");
}
__device__ inline void arrive_with_copies(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
// 16 bytes by a thread, past the first-level cache; until all that it asked for is there.
__device__ inline void copy_sixteen(u32 to, const u16* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// sums += 16 columns of 8 rows of x (of 16; the others are zero) times those of 8 rows of W, of bf16 or float16. Which
// columns a thread holds is of no matter as long as it is the same ones of x and of W.
template <bool Half>
__device__ void multiply_columns(float* sums, u32 x0, u32 x1, u32 w0, u32 w1) {
  if (Half)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%5}, {%7,%8}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(x0), "r"(0), "r"(x1), "r"(w0), "r"(w1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%5}, {%7,%8}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(x0), "r"(0), "r"(x1), "r"(w0), "r"(w1));
}
// sums += 16 rows of w times 8 columns of x, 16 of each multiplied, of bf16 or float16: registers of a thread as mma.m16n8k16
// wants them.
template <bool Half>
__device__ void multiply_tile(float (&sums)[4], u32 w0, u32 w1, u32 w2, u32 w3, u32 x0, u32 x1) {
  if (Half)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(w0), "r"(w1), "r"(w2), "r"(w3), "r"(x0), "r"(x1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(w0), "r"(w1), "r"(w2), "r"(w3), "r"(x0), "r"(x1));
}
// The same into sums that were nothing before, of bf16.
__device__ inline void begin_tile(float (&sums)[4], u32 w0, u32 w1, u32 w2, u32 w3, u32 x0, u32 x1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=f"(sums[0]), "=f"(sums[1]), "=f"(sums[2]), "=f"(sums[3])
      : "r"(w0), "r"(w1), "r"(w2), "r"(w3), "r"(x0), "r"(x1), "f"(0.0f));
}
// The same of signed bytes, 32 of each multiplied.
__device__ inline void multiply_bytes(int (&sums)[4], u32 w0, u32 w1, u32 w2, u32 w3, u32 x0, u32 x1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(w0), "r"(w1), "r"(w2), "r"(w3), "r"(x0), "r"(x1));
}
