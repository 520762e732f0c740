// y = f(x) W^T for one row x and W of e4m3 or of codes, or x W^T for up to eight of e4m3 that are ready to multiply: weights
// stream from memory through a ring in shared memory.
//
// A program owns units of 8 rows of W and takes every G-th of them. Its last warp fills the ring by bulk copies as soon as the
// program starts: before the kernel in front has ended (programmatic dependent launch), as weights are constant. The others
// prepare x (join, norms, rounding) and multiply, each its part of the columns of a stage; they never wait for one another:
// the last warp has a stage filled anew, adds their sums and writes results. Such weights take more instructions per byte
// than bf16 does; here those that ask for bytes and write results are few and next to the others.
//
// Codes of four bits have scales of groups of columns, which come into the ring with them; what multiplies is in
// narrow_products.cuh.
//
// Compiled with -D: ROWS of x that fit (1, 2, 4 or 8; more than one come as e4m3 with a scale each, or as bf16 to QUANTIZE), K columns, FORMAT (row.cuh's),
// WARPS that multiply, SEGMENT bytes of a row in a stage of the ring, STAGES, ACT (0: none, 1: silu, 2: gelu tanh), SHARED bytes,
// PROGRAMS on an SM, and 0/1: NORM, BRANCH, BRANCH_NORM, BIAS, HALF_SCALES (int4's scales are float16, else bf16), WIDE (several rows of x are
// float16 in shared memory).

#include "narrow_products.cuh"
#include "units.cuh"

constexpr int MULTIPLYING = 32 * WARPS;
constexpr int ROW_BYTES = K * bits_of(FORMAT) / 8;
constexpr int SEGMENTS = ROW_BYTES / SEGMENT;
constexpr int STEPS = SEGMENT / 64 / WARPS;
static_assert(ROW_BYTES % SEGMENT == 0 && STEPS * 64 * WARPS == SEGMENT && K % 8 == 0, "columns do not fit the tiles");
// Of a row and 64 bytes of it, behind the rows of a stage: two rows side by side.
constexpr int SCALE = FORMAT == INT4 ? 2 : FORMAT == MXFP4 ? 4 : 0;
constexpr int SCALES_AT = rows_bytes(SEGMENT);
constexpr int STAGE = SCALES_AT + SEGMENT / 64 * UNIT * SCALE;
constexpr bool INTEGER = FORMAT == INT8 || FORMAT == INT4;
// Between rows of x, or planes of bytes: neighbours of one byte an element lie half a line of banks apart.
constexpr int APART = INTEGER ? plane_bytes(K) : WIDE ? 2 * K : K / 128 * 128 + 64;
constexpr int X_BYTES = (INTEGER ? 2 : ROWS) * APART;
constexpr int SUMS = ROWS * UNIT;
static_assert(ROWS == 1 ? WIDE : FORMAT == E4M3 && K % 64 == 0, "several rows are of e4m3, one is not");

struct Shared {
  u8 ring[STAGES][STAGE];
  u8 x[X_BYTES];
  u64 full[STAGES];
  u64 done[STAGES];
  float x_scales[INTEGER ? ROW_BYTES / 64 : 2];
  float sums[STAGES][WARPS][SUMS];
  float partial[3][WARPS];
  float x_scale[ROWS];
};

static_assert(sizeof(Shared) == SHARED, "the launch must know the size");

// Of the filling warp: lanes that add up one sum, and sums of a lane.
constexpr int SHARING = SUMS < 32 ? 32 / SUMS : 1;
constexpr int EACH = SUMS < 32 ? 1 : SUMS / 32;

// 16 columns of one of several rows of x.
__device__ void put(u8* x, int row, int piece, uint4 codes) {
  uint4* to = reinterpret_cast<uint4*>(x + row * APART + piece * 16 * (1 + WIDE));
  if (WIDE) {
    to[0] = make_uint4(halves(codes.x), halves(codes.x >> 16), halves(codes.y), halves(codes.y >> 16));
    to[1] = make_uint4(halves(codes.z), halves(codes.z >> 16), halves(codes.w), halves(codes.w >> 16));
  } else {
    *to = codes;
  }
}

