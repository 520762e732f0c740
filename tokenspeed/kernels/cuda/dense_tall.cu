// y = act(x W^T + bias) of up to 128 rows of x by weights of bf16 or e4m3, by Hopper's warpgroup products.
//
// A block is 64 rows of W, the left operand of products whose right one are all rows of x. A tile is some blocks of each of two
// warpgroups, which have other rows of W, or the same rows and every other line of columns. One thread has lines of both
// operands copied into a ring through tensor maps: W at once, x when the kernel in front has ended. Where SPLITS programs share a
// tile's columns, each leaves its sums, which another kernel adds up. A PAIR of programs with neighbouring tiles is a cluster,
// each of which has half of x copied for both.
//
// Compiled with -D: TOKENS rows of x at most (16, 32, 64 or 128), K columns, N outputs, FORMAT (row.cuh's: bf16 or e4m3), SHARED_ROWS
// (1: warpgroups have the same rows of W), BLOCKS, SPLITS, PAIR (1 or 2), STAGES, ACT (0: none, 1: silu, 2: gelu tanh; gate rows
// lie over up rows), SHARED bytes.

#include "products.cuh"

constexpr bool NARROW = FORMAT == E4M3, GATED = ACT != 0;
constexpr int TALL = 64, GROUPS = 2, WORKERS = GROUPS * 128, THREADS = WORKERS + 32;
constexpr int COLUMNS = NARROW ? 128 : 64;                         // of a line
constexpr int STEP = SHARED_ROWS ? GROUPS : 1, HEIGHTS = GROUPS / STEP;  // lines of a stage; warpgroups above each other
constexpr int SEGMENTS = K / (COLUMNS * STEP), OUTPUTS = HEIGHTS * TALL * (GATED ? BLOCKS / 2 : BLOCKS), TILES = (N + OUTPUTS - 1) / OUTPUTS;
constexpr int W_LINE = TALL * LINE, W_STAGE = GROUPS * BLOCKS * W_LINE, X_LINE = TOKENS * LINE, X_STAGE = STEP * X_LINE;
constexpr int SUMS = TOKENS / 2, EIGHTS = TOKENS / 8, SHARING = SPLITS * PAIR;
static_assert(K % (COLUMNS * STEP) == 0 && N % 2 == 0, "sizes do not fit the tiles");
static_assert(!GATED || (BLOCKS == 2 && SPLITS == 1), "a thread has gate and up of an output");

struct Shared {
  u8 w[STAGES][W_STAGE];
  u8 x[STAGES][X_STAGE];
  float other[SHARED_ROWS ? BLOCKS * SUMS * 128 : 1];  // sums of the second warpgroup
  u64 full[STAGES], done[STAGES];
  float x_scale[TOKENS];
};
static_assert(sizeof(Shared) <= SHARED, "the launch must know the size");

// A place in the ring.
struct Slot {
  int at = 0, parity = 0;

  __device__ void next() {
    if (++at == STAGES) at = 0, parity ^= 1;
  }
};

__device__ inline int split_of() { return blockIdx.x / PAIR % SPLITS; }

// Stages of the program's tiles, one after the other.
struct Segment {
  int tile, at, begin, end, apart;

  __device__ Segment() {
    int split = split_of();
    begin = SEGMENTS * split / SPLITS, end = SEGMENTS * (split + 1) / SPLITS, at = begin;
    tile = blockIdx.x / SHARING * PAIR + blockIdx.x % PAIR, apart = gridDim.x / SHARING * PAIR;
  }
  // A pair goes on together, as both have x copied for each other.
  __device__ bool more() const { return tile / PAIR * PAIR < TILES; }
  __device__ void next() {
    if (++at == end) at = begin, tile += apart;
  }
};

// The first row of W of a warpgroup's block.
__device__ inline int row_of(int tile, int group, int block) {
  int height = SHARED_ROWS ? 0 : group;
  return GATED ? tile * OUTPUTS + height * TALL + block * N : tile * OUTPUTS + (height * BLOCKS + block) * TALL;
}

