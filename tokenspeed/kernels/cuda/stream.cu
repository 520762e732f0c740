// y = f(x) W^T for one row x, or x W^T for up to eight that are ready to multiply: weights stream from memory through rings in
// shared memory without a pause.
//
// A program owns units of 8 rows of W and takes every G-th of them. Each warp has a slice of their columns and a ring of its
// own, which it fills by bulk copies as soon as the program starts: before the kernel in front has ended (programmatic
// dependent launch), as weights are constant. Then x is prepared (join, norms, e4m3), and each warp multiplies its slice on
// tensor cores and asks for more; sums of the warps meet at the end of a unit.
//
// Codes of four bits have scales of groups of columns, which come into the ring with them; what multiplies codes is in row.cuh.
//
// Compiled with -D: ROWS of x that fit (1, 2, 4 or 8; more than one come prepared, and to bf16), K columns, FORMAT (row.cuh's),
// WARPS, SEGMENT bytes of a row in a stage of a ring, STAGES, ACT (0: none, 1: silu, 2: gelu tanh), SHARED bytes, and 0/1:
// NORM, BRANCH, BRANCH_NORM, BIAS, HALF_SCALES (int4's scales are float16, else bf16).

#include "row.cuh"

constexpr int UNIT = 8;
constexpr int OUTPUTS = ACT ? UNIT / 2 : UNIT;
constexpr int THREADS = 32 * WARPS;
constexpr int BITS = bits_of(FORMAT);
constexpr int ROW_BYTES = K * BITS / 8;
constexpr int SLICE = ROW_BYTES / WARPS;
constexpr int SEGMENTS = SLICE / SEGMENT;
// Eight threads that read 16 bytes each touch 64 bytes of an even row and of the next: odd rows lie apart, half a line of
// banks further.
constexpr int ODD = UNIT / 2 * SEGMENT + 64;
constexpr int STEPS = SEGMENT / 64;
// Of a row and 64 bytes of it, behind the rows of a stage: two rows side by side.
constexpr int SCALE = FORMAT == INT4 ? 2 : FORMAT == MXFP4 ? 4 : 0;
constexpr int SCALES_AT = UNIT * SEGMENT + 64;
constexpr int STAGE = SCALES_AT + STEPS * UNIT * SCALE;
constexpr bool CODES = FORMAT != BF16 && FORMAT != E4M3;
constexpr int OFFSETS = FORMAT == INT8 || FORMAT == INT4 ? ROW_BYTES / 64 : 2;
static_assert(STEPS * UNIT / 2 <= 32, "a thread per pair of scales");
static_assert(SLICE % SEGMENT == 0 && SEGMENT % 128 == 0 && SLICE * WARPS == ROW_BYTES && K % 8 == 0, "columns do not fit the tiles");

__device__ int row_at(int row) { return row / 2 * SEGMENT + row % 2 * ODD; }

// Rows of x: neighbours lie half a line of banks apart.
constexpr int PITCH = ROWS > 1 ? K + 32 : K;

struct Shared {
  u8 ring[WARPS][STAGES][STAGE];
  u16 x[ROWS * PITCH];
  u64 full[WARPS][STAGES];
  float offsets[OFFSETS];
  float sums[2][WARPS][ROWS * UNIT];
  float partial[3][WARPS];
};

static_assert(sizeof(Shared) == SHARED, "the launch must know the size");

// Row of W that lies at `local` of a unit: consecutive rows, or gate rows and then up rows; past the end the last one.
__device__ int weight_row(int unit, int local, int n) {
  return min(unit * OUTPUTS + local % OUTPUTS, n - 1) + local / OUTPUTS * n;
}

// Scales of two rows.
__device__ uint2 scales_at(const u8* from) {
  if (SCALE == 2) return make_uint2(*reinterpret_cast<const u32*>(from), 0);
  return SCALE == 4 ? *reinterpret_cast<const uint2*>(from) : make_uint2(0, 0);
}

