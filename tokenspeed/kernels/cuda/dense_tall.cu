// y = x W^T + bias of 9 to 64 rows of x by weights of bf16 or e4m3, by Hopper's warpgroup products.
//
// A tile is 128 rows of W: 64 for each of two warpgroups, the left operand of products whose right one are all rows of x. SPLITS
// programs share its columns, as a cluster. One thread of each has lines of both operands copied into a ring through tensor
// maps: W at once, x when the kernel in front has ended. At the end programs send their sums of every eight rows of x to the one
// that adds those up.
//
// Compiled with -D: TOKENS rows of x at most (32 or 64), K columns, N outputs, FORMAT (row.cuh's: bf16 or e4m3), SPLITS, STAGES,
// SHARED bytes.

#include "products.cuh"

constexpr bool NARROW = FORMAT == E4M3;
constexpr int TALL = 64, GROUPS = 2, TILE = GROUPS * TALL, WORKERS = GROUPS * 128, THREADS = WORKERS + 32;
constexpr int COLUMNS = NARROW ? 128 : 64;  // of a line
constexpr int SEGMENTS = K / COLUMNS, W_STAGE = TILE * LINE, X_STAGE = TOKENS * LINE;
constexpr int SUMS = TOKENS / 2, EIGHTS = TOKENS / 8, HELD = (EIGHTS + SPLITS - 1) / SPLITS;
static_assert(K % COLUMNS == 0 && N % 2 == 0 && SPLITS <= EIGHTS, "sizes do not fit the tiles");

struct Shared {
  u8 w[STAGES][W_STAGE];
  u8 x[STAGES][X_STAGE];
  float4 given[SPLITS > 1 ? HELD : 1][SPLITS][WORKERS];
  u64 full[STAGES], done[STAGES], all_given, unused;
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

// Lines of this program.
__device__ inline int split_of() { return blockIdx.x % SPLITS; }
__device__ inline int begin_of() { return SEGMENTS * split_of() / SPLITS; }
__device__ inline int end_of() { return SEGMENTS * (split_of() + 1) / SPLITS; }
// The first row of W of the tile.
__device__ inline int tile_row() { return blockIdx.x / SPLITS * TILE; }

__device__ inline void ask_weights(Shared& s, const TensorMap& map, int segment, int at, u64 policy) {
  u32 full = shared_address(&s.full[at]);
  expect_bytes(full, W_STAGE + X_STAGE);
  copy_tensor(shared_address(s.w[at]), map, segment * COLUMNS, tile_row(), 0, 0, 0, full, policy);
}
__device__ inline void ask_rows(Shared& s, const TensorMap& map, int segment, int at, u64 policy) {
  copy_tensor(shared_address(s.x[at]), map, segment * COLUMNS, 0, 0, 0, 0, shared_address(&s.full[at]), policy);
}

// By one thread: all that the ring holds, of weights.
__device__ void ask_first(Shared& s, const TensorMap& weights) {
  u64 once = read_once_policy();
  for (int at = 0; at < min(STAGES, end_of() - begin_of()); ++at) ask_weights(s, weights, begin_of() + at, at, once);
}
// Then x, once the kernel in front has ended, and the rest.
__device__ void fill(Shared& s, const TensorMap& weights, const TensorMap& x) {
  u64 once = read_once_policy(), usual = usual_policy();
  int first = min(STAGES, end_of() - begin_of());
  for (int at = 0; at < first; ++at) ask_rows(s, x, begin_of() + at, at, usual);
  Slot slot;
  for (int segment = begin_of() + first; segment < end_of(); ++segment, slot.next()) {
    wait_barrier(shared_address(&s.done[slot.at]), slot.parity);
    ask_weights(s, weights, segment, slot.at, once);
    ask_rows(s, x, segment, slot.at, usual);
  }
}

// A thread has sums of the rows of W `row` and `row` + 8, and of two neighbouring ones of every eight rows of x.
struct Out {
  u16* y;
  long long stride;
  int tokens, row;
  float scale[2], bias[2];

  __device__ Out(u16* y, long long stride, int tokens, const float* scales, const float* biases)
      : y(y), stride(stride), tokens(tokens), row(tile_row() + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4) {
    for (int i = 0; i < 2; ++i) {
      int at = row + i * 8;
      scale[i] = NARROW && at < N ? scales[at] : 1;
      bias[i] = biases && at < N ? biases[at] : 0;
    }
  }

