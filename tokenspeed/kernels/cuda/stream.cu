// y = f(x) W^T for one row x, or x W^T for up to eight that are ready to multiply, of bf16: weights stream from memory through
// rings in shared memory without a pause.
//
// A program owns units of 8 rows of W and takes every G-th of them. Each warp has a slice of their columns and a ring of its
// own, which it fills by bulk copies as soon as the program starts: before the kernel in front has ended (programmatic
// dependent launch), as weights are constant. Then x is prepared (join, norms), and each warp multiplies its slice on
// tensor cores and asks for more; sums of the warps meet at the end of a unit. Narrower weights: stream_narrow.cu.
//
// Where several rows of x leave rings little room, the programs of a cluster share the columns, and send each other their sums.
//
// Compiled with -D: ROWS of x that fit (1, 2, 4 or 8; more than one come prepared), K columns, CLUSTER programs that share them,
// WARPS, SEGMENT bytes of a row in a stage of a ring, STAGES, ACT (0: none, 1: silu, 2: gelu tanh), SHARED bytes, PROGRAMS on an
// SM, and 0/1: NORM, BRANCH, BRANCH_NORM, BIAS.

#include "units.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int OWN = K / CLUSTER;
constexpr int ROW_BYTES = 2 * OWN;
constexpr int SLICE = ROW_BYTES / WARPS;
constexpr int SEGMENTS = SLICE / SEGMENT;
constexpr int STEPS = SEGMENT / 64;
constexpr int SUMS = ROWS * UNIT;
constexpr int ADDING = (SUMS + 31) / 32 * 32;
static_assert(SLICE % SEGMENT == 0 && SEGMENT % 64 == 0 && SLICE * WARPS * CLUSTER == 2 * K && K % 8 == 0,
              "columns do not fit the tiles");
static_assert(CLUSTER == 1 || ROWS > 1, "rows are prepared where all of their columns are");

// Rows of x: neighbours lie half a line of banks apart.
constexpr int PITCH = ROWS > 1 ? OWN + 32 : OWN;

struct Shared {
  u8 ring[WARPS][STAGES][rows_bytes(SEGMENT)];
  u16 x[ROWS * PITCH];
  u64 full[WARPS][STAGES];
  u64 gathered;
  float sums[2][WARPS][SUMS];
  float parts[CLUSTER][SUMS];
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
      unit += gridDim.x / CLUSTER;
    }
  }
};

// The programs of a cluster finish its units in turn, each one's when the next one's sums are there, so that none waits long.
// A program that sends for its next turn's unit to another has heard from that one since, which had finished its last by then:
// so there is one place for parts.
struct Turn {
  int at = 0, held = -1, phase = 0;
  float bias = 0;

  __device__ void send(Shared& s, int rank, float total, int unit, float row_bias) {
    u32 gathered = shared_address(&s.gathered);
    if (at == rank) {
      held = unit, bias = row_bias;
      if (threadIdx.x == 0) expect_bytes(gathered, CLUSTER * SUMS * 4);
    }
    if (threadIdx.x < SUMS) send_float(shared_address(&s.parts[rank][threadIdx.x]), at, total, gathered);
    if (++at == CLUSTER) at = 0;
  }

  template <class Finish>
  __device__ void finish(Shared& s, Finish finish) {
    if (held < 0) return;
    wait_barrier(shared_address(&s.gathered), phase);
    float total = 0;
    for (int from = 0; from < CLUSTER; ++from) total += s.parts[from][threadIdx.x % SUMS];
    finish(total, held, bias);
    held = -1, phase ^= 1;
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS) stream(
    const u16* x, const float* x_scale, const u16* branch, const u8* weight, const u8* scale, const float* bias, const float* norm_weight,
    const float* branch_weight, u16* y, u16* joined, long long x_stride, long long w_stride, int rows, int n, float eps,
    float branch_eps) {
  Shared& s = *reinterpret_cast<Shared*>(launched_memory());
  let_next_start();
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, units = (n + OUTPUTS - 1) / OUTPUTS;
  int rank = blockIdx.x % CLUSTER, first = blockIdx.x / CLUSTER, apart = gridDim.x / CLUSTER;
  x += rank * OWN, weight += rank * ROW_BYTES;
  if (lane == 0) {
    for (int i = 0; i < STAGES; ++i) barrier_init(&s.full[warp][i], 1);
    if (CLUSTER > 1 && warp == 0) barrier_init(&s.gathered, 1);
    barriers_ready();
  }
  __syncwarp();
  if (CLUSTER > 1) cluster_arrive();
  Stream stream{weight, w_stride, n, units, first, 0, read_once_policy()};
  for (int i = 0; i < STAGES; ++i) stream.request(s.ring[warp][i], shared_address(&s.full[warp][i]));
  Row<OWN, THREADS> norm, branch_norm;
  constexpr bool early = reads_early<BRANCH, BRANCH_NORM, OWN, THREADS>();
  if (NORM && early) norm.load(norm_weight);
  if (BRANCH_NORM && early) branch_norm.load(branch_weight);
  float next_bias = BIAS ? bias[weight_row(first, lane % UNIT, n)] : 0;  // of a unit while the one before is multiplied
  if (CLUSTER > 1) cluster_wait();

  wait_for_previous();
  if (ROWS > 1)
    load_rows<ROWS, ROW_BYTES, THREADS>(x, x_stride, rows, [&](int row, int piece, uint4 pairs) {
      // Turned as Row::store does.
      *reinterpret_cast<uint4*>(s.x + row * PITCH + piece * 8) = make_uint4(pairs.x, pairs.z, pairs.y, pairs.w);
    });
  else
    prepare_row<BF16, NORM, BRANCH, BRANCH_NORM>(s.x, nullptr, s.partial, x, branch, norm, branch_norm, norm_weight,
                                                 branch_weight, joined, eps, branch_eps);
  int group = lane / 4, part = lane % 4, at = 0, parity = 0, flip = 0;
  auto finish = [&](float total, int unit, float row_bias) {
    int t = threadIdx.x / UNIT, local = lane % UNIT, column = unit * OUTPUTS + local;
    if (BIAS) total += rounded(row_bias);
    if (ACT) total = gated<ACT>(total, __shfl_down_sync(~0u, total, UNIT / 2));
    if (t < rows && column < n && local < OUTPUTS) y[(long long)t * n + column] = narrow(total);
  };
  Turn turn;
  for (int unit = first; unit < units; unit += apart, flip ^= 1) {
    float sums[4][4] = {};  // several, as one product waits for the one before it into the same
    float row_bias = next_bias;
    if (BIAS) next_bias = bias[weight_row(unit + apart, lane % UNIT, n)];
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
    if (threadIdx.x < ADDING) {
      float total = 0;
      for (int w = 0; w < WARPS; ++w) total += s.sums[flip][w][threadIdx.x % SUMS];
      if (CLUSTER == 1) {
        finish(total, unit, row_bias);
      } else {
        turn.finish(s, finish);
        turn.send(s, rank, total, unit, row_bias);
      }
    }
  }
  if (CLUSTER > 1 && threadIdx.x < ADDING) turn.finish(s, finish);
}
