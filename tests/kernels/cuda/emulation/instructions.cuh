// What `instructions.cuh` and a device give `stream.cu`, by a host's threads: one for each thread of a program, one program (or
// cluster) after the other. Copies arrive at once, so that memory which is still read when it is asked for anew shows.

#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __expf(v) std::exp(v)

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using std::max;
using std::min;

struct Place {
  int x, y;
};
struct uint2 {
  u32 x, y;
};
struct alignas(16) uint4 {
  u32 x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// A barrier in shared memory: arrivals of each phase, those still missing, and bytes that were promised and did not come.
struct Counted {
  int arrivals, missing, bytes, phase;
};
struct Warp {
  std::unique_ptr<std::barrier<>> together;
  u32 held[32][8];
};
struct Program {
  u8* memory;
  std::unique_ptr<std::barrier<>> all, first;
  std::map<u32, Counted> barriers;
  std::map<int, std::unique_ptr<std::barrier<>>> teams;
  std::vector<Warp> warps;
  std::atomic<int> any;
};

constexpr int RANK_SHIFT = 20;  // of a program in a shared address
inline Program programs[16];
inline std::unique_ptr<std::barrier<>> cluster;
inline std::mutex guard;
inline std::condition_variable changed;
inline thread_local Place threadIdx, blockIdx;
inline Place gridDim;
inline int token_of_grid = 0;
inline thread_local Program* own;
inline thread_local Warp* warp_of;
inline thread_local int rank_of, lane_of;

inline void refuse(const char* what) {
  std::printf("%s\n", what);
  std::fflush(stdout);
  std::_Exit(3);
}

inline u32 __float_as_uint(float v) {
  u32 r;
  std::memcpy(&r, &v, 4);
  return r;
}
inline float __uint_as_float(u32 v) {
  float r;
  std::memcpy(&r, &v, 4);
  return r;
}
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline void __syncwarp() { warp_of->together->arrive_and_wait(); }
inline void __syncthreads() { own->all->arrive_and_wait(); }
inline int __syncthreads_or(int v) {
  if (threadIdx.x == 0) own->any = 0;
  __syncthreads();
  if (v) own->any = 1;
  __syncthreads();
  return own->any;
}
inline float __shfl_sync(u32, float v, int from) {
  warp_of->held[lane_of][7] = __float_as_uint(v);
  __syncwarp();
  float r = __uint_as_float(warp_of->held[from < 32 ? from : lane_of][7]);
  __syncwarp();
  return r;
}
inline float __shfl_xor_sync(u32 who, float v, int other) { return __shfl_sync(who, v, lane_of ^ other); }
inline float __shfl_down_sync(u32 who, float v, int by) { return __shfl_sync(who, v, lane_of + by); }
inline int __shfl_up_sync(u32 who, int v, int by) { return __shfl_sync(who, float(v), max(lane_of - by, 0)); }
inline int __popc(u32 v) { return __builtin_popcount(v); }
inline u32 __match_any_sync(u32, int v) {
  warp_of->held[lane_of][6] = v;
  __syncwarp();
  u32 alike = 0;
  for (int i = 0; i < 32; ++i) alike |= u32(warp_of->held[i][6] == u32(v)) << i;
  __syncwarp();
  return alike;
}

inline u32 most_of_warp(u32 v) {
  warp_of->held[lane_of][6] = v;
  __syncwarp();
  for (int i = 0; i < 32; ++i) v = max(v, warp_of->held[i][6]);
  __syncwarp();
  return v;
}
inline u32 least_of_warp(u32 v) { return ~most_of_warp(~v); }

inline u16 narrow(float v) {
  u32 bits = __float_as_uint(v);
  return v != v ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 pair(float low, float high) { return narrow(low) | u32(narrow(high)) << 16; }
inline float larger(float a, float b) { return a != a || b != b ? NAN : max(a, b); }
inline float of_bf16(u16 bits) { return __uint_as_float(u32(bits) << 16); }
inline float of_half(u16 bits) {
  _Float16 r;
  std::memcpy(&r, &bits, 2);
  return float(r);
}
inline float widen_half(u32 bits) { return of_half(bits); }
inline float of_e4m3(u8 bits) {
  int exponent = bits >> 3 & 15, mantissa = bits & 7;
  float size = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(float(mantissa), -9);
  return bits & 128 ? -size : size;
}
inline u8 to_e4m3(float v) {
  int best = 0;
  for (int i = 0; i < 256; ++i) {
    float off = std::fabs(of_e4m3(i) - v), least = std::fabs(of_e4m3(best) - v);
    if ((i & 127) != 127 && (off < least || (off == least && i % 2 == 0))) best = i;
  }
  return best;
}
inline u16 e4m3_pair(float low, float high) { return to_e4m3(low) | to_e4m3(high) << 8; }
inline u32 halves(u16 pair) {
  u16 r[2];
  for (int i = 0; i < 2; ++i) {
    _Float16 v = of_e4m3(pair >> 8 * i & 255);
    std::memcpy(&r[i], &v, 2);
  }
  return r[0] | u32(r[1]) << 16;
}
inline u32 enlarged(u32 both) {
  return pair(std::ldexp(of_bf16(both), 64), std::ldexp(of_bf16(both >> 16), 64));
}
inline u32 bytes_of(u32 first, u32 second, u32 which) {
  u64 both = first | u64(second) << 32;
  u32 r = 0;
  for (int i = 0; i < 4; ++i) r |= u32(both >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
  return r;
}
inline u32 upper_nibbles(u32 word, u32 mask) { return (word ^ 0x80808080u) & mask; }
inline u32 held_constant(u32 value) { return value; }

inline void let_next_start() {}
inline void wait_for_previous() {}
inline u8* launched_memory() { return own->memory; }
inline bool elected() { return lane_of == 5; }
inline u32 shared_address(const void* p) { return u32(static_cast<const u8*>(p) - own->memory) | rank_of << RANK_SHIFT; }
inline u8* at_address(u32 a, u32 aligned) {
  if (a % aligned) refuse("shared memory is read or written out of line");
  return programs[a >> RANK_SHIFT].memory + a % (1 << RANK_SHIFT);
}
inline void load_four(u32 (&words)[4], u32 from, bool wanted) {
  if (wanted) std::memcpy(words, at_address(from, 16), 16);
}
inline void load_two(u32 (&words)[4], u32 from, bool wanted) {
  if (wanted) std::memcpy(words, at_address(from, 8), 8);
}

inline Counted& counted(u32 barrier) { return programs[barrier >> RANK_SHIFT].barriers[barrier]; }
inline void settle(Counted& b) {
  if (b.missing || b.bytes) return;
  b.missing = b.arrivals, b.phase ^= 1;
  changed.notify_all();
}
inline void barrier_init(u64* barrier, int arrivals) {
  std::lock_guard<std::mutex> held(guard);
  counted(shared_address(barrier)) = {arrivals, arrivals, 0, 0};
}
inline void barriers_ready() {}
inline void expect_bytes(u32 barrier, int bytes) {
  std::lock_guard<std::mutex> held(guard);
  Counted& b = counted(barrier);
  if (b.missing-- <= 0) refuse("a barrier counts more arrivals than it has");
  b.bytes += bytes;
  settle(b);
}
inline void arrive(u32 barrier) { expect_bytes(barrier, 0); }
inline void arrive_with_copies(u32 barrier) { arrive(barrier); }
inline void came(u32 barrier, int bytes) {
  std::lock_guard<std::mutex> held(guard);
  Counted& b = counted(barrier);
  b.bytes -= bytes;
  settle(b);
}
inline void wait_barrier(u32 barrier, u32 parity) {
  std::unique_lock<std::mutex> held(guard);
  changed.wait(held, [&] { return counted(barrier).phase != int(parity); });
}
inline void cluster_arrive() {}
inline void cluster_wait() { cluster->arrive_and_wait(); }
template <int Threads>
void sync_first() {
  own->first->arrive_and_wait();
}
template <int Threads>
void sync_team(int team) {
  std::unique_lock<std::mutex> held(guard);
  auto& barrier = own->teams[team];
  if (!barrier) barrier = std::make_unique<std::barrier<>>(Threads);
  held.unlock();
  barrier->arrive_and_wait();
}
inline u64 read_once_policy() { return 0; }
inline u64 usual_policy() { return 0; }
inline void copy_bulk(u32 to, const u8* from, int bytes, u32 barrier, u64) {
  if (reinterpret_cast<u64>(from) % 16 || bytes % 16) refuse("a bulk copy is out of line");
  std::memcpy(at_address(to, 16), from, bytes);
  came(barrier, bytes);
}
// A tensor of five axes: its address, sizes, strides of all axes but the first in bytes, box, and bytes of an element.
struct TensorMap {
  u64 words[16];
};
inline void copy_tensor(u32 to, const TensorMap& map, int c0, int c1, int c2, int c3, int c4, u32 barrier, u64) {
  const u64 *sizes = map.words + 1, *strides = map.words + 6, *box = map.words + 10, item = map.words[15] % 256;
  u64 swizzled = map.words[15] / 256;
  int first[] = {c0, c1, c2, c3, c4};
  u8* begin = at_address(to, swizzled ? 1024 : 128);
  int bytes = 0;
  for (u64 i = 0; i < box[0] * box[1] * box[2] * box[3] * box[4]; ++i, bytes += item) {
    u64 rest = i, from = map.words[0];
    bool inside = true;
    for (int axis = 0; axis < 5; ++axis) {
      u64 index = first[axis] + rest % box[axis];
      rest /= box[axis];
      inside &= index < sizes[axis];
      from += index * (axis ? strides[axis - 1] : item);
    }
    u8* at = begin + (swizzled ? bytes ^ (bytes >> 7 & 7) << 4 : bytes);
    if (inside) std::memcpy(at, reinterpret_cast<const u8*>(from), item);
    else std::memset(at, 0, item);
  }
  came(barrier, bytes);
}
template <int Bytes>
void copy_few(u32 to, const u8* from) {
  if (reinterpret_cast<u64>(from) % Bytes) refuse("a copy is out of line");
  std::memcpy(at_address(to, Bytes), from, Bytes);
}
inline void copy_sixteen(u32 to, const u16* from) { copy_few<16>(to, reinterpret_cast<const u8*>(from)); }
inline void wait_for_copies() {}
inline u32 in_program(u32 address, int rank) { return address % (1 << RANK_SHIFT) | rank << RANK_SHIFT; }
inline void store_remote(const void* here, int rank, float v) {
  std::memcpy(at_address(in_program(shared_address(here), rank), 4), &v, 4);
}
inline void send_float(u32 to, int rank, float v, u32 barrier) {
  std::memcpy(at_address(in_program(to, rank), 4), &v, 4);
  came(in_program(barrier, rank), 4);
}
inline void send_four(u32 to, int rank, float4 v, u32 barrier) {
  std::memcpy(at_address(in_program(to, rank), 16), &v, 16);
  came(in_program(barrier, rank), 16);
}

// Sums of a thread: of words `w` of the rows and `x` of the columns that belong to it, each word by `dot`.
template <class Sum, class Dot>
void multiply(Sum (&sums)[4], u32 w0, u32 w1, u32 w2, u32 w3, u32 x0, u32 x1, Dot dot) {
  u32 mine[] = {w0, w1, w2, w3, x0, x1};
  std::memcpy(warp_of->held[lane_of], mine, sizeof mine);
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const auto *rows = &warp_of->held[lane_of / 4 * 4], *columns = &warp_of->held[(lane_of % 4 * 2 + i % 2) * 4];
    auto sum = dot(0u, 0u);
    for (int t = 0; t < 4; ++t) sum += dot(rows[t][i / 2], columns[t][4]) + dot(rows[t][i / 2 + 2], columns[t][5]);
    sums[i] = Sum(sums[i] + sum);
  }
  __syncwarp();
}
template <bool Half>
void multiply_tile(float (&sums)[4], u32 w0, u32 w1, u32 w2, u32 w3, u32 x0, u32 x1) {
  auto wide = [](u32 bits) { return double(Half ? of_half(bits) : of_bf16(bits)); };
  multiply(sums, w0, w1, w2, w3, x0, x1,
           [&](u32 a, u32 b) { return wide(a & 0xffff) * wide(b & 0xffff) + wide(a >> 16) * wide(b >> 16); });
}
inline void begin_tile(float (&sums)[4], u32 w0, u32 w1, u32 w2, u32 w3, u32 x0, u32 x1) {
  for (float& sum : sums) sum = 0;
  multiply_tile<false>(sums, w0, w1, w2, w3, x0, x1);
}
inline void multiply_bytes(int (&sums)[4], u32 w0, u32 w1, u32 w2, u32 w3, u32 x0, u32 x1) {
  multiply(sums, w0, w1, w2, w3, x0, x1, [](u32 a, u32 b) {
    int sum = 0;
    for (int i = 0; i < 32; i += 8) sum += int(static_cast<signed char>(a >> i)) * static_cast<signed char>(b >> i);
    return sum;
  });
}

// Runs so many programs of `threads`, of which barriers among the first are for `first`, in clusters of so many.
template <class Kernel>
void launch(int grid, int threads, int first, int shared, int together, Kernel kernel) {
  gridDim = {grid};
  for (int begin = 0; begin < grid; begin += together) {
    cluster = std::make_unique<std::barrier<>>(threads * together);
    std::vector<std::vector<u8>> memories(together, std::vector<u8>(shared + 128, 0x7f));
    for (int rank = 0; rank < together; ++rank) {
      Program& program = programs[rank];
      program.memory = memories[rank].data() + 128 - reinterpret_cast<u64>(memories[rank].data()) % 128;
      program.all = std::make_unique<std::barrier<>>(threads), program.first = std::make_unique<std::barrier<>>(first);
      program.barriers.clear(), program.teams.clear(), program.warps = std::vector<Warp>(threads / 32);
      for (Warp& warp : program.warps) warp.together = std::make_unique<std::barrier<>>(32);
    }
    std::vector<std::thread> running;
    for (int i = 0; i < threads * together; ++i)
      running.emplace_back([=] {
        rank_of = i / threads, threadIdx = {i % threads}, blockIdx = {begin + rank_of, token_of_grid}, lane_of = i % 32;
        own = &programs[rank_of], warp_of = &own->warps[threadIdx.x / 32];
        kernel();
      });
    for (std::thread& thread : running) thread.join();
  }
}
