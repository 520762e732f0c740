// Norm, router and choice of experts of a few tokens in one kernel: a cluster of programs has one token.
//
// Each warp scores its experts, whose weights it holds in registers before the kernel in front has ended (programmatic
// dependent launch): they are constant. All programs repeat the token's join and norm; the first one writes them, gets the
// scores of all through its shared memory, and one warp of it chooses.
//
// Compiled with -D: COLS of a row, EXPERTS, K of them chosen, PROGRAMS of a cluster, WARPS, SCORE (0: softmax, 1: sigmoid,
// 2: softmax of the chosen), and 0/1: RENORMALIZE, BRANCH, BRANCH_NORM, BIAS, CORRECTION, NOISE.

#include "row.cuh"

enum { SOFTMAX, SIGMOID, CHOSEN };
constexpr int THREADS = 32 * WARPS;
constexpr int EACH = (EXPERTS + PROGRAMS * WARPS - 1) / (PROGRAMS * WARPS);
constexpr int CHUNKS = (COLS / 8 + 31) / 32;
constexpr int OWN = (EXPERTS + 31) / 32;
constexpr float TINY = 1e-20f;
static_assert(COLS % 8 == 0 && K <= 32 && K <= EXPERTS, "unfit sizes");

struct Shared {
  uint4 row[COLS / 8];
  float partial[2][WARPS];
  float scores[EXPERTS];
};
static_assert(sizeof(Shared) == SHARED, "the launch must know the size");

__device__ float unbounded() { return __uint_as_float(0x7f800000u); }

// In the order of the values: both zeros are equal, and what is no number is greatest; never 0.
__device__ u32 sortable(float v) {
  u32 bits = v == 0 ? 0 : __float_as_uint(v);
  return v != v ? ~0u : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// As `route.scores_of_noise`.
__device__ float noise(int position, int slot, u32 seed, int expert) {
  u32 bits = ((u32)(position * 4096 + slot) * EXPERTS + expert) ^ seed * 0x61C88647u;
  bits = (bits ^ bits >> 16) * 0x85EBCA6Bu;
  bits = (bits ^ bits >> 13) * 0xC2B2AE35u;
  return ((bits ^ bits >> 16) >> 8) * (1.0f / 16777216);
}

__device__ float most(float v) {
  for (int o = 16; o; o /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, o));
  return v;
}
__device__ float sum(float v) {
  for (int o = 16; o; o /= 2) v += __shfl_xor_sync(~0u, v, o);
  return v;
}

// The join and norm of a row into shared memory, and by one program into memory.
__device__ void prepare(Shared& s, const u16* x, const u16* branch, const Row<COLS, THREADS>& norm, const float* branch_weight,
                        u16* joined, u16* normed, float eps, float branch_eps, bool writes) {
  Row<COLS, THREADS> row;
  row.load(x);
  if (BRANCH) {
    Row<COLS, THREADS> other;
    other.load(branch);
    if (BRANCH_NORM) other.scale(rsqrtf(across<false, WARPS>(other.squares(), s.partial[0]) / COLS + branch_eps), branch_weight);
    row.add(other);
    if (writes) row.store(joined);
  }
  row.scale(rsqrtf(across<false, WARPS>(row.squares(), s.partial[1]) / COLS + eps), norm);
  row.store(reinterpret_cast<u16*>(s.row));
  if (writes) row.store(normed);
}