__device__ inline void ask_weights(Shared& s, const TensorMap& map, const Segment& segment, int at, u64 policy) {
  u32 full = shared_address(&s.full[at]);
  expect_bytes(full, W_STAGE + X_STAGE);
#pragma unroll
  for (int i = 0; i < GROUPS * BLOCKS; ++i) {
    int group = i / BLOCKS, column = (segment.at * STEP + (SHARED_ROWS ? group : 0)) * COLUMNS;
    copy_tensor(shared_address(s.w[at]) + i * W_LINE, map, column, row_of(segment.tile, group, i % BLOCKS), 0, 0, 0, full, policy);
  }
}
__device__ inline void ask_rows(Shared& s, const TensorMap& map, const Segment& segment, int at, u64 policy) {
  u32 to = shared_address(s.x[at]), full = shared_address(&s.full[at]);
  int half = blockIdx.x % PAIR;
#pragma unroll
  for (int line = 0; line < STEP; ++line, to += X_LINE) {
    int column = (segment.at * STEP + line) * COLUMNS;
    if (PAIR == 1)
      copy_tensor(to, map, column, 0, 0, 0, 0, full, policy);
    else
      copy_to_both(to + half * X_LINE / 2, map, column, half * TOKENS / 2, full, policy);
  }
}

// By one thread: all that the ring holds, of weights.
__device__ void ask_first(Shared& s, const TensorMap& weights) {
  u64 once = read_once_policy();
  Segment segment;
  for (int at = 0; at < STAGES && segment.more(); ++at, segment.next()) ask_weights(s, weights, segment, at, once);
}
// Then x, once both programs of a pair have set up their barriers and the kernel in front has ended, and the rest.
__device__ void fill(Shared& s, const TensorMap& weights, const TensorMap& x) {
  u64 once = read_once_policy(), usual = usual_policy();
  Segment segment;
  for (int at = 0; at < STAGES && segment.more(); ++at, segment.next()) ask_rows(s, x, segment, at, usual);
  for (Slot slot; segment.more(); segment.next(), slot.next()) {
    wait_barrier(shared_address(&s.done[slot.at]), slot.parity);
    ask_weights(s, weights, segment, slot.at, once);
    ask_rows(s, x, segment, slot.at, usual);
  }
}

// Of the rows of W that a thread has sums of: `low` and `low` + 8 of each block.
struct Factors {
  float scale[BLOCKS][2], bias[BLOCKS][2];

  __device__ Factors(const float* scales, const float* biases, int tile) {
    int warp = threadIdx.x / 32, low = warp % 4 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int at = row_of(tile, warp / 4, block) + low + i * 8;
        bool there = at < (GATED ? 2 * N : N);
        scale[block][i] = NARROW && there ? scales[at] : 1;
        bias[block][i] = biases && there ? biases[at] : 0;
      }
  }
  __device__ float of(int block, int i, float sum, float x_scale) const {
    return (NARROW ? sum * (scale[block][i] * x_scale) : sum) + bias[block][i];
  }
};

struct Out {
  u16* y;
  float* parts;
  long long stride;
  int tokens;
};

// Writes what a thread has of eight rows of x: neighbouring rows of W of a row of x lie in two threads, which give each other
// one of two rows of x.
__device__ inline void put(const Shared& s, const Out& out, const Factors& factors, int tile, int eight, const float (&sums)[BLOCKS][SUMS]) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = eight * 8 + lane % 4 * 2;
  float scale[2] = {NARROW ? s.x_scale[first] : 1, NARROW ? s.x_scale[first + 1] : 1};
#pragma unroll
  for (int block = 0; block < (GATED ? 1 : BLOCKS); ++block) {
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[i] = factors.of(block, i / 2, sums[block][4 * eight + i], scale[i % 2]);
      if (GATED) v[i] = gated<ACT == 2 ? 2 : 1>(v[i], factors.of(BLOCKS - 1, i / 2, sums[BLOCKS - 1][4 * eight + i], scale[i % 2]));
    }
    u32 even_token = pair(v[0], v[2]), odd_token = pair(v[1], v[3]);
    bool odd = lane / 4 % 2;
    u32 kept = odd ? odd_token : even_token, sent = odd ? even_token : odd_token;
    u32 other = __float_as_uint(__shfl_xor_sync(~0u, __uint_as_float(sent), 4));
    u32 even_row = odd ? other : kept, odd_row = odd ? kept : other;
    int token = first + odd, at = row_of(tile, warp / 4, block) + warp % 4 * 16 + lane / 4 - odd;
    u16* to = out.y + token * out.stride + at;
    if (token < out.tokens && at < N) *reinterpret_cast<u32*>(to) = bytes_of(even_row, odd_row, 0x5410);
    if (token < out.tokens && at + 8 < N) *reinterpret_cast<u32*>(to + 8) = bytes_of(even_row, odd_row, 0x7632);
  }
}
// The same as parts of sums: [SPLITS, tokens, N].
__device__ inline void leave(const Out& out, int tile, int eight, const float (&sums)[BLOCKS][SUMS]) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = eight * 8 + lane % 4 * 2;
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int token = first + i % 2, row = row_of(tile, warp / 4, block) + warp % 4 * 16 + lane / 4 + i / 2 * 8;
      if (token < out.tokens && row < N) out.parts[((long long)split_of() * out.tokens + token) * N + row] = sums[block][4 * eight + i];
    }
}

