// Norm, router and choice of experts of a few tokens in one kernel: a cluster of programs has one token, or several.
//
// Each warp scores its experts, whose weights it holds in registers before the kernel in front has ended (programmatic
// dependent launch): they are constant. All programs repeat the tokens' join and norm, each token's by a team of warps; the
// first one writes them, gets the scores of all through its shared memory, and one warp of each team chooses.
//
// Compiled with -D: COLS of a row, EXPERTS, K of them chosen, PROGRAMS of a cluster, WARPS, TOKENS of a cluster, SCORE (0:
// softmax, 1: sigmoid, 2: softmax of the chosen), and 0/1: RENORMALIZE, BRANCH, BRANCH_NORM, BIAS, CORRECTION, NOISE.

#include "row.cuh"

enum { SOFTMAX, SIGMOID, CHOSEN };
constexpr int THREADS = 32 * WARPS;
constexpr int EACH = (EXPERTS + PROGRAMS * WARPS - 1) / (PROGRAMS * WARPS);
constexpr int CHUNKS = (COLS / 8 + 31) / 32;
constexpr int OWN = (EXPERTS + 31) / 32;
constexpr int SHARE = WARPS / TOKENS;
using Part = Row<COLS, 32 * SHARE, TOKENS>;
// Whether registers hold the norm's weights besides the rest, so that they can be read before the wait.
constexpr bool EARLY = 4 * EACH * CHUNKS + 3 * 8 * Part::VECTORS <= 200;
constexpr float TINY = 1e-20f;
static_assert(COLS % 8 == 0 && K <= 32 && K <= EXPERTS && WARPS % TOKENS == 0 && EACH * TOKENS <= 32, "unfit sizes");

struct Shared {
  uint4 rows[TOKENS][COLS / 8];
  float partial[2][WARPS];
  float scores[TOKENS][EXPERTS];
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

// Over a team.
__device__ float sum_of_team(float v, float* partial) {
  int warp = threadIdx.x / 32;
  v = sum(v);
  if (threadIdx.x % 32 == 0) partial[warp] = v;
  sync_first<THREADS>();
  v = 0;
  for (int w = 0; w < SHARE; ++w) v += partial[warp / SHARE * SHARE + w];
  return v;
}

// The join and norm of a team's row into shared memory, and by one program into memory. norm: the weights where EARLY.
__device__ void prepare(Shared& s, const u16* x, const u16* branch, const Part& norm, const float* norm_weight,
                        const float* branch_weight, u16* joined, u16* normed, float eps, float branch_eps, bool writes) {
  Part row;
  row.load(x);
  if (BRANCH) {
    Part other;
    other.load(branch);
    if (BRANCH_NORM) other.scale(rsqrtf(sum_of_team(other.squares(), s.partial[0]) / COLS + branch_eps), branch_weight);
    row.add(other);
    if (writes) row.store(joined);
  }
  float factor = rsqrtf(sum_of_team(row.squares(), s.partial[1]) / COLS + eps);
  if (EARLY)
    row.scale(factor, norm);
  else
    row.scale(factor, norm_weight);
  row.store(reinterpret_cast<u16*>(s.rows[threadIdx.x / 32 / SHARE]));
  if (writes) row.store(normed);
}

// The K best of a token's scores, by one warp: thread r has the r-th.
__device__ void choose(float* scores, const float (&correction)[OWN], int* ids, float* shares, int position, int slot,
                       u32 seed, float scale) {
  int lane = threadIdx.x % 32;
  float v[OWN], top = -unbounded(), total = 0;
  for (int j = 0; j < OWN; ++j) {
    int expert = lane + 32 * j;
    v[j] = expert < EXPERTS ? scores[expert] : -unbounded();
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
    if (expert < EXPERTS) scores[expert] = v[j];
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
  float share = scores[mine];
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
    long long x_stride, long long branch_stride, long long w_stride, float eps, float branch_eps, float scale, u32 seed,
    int tokens) {
  Shared& s = *reinterpret_cast<Shared*>(launched_memory());
  let_next_start();
  cluster_arrive();
  int rank = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, team = warp / SHARE;
  int first = (rank * WARPS + warp) * EACH, token = blockIdx.y * TOKENS + team;
  bool there = TOKENS == 1 || token < tokens, chooses = rank == 0 && warp % SHARE == 0 && there;
  if (!there) token = tokens - 1;
  uint4 w[EACH][CHUNKS];
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    const uint4* from = reinterpret_cast<const uint4*>(weight + min(first + e, EXPERTS - 1) * w_stride);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) w[e][c] = 32 * c + lane < COLS / 8 ? from[32 * c + lane] : make_uint4(0, 0, 0, 0);
  }
  float added[OWN] = {}, own_bias = 0;
  for (int j = 0; CORRECTION && chooses && j < OWN; ++j)
    if (lane + 32 * j < EXPERTS) added[j] = correction[lane + 32 * j];
  int expert = first + lane / TOKENS;
  bool scores = lane < EACH * TOKENS && expert < EXPERTS;
  if (BIAS && scores) own_bias = rounded(bias[expert]);
  int slot = slots[token], position = NOISE ? positions[token] : 0;
  Part norm;
  if (EARLY) norm.load(norm_weight);

  wait_for_previous();
  prepare(s, x + token * x_stride, branch + token * branch_stride, norm, norm_weight, branch_weight,
          joined + (long long)token * COLS, normed + (long long)token * COLS, eps, branch_eps, rank == 0 && there);
  __syncthreads();
  float sums[EACH][TOKENS] = {}, own = 0;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      uint4 v = s.rows[t][min(32 * c + lane, COLS / 8 - 1)];
#pragma unroll
      for (int e = 0; e < EACH; ++e)
        sums[e][t] += dot(v.x, w[e][c].x) + dot(v.y, w[e][c].y) + dot(v.z, w[e][c].z) + dot(v.w, w[e][c].w);
    }
#pragma unroll
  for (int i = 0; i < EACH * TOKENS; ++i) {
    float of_warp = sum(sums[i / TOKENS][i % TOKENS]);
    if (lane == i) own = of_warp;
  }
  cluster_wait();
  if (scores) store_remote(&s.scores[lane % TOKENS][expert], 0, rounded(own + own_bias));
  cluster_arrive();
  cluster_wait();
  if (chooses) choose(s.scores[team], added, ids + token * K, shares + token * K, position, slot, seed, scale);
}
