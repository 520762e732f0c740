// One row of bf16 among the threads of a program: reading, norms, writing; and what streaming kernels share.

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// How weights are held: bf16; e4m3; codes of 8 and of 4 bits, the latter as quantization/nibbles.py lays them out.
enum { BF16, E4M3, INT8, INT4, MXFP4 };
__device__ constexpr int bits_of(int format) { return format == BF16 ? 16 : format == E4M3 || format == INT8 ? 8 : 4; }

// Codes are multiplied as bf16 whose bits they are: a code c of up to 8 bits is c 2^-133, one of e2m1 with its exponent's two
// bits at the lower end of bf16's is 2^-126 times its value, and many of both are no normal numbers, which tensor cores take
// exactly. So that products are normal ones, x is 2^64 times as large; what is left of both is taken back from the sums.
constexpr float X_FACTOR = 18446744073709551616.0f;
constexpr float CODE_FACTOR = 5.902958103587056517e20f;  // 2^69
constexpr float E2M1_FACTOR = 4.611686018427387904e18f;  // 2^62

__device__ inline float widen(u32 bits) { return __uint_as_float(bits << 16); }
__device__ inline u16 narrow(float v) {
  u16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}
// Two as bf16, the first in the lower half.
__device__ inline u32 pair(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ inline float exp2_fast(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
__device__ inline float rounded(float v) { return widen(narrow(v)); }
__device__ inline u16 e4m3_pair(float low, float high) {
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
// Two e4m3 values as float16, which holds them exactly.
__device__ inline u32 halves(u16 pair) {
  u32 r;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(pair));
  return r;
}
__device__ inline u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

__device__ inline void wait_full(u32 barrier, u32 parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(barrier), "r"(parity) : "memory");
}

// Eight columns from (i Threads + thread) 8 on, for each i, of a row of so many; zeros beyond its end.
template <int Columns, int Threads>
struct Row {
  static constexpr int VECTORS = (Columns / 8 + Threads - 1) / Threads;
  float v[VECTORS][8];

  __device__ static int at(int i) { return (i * Threads + threadIdx.x) * 8; }

  __device__ void load(const u16* from) {
    for (int i = 0; i < VECTORS; ++i) {
      uint4 bits = at(i) < Columns ? *reinterpret_cast<const uint4*>(from + at(i)) : make_uint4(0, 0, 0, 0);
      u32 words[] = {bits.x, bits.y, bits.z, bits.w};
      for (int j = 0; j < 4; ++j) {
        v[i][2 * j] = widen(words[j] & 0xffff);
        v[i][2 * j + 1] = __uint_as_float(words[j] & 0xffff0000u);
      }
    }
  }

  // A norm's weights; constant, so read before a wait.
  __device__ void load(const float* from) {
    for (int i = 0; i < VECTORS; ++i)
      for (int j = 0; j < 8; j += 4) {
        float4 four = at(i) < Columns ? *reinterpret_cast<const float4*>(from + at(i) + j) : make_float4(0, 0, 0, 0);
        v[i][j] = four.x, v[i][j + 1] = four.y, v[i][j + 2] = four.z, v[i][j + 3] = four.w;
      }
  }

  // Times a factor; `turned`: pairs of columns in the order in which bf16 products take them.
  __device__ void store(u16* to, float factor = 1, bool turned = false) const {
    for (int i = 0; i < VECTORS; ++i) {
      u32 words[4];
      for (int j = 0; j < 4; ++j)
        words[turned ? j / 2 + j % 2 * 2 : j] = narrow(v[i][2 * j] * factor) | u32(narrow(v[i][2 * j + 1] * factor)) << 16;
      if (at(i) < Columns) *reinterpret_cast<uint4*>(to + at(i)) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }

  // As e4m3 of a scale, held in float16.
  __device__ void store_e4m3(u16* to, float scale) const {
    float inverse = 1.0f / scale;
    for (int i = 0; i < VECTORS; ++i) {
      u32 words[4];
      for (int j = 0; j < 4; ++j) words[j] = halves(e4m3_pair(v[i][2 * j] * inverse, v[i][2 * j + 1] * inverse));
      if (at(i) < Columns) *reinterpret_cast<uint4*>(to + at(i)) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }

  // The sums of so many columns each, a multiple of 8 up to 256, times a factor.
  template <int Group>
  __device__ void store_sums(float* to, float factor) const {
    for (int i = 0; i < VECTORS; ++i) {
      float sum = ((v[i][0] + v[i][1]) + (v[i][2] + v[i][3])) + ((v[i][4] + v[i][5]) + (v[i][6] + v[i][7]));
      for (int o = Group / 16; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
      if (at(i) < Columns && at(i) % Group == 0) to[at(i) / Group] = sum * factor;
    }
  }

  __device__ void add(const Row& other) {
    for (int i = 0; i < VECTORS; ++i)
      for (int j = 0; j < 8; ++j) v[i][j] = rounded(v[i][j] + other.v[i][j]);
  }

  __device__ float squares() const {
    float sum = 0;
    for (int i = 0; i < VECTORS; ++i)
      for (int j = 0; j < 8; ++j) sum += v[i][j] * v[i][j];
    return sum;
  }

  __device__ float largest() const {
    float most = 0;
    for (int i = 0; i < VECTORS; ++i)
      for (int j = 0; j < 8; ++j) most = fmaxf(most, fabsf(v[i][j]));
    return most;
  }

  __device__ void scale(float factor, const Row& weights) {
    for (int i = 0; i < VECTORS; ++i)
      for (int j = 0; j < 8; ++j) v[i][j] = rounded(v[i][j] * factor * weights.v[i][j]);
  }
};

// Sum or maximum over all threads; every one gets it. `partial` must not be in use.
template <bool Largest, int Warps>
__device__ float across(float v, float* partial) {
  for (int o = 16; o; o /= 2) {
    float other = __shfl_xor_sync(~0u, v, o);
    v = Largest ? fmaxf(v, other) : v + other;
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  v = partial[0];
  for (int w = 1; w < Warps; ++w) v = Largest ? fmaxf(v, partial[w]) : v + partial[w];
  return v;
}

// A row as products take it, into shared memory: [plus a branch, which may be normed first,] [normed,] bf16, or e4m3 held
// in float16 for e4m3 weights, or bf16 times X_FACTOR for codes, whose zeros' part of the products of 64 bytes of a row goes to
// `offsets`. Its scale. The sum with the branch goes to `joined`, from one program.
template <int Format, bool Norm, bool Branch, bool BranchNorm, int Columns, int Threads>
__device__ float prepare_row(u16* to, float* offsets, float (*partial)[Threads / 32], const u16* x, const u16* branch,
                             const Row<Columns, Threads>& norm, const Row<Columns, Threads>& branch_norm, u16* joined,
                             float eps, float branch_eps) {
  constexpr int warps = Threads / 32;
  Row<Columns, Threads> row;
  row.load(x);
  if (Branch) {
    Row<Columns, Threads> other;
    other.load(branch);
    if (BranchNorm)
      other.scale(rsqrtf(across<false, warps>(other.squares(), partial[0]) / Columns + branch_eps), branch_norm);
    row.add(other);
    if (blockIdx.x == 0) row.store(joined);
  }
  if (Norm) row.scale(rsqrtf(across<false, warps>(row.squares(), partial[1]) / Columns + eps), norm);
  float scale = 1;
  if (Format == BF16) {
    row.store(to, 1, true);
  } else if (Format != E4M3) {
    row.store(to, X_FACTOR);
    if (Format == INT8) row.template store_sums<64>(offsets, -128 / CODE_FACTOR);
    if (Format == INT4) row.template store_sums<128>(offsets, -8 / CODE_FACTOR);
  } else {
    scale = fmaxf(across<true, warps>(row.largest(), partial[2]), 1e-12f) / 448.0f;
    row.store_e4m3(to, scale);
  }
  __syncthreads();
  return scale;
}

// Prepared rows, `stride` elements apart, into rows of `pitch`, turned as Row::store does.
template <int Columns, int Threads>
__device__ void load_rows(u16* to, int pitch, const u16* from, long long stride, int rows) {
#pragma unroll 4
  for (int i = threadIdx.x; i < rows * (Columns / 8); i += Threads) {
    int row = i / (Columns / 8), at = i % (Columns / 8) * 8;
    uint4 pairs = *reinterpret_cast<const uint4*>(from + row * stride + at);
    *reinterpret_cast<uint4*>(to + row * pitch + at) = make_uint4(pairs.x, pairs.z, pairs.y, pairs.w);
  }
  __syncthreads();
}

template <int Act>
__device__ float gated(float gate, float up) {
  gate = rounded(gate);
  float z = Act == 1 ? gate : 1.5957691216057308f * (gate + 0.044715f * gate * gate * gate);
  return rounded(gate / (1.0f + __expf(-z))) * rounded(up);
}

// sums += 16 columns of 8 rows of x (of 16; the others are zero) times those of 8 rows of W, of bf16 or float16. Which
// columns a thread holds is of no matter as long as it is the same ones of x and of W.
template <bool Half>
__device__ void multiply_columns(float* sums, u32 x0, u32 x1, u32 w0, u32 w1) {
  if (Half)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%5}, {%7,%8}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(x0), "r"(0), "r"(x1), "r"(w0), "r"(w1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%5}, {%7,%8}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(x0), "r"(0), "r"(x1), "r"(w0), "r"(w1));
}

// The same with x as 16 bytes are loaded: two products, of its first and third, and of its second and fourth pair of columns.
// Each has the other's pairs as eight more rows, for nothing; what is wanted of the first lies in sums 0 and 1, of the second
// in sums 2 and 3, and no register has to be moved.
template <bool Half>
__device__ void multiply_quad(float* sums, uint4 x, u32 w0, u32 w1) {
  if (Half)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(w0), "r"(w1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(w0), "r"(w1));
}

// 16 bytes of each of 8 rows of W per thread of a group, and as many columns of x: bf16 or e4m3. What is wanted lies in the
// first half of sums[0] and the second of sums[1].
template <int Format>
__device__ void multiply_vector(float (*sums)[4], const u16* x, bool mine, uint4 w) {
  const uint4* from = reinterpret_cast<const uint4*>(x);
  uint4 a = make_uint4(0, 0, 0, 0), b = a;
  if (mine) a = from[0];
  if (Format == BF16) {
    multiply_quad<false>(sums[0], a, w.x, w.y);
    multiply_quad<false>(sums[1], a, w.z, w.w);
  } else {
    if (mine) b = from[1];
    multiply_quad<true>(sums[0], a, halves(w.x), halves(w.y));
    multiply_quad<true>(sums[1], a, halves(w.x >> 16), halves(w.y >> 16));
    multiply_quad<true>(sums[0], b, halves(w.z), halves(w.w));
    multiply_quad<true>(sums[1], b, halves(w.z >> 16), halves(w.w >> 16));
  }
}

__device__ inline float widen_half(u32 bits) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"((u16)bits));
  return r;
}

__device__ inline u32 bytes_of(u32 word, u32 which) {
  u32 r;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(r) : "r"(word), "r"(which));
  return r;
}
// Two codes of e2m1 as bf16, of a word shifted so that their signs are top bits, and so that their other bits are 6 to 8.
__device__ inline u32 e2m1_pair(u32 signs, u32 others) { return signs & 0x80008000u | others & 0x01c001c0u; }

// Adds 64 bytes of each of 8 rows of W, of which each thread of a group holds 16, times as many columns of x, to the sums of
// two rows. `offset` as prepare_row made it, `scales` of both rows: none, bf16 or HalfScales of one group each, or four
// exponents each.
template <int Format, bool HalfScales>
__device__ void multiply_codes(float* sums, const u16* from, bool mine, uint4 w, float offset, uint2 scales) {
  u32 words[] = {w.x, w.y, w.z, w.w};
  constexpr int vectors = Format == INT8 ? 2 : 4, apart = Format == INT8 ? 8 : 32;
  uint4 x[vectors] = {};
  if (mine)
    for (int j = 0; j < vectors; ++j) x[j] = *reinterpret_cast<const uint4*>(from + j * apart);
  float low[4] = {offset, offset, 0, 0}, high[4] = {};
  if (Format == INT8) {
    for (int j = 0; j < 4; ++j) words[j] ^= 0x80808080u;
    for (int j = 0; j < 2; ++j) {
      u32 first = words[2 * j], second = words[2 * j + 1];
      multiply_quad<false>(low, x[j], bytes_of(first, 0x4140), bytes_of(second, 0x4140));
      multiply_quad<false>(high, x[j], bytes_of(first, 0x4342), bytes_of(second, 0x4342));
    }
    sums[0] += low[0] + high[2];
    sums[1] += low[1] + high[3];
  } else if (Format == INT4) {
    for (int j = 0; j < 4; ++j) {
      multiply_quad<false>(low, x[j], words[j] & 0x000f000fu, words[j] >> 8 & 0x000f000fu);
      multiply_quad<false>(high, x[j], words[j] & 0x00f000f0u, words[j] >> 8 & 0x00f000f0u);
    }
    float left = HalfScales ? widen_half(scales.x & 0xffff) : widen(scales.x & 0xffff);
    float right = HalfScales ? widen_half(scales.x >> 16) : __uint_as_float(scales.x & 0xffff0000u);
    sums[0] += (low[0] + high[2] * 0.0625f) * left;
    sums[1] += (low[1] + high[3] * 0.0625f) * right;
  } else {
    for (int j = 0; j < 4; ++j) {
      u32 word = words[j];
      float first[4] = {}, second[4] = {};
      multiply_quad<false>(first, x[j], e2m1_pair(word << 12, word << 6), e2m1_pair(word << 4, word >> 2));
      multiply_quad<false>(second, x[j], e2m1_pair(word << 8, word << 2), e2m1_pair(word, word >> 6));
      float left = __uint_as_float((j < 3 ? scales.x << (23 - 8 * j) : scales.x >> 1) & 0x7f800000u);
      float right = __uint_as_float((j < 3 ? scales.y << (23 - 8 * j) : scales.y >> 1) & 0x7f800000u);
      sums[0] += (first[0] + second[2]) * left;
      sums[1] += (first[1] + second[3]) * right;
    }
  }
}

__device__ inline u64 read_once_policy() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Have `bytes` of global memory copied into shared memory; the barrier counts them.
__device__ inline void copy_bulk(u32 to, const u8* from, int bytes, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}
// The same of 4 or 8 bytes by a thread; the barrier then counts an arrival of each thread once all that it asked for is there.
template <int Bytes>
__device__ void copy_few(u32 to, const u8* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(Bytes) : "memory");
}
__device__ inline void arrive_with_copies(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void expect_bytes(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
