// y = f(x) W^T for one row x, or x W^T for up to eight that are ready to multiply, of bf16: weights stream from memory through
// rings in shared memory without a pause.
//
// A program owns units of 8 rows of W and takes every G-th of them. Each warp has a slice of their columns and a ring of its
// own, which it fills by bulk copies as soon as the program starts: before the kernel in front has ended (programmatic
// dependent launch), as weights are constant. Then x is prepared (join, norms), and each warp multiplies its slice on
// tensor cores and asks for more; sums of the warps meet at the end of a unit. Narrower weights: stream_narrow.cu.
//
// Compiled with -D: ROWS of x that fit (1, 2, 4 or 8; more than one come prepared), K columns, WARPS, SEGMENT bytes of a row in
// a stage of a ring, STAGES, ACT (0: none, 1: silu, 2: gelu tanh), SHARED bytes, and 0/1: NORM, BRANCH, BRANCH_NORM, BIAS.

#include "units.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int ROW_BYTES = 2 * K;
constexpr int SLICE = ROW_BYTES / WARPS;
constexpr int SEGMENTS = SLICE / SEGMENT;
constexpr int STEPS = SEGMENT / 64;
static_assert(SLICE % SEGMENT == 0 && SEGMENT % 128 == 0 && SLICE * WARPS == ROW_BYTES && K % 8 == 0,
              "columns do not fit the tiles");

// Rows of x: neighbours lie half a line of banks apart.
constexpr int PITCH = ROWS > 1 ? K + 32 : K;

struct Shared {
  u8 ring[WARPS][STAGES][rows_bytes(SEGMENT)];
  u16 x[ROWS * PITCH];
  u64 full[WARPS][STAGES];
  float sums[2][WARPS][ROWS * UNIT];
  float partial[3][WARPS];
};

static_assert(sizeof(Shared) == SHARED, "the launch must know the size");

// A warp's way through its columns of the program's units: what it asks for next.
struct Stream {
  const u8* weight;
  long long w_stride;
  int n, units, unit, segment;
  u64 policy;

  __device__ void request(u8* to, u32 full) {
    if (unit >= units) return;
    int lane = threadIdx.x % 32;
    if (lane == 0) expect_bytes(full, UNIT * SEGMENT);
    __syncwarp();
    if (lane < UNIT) {
      const u8* from = weight + weight_row(unit, lane, n) * w_stride + threadIdx.x / 32 * SLICE + segment * SEGMENT;
      copy_bulk(shared_address(to) + row_at(lane, SEGMENT), from, SEGMENT, full, policy);
    }
    if (++segment == SEGMENTS) {
      segment = 0;
      unit += gridDim.x;
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2) stream(
    const u16* x, const u16* branch, const u8* weight, const u8* scale, const float* bias, const float* norm_weight,
    const float* branch_weight, u16* y, u16* joined, long long x_stride, long long w_stride, int rows, int n, float eps,
    float branch_eps) {
  Shared& s = *reinterpret_cast<Shared*>(launched_memory());
  let_next_start();
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, units = (n + OUTPUTS - 1) / OUTPUTS;
  if (lane == 0) {
    for (int i = 0; i < STAGES; ++i) barrier_init(&s.full[warp][i], 1);
    barriers_ready();
  }
  __syncwarp();
  Stream stream{weight, w_stride, n, units, (int)blockIdx.x, 0, read_once_policy()};
  for (int i = 0; i < STAGES; ++i) stream.request(s.ring[warp][i], shared_address(&s.full[warp][i]));
  Row<K, THREADS> norm, branch_norm;
  constexpr bool early = reads_early<BRANCH, BRANCH_NORM, K, THREADS>();
  if (NORM && early) norm.load(norm_weight);
  if (BRANCH_NORM && early) branch_norm.load(branch_weight);

  wait_for_previous();
  if (ROWS > 1)
    load_rows<K, THREADS>(s.x, PITCH, x, x_stride, rows);
  else
    prepare_row<BF16, NORM, BRANCH, BRANCH_NORM>(s.x, nullptr, s.partial, x, branch, norm, branch_norm, norm_weight,
                                                 branch_weight, joined, eps, branch_eps);
  int group = lane / 4, part = lane % 4, at = 0, parity = 0, flip = 0;
  for (int unit = blockIdx.x; unit < units; unit += gridDim.x, flip ^= 1) {
    float sums[4][4] = {};  // several, as one product waits for the one before it into the same
    int row = weight_row(unit, lane % UNIT, n);
    float row_bias = BIAS ? rounded(bias[row]) : 0;
    for (int segment = 0; segment < SEGMENTS; ++segment) {
      u32 full = shared_address(&s.full[warp][at]);
      wait_barrier(full, parity);
      const u8* weights = s.ring[warp][at] + row_at(group, SEGMENT) + part * 16;
      const u16* columns = s.x + group % ROWS * PITCH + (warp * SLICE + segment * SEGMENT) / 2 + part * 8;
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        uint4 w = *reinterpret_cast<const uint4*>(weights + step * 64);
        uint4 a = make_uint4(0, 0, 0, 0);
        if (group < ROWS) a = *reinterpret_cast<const uint4*>(columns + step * 32);
        // Two products, of x's first and third, and of its second and fourth pair of columns, which are eight more rows. What
        // is wanted of the first lies in sums 0 and 1, of the second in 2 and 3, and no register has to be moved.
        multiply_tile<false>(sums[step % 2 * 2], a.x, a.y, a.z, a.w, w.x, w.y);
        multiply_tile<false>(sums[step % 2 * 2 + 1], a.x, a.y, a.z, a.w, w.z, w.w);
      }
      __syncwarp();
      stream.request(s.ring[warp][at], full);
      if (++at == STAGES) {
        at = 0;
        parity ^= 1;
      }
    }
    if (group < ROWS) {
      for (int i = 0; i < 2; ++i)
        s.sums[flip][warp][group * UNIT + 2 * part + i] =
            (sums[0][i] + sums[1][2 + i]) + (sums[2][i] + sums[3][2 + i]);
    }
    __syncthreads();
    if (threadIdx.x < (ROWS * UNIT + 31) / 32 * 32) {
      int t = threadIdx.x / UNIT, local = lane % UNIT;
      float total = 0;
      for (int w = 0; w < WARPS; ++w) total += s.sums[flip][w][t % ROWS * UNIT + local];
      if (BIAS) total += row_bias;
      int column = unit * OUTPUTS + local;
      if (ACT) total = gated<ACT>(total, __shfl_down_sync(~0u, total, UNIT / 2));
      if (t < rows && column < n && local < OUTPUTS) y[(long long)t * n + column] = narrow(total);
    }
  }
}
