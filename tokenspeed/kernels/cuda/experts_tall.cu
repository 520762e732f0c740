// The chosen experts of some tokens by weights of bf16 or e4m3, in two kernels of one source by Hopper's warpgroup products:
// gate and up with their activation, then down, whose results of each choice another kernel weighs and adds up.
//
// Every program lists the experts that are chosen in blocks: an expert and up to ROWS of its choices. A unit is 64 rows of W
// for a block (of gate and up 32 each: products give a thread both of an output). Units of all blocks, one after the other, are
// dealt out evenly. One thread has a program's units copied into a ring through a tensor map, as products want them: nothing
// is done to weights on their way. A warpgroup puts a block's rows of x beside them, by e4m3 quantised with a scale each, and
// multiplies.
//
// down asks for its experts before its wait: gate and up lets it start after its own wait, so that the router has ended.
//
// Compiled with -D: ROWS of a block (8 or 16), EXPERTS, CHOSEN choices at most, CHOICES of a token, K columns, N outputs, FORMAT (row.cuh's: bf16 or e4m3), STEP lines of 128
// bytes in a stage, STAGES, PROGRAMS on an SM, ACT (0: down, 1: silu, 2: gelu tanh), SHARED bytes.

#include "expert_blocks.cuh"
#include "products.cuh"

constexpr bool DOWN = ACT == 0, NARROW = FORMAT == E4M3;
constexpr int TALL = 64, THREADS = 160;
constexpr int OUTPUTS = DOWN ? TALL : TALL / 2, UNITS = N / OUTPUTS, W_ROWS = DOWN ? N : 2 * N;
constexpr int COLUMNS = NARROW ? 128 : 64;  // of a line
constexpr int LINES = K / COLUMNS, SEGMENTS = LINES / STEP;
constexpr int STAGE_LINE = TALL * LINE, X_LINE = ROWS * LINE;
static_assert(N % OUTPUTS == 0 && K % (COLUMNS * STEP) == 0, "sizes do not fit the tiles");

struct Shared {
  u8 ring[STAGES][STEP * STAGE_LINE];
  u8 x[LINES * X_LINE];
  u64 full[STAGES], done[STAGES];
  float x_scale[ROWS];
  Blocks<ROWS, EXPERTS, CHOSEN, CHOICES, THREADS> blocks;
};
static_assert(sizeof(Shared) <= SHARED, "the launch must know the size");

// A place in the ring.
struct Slot {
  int at = 0, parity = 0;

  __device__ void next() {
    if (++at == STAGES) at = 0, parity ^= 1;
  }
};

// By one thread.
__device__ void fill(Shared& s, const TensorMap& weights, int begin, int end) {
  Slot slot;
  u64 policy = read_once_policy();
  for (int unit = begin; unit < end; ++unit) {
    int expert = s.blocks.expert[unit / UNITS], eight = unit % UNITS * 4;
    for (int segment = 0; segment < SEGMENTS; ++segment, slot.next()) {
      u32 full = shared_address(&s.full[slot.at]);
      wait_barrier(shared_address(&s.done[slot.at]), slot.parity ^ 1);
      expect_bytes(full, STEP * STAGE_LINE);
#pragma unroll
      for (int line = 0; line < STEP; ++line)
        copy_tensor(shared_address(s.ring[slot.at]) + line * STAGE_LINE, weights, (segment * STEP + line) * COLUMNS, 0, 0, eight,
                    expert, full, policy);
    }
  }
}

// Eight columns of a row of x.
__device__ inline void put(u8* x, int row, int piece, uint4 bits, float inverse) {
  if (NARROW) {
    u32 low = e4m3_of(bits.x, inverse) | u32(e4m3_of(bits.y, inverse)) << 16;
    u32 high = e4m3_of(bits.z, inverse) | u32(e4m3_of(bits.w, inverse)) << 16;
    *reinterpret_cast<uint2*>(x + piece / 16 * X_LINE + swizzled(row, piece % 16 / 2) + piece % 2 * 8) = make_uint2(low, high);
  } else {
    *reinterpret_cast<uint4*>(x + piece / 8 * X_LINE + swizzled(row, piece % 8)) = bits;
  }
}