// The K best of the scores, by one warp: thread r has the r-th.
__device__ void choose(Shared& s, const float (&correction)[OWN], int* ids, float* shares, int position, int slot, u32 seed,
                       float scale) {
  int lane = threadIdx.x % 32;
  float v[OWN], top = -unbounded(), total = 0;
  for (int j = 0; j < OWN; ++j) {
    int expert = lane + 32 * j;
    v[j] = expert < EXPERTS ? s.scores[expert] : -unbounded();
    if (NOISE && expert < EXPERTS) v[j] = v[j] == unbounded() ? 2 : noise(position, slot, seed, expert);
    top = fmaxf(top, v[j]);
  }
  if (SCORE == SOFTMAX) {
    top = most(top);
    for (int j = 0; j < OWN; ++j) total += v[j] = __expf(v[j] - top);
    total = sum(total);
  }
  u32 keys[OWN];
  for (int j = 0; j < OWN; ++j) {
    int expert = lane + 32 * j;
    if (SCORE == SOFTMAX) v[j] /= total;
    if (SCORE == SIGMOID) v[j] = 1 / (1 + __expf(-v[j]));
    keys[j] = expert < EXPERTS ? sortable(CORRECTION ? v[j] + correction[j] : v[j]) : 0;
    if (expert < EXPERTS) s.scores[expert] = v[j];
  }
  __syncwarp();
  u32 mine = 0;
#pragma unroll 1
  for (int place = 0; place < K; ++place) {
    u32 best = keys[0], at = 0;
    for (int j = 1; j < OWN; ++j)
      if (keys[j] > best) best = keys[j], at = j;
    u32 winner = least_of_warp(best == most_of_warp(best) ? lane + 32 * at : ~0u);
    if (lane == place) mine = winner;
    for (int j = 0; j < OWN; ++j)
      if (winner == lane + 32 * j) keys[j] = 0;
  }
  float share = s.scores[mine];
  if (SCORE == CHOSEN) share = __expf(share - most(lane < K ? share : -unbounded()));
  if (SCORE == CHOSEN) share /= sum(lane < K ? share : 0);
  else if (RENORMALIZE) share /= sum(lane < K ? share : 0) + TINY;
  if (lane < K) {
    ids[lane] = slot >= 0 ? (int)mine : -1;
    shares[lane] = share * scale;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) route(
    const u16* x, const u16* branch, const u16* weight, const float* bias, const float* correction, const float* norm_weight,
    const float* branch_weight, const int* slots, const int* positions, int* ids, float* shares, u16* normed, u16* joined,
    long long x_stride, long long branch_stride, long long w_stride, float eps, float branch_eps, float scale, u32 seed) {
  Shared& s = *reinterpret_cast<Shared*>(launched_memory());
  let_next_start();
  cluster_arrive();
  int rank = blockIdx.x, token = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int first = (rank * WARPS + warp) * EACH;
  uint4 w[EACH][CHUNKS];
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    const uint4* from = reinterpret_cast<const uint4*>(weight + min(first + e, EXPERTS - 1) * w_stride);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) w[e][c] = 32 * c + lane < COLS / 8 ? from[32 * c + lane] : make_uint4(0, 0, 0, 0);
  }
  bool chooses = rank == 0 && warp == 0;
  float added[OWN] = {}, own_bias = 0;
  for (int j = 0; CORRECTION && chooses && j < OWN; ++j)
    if (lane + 32 * j < EXPERTS) added[j] = correction[lane + 32 * j];
  if (BIAS && lane < EACH && first + lane < EXPERTS) own_bias = rounded(bias[first + lane]);
  int slot = slots[token], position = NOISE ? positions[token] : 0;
  Row<COLS, THREADS> norm;
  norm.load(norm_weight);

  wait_for_previous();
  prepare(s, x + token * x_stride, branch + token * branch_stride, norm, branch_weight, joined + (long long)token * COLS,
          normed + (long long)token * COLS, eps, branch_eps, rank == 0);
  __syncthreads();
  float sums[EACH] = {}, own = 0;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    uint4 v = s.row[min(32 * c + lane, COLS / 8 - 1)];
#pragma unroll
    for (int e = 0; e < EACH; ++e) sums[e] += dot(v.x, w[e][c].x) + dot(v.y, w[e][c].y) + dot(v.z, w[e][c].z) + dot(v.w, w[e][c].w);
  }
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    sums[e] = sum(sums[e]);
    if (lane == e) own = sums[e];
  }
  cluster_wait();
  if (lane < EACH && first + lane < EXPERTS) store_remote(&s.scores[first + lane], 0, rounded(own + own_bias));
  cluster_arrive();
  cluster_wait();
  if (chooses) choose(s, added, ids + token * K, shares + token * K, position, slot, seed, scale);
}
