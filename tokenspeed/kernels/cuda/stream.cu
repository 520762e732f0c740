// y = f(x) W^T for one row x: weights stream from memory through rings in shared memory without a pause.
//
// A program owns units of 8 rows of W and takes every G-th of them. Each warp has a slice of their columns and a ring of its
// own, which it fills by bulk copies as soon as the program starts: before the kernel in front has ended (programmatic
// dependent launch), as weights are constant. Then x is prepared (join, norms, e4m3), and each warp multiplies its slice on
// tensor cores and asks for more; sums of the warps meet at the end of a unit.
//
// Compiled with -D: K columns, ITEM bytes of a weight (2: bf16, 1: e4m3), WARPS, SEGMENT bytes of a row in a stage of a
// ring, STAGES, ACT (0: none, 1: silu, 2: gelu tanh), SHARED bytes, and 0/1: NORM, BRANCH, BRANCH_NORM, BIAS.

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int UNIT = 8;
constexpr int OUTPUTS = ACT ? UNIT / 2 : UNIT;
constexpr int THREADS = 32 * WARPS;
constexpr int ROW_BYTES = K * ITEM;
constexpr int SLICE = ROW_BYTES / WARPS;
constexpr int SEGMENTS = SLICE / SEGMENT;
// Eight threads that read 16 bytes each touch 64 bytes of an even row and of the next: odd rows lie apart, half a line of
// banks further.
constexpr int ODD = UNIT / 2 * SEGMENT + 64;
constexpr int STAGE = UNIT * SEGMENT + 64;
constexpr int STEPS = SEGMENT / 64;
constexpr int VECTORS = (K / 8 + THREADS - 1) / THREADS;
static_assert(SLICE % SEGMENT == 0 && SEGMENT % 128 == 0 && SLICE * WARPS == ROW_BYTES && K % 8 == 0, "columns do not fit the tiles");

__device__ float widen(u32 bits) { return __uint_as_float(bits << 16); }
__device__ u16 narrow(float v) {
  u16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}
__device__ float rounded(float v) { return widen(narrow(v)); }
__device__ u16 e4m3_pair(float low, float high) {
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
// Two e4m3 values as float16, which holds them exactly.
__device__ u32 halves(u16 pair) {
  u32 r;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(pair));
  return r;
}
__device__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