// The way through the columns of the program's units: what the filling warp asks for next.
struct Stream {
  const u8* weight;
  const u8* scale;
  int w_stride, n, units, unit, segment;
  u64 policy;

  // Whether there was something; `full` counts it once `expect` is called.
  __device__ bool request(u8* to, u32 full) {
    if (unit >= units) return false;
    if (elected()) {
      const u8* from = weight + segment * SEGMENT;
#pragma unroll
      for (int row = 0; row < UNIT; ++row)
        copy_bulk(shared_address(to) + row_at(row, SEGMENT), from + (long long)weight_row(unit, row, n) * w_stride, SEGMENT, full,
                  policy);
    }
    __syncwarp();
    int lane = threadIdx.x % 32;
    if (SCALE) {
      // Rows, and halves of a gate and up pair, are even in number, so that two lie together at the end as well.
      int local = lane % (UNIT / 2) * 2, row = min(unit * OUTPUTS + local % OUTPUTS, n - 2) + local / OUTPUTS * n;
      long long apart = (long long)(ACT ? 2 * n : n) * SCALE;
      const u8* from = scale + segment * (SEGMENT / 64) * apart + row * SCALE;
      for (int piece = lane; piece < SEGMENT / 64 * UNIT / 2; piece += 32)
        copy_few<2 * SCALE>(shared_address(to) + SCALES_AT + piece * 2 * SCALE, from + piece / (UNIT / 2) * apart);
      arrive_with_copies(full);
    }
    if (++segment == SEGMENTS) {
      segment = 0;
      unit += gridDim.x;
    }
    return true;
  }

  __device__ static void expect(u32 full) {
    if (threadIdx.x % 32 == 0) expect_bytes(full, UNIT * SEGMENT);
  }
};