// The second warpgroup's sums are added to the first's. Both come here once for each tile.
__device__ inline void add_other(Shared& s, float (&sums)[BLOCKS][SUMS]) {
  int own = threadIdx.x % 128;
  if (threadIdx.x >= 128)
#pragma unroll
    for (int i = 0; i < BLOCKS * SUMS; ++i) s.other[i * 128 + own] = sums[i / SUMS][i % SUMS];
  sync_first<WORKERS>();
  if (threadIdx.x < 128)
#pragma unroll
    for (int i = 0; i < BLOCKS * SUMS; ++i) sums[i / SUMS][i % SUMS] += s.other[i * 128 + own];
  sync_first<WORKERS>();
}

__device__ inline void release(Shared& s, int at) {
  if (threadIdx.x % 32) return;
  if (PAIR == 1)
    arrive(shared_address(&s.done[at]));
  else
    arrive_at_both(shared_address(&s.done[at]));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) dense_tall(
    const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap x, u16* y, float* parts, const float* w_scale,
    const float* x_scale, const float* bias, long long y_stride, int tokens) {
  Shared& s = *reinterpret_cast<Shared*>(launched_memory());
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) barrier_init(&s.full[i], 1), barrier_init(&s.done[i], GROUPS * 4 * PAIR);
    barriers_ready();
  }
  __syncthreads();
  if (PAIR > 1) cluster_arrive();
  let_next_start();
  if (threadIdx.x >= WORKERS) {
    if (elected()) ask_first(s, weights);
    wait_for_previous();
    __syncwarp();
    if (PAIR > 1) cluster_wait();
    if (elected()) fill(s, weights, x);
    __syncwarp();
    if (PAIR > 1) cluster_arrive(), cluster_wait();
    return;
  }
  wait_for_previous();
  if (PAIR > 1) cluster_wait();
  if (NARROW) {
    for (int t = threadIdx.x; t < TOKENS; t += WORKERS) s.x_scale[t] = t < tokens ? x_scale[t] : 0;
    sync_first<WORKERS>();
  }
  Out out{y, parts, y_stride, tokens};
  int group = threadIdx.x / 128;
  Slot slot, last;
  float sums[BLOCKS][SUMS];
  for (Segment segment; segment.more();) {
    int tile = segment.tile;
    Factors factors(w_scale, SPLITS > 1 ? nullptr : bias, tile);
#pragma unroll 1
    for (int at = segment.begin; at < segment.end; ++at, segment.next(), slot.next()) {
      wait_barrier(shared_address(&s.full[slot.at]), slot.parity);
      u64 own_w = matrix(shared_address(s.w[slot.at]) + group * BLOCKS * W_LINE, 16);
      u64 own_x = matrix(shared_address(s.x[slot.at]) + (SHARED_ROWS ? group * X_LINE : 0), 16);
      products_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step)
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block)
          multiply_few<NARROW>(sums[block], own_w + block * (W_LINE / 16) + step * 2, own_x + step * 2, at > segment.begin || step > 0);
      products_commit();
      if (at > segment.begin) {
        products_wait<1>();
        release(s, last.at);
      }
      last = slot;
    }
    products_wait<0>();
    for (int block = 0; block < BLOCKS; ++block) hold(sums[block]);
    release(s, last.at);
    if (SHARED_ROWS) add_other(s, sums);
    if (SHARED_ROWS && group) continue;
#pragma unroll
    for (int e = 0; e < EIGHTS; ++e) {
      if (SPLITS > 1)
        leave(out, tile, e, sums);
      else
        put(s, out, factors, tile, e, sums);
    }
  }
  if (PAIR > 1) cluster_arrive(), cluster_wait();
}