// A warp's way through its columns of the program's units: what it asks for next.
struct Stream {
  const u8* weight;
  const u8* scale;
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
      copy_bulk(shared_address(to) + row_at(lane), from, SEGMENT, full, policy);
    }
    if (SCALE) {
      // Rows, and halves of a gate and up pair, are even in number, so that two lie together at the end as well.
      int local = lane % (UNIT / 2) * 2, row = min(unit * OUTPUTS + local % OUTPUTS, n - 2) + local / OUTPUTS * n;
      int step = lane / (UNIT / 2), group = (threadIdx.x / 32 * SEGMENTS + segment) * STEPS + step;
      const u8* from = scale + ((long long)group * (ACT ? 2 * n : n) + row) * SCALE;
      if (step < STEPS) copy_few<2 * SCALE>(shared_address(to) + SCALES_AT + lane * 2 * SCALE, from);
      arrive_with_copies(full);
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
  extern __shared__ __align__(128) u8 memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  asm volatile("griddepcontrol.launch_dependents;");
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, units = (n + OUTPUTS - 1) / OUTPUTS;
  if (lane == 0) {
    for (int i = 0; i < STAGES; ++i)
      asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&s.full[warp][i])), "n"(SCALE ? 33 : 1));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
  Stream stream{weight, scale, w_stride, n, units, (int)blockIdx.x, 0, read_once_policy()};
  for (int i = 0; i < STAGES; ++i) stream.request(s.ring[warp][i], shared_address(&s.full[warp][i]));
  Row<K, THREADS> norm, branch_norm;
  if (NORM) norm.load(norm_weight);
  if (BRANCH_NORM) branch_norm.load(branch_weight);

  asm volatile("griddepcontrol.wait;" ::: "memory");
  float x_scale = 1;
  if (ROWS > 1)
    load_rows<K, THREADS>(s.x, PITCH, x, x_stride, rows);
  else
    x_scale = prepare_row<FORMAT, NORM, BRANCH, BRANCH_NORM>(s.x, s.offsets, s.partial, x, branch, norm, branch_norm, joined,
                                                             eps, branch_eps);
  constexpr int APART = FORMAT == INT4 || FORMAT == MXFP4 ? 8 : 128 / BITS;  // columns between threads of a group
  int group = lane / 4, part = lane % 4, at = 0, parity = 0, flip = 0;
  for (int unit = blockIdx.x; unit < units; unit += gridDim.x, flip ^= 1) {
    float sums[4][4] = {};  // several, as one product waits for the one before it into the same
    int row = weight_row(unit, lane % UNIT, n);
    float row_scale = FORMAT == E4M3 || FORMAT == INT8 ? reinterpret_cast<const float*>(scale)[row] : 1;
    float row_bias = BIAS ? rounded(bias[row]) : 0;
    for (int segment = 0; segment < SEGMENTS; ++segment) {
      u32 full = shared_address(&s.full[warp][at]);
      wait_full(full, parity);
      const u8* weights = s.ring[warp][at] + row_at(group) + part * 16;
      int first = (warp * SLICE + segment * SEGMENT) / 64;
      const u16* columns = s.x + group % ROWS * PITCH + first * 512 / BITS + part * APART;
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        uint4 w = *reinterpret_cast<const uint4*>(weights + step * 64);
        if (CODES)
          multiply_codes<FORMAT, HALF_SCALES>(sums[0], columns + step * 512 / BITS, group == 0, w,
                                              FORMAT == MXFP4 ? 0 : s.offsets[first + step],
                                              scales_at(s.ring[warp][at] + SCALES_AT + (step * 4 + part) * 2 * SCALE));
        else
          multiply_vector<FORMAT>(sums + step % 2 * 2, columns + step * 512 / BITS, group < ROWS, w);
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
            CODES ? sums[0][i] : (sums[0][i] + sums[1][2 + i]) + (sums[2][i] + sums[3][2 + i]);
    }
    __syncthreads();
    if (threadIdx.x < (ROWS * UNIT + 31) / 32 * 32) {
      int t = threadIdx.x / UNIT, local = lane % UNIT;
      float total = 0;
      for (int w = 0; w < WARPS; ++w) total += s.sums[flip][w][t % ROWS * UNIT + local];
      if (FORMAT == E4M3 || FORMAT == INT8) total *= x_scale * row_scale;
      if (CODES) total *= FORMAT == MXFP4 ? E2M1_FACTOR : CODE_FACTOR;
      if (BIAS) total += row_bias;
      int column = unit * OUTPUTS + local;
      if (ACT) total = gated<ACT>(total, __shfl_down_sync(~0u, total, UNIT / 2));
      if (t < rows && column < n && local < OUTPUTS) y[(long long)t * n + column] = narrow(total);
    }
  }
}
