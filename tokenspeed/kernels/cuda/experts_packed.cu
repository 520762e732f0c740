// The chosen experts of some tokens by MXFP4 weights, in two kernels of one source: gate and up with their activation, then
// down, whose results of each choice another kernel weighs and adds up; of one token down does.
//
// Every program lists the experts that are chosen in blocks: an expert and up to ROWS of its choices. A unit is 16 rows of
// W for a block (of gate and up 8 each, which go together). Units of all blocks, one after the other, are dealt out evenly: a
// program has some in a row, which its teams of warps take in turn. The warps of a team share a unit's columns, each through a
// ring of its own, which one thread fills by tensor copies, and one of them adds up their sums. All warps meet where a block
// begins, with its rows of x in shared memory; those of the next one are on their way meanwhile, where there are two BUFFERS.
//
// Down of one token (SUMS) has one block of all choices: a team has as many warps for each of them, which weigh their sums.
//
// A word of 32 bits holds two neighbouring columns of each of a run's four blocks of 32 (quantization/mxfp4_experts.py). Codes
// are taken for the bf16 numbers of their bits, 2^-126 of their value, which tensor cores multiply exactly; x is X_FACTOR
// times as large. A block's sums are multiplied by its power of two.
//
// down asks for its experts before its wait: gate and up lets it start after its own wait, so that the router has ended.
//
// Compiled with -D: ROWS of x that fit (1, 2, 4 or 8), EXPERTS, CHOSEN choices at most, CHOICES of a token, K columns, N
// outputs, WARPS, TEAM of which share a unit, BUFFERS for a block's rows of x, STEP runs of 128 columns in a stage, STAGES,
// ACT (0: down, 1: silu, 2: gelu tanh, 3: clamped swiglu), BIAS, SHARED bytes.

#include "expert_blocks.cuh"
#include "row.cuh"

constexpr bool DOWN = ACT == 0, SUMS = DOWN && CHOSEN == CHOICES;
constexpr int THREADS = 32 * WARPS;
constexpr int TALL = 16;
constexpr int OUTPUTS = DOWN ? TALL : TALL / 2;
constexpr int UNITS = N / OUTPUTS;
constexpr int RUNS = (K + 127) / 128;
constexpr int SEGMENTS = (RUNS + STEP - 1) / STEP;
constexpr int RUN = 64;  // bytes of a row
constexpr int CODES = STEP * TALL * RUN, SCALES = STEP * TALL * 4;
// Of x's columns, with those past the last one, zeros; bytes of a row, neighbours half a line of banks apart.
constexpr int VECTORS = K / 8, COLUMNS = SEGMENTS * STEP * 128, X_PITCH = 2 * COLUMNS + 64;
// SHARE warps of a team share an expert's columns.
constexpr int TEAMS = WARPS / TEAM, SHARE = SUMS ? TEAM / CHOICES : TEAM, X_ROWS = SUMS ? CHOICES : ROWS;
#if __CUDA_ARCH__ < 1000
constexpr int RUNS_AT_ONCE = STEP;
#else
constexpr int RUNS_AT_ONCE = 2;  // more spill registers there
#endif
// Codes are 2^-126, exponents 2^90 of what they stand for.
constexpr float BACK = 1.0f / 268435456;
static_assert(N % OUTPUTS == 0 && K % 8 == 0 && STEP % 2 == 0 && WARPS % TEAM == 0 && TEAM % (SUMS ? CHOICES : 1) == 0,
              "sizes do not fit the tiles");

struct Shared {
  u8 codes[WARPS][STAGES][CODES];
  u32 scales[WARPS][STAGES][SCALES / 4];
  float4 powers[WARPS][SCALES / 4];
  float4 sums[TEAM > 1 ? TEAMS : 1][2][TEAM][32];
  u8 x[BUFFERS][X_ROWS * X_PITCH];
  u64 full[WARPS][STAGES];
  Blocks<ROWS, EXPERTS, CHOSEN, CHOICES, THREADS> blocks;
};
static_assert(sizeof(Shared) <= SHARED, "the launch must know the size");

// A team's way through the program's units.
struct Way {
  int at, end, unit, stop;  // from `at` on units of one block end at `stop`

  __device__ Way(int begin, int end) : at(begin), end(end) { open(); }
  __device__ void open() {
    stop = min(end, (at / UNITS + 1) * UNITS);
    unit = at + threadIdx.x / 32 / TEAM;
  }
  __device__ bool within() const { return unit < stop; }
  // The next block; false at the end.
  __device__ bool advance() {
    at = stop;
    if (at >= end) return false;
    open();
    return true;
  }
};

// What a warp asks for next.
struct Stream {
  const Shared* s;
  const TensorMap* codes;
  const TensorMap* scales;
  Way way;
  int own, first, segment;
  bool more;
  u64 policy;

  __device__ void settle() {
    while (more && !way.within()) more = way.advance();
  }

