// Projections of one row that follow each other, in one kernel: weights stream from memory through rings in shared memory
// across all of them without a pause.
//
// A processor has one program, and each of its warps a slice of the columns and a ring, as in `stream.cu`. Weights are
// constant, so a warp asks for those of the next projection as soon as there is room, long before its input is there. A
// projection begins when all programs have told that they have ended the one before (`arrived`); meanwhile rings fill. All
// programs must run at once: one per processor, and no other such kernel beside.
//
// Compiled with -D: OPS, ITEM bytes of a weight (2: bf16, 1: e4m3), WARPS, SEGMENT bytes of a row in a stage of a ring,
// STAGES, SHARED bytes, BRANCH_NORM 0/1, and lists of OPS numbers: COLUMNS, ACTS (0: none, 1: silu, 2: gelu tanh), JOINS
// (0/1: the input is x + branch, normed).

#include "row.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int UNIT = 4096 / SEGMENT;
constexpr int ODD = UNIT / 2 * SEGMENT + 64;
constexpr int STAGE = UNIT * SEGMENT + 64;
constexpr int SITES = 256;
__device__ constexpr int K[] = {COLUMNS}, ACT[] = {ACTS}, JOIN[] = {JOINS};

__device__ constexpr int widest() {
  int most = 0;
  for (int op = 0; op < OPS; ++op) most = K[op] > most ? K[op] : most;
  return most;
}
__device__ constexpr int slice(int op) { return K[op] * ITEM / WARPS; }
__device__ constexpr int segments(int op) { return (slice(op) + SEGMENT - 1) / SEGMENT; }
__device__ constexpr bool fit() {
  for (int op = 0; op < OPS; ++op)
    if (slice(op) * WARPS != K[op] * ITEM || slice(op) % 64 || K[op] % 8) return false;
  return sizeof(K) == OPS * 4 && sizeof(ACT) == OPS * 4 && sizeof(JOIN) == OPS * 4 && SEGMENT % 128 == 0;
}
static_assert(fit(), "columns do not fit the tiles");

struct Operand {
  const u16 *x, *branch;
  const u8* weight;
  const float *w_scale, *norm, *branch_norm;
  u16 *y, *joined;
  long long w_stride;
  int n;
  float eps, branch_eps;
};

struct Chain {
  Operand op[OPS];
  int site;
};

struct Shared {
  u8 ring[WARPS][STAGES][STAGE];
  u16 x[widest()];
  float sums[2][WARPS][UNIT];
  float partial[3][WARPS];
  u64 full[WARPS][STAGES];
};
static_assert(sizeof(Shared) == SHARED, "the launch must know the size");

// How many programs have ended each projection, in all launches of a site: launches of a site follow each other.
extern "C" __device__ u64 arrived[SITES][OPS];

__device__ int row_at(int row) { return row / 2 * SEGMENT + row % 2 * ODD; }

// Row of W at `local` of a unit: consecutive rows, or gate and up rows in turn; past the end the last one.
__device__ int weight_row(bool gated, int unit, int local, int n) {
  if (!gated) return min(unit * UNIT + local, n - 1);
  return min(unit * (UNIT / 2) + local / 2, n - 1) + local % 2 * n;
}
__device__ int units_of(bool gated, int n) { return gated ? (n + UNIT / 2 - 1) / (UNIT / 2) : (n + UNIT - 1) / UNIT; }

// A warp's way through its slices of the program's units of all projections: what it asks for next.
struct Stream {
  const Chain& chain;
  u64 policy;
  int op = -1, unit = 0, units = 0, segment = 0;

  __device__ void request(u8* to, u32 full) {
    while (unit >= units) {
      if (op + 1 >= OPS) return;
      ++op;
      unit = blockIdx.x;
      units = units_of(ACT[op] != 0, chain.op[op].n);
    }
    const Operand& o = chain.op[op];
    int lane = threadIdx.x % 32, at = segment * SEGMENT, bytes = min(SEGMENT, slice(op) - at);
    if (lane == 0) expect_bytes(full, UNIT * bytes);
    __syncwarp();
    if (lane < UNIT) {
      const u8* from = o.weight + weight_row(ACT[op] != 0, unit, lane, o.n) * o.w_stride + threadIdx.x / 32 * slice(op) + at;
      copy_bulk(shared_address(to) + row_at(lane), from, bytes, full, policy);
    }
    if (++segment == segments(op)) {
      segment = 0;
      unit += gridDim.x;
    }
  }
};

// The warp's place in its ring.
struct Place {
  int at = 0, parity = 0;

  __device__ void next() {
    if (++at == STAGES) {
      at = 0;
      parity ^= 1;
    }
  }
};