extern "C" __global__ void __launch_bounds__(MULTIPLYING + 32, PROGRAMS) stream(
    const u16* x, const float* token_scale, const u16* branch, const u8* weight, const u8* scale, const float* bias, const float* norm_weight,
    const float* branch_weight, u16* y, u16* joined, long long x_stride, long long w_stride, int rows, int n, float eps,
    float branch_eps) {
  Shared& s = *reinterpret_cast<Shared*>(launched_memory());
  let_next_start();
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, units = (n + OUTPUTS - 1) / OUTPUTS;
  Stream stream{weight, scale, (int)w_stride, n, units, (int)blockIdx.x, 0, read_once_policy()};
  Row<K, MULTIPLYING> norm, branch_norm;
  if (warp == WARPS) {
    if (elected()) {
      for (int i = 0; i < STAGES; ++i) {
        barrier_init(&s.full[i], SCALE ? 33 : 1);
        barrier_init(&s.done[i], WARPS * UNIT);
      }
      barriers_ready();
    }
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < STAGES; ++i) {
      u32 full = shared_address(&s.full[i]);
      if (stream.unit < units) Stream::expect(full);
      __syncwarp();
      stream.request(s.ring[i], full);
    }
  } else {
    constexpr bool early = reads_early<BRANCH, BRANCH_NORM, K, MULTIPLYING>();
    if (NORM && early) norm.load(norm_weight);
    if (BRANCH_NORM && early) branch_norm.load(branch_weight);
  }
  __syncthreads();

  wait_for_previous();
  int at = 0, parity = 0;
  if (warp < WARPS) {
    if constexpr (ROWS > 1) {
      auto store = [&](int row, int piece, uint4 codes) { put(s.x, row, piece, codes); };
      if constexpr (QUANTIZE)
        quantize_rows<ROWS, K, WARPS>(s.x_scale, s.partial[0], x, x_stride, rows, store);
      else
        load_rows<ROWS, K, MULTIPLYING>(reinterpret_cast<const u8*>(x), x_stride, rows, store);
    } else {
      float x_scale = prepare_row<FORMAT, NORM, BRANCH, BRANCH_NORM>(
          reinterpret_cast<u16*>(s.x), s.x_scales, s.partial, x, branch, norm, branch_norm, norm_weight, branch_weight, joined,
          eps, branch_eps);
      if (FORMAT == E4M3 && threadIdx.x == 0) s.x_scale[0] = x_scale;  // before its warp's first arrival
    }
    using P = Products<FORMAT, HALF_SCALES, ROWS, WIDE>;
    P products;
    int group = lane / 4, part = lane % 4;
    bool wanted = P::USED == 8 || group < P::USED;
    u32 own_x = shared_address(s.x) + P::x_at(group, part, APART) + warp * STEPS * P::X_STEP;
    u32 held[STEPS][4] = {};
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
      products.clear();
      for (int segment = 0; segment < SEGMENTS; ++segment) {
        wait_barrier(shared_address(&s.full[at]), parity);
        const u8* stage = s.ring[at];
        const u8* weights = stage + row_at(group, SEGMENT) + warp * STEPS * 64 + part * 16;
        u32 columns = own_x + segment * (SEGMENT / 64) * P::X_STEP;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
          uint4 w = *reinterpret_cast<const uint4*>(weights + step * 64);
          products.add(held[step], columns + step * P::X_STEP, APART, wanted, w,
                       INTEGER ? s.x_scales[segment * (SEGMENT / 64) + warp * STEPS + step] : 1,
                       stage + SCALES_AT + ((warp * STEPS + step) * UNIT + group) * SCALE);
        }
        if (segment == SEGMENTS - 1) products.store(s.sums[at][warp], group, part);
        __syncwarp();
        if (part == 0) arrive(shared_address(&s.done[at]));
        if (++at == STAGES) {
          at = 0;
          parity ^= 1;
        }
      }
    }
    return;
  }
  int local = lane % UNIT;
  float x_scales[EACH];
  for (int i = 0; i < EACH; ++i) {
    int token = (lane + i * 32) % SUMS / UNIT;
    x_scales[i] = ROWS > 1 && !QUANTIZE && token < rows ? token_scale[token] : 1;
  }
  for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
    int row = weight_row(unit, local, n), column = unit * OUTPUTS + local;
    float row_scale = FORMAT == E4M3 || FORMAT == INT8 ? reinterpret_cast<const float*>(scale)[row] : 1;
    float row_bias = BIAS ? rounded(bias[row]) : 0;
    for (int segment = 0; segment < SEGMENTS; ++segment) {
      u32 full = shared_address(&s.full[at]);
      wait_barrier(shared_address(&s.done[at]), parity);
      bool more = stream.request(s.ring[at], full);
      if (segment == SEGMENTS - 1) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
          int sum = (lane + i * 32) % SUMS, token = ROWS > 1 ? sum / UNIT : 0;
          float total = 0;
          for (int w = lane / SUMS; w < WARPS; w += SHARING) total += s.sums[at][w][sum];
          for (int o = SUMS; o < 32; o *= 2) total += __shfl_xor_sync(~0u, total, o);
          if (FORMAT == E4M3) total *= ROWS > 1 && !QUANTIZE ? x_scales[i] : s.x_scale[token];
          if (FORMAT == E4M3 || FORMAT == INT8) total *= row_scale;
          if (FORMAT == MXFP4) total *= E2M1_FACTOR;
          if (BIAS) total += row_bias;
          if (ACT) total = gated<ACT>(total, __shfl_down_sync(~0u, total, UNIT / 2));
          bool mine = lane < SUMS && local < OUTPUTS && column < n && (ROWS == 1 || token < rows);
          if (mine) y[(long long)token * n + column] = narrow(total);
        }
        __syncwarp();
      }
      // Only now can the stage fill, and be multiplied: sums of the stage are read.
      if (more) Stream::expect(full);
      if (++at == STAGES) {
        at = 0;
        parity ^= 1;
      }
    }
  }
}