  __device__ void request(u8* to, u32* scales_to, u32 full) {
    if (!more) return;
    if (elected()) {
      int expert = s->blocks.expert[SUMS ? own : way.unit / UNITS], group = way.unit % UNITS;
      expect_bytes(full, CODES + SCALES);
      copy_tensor(shared_address(to), *codes, 0, 0, 0, segment * STEP, expert * (DOWN ? 1 : 2) * UNITS + group, full, policy);
      copy_tensor(shared_address(scales_to), *scales, 0, 0, segment * STEP, group, expert, full, policy);
    }
    __syncwarp();
    segment += SHARE;
    if (segment >= SEGMENTS) {
      segment = first;
      way.unit += TEAMS;
      settle();
    }
  }
};

// Asks for the block's rows of x; zeros for those that it has not.
__device__ void ask_rows(u8* to, const short* choices, const u16* x, long long x_stride) {
  for (int i = threadIdx.x; i < X_ROWS * VECTORS; i += THREADS) {
    int row = i / VECTORS, at = i % VECTORS, choice = choices[row];
    u8* place = to + row * X_PITCH + at * 16;
    if (choice >= 0)
      copy_sixteen(shared_address(place), x + (DOWN ? choice : choice / CHOICES) * x_stride + at * 8);
    else
      *reinterpret_cast<uint4*>(place) = make_uint4(0, 0, 0, 0);
  }
}
// Takes what this thread asked for, and makes it X_FACTOR times as large.
__device__ void take_rows(u8* rows) {
  wait_for_copies();
#pragma unroll 4
  for (int i = threadIdx.x; i < X_ROWS * VECTORS; i += THREADS) {
    uint4& v = *reinterpret_cast<uint4*>(rows + i / VECTORS * X_PITCH + i % VECTORS * 16);
    v = make_uint4(enlarged(v.x), enlarged(v.y), enlarged(v.z), enlarged(v.w));
  }
}

// The powers of two of a stage's rows and blocks, from their exponents.
__device__ inline void unpack_powers(float4* to, const u32* from) {
  for (int i = threadIdx.x % 32; i < SCALES / 4; i += 32) {
    u32 bits = from[i];
    to[i] = make_float4(__uint_as_float(bits << 23 & 0x7f800000u), __uint_as_float(bits << 15 & 0x7f800000u),
                        __uint_as_float(bits << 7 & 0x7f800000u), __uint_as_float(bits >> 1 & 0x7f800000u));
  }
}

__device__ inline u32 turned(u32 word, int left) { return left ? word << left | word >> (32 - left) : word; }
// Two codes of a block, in the places of bf16's bits.
__device__ inline u32 code_pair(u32 word, int block) {
  if (block < 3) return turned(word, 6 * block) & 0x81c081c0u;
  return turned(word, 10) & 0x81808180u | turned(word, 2) & 0x00400040u;
}

// A run of 128 columns: of two rows of W on each side, by their blocks' powers of two, and as many rows of x as there are.
__device__ inline void multiply_run(float (&sums)[4], const u8* words, const float4* powers, const u8* x) {
  u32 first[4], second[4];
  float of_low[4], of_high[4];
  *reinterpret_cast<uint4*>(first) = *reinterpret_cast<const uint4*>(words);
  *reinterpret_cast<uint4*>(second) = *reinterpret_cast<const uint4*>(words + 8 * RUN);
  *reinterpret_cast<float4*>(of_low) = powers[0];
  *reinterpret_cast<float4*>(of_high) = powers[8];
#pragma unroll
  for (int block = 0; block < 4; ++block) {
    u32 w[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) w[2 * i] = code_pair(first[i], block), w[2 * i + 1] = code_pair(second[i], block);
    uint4 columns = *reinterpret_cast<const uint4*>(x + block * 64);
    float part[4];
    begin_tile(part, w[0], w[1], w[2], w[3], columns.x, columns.y);
    multiply_tile<false>(part, w[4], w[5], w[6], w[7], columns.z, columns.w);
    for (int i = 0; i < 2; ++i) sums[i] += part[i] * of_low[block], sums[2 + i] += part[2 + i] * of_high[block];
  }
}

__device__ inline float activated(float gate, float up, float alpha, float limit) {
  if (ACT != 3) return gated<ACT == 3 ? 1 : ACT>(gate, up);
  gate = fminf(rounded(gate), limit), up = fminf(fmaxf(rounded(up), -limit), limit);
  return gate / (1 + __expf(-alpha * gate)) * (up + 1);
}

extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS) experts_packed(
    const __grid_constant__ TensorMap codes, const __grid_constant__ TensorMap scales, const u16* x, const int* ids,
    const float* shares, const float* bias, u16* y, float* parts, long long x_stride, int chosen, float alpha, float limit) {
  Shared& s = *reinterpret_cast<Shared*>(launched_memory());
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, part = lane % 4;
  int team = warp / TEAM, member = warp % TEAM, own = member / SHARE, first = member % SHARE;
  if (lane == 0) {
    for (int i = 0; i < STAGES; ++i) barrier_init(&s.full[warp][i], 1);
    barriers_ready();
  }
  for (int i = threadIdx.x; i < BUFFERS * X_ROWS * (COLUMNS / 8 - VECTORS); i += THREADS) {
    int row = i % (BUFFERS * X_ROWS), at = VECTORS + i / (BUFFERS * X_ROWS);
    *reinterpret_cast<uint4*>(s.x[row / X_ROWS] + row % X_ROWS * X_PITCH + at * 16) = make_uint4(0, 0, 0, 0);
  }
  if (!DOWN) wait_for_previous();
  let_next_start();
  int blocks = s.blocks.list(ids, chosen), units = (SUMS ? 1 : blocks) * UNITS;
  int begin = (long long)units * blockIdx.x / gridDim.x, end = (long long)units * (blockIdx.x + 1) / gridDim.x;
  Stream stream{&s, &codes, &scales, Way(begin, end), own, first, first, begin < end && first < SEGMENTS, read_once_policy()};
  stream.settle();
#pragma unroll 1
  for (int i = 0; i < STAGES; ++i) stream.request(s.codes[warp][i], s.scales[warp][i], shared_address(&s.full[warp][i]));
  if (DOWN) wait_for_previous();
  int at = 0, parity = 0, flip = 0, turn = 0, buffer = 0;
  // Where there are fewer rows of x than a product has, it takes some of them again, and nobody asks for these sums.
  int own_x = (SUMS ? own : group % ROWS) * X_PITCH + part * 16;
  float weight = SUMS ? shares[own] : 0;
  float4* powers = s.powers[warp];
  Way way(begin, end);
  if (BUFFERS > 1 && begin < end) ask_rows(s.x[0], s.blocks.choice + begin / UNITS * ROWS, x, x_stride);
  for (bool more = begin < end; more; more = way.advance()) {
    int block = way.at / UNITS, expert = s.blocks.expert[SUMS ? own : block];
    u8* rows = s.x[buffer];
    if (BUFFERS == 1) {
      __syncthreads();
      ask_rows(rows, s.blocks.choice + block * ROWS, x, x_stride);
    }
    take_rows(rows);
    __syncthreads();
    if (BUFFERS > 1) {
      buffer ^= 1;
      if (way.stop < end) ask_rows(s.x[buffer], s.blocks.choice + (block + 1) * ROWS, x, x_stride);
    }
    for (; way.within(); way.unit += TEAMS) {
      float sums[4] = {}, low_bias = 0, high_bias = 0;
      int row = way.unit % UNITS * OUTPUTS + group;
      if (BIAS) {  // rounded where it is needed: nothing waits for it here
        const float* row_bias = bias + (long long)expert * (N * (DOWN ? 1 : 2)) + row;
        low_bias = row_bias[0], high_bias = row_bias[DOWN ? 8 : N];
      }
      for (int segment = first; segment < SEGMENTS; segment += SHARE) {
        u32 full = shared_address(&s.full[warp][at]);
        wait_barrier(full, parity);
        const u8* words = s.codes[warp][at] + group * RUN + part * 16;
        unpack_powers(powers, s.scales[warp][at]);
        __syncwarp();
#pragma unroll RUNS_AT_ONCE
        for (int run = 0; run < STEP; ++run)
          multiply_run(sums, words + run * TALL * RUN, powers + run * TALL + group, rows + own_x + (segment * STEP + run) * 256);
        __syncwarp();
        stream.request(s.codes[warp][at], s.scales[warp][at], full);
        if (++at == STAGES) at = 0, parity ^= 1;
      }
      for (int j = 0; j < 4 && SUMS; ++j)
        sums[j] = weight * (sums[j] * BACK + (first == 0 ? rounded(j < 2 ? low_bias : high_bias) : 0));
      if (TEAM > 1) {
        float4(*given)[32] = s.sums[team][flip];
        bool adds = member == turn;
        given[member][lane] = make_float4(sums[0], sums[1], sums[2], sums[3]);
        sync_team<32 * TEAM>(team);
        for (int j = 0; j < 4 && adds; ++j) sums[j] = 0;
        for (int other = 0; other < TEAM && adds; ++other) {
          float4 some = given[other][lane];
          sums[0] += some.x, sums[1] += some.y, sums[2] += some.z, sums[3] += some.w;
        }
        flip ^= 1;
        if (++turn == TEAM) turn = 0;
        if (!adds) continue;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int column = 2 * part + i, choice = column < ROWS ? s.blocks.choice[block * ROWS + column % ROWS] : -1;
        if (SUMS && column == 0) y[row] = narrow(blocks ? sums[0] : 0), y[row + 8] = narrow(blocks ? sums[2] : 0);
        if (SUMS) continue;
        float low = sums[i] * BACK + rounded(low_bias), high = sums[2 + i] * BACK + rounded(high_bias);
        if (choice >= 0 && DOWN) parts[(long long)choice * N + row] = low, parts[(long long)choice * N + row + 8] = high;
        if (choice >= 0 && !DOWN) y[(long long)choice * N + row] = narrow(activated(low, high, alpha, limit));
      }
    }
  }
}