__device__ void wait(u32 barrier, u32 parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ int row_at(int row) { return row / 2 * SEGMENT + row % 2 * ODD; }

struct Shared {
  u8 ring[WARPS][STAGES][STAGE];
  u16 x[K];
  float sums[2][WARPS][UNIT];
  float partial[3][WARPS];
  u64 full[WARPS][STAGES];
};

static_assert(sizeof(Shared) == SHARED, "the launch must know the size");

// Sum or maximum over all threads; every one gets it. `partial` must not be in use.
template <bool LARGEST>
__device__ float across(float v, float* partial) {
  for (int o = 16; o; o /= 2) {
    float other = __shfl_xor_sync(~0u, v, o);
    v = LARGEST ? fmaxf(v, other) : v + other;
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  v = partial[0];
  for (int w = 1; w < WARPS; ++w) v = LARGEST ? fmaxf(v, partial[w]) : v + partial[w];
  return v;
}

struct Row {
  float v[VECTORS][8];
};

__device__ void load_row(Row& row, const u16* from) {
  for (int i = 0; i < VECTORS; ++i) {
    int at = (i * THREADS + threadIdx.x) * 8;
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (at < K) bits = *reinterpret_cast<const uint4*>(from + at);
    u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
    for (int j = 0; j < 4; ++j) {
      row.v[i][2 * j] = widen(words[j] & 0xffff);
      row.v[i][2 * j + 1] = __uint_as_float(words[j] & 0xffff0000u);
    }
  }
}

__device__ void store_row(u16* to, const Row& row) {
  for (int i = 0; i < VECTORS; ++i) {
    int at = (i * THREADS + threadIdx.x) * 8;
    u32 words[4];
    for (int j = 0; j < 4; ++j) words[j] = narrow(row.v[i][2 * j]) | u32(narrow(row.v[i][2 * j + 1])) << 16;
    if (at < K) *reinterpret_cast<uint4*>(to + at) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// A norm's weights for the columns that a thread has; constant, so read before the wait.
__device__ void load_weights(Row& to, const float* weight) {
  for (int i = 0; i < VECTORS; ++i) {
    int at = (i * THREADS + threadIdx.x) * 8;
    for (int j = 0; j < 8; j += 4) {
      float4 four = at < K ? *reinterpret_cast<const float4*>(weight + at + j) : make_float4(0, 0, 0, 0);
      to.v[i][j] = four.x, to.v[i][j + 1] = four.y, to.v[i][j + 2] = four.z, to.v[i][j + 3] = four.w;
    }
  }
}

__device__ void norm_row(Row& row, const Row& weights, float eps, float* partial) {
  float squares = 0;
  for (int i = 0; i < VECTORS; ++i)
    for (int j = 0; j < 8; ++j) squares += row.v[i][j] * row.v[i][j];
  float factor = rsqrtf(across<false>(squares, partial) / K + eps);
  for (int i = 0; i < VECTORS; ++i)
    for (int j = 0; j < 8; ++j) row.v[i][j] = rounded(row.v[i][j] * factor * weights.v[i][j]);
}

// The row as the products take it, into shared memory; its scale where it becomes e4m3.
__device__ float prepare(Shared& s, const u16* x, const u16* branch, const Row& norm, const Row& branch_norm, u16* joined,
                         float eps, float branch_eps) {
  Row row;
  load_row(row, x);
  if (BRANCH) {
    Row other;
    load_row(other, branch);
    if (BRANCH_NORM) norm_row(other, branch_norm, branch_eps, s.partial[0]);
    for (int i = 0; i < VECTORS; ++i)
      for (int j = 0; j < 8; ++j) row.v[i][j] = rounded(row.v[i][j] + other.v[i][j]);
    if (blockIdx.x == 0) store_row(joined, row);
  }
  if (NORM) norm_row(row, norm, eps, s.partial[1]);
  float scale = 1;
  if (ITEM == 2) {
    store_row(s.x, row);
  } else {
    float largest = 0;
    for (int i = 0; i < VECTORS; ++i)
      for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fabsf(row.v[i][j]));
    scale = fmaxf(across<true>(largest, s.partial[2]), 1e-12f) / 448.0f;
    float inverse = 1.0f / scale;
    for (int i = 0; i < VECTORS; ++i) {
      int at = (i * THREADS + threadIdx.x) * 8;
      u32 words[4];
      for (int j = 0; j < 4; ++j)
        words[j] = halves(e4m3_pair(row.v[i][2 * j] * inverse, row.v[i][2 * j + 1] * inverse));
      if (at < K) *reinterpret_cast<uint4*>(s.x + at) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
  __syncthreads();
  return scale;
}

// sums += 16 columns of x (the first of 16 rows; the others are zero) times those of 8 rows of W. Which columns a thread
// holds is of no matter as long as it is the same ones of x and of W.
__device__ void multiply(float* sums, u32 x0, u32 x1, u32 w0, u32 w1) {
  if (ITEM == 2)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%5}, {%7,%8}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(x0), "r"(0), "r"(x1), "r"(w0), "r"(w1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%5}, {%7,%8}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(x0), "r"(0), "r"(x1), "r"(w0), "r"(w1));
}

// 16 bytes of each of 8 rows of W per thread of a group, and as many columns of x.
__device__ void multiply_vector(float (*sums)[4], const u16* x, bool mine, uint4 w) {
  const uint4* from = reinterpret_cast<const uint4*>(x);
  uint4 a = make_uint4(0, 0, 0, 0), b = a;
  if (mine) a = from[0];
  if (ITEM == 2) {
    multiply(sums[0], a.x, a.y, w.x, w.y);
    multiply(sums[1], a.z, a.w, w.z, w.w);
  } else {
    if (mine) b = from[1];
    multiply(sums[0], a.x, a.y, halves(w.x), halves(w.x >> 16));
    multiply(sums[1], a.z, a.w, halves(w.y), halves(w.y >> 16));
    multiply(sums[0], b.x, b.y, halves(w.z), halves(w.z >> 16));
    multiply(sums[1], b.z, b.w, halves(w.w), halves(w.w >> 16));
  }
}

__device__ float gated(float gate, float up) {
  gate = rounded(gate);
  float z = ACT == 1 ? gate : 1.5957691216057308f * (gate + 0.044715f * gate * gate * gate);
  return rounded(gate / (1.0f + __expf(-z))) * rounded(up);
}

// Row of W that lies at `local` of a unit: consecutive rows, or gate and up rows in turn; past the end the last one.
__device__ int weight_row(int unit, int local, int n) {
  if (!ACT) return min(unit * UNIT + local, n - 1);
  return min(unit * OUTPUTS + local / 2, n - 1) + local % 2 * n;
}

// A warp's way through its columns of the program's units: what it asks for next.
struct Stream {
  const u8* weight;
  long long w_stride;
  int n, units, unit, segment;
  u64 policy;

  __device__ void request(u8* to, u32 full) {
    if (unit >= units) return;
    int lane = threadIdx.x % 32;
    if (lane == 0)
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(full), "r"(UNIT * SEGMENT) : "memory");
    __syncwarp();
    if (lane < UNIT) {
      const u8* from = weight + weight_row(unit, lane, n) * w_stride + threadIdx.x / 32 * SLICE + segment * SEGMENT;
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
              "r"(shared_address(to) + row_at(lane)), "l"(from), "r"(SEGMENT), "r"(full), "l"(policy) : "memory");
    }
    if (++segment == SEGMENTS) {
      segment = 0;
      unit += gridDim.x;
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2) stream(
    const u16* x, const u16* branch, const u8* weight, const float* w_scale, const float* bias, const float* norm_weight,
    const float* branch_weight, u16* y, u16* joined, long long w_stride, int n, float eps, float branch_eps) {
  extern __shared__ __align__(128) u8 memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  asm volatile("griddepcontrol.launch_dependents;");
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, units = (n + OUTPUTS - 1) / OUTPUTS;
  if (lane == 0) {
    for (int i = 0; i < STAGES; ++i)
      asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(&s.full[warp][i])));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
  Stream stream{weight, w_stride, n, units, (int)blockIdx.x, 0, 0};
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(stream.policy));
  for (int i = 0; i < STAGES; ++i) stream.request(s.ring[warp][i], shared_address(&s.full[warp][i]));
  Row norm, branch_norm;
  if (NORM) load_weights(norm, norm_weight);
  if (BRANCH_NORM) load_weights(branch_norm, branch_weight);

  asm volatile("griddepcontrol.wait;" ::: "memory");
  float x_scale = prepare(s, x, branch, norm, branch_norm, joined, eps, branch_eps);
  int group = lane / 4, part = lane % 4, at = 0, parity = 0, flip = 0;
  for (int unit = blockIdx.x; unit < units; unit += gridDim.x, flip ^= 1) {
    float sums[4][4] = {};  // several, as one product waits for the one before it into the same
    int row = weight_row(unit, lane % UNIT, n);
    float row_scale = ITEM == 1 ? w_scale[row] : 1, row_bias = BIAS ? rounded(bias[row]) : 0;
    for (int segment = 0; segment < SEGMENTS; ++segment) {
      u32 full = shared_address(&s.full[warp][at]);
      wait(full, parity);
      const u8* weights = s.ring[warp][at] + row_at(group) + part * 16;
      const u16* columns = s.x + (warp * SLICE + segment * SEGMENT + part * 16) / ITEM;
#pragma unroll
      for (int step = 0; step < STEPS; ++step)
        multiply_vector(sums + step % 2 * 2, columns + step * 64 / ITEM, group == 0,
                        *reinterpret_cast<const uint4*>(weights + step * 64));
      __syncwarp();
      stream.request(s.ring[warp][at], full);
      if (++at == STAGES) {
        at = 0;
        parity ^= 1;
      }
    }
    if (group == 0) {
      for (int i = 0; i < 2; ++i)
        s.sums[flip][warp][2 * part + i] = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      float total = 0;
      for (int w = 0; w < WARPS; ++w) total += s.sums[flip][w][lane % UNIT];
      if (ITEM == 1) total *= x_scale * row_scale;
      if (BIAS) total += row_bias;
      if (ACT) {
        float up = __shfl_down_sync(~0u, total, 1);
        int column = unit * OUTPUTS + lane / 2;
        if (lane < UNIT && lane % 2 == 0 && column < n) y[column] = narrow(gated(total, up));
      } else {
        int column = unit * UNIT + lane;
        if (lane < UNIT && column < n) y[column] = narrow(total);
      }
    }
  }
}