template <int BYTES>
__device__ void multiply_segment(float (*sums)[4][4], const u8* weights, const u16* x, bool mine) {
#pragma unroll
  for (int step = 0; step < BYTES / 64; ++step)
#pragma unroll
    for (int tile = 0; tile < UNIT / 8; ++tile)
      multiply_vector<ITEM>(sums[tile] + step % 2 * 2, x + step * 64 / ITEM, mine,
                            *reinterpret_cast<const uint4*>(weights + tile * 4 * SEGMENT + step * 64));
}

// Waits until all programs have ended the projection before I. `all`: their count then, which thread 0 knows.
template <int I>
__device__ void wait_for_input(const Chain& chain, u64 all) {
  if (I == 0) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    return;
  }
  u64 count = 0;
  while (threadIdx.x == 0 && count < all)
    asm volatile("ld.acquire.gpu.u64 %0, [%1];" : "=l"(count) : "l"(&arrived[chain.site][I - 1]) : "memory");
  __syncthreads();
}

// Tells that this program has ended projection I, whose results its first warp wrote. The count when all have.
template <int I>
__device__ u64 arrive(const Chain& chain) {
  __syncwarp();
  if (threadIdx.x != 0) return 0;
  __threadfence();
  u64 before = atomicAdd(&arrived[chain.site][I], 1ull);
  return (before / gridDim.x + 1) * gridDim.x;
}

// Projection I, and those after it. `all`: as `wait_for_input` wants it.
template <int I>
__device__ void project(Shared& s, const Chain& chain, Stream& stream, Place& place, u64 all) {
  const Operand& o = chain.op[I];
  constexpr bool gates = ACT[I] != 0;
  constexpr int tail = slice(I) % SEGMENT;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, part = lane % 4, flip = 0;
  int units = units_of(gates, o.n);
  Row<K[I], THREADS> norm, branch_norm;
  if (JOIN[I]) norm.load(o.norm);
  if (JOIN[I] && BRANCH_NORM) branch_norm.load(o.branch_norm);
  wait_for_input<I>(chain, all);
  float x_scale = prepare_row<ITEM, JOIN[I], JOIN[I], JOIN[I] && BRANCH_NORM>(s.x, s.partial, o.x, o.branch, norm, branch_norm,
                                                                              o.joined, o.eps, o.branch_eps);
  for (int unit = blockIdx.x; unit < units; unit += gridDim.x, flip ^= 1) {
    float sums[UNIT / 8][4][4] = {};
    int row = weight_row(gates, unit, lane % UNIT, o.n);
    float row_scale = ITEM == 1 ? o.w_scale[row] : 1;
    for (int segment = 0; segment < segments(I); ++segment) {
      u32 full = shared_address(&s.full[warp][place.at]);
      wait_full(full, place.parity);
      const u8* weights = s.ring[warp][place.at] + row_at(group) + part * 16;
      const u16* x = s.x + (warp * slice(I) + segment * SEGMENT + part * 16) / ITEM;
      if (!tail || segment + 1 < segments(I))
        multiply_segment<SEGMENT>(sums, weights, x, group == 0);
      else
        multiply_segment<tail>(sums, weights, x, group == 0);
      __syncwarp();
      stream.request(s.ring[warp][place.at], full);
      place.next();
    }
    if (group == 0)
      for (int tile = 0; tile < UNIT / 8; ++tile)
        for (int i = 0; i < 2; ++i)
          s.sums[flip][warp][8 * tile + 2 * part + i] =
              (sums[tile][0][i] + sums[tile][1][i]) + (sums[tile][2][i] + sums[tile][3][i]);
    __syncthreads();
    if (warp == 0) {
      float total = 0;
      for (int w = 0; w < WARPS; ++w) total += s.sums[flip][w][lane % UNIT];
      total *= ITEM == 1 ? x_scale * row_scale : 1;
      if (gates) {
        float up = __shfl_down_sync(~0u, total, 1);
        int column = unit * (UNIT / 2) + lane / 2;
        if (lane < UNIT && lane % 2 == 0 && column < o.n) o.y[column] = narrow(gated<ACT[I]>(total, up));
      } else {
        int column = unit * UNIT + lane;
        if (lane < UNIT && column < o.n) o.y[column] = narrow(total);
      }
    }
  }
  if constexpr (I + 1 < OPS) project<I + 1>(s, chain, stream, place, arrive<I>(chain));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) chain(const __grid_constant__ Chain given) {
  extern __shared__ __align__(128) u8 memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  asm volatile("griddepcontrol.launch_dependents;");
  int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) {
    for (int i = 0; i < STAGES; ++i)
      asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(&s.full[warp][i])));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
  Stream stream{given, read_once_policy()};
  for (int i = 0; i < STAGES; ++i) stream.request(s.ring[warp][i], shared_address(&s.full[warp][i]));
  Place place;
  project<0>(s, given, stream, place, 0);
}