// The block's rows of x; those that it has not stay as they are, and nobody asks for their sums.
__device__ void load_block(Shared& s, int block, const u16* x, long long x_stride) {
  constexpr int PIECES = K / 8, OWN = (PIECES + 31) / 32;
  constexpr int ROWS_AT_ONCE = OWN <= 8 ? 2 : 1;  // what registers hold: both wait for the second-level cache
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const short* choices = s.blocks.choice + block * ROWS;
  sync_first<128>();
#pragma unroll 1
  for (int first = warp; first < ROWS && choices[first] >= 0; first += 4 * ROWS_AT_ONCE) {
    uint4 bits[ROWS_AT_ONCE][OWN];
#pragma unroll
    for (int r = 0; r < ROWS_AT_ONCE; ++r) {
      int choice = max(int(choices[first + 4 * r]), 0);
      const uint4* from = reinterpret_cast<const uint4*>(x + (DOWN ? choice : choice / CHOICES) * x_stride);
#pragma unroll
      for (int i = 0; i < OWN; ++i) bits[r][i] = i * 32 + lane < PIECES ? from[i * 32 + lane] : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int r = 0; r < ROWS_AT_ONCE; ++r) {
      float most = 0, inverse = 1;
      if (NARROW) {
#pragma unroll
        for (int i = 0; i < OWN; ++i)
          for (u32 word : {bits[r][i].x, bits[r][i].y, bits[r][i].z, bits[r][i].w})
            most = fmaxf(most, fmaxf(fabsf(widen(word & 0xffff)), fabsf(__uint_as_float(word & 0xffff0000u))));
        for (int o = 16; o; o /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
        float scale = fmaxf(most, 1e-12f) / 448.0f;
        inverse = 1.0f / scale;
        if (lane == 0) s.x_scale[first + 4 * r] = scale;
      }
#pragma unroll
      for (int i = 0; i < OWN; ++i)
        if (i * 32 + lane < PIECES) put(s.x, first + 4 * r, i * 32 + lane, bits[r][i], inverse);
    }
  }
  products_see();
  sync_first<128>();
}

// sums [+]= 64 rows of W times the rows of x, over a line of both.
__device__ inline void multiply_line(float (&sums)[ROWS / 2], u64 weights, u64 x, bool first) {
#pragma unroll
  for (int step = 0; step < 4; ++step) multiply_few<NARROW>(sums, weights + step * 2, x + step * 2, step > 0 || !first);
}

extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS) experts_tall(
    const __grid_constant__ TensorMap weights, const u16* x, const int* ids, const float* scale, u16* y, float* parts,
    long long x_stride, int chosen) {
  Shared& s = *reinterpret_cast<Shared*>(launched_memory());
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, part = lane % 4;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) barrier_init(&s.full[i], 1), barrier_init(&s.done[i], 4);
    barriers_ready();
  }
  if (!DOWN) wait_for_previous();
  let_next_start();
  int units = s.blocks.list(ids, chosen) * UNITS;
  int begin = (long long)units * blockIdx.x / gridDim.x, end = (long long)units * (blockIdx.x + 1) / gridDim.x;
  if (warp == 4) {
    if (elected()) fill(s, weights, begin, end);
    return;
  }
  if (DOWN) wait_for_previous();
  Slot slot;
  u64 own_x = matrix(shared_address(s.x), 16);
  int loaded = -1;
  for (int unit = begin; unit < end; ++unit) {
    int block = unit / UNITS, row = unit % UNITS * OUTPUTS + warp * (OUTPUTS / 4) + group;
    const float* scales = scale + s.blocks.expert[block] * W_ROWS + row;
    float low_scale = NARROW ? scales[0] : 1, high_scale = NARROW ? scales[DOWN ? 8 : N] : 1;
    if (block != loaded) load_block(s, loaded = block, x, x_stride);
    float sums[ROWS / 2];
#pragma unroll 1
    for (int segment = 0; segment < SEGMENTS; ++segment, slot.next()) {
      wait_barrier(shared_address(&s.full[slot.at]), slot.parity);
      u64 own = matrix(shared_address(s.ring[slot.at]), 16);
      products_fence();
#pragma unroll
      for (int line = 0; line < STEP; ++line)
        multiply_line(sums, own + line * (STAGE_LINE / 16), own_x + (segment * STEP + line) * (X_LINE / 16), segment == 0 && line == 0);
      products_commit();
      products_wait<0>();
      hold(sums);
      if (lane == 0) arrive(shared_address(&s.done[slot.at]));
    }
#pragma unroll
    for (int i = 0; i < ROWS / 4; ++i) {
      int column = i / 2 * 8 + 2 * part + i % 2, choice = s.blocks.choice[block * ROWS + column], at = i / 2 * 4 + i % 2;
      float by = NARROW ? s.x_scale[column] : 1, low = sums[at] * (low_scale * by), high = sums[at + 2] * (high_scale * by);
      if (choice >= 0 && DOWN) parts[(long long)choice * N + row] = low, parts[(long long)choice * N + row + 8] = high;
      if (choice >= 0 && !DOWN) y[(long long)choice * N + row] = narrow(gated<ACT == 2 ? 2 : 1>(low, high));
    }
  }
}
