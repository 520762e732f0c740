// y = act(x W^T + bias) of up to 128 rows of x by weights of bf16 or e4m3, by Hopper's warpgroup products.
//
// A tile is GROUPS times BLOCKS times 64 rows of W, each block the left operand of products whose right one are all rows of x.
// One thread has lines of both copied into a ring through tensor maps: W at once, x when the kernel in front has ended. SPLITS
// programs share a tile's columns: they leave their sums in memory, wait for each other, and each adds up some rows of x. A
// PAIR of programs with neighbouring tiles is a cluster, each of which has half of x copied for both.
//
// Compiled with -D: TOKENS rows of x at most (16, 32, 64 or 128), K columns, N outputs, FORMAT (row.cuh's: bf16 or e4m3), GROUPS,
// BLOCKS, SPLITS, PAIR (1 or 2), STAGES, PROGRAMS on an SM, ACT (0: none, 1: silu, 2: gelu tanh; gate rows lie over up rows), SHARED bytes.

#include "products.cuh"

constexpr bool NARROW = FORMAT == E4M3, GATED = ACT != 0;
constexpr int TALL = 64, WORKERS = GROUPS * 128, THREADS = WORKERS + 32;
constexpr int COLUMNS = NARROW ? 128 : 64;  // of a line
constexpr int LINES = K / COLUMNS, OUTPUTS = GROUPS * TALL * (GATED ? BLOCKS / 2 : BLOCKS), TILES = (N + OUTPUTS - 1) / OUTPUTS;
constexpr int SHARING = SPLITS * PAIR;  // programs that work on neighbouring tiles
constexpr int W_LINE = TALL * LINE, W_STAGE = GROUPS * BLOCKS * W_LINE, X_STAGE = TOKENS * LINE, SUMS = TOKENS / 2, EIGHTS = TOKENS / 8;
static_assert(K % COLUMNS == 0 && N % 2 == 0 && (!GATED || BLOCKS == 2), "sizes do not fit the tiles");

struct Shared {
  u8 w[STAGES][W_STAGE];
  u8 x[STAGES][X_STAGE];
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

// Lines of the program's tiles, one after the other.
struct Line {
  int tile, at, begin, end, apart;

  __device__ Line() {
    int split = split_of();
    begin = LINES * split / SPLITS, end = LINES * (split + 1) / SPLITS, at = begin;
    tile = blockIdx.x / SHARING * PAIR + blockIdx.x % PAIR, apart = gridDim.x / SHARING * PAIR;
  }
  // A pair goes on together, as both have x copied for each other.
  __device__ bool more() const { return tile / PAIR * PAIR < TILES; }
  __device__ void next() {
    if (++at == end) at = begin, tile += apart;
  }
};

__device__ inline int row_of(int tile, int group, int block) {
  return GATED ? tile * OUTPUTS + group * TALL + block * N : tile * OUTPUTS + (group * BLOCKS + block) * TALL;
}

__device__ inline void ask_weights(Shared& s, const TensorMap& map, const Line& line, int at, u64 policy) {
  u32 full = shared_address(&s.full[at]);
  expect_bytes(full, W_STAGE + X_STAGE);
#pragma unroll
  for (int i = 0; i < GROUPS * BLOCKS; ++i)
    copy_tensor(shared_address(s.w[at]) + i * W_LINE, map, line.at * COLUMNS, row_of(line.tile, i / BLOCKS, i % BLOCKS), 0, 0, 0, full, policy);
}
__device__ inline void ask_rows(Shared& s, const TensorMap& map, const Line& line, int at, u64 policy) {
  u32 to = shared_address(s.x[at]), full = shared_address(&s.full[at]);
  int half = blockIdx.x % PAIR;
  if (PAIR == 1)
    copy_tensor(to, map, line.at * COLUMNS, 0, 0, 0, 0, full, policy);
  else
    copy_to_both(to + half * X_STAGE / 2, map, line.at * COLUMNS, half * TOKENS / 2, full, policy);
}

// By one thread: all that the ring holds, of weights.
__device__ void ask_first(Shared& s, const TensorMap& weights) {
  u64 once = read_once_policy();
  Line line;
  for (int at = 0; at < STAGES && line.more(); ++at, line.next()) ask_weights(s, weights, line, at, once);
}
// Then x, once both programs of a pair have set up their barriers and the kernel in front has ended, and the rest.
__device__ void fill(Shared& s, const TensorMap& weights, const TensorMap& x) {
  u64 once = read_once_policy(), usual = usual_policy();
  Line line;
  for (int at = 0; at < STAGES && line.more(); ++at, line.next()) ask_rows(s, x, line, at, usual);
  Slot slot;
  for (; line.more(); line.next(), slot.next()) {
    wait_barrier(shared_address(&s.done[slot.at]), slot.parity);
    ask_weights(s, weights, line, slot.at, once);
    ask_rows(s, x, line, slot.at, usual);
  }
}

// What a thread has of eight rows of x: of rows `low` and `low` + 8 of W, each two rows of x.
struct Piece {
  float v[BLOCKS][4];
};

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
  long long stride;
  int tokens;
};