  // Neighbouring rows of W of a row of x lie in two threads, which give each other one of two rows of x.
  __device__ void put(const Shared& s, int eight, float4 sums) const {
    int lane = threadIdx.x % 32, first = eight * 8 + lane % 4 * 2;
    bool odd = lane / 4 % 2;
    u32 even_token = pair(scaled(s, 0, first, sums.x), scaled(s, 1, first, sums.z));
    u32 odd_token = pair(scaled(s, 0, first + 1, sums.y), scaled(s, 1, first + 1, sums.w));
    u32 kept = odd ? odd_token : even_token, sent = odd ? even_token : odd_token;
    u32 other = __float_as_uint(__shfl_xor_sync(~0u, __uint_as_float(sent), 4));
    u32 even_row = odd ? other : kept, odd_row = odd ? kept : other;
    int token = first + odd, at = row - odd;
    u16* to = y + token * stride + at;
    if (token < tokens && at < N) *reinterpret_cast<u32*>(to) = bytes_of(even_row, odd_row, 0x5410);
    if (token < tokens && at + 8 < N) *reinterpret_cast<u32*>(to + 8) = bytes_of(even_row, odd_row, 0x7632);
  }
  __device__ float scaled(const Shared& s, int i, int token, float sum) const {
    return (NARROW ? sum * (scale[i] * s.x_scale[token]) : sum) + bias[i];
  }
};

__device__ inline float4 four_of(const float (&sums)[SUMS], int eight) {
  return make_float4(sums[4 * eight], sums[4 * eight + 1], sums[4 * eight + 2], sums[4 * eight + 3]);
}
// Sends sums to those who add them up, and does so for its own eights, in the order of the columns.
__device__ inline void add_up(Shared& s, const Out& out, const float (&sums)[SUMS]) {
  u32 all_given = shared_address(&s.all_given);
#pragma unroll
  for (int eight = 0; eight < EIGHTS; ++eight) {
    u32 to = shared_address(&s.given[eight / SPLITS][split_of()][threadIdx.x]);
    send_four(to, eight % SPLITS, four_of(sums, eight), all_given);
  }
  wait_barrier(all_given, 0);
#pragma unroll 1
  for (int eight = split_of(); eight < EIGHTS; eight += SPLITS) {
    float4 total = s.given[eight / SPLITS][0][threadIdx.x];
    for (int from = 1; from < SPLITS; ++from) {
      float4 more = s.given[eight / SPLITS][from][threadIdx.x];
      total.x += more.x, total.y += more.y, total.z += more.z, total.w += more.w;
    }
    out.put(s, eight, total);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) dense_tall(
    const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap x, u16* y, const float* w_scale,
    const float* x_scale, const float* bias, long long y_stride, int tokens) {
  Shared& s = *reinterpret_cast<Shared*>(launched_memory());
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) barrier_init(&s.full[i], 1), barrier_init(&s.done[i], WORKERS / 32);
    barrier_init(&s.all_given, 1);
    barriers_ready();
    int eights = (EIGHTS - 1 - split_of()) / SPLITS + 1;
    if (SPLITS > 1) expect_bytes(shared_address(&s.all_given), eights * SPLITS * WORKERS * 16);
  }
  __syncthreads();
  if (SPLITS > 1) cluster_arrive();
  let_next_start();
  if (threadIdx.x >= WORKERS) {
    if (elected()) ask_first(s, weights);
    wait_for_previous();
    __syncwarp();
    if (elected()) fill(s, weights, x);
    __syncwarp();
    if (SPLITS > 1) cluster_wait();
    return;
  }
  Out out(y, y_stride, tokens, w_scale, bias);
  wait_for_previous();
  if (NARROW) {
    for (int t = threadIdx.x; t < TOKENS; t += WORKERS) s.x_scale[t] = t < tokens ? x_scale[t] : 0;
    sync_first<WORKERS>();
  }
  float sums[SUMS];
  Slot slot, last;
#pragma unroll 1
  for (int at = begin_of(); at < end_of(); ++at, slot.next()) {
    wait_barrier(shared_address(&s.full[slot.at]), slot.parity);
    u64 own_w = matrix(shared_address(s.w[slot.at]) + threadIdx.x / 128 * TALL * LINE, 16);
    u64 own_x = matrix(shared_address(s.x[slot.at]), 16);
    products_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
      multiply_few<NARROW>(sums, own_w + step * 2, own_x + step * 2, at > begin_of() || step > 0);
    products_commit();
    if (at > begin_of()) {
      products_wait<1>();
      if (threadIdx.x % 32 == 0) arrive(shared_address(&s.done[last.at]));
    }
    last = slot;
  }
  products_wait<0>();
  hold(sums);
  if (SPLITS > 1) {
    cluster_wait();
    add_up(s, out, sums);
    return;
  }
#pragma unroll
  for (int eight = 0; eight < EIGHTS; ++eight) out.put(s, eight, four_of(sums, eight));
}