// Writes a piece: neighbouring rows of W of a row of x lie in two threads, which give each other one of two rows of x.
__device__ inline void put(const Shared& s, const Out& out, const Factors& factors, int tile, int eight, const Piece& piece) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4, first = eight * 8 + lane % 4 * 2;
  float scale[2] = {NARROW ? s.x_scale[first] : 1, NARROW ? s.x_scale[first + 1] : 1};
#pragma unroll
  for (int block = 0; block < (GATED ? 1 : BLOCKS); ++block) {
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[i] = factors.of(block, i / 2, piece.v[block][i], scale[i % 2]);
      if (GATED) v[i] = gated<ACT == 2 ? 2 : 1>(v[i], factors.of(BLOCKS - 1, i / 2, piece.v[BLOCKS - 1][i], scale[i % 2]));
    }
    u32 even_token = pair(v[0], v[2]), odd_token = pair(v[1], v[3]);
    bool odd = lane / 4 % 2;
    u32 kept = odd ? odd_token : even_token, sent = odd ? even_token : odd_token;
    u32 other = __float_as_uint(__shfl_xor_sync(~0u, __uint_as_float(sent), 4));
    u32 even_row = odd ? other : kept, odd_row = odd ? kept : other;
    int token = first + odd, at = row_of(tile, group, block) + warp % 4 * 16 + lane / 4 - odd;
    u16* to = out.y + token * out.stride + at;
    if (token < out.tokens && at < N) *reinterpret_cast<u32*>(to) = bytes_of(even_row, odd_row, 0x5410);
    if (token < out.tokens && at + 8 < N) *reinterpret_cast<u32*>(to + 8) = bytes_of(even_row, odd_row, 0x7632);
  }
}

// Leaves sums, waits for those of the tile's other programs, and adds up some.
__device__ void add_up(const Shared& s, const Out& out, const Factors& factors, int tile, const float (&sums)[BLOCKS][SUMS], float4* parts,
                       u32* met) {
  constexpr int EACH = BLOCKS * EIGHTS * WORKERS, AT_ONCE = SPLITS * BLOCKS < 16 ? 16 / (SPLITS * BLOCKS) : 1;
  int split = split_of(), begin = EIGHTS * split / SPLITS, end = EIGHTS * (split + 1) / SPLITS;
  float4 *all = parts + (long long)tile * SPLITS * EACH + threadIdx.x, *own = all + split * EACH;
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
    for (int e = 0; e < EIGHTS; ++e)
      own[(block * EIGHTS + e) * WORKERS] = make_float4(sums[block][4 * e], sums[block][4 * e + 1], sums[block][4 * e + 2], sums[block][4 * e + 3]);
  meet<WORKERS>(met + 2 * tile, SPLITS);
#pragma unroll 1
  for (int first = begin; first < end; first += AT_ONCE) {
    float4 found[AT_ONCE][SPLITS][BLOCKS];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
      for (int other = 0; other < SPLITS; ++other)
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block)
          found[i][other][block] = read_fresh(all + other * EACH + (block * EIGHTS + min(first + i, EIGHTS - 1)) * WORKERS);
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      Piece piece{};
#pragma unroll
      for (int other = 0; other < SPLITS; ++other)
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
          float4 v = found[i][other][block];
          piece.v[block][0] += v.x, piece.v[block][1] += v.y, piece.v[block][2] += v.z, piece.v[block][3] += v.w;
        }
      if (first + i < end) put(s, out, factors, tile, first + i, piece);
    }
  }
}

__device__ inline void release(Shared& s, int at) {
  if (threadIdx.x % 32) return;
  if (PAIR == 1)
    arrive(shared_address(&s.done[at]));
  else
    arrive_at_both(shared_address(&s.done[at]));
}

extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS) dense_tall(
    const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap x, u16* y, const float* w_scale,
    const float* x_scale, const float* bias, float4* parts, u32* met, long long y_stride, int tokens) {
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
  Out out{y, y_stride, tokens};
  int group = threadIdx.x / 128;
  Slot slot, last;
  float sums[BLOCKS][SUMS];
  for (Line line; line.more();) {
    int tile = line.tile;
    Factors factors(w_scale, bias, tile);
#pragma unroll 1
    for (int at = line.begin; at < line.end; ++at, line.next(), slot.next()) {
      wait_barrier(shared_address(&s.full[slot.at]), slot.parity);
      u64 own_w = matrix(shared_address(s.w[slot.at]) + group * BLOCKS * W_LINE, 16), own_x = matrix(shared_address(s.x[slot.at]), 16);
      products_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step)
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block)
          multiply_few<NARROW>(sums[block], own_w + block * (W_LINE / 16) + step * 2, own_x + step * 2, at > line.begin || step > 0);
      products_commit();
      if (at > line.begin) {
        products_wait<1>();
        release(s, last.at);
      }
      last = slot;
    }
    products_wait<0>();
    for (int block = 0; block < BLOCKS; ++block) hold(sums[block]);
    release(s, last.at);
    if (SPLITS > 1) {
      add_up(s, out, factors, tile, sums, parts, met);
    } else {
#pragma unroll
      for (int e = 0; e < EIGHTS; ++e) {
        Piece piece;
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
          for (int i = 0; i < 4; ++i) piece.v[block][i] = sums[block][4 * e + i];
        put(s, out, factors, tile, e, piece);
      }
    }
  }
  if (PAIR > 1) cluster_arrive(), cluster_wait();
}
