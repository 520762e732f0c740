// One row of bf16 among the threads of a program: reading, norms, writing; and what streaming kernels share.

#pragma once

#include "instructions.cuh"

// How weights are held: bf16; e4m3; codes of 8 and of 4 bits, the latter as quantization/nibbles.py lays them out.
enum { BF16, E4M3, INT8, INT4, MXFP4 };
__device__ constexpr int bits_of(int format) { return format == BF16 ? 16 : format == E4M3 || format == INT8 ? 8 : 4; }

// x of integer codes is taken for integers of 15 bits, in two bytes, of which a power of two is the scale.
constexpr int INTEGER_BITS = 14;
// Of a plane of such bytes; the next one lies half a line of banks apart.
__device__ constexpr int plane_bytes(int columns) { return columns + 64; }
// e2m1 is multiplied as the bf16 whose bits it is, with its exponent's two bits at the lower end of bf16's: 2^-126 times its
// value, and mostly no normal number, which tensor cores take exactly. So that products are normal ones, x is 2^64 times as
// large; what is left of both is taken back from the sums.
constexpr float X_FACTOR = 18446744073709551616.0f;
constexpr float E2M1_FACTOR = 4.611686018427387904e18f;  // 2^62

__device__ inline float widen(u32 bits) { return __uint_as_float(bits << 16); }
__device__ inline float rounded(float v) { return widen(narrow(v)); }
// Of two columns of bf16 each.
__device__ inline float dot(u32 a, u32 b) {
  return widen(a & 0xffff) * widen(b & 0xffff) + __uint_as_float(a & 0xffff0000u) * __uint_as_float(b & 0xffff0000u);
}
// Two columns of bf16 as e4m3.
__device__ inline u16 e4m3_of(u32 pair, float inverse) {
  return e4m3_pair(widen(pair & 0xffff) * inverse, __uint_as_float(pair & 0xffff0000u) * inverse);
}
// Of four integers of which 128 was added to each: the upper bytes, and the lower ones as signed.
__device__ inline void split(const u32* words, u32& lower, u32& upper) {
  u32 first = bytes_of(words[0], words[1], 0x5140), second = bytes_of(words[2], words[3], 0x5140);
  lower = bytes_of(first, second, 0x5410) ^ 0x80808080u;
  upper = bytes_of(first, second, 0x7632);
}

// Eight columns from (i Threads + thread) 8 on, for each i, of a row of so many; zeros beyond its end. Rows: which so many
// threads each have at once.
template <int Columns, int Threads, int Rows = 1>
struct Row {
  static constexpr int VECTORS = (Columns / 8 + Threads - 1) / Threads;
  float v[VECTORS][8];

  __device__ static int at(int i) { return (i * Threads + (Rows > 1 ? threadIdx.x % Threads : threadIdx.x)) * 8; }

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
        words[turned ? j / 2 + j % 2 * 2 : j] = pair(v[i][2 * j] * factor, v[i][2 * j + 1] * factor);
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

  // As integers of a scale per Group columns, their upper and lower bytes apart: bytes' columns are in the order in which
  // words of codes hold them, and what a thread takes of a run of 128 columns of four-bit codes lies together. Codes of four
  // bits are multiplied 16 times as large.
  template <int Group>
  __device__ void store_bytes(u8* upper, u8* lower, float* scales) const {
    constexpr bool nibbles = Group == 128, even = Columns % (8 * Threads) == 0;
    float most[VECTORS];  // of all groups first, as each waits for other threads
    for (int i = 0; i < VECTORS; ++i) {
      most[i] = 0;
      for (int j = 0; j < 8; ++j) most[i] = larger(most[i], fabsf(v[i][j]));
    }
    for (int o = Group / 16; o; o /= 2)
      for (int i = 0; i < VECTORS; ++i) most[i] = larger(most[i], __shfl_xor_sync(~0u, most[i], o));
    for (int i = 0; i < VECTORS; ++i) {
      u32 exponent = max(__float_as_uint(most[i]) & 0x7f800000u, 32u << 23);
      float factor = __uint_as_float(((127 + INTEGER_BITS - 1 + 127) << 23) - exponent);
      u32 words[8];  // the integer plus 128 in the lower bits, as the rest are those of 1.5 2^23
      for (int j = 0; j < 8; ++j)
        words[j] = __float_as_uint(fmaf(v[i][nibbles ? j % 2 * 4 + j / 2 : j], factor, 12582912.0f + 128));
      uint2 low, high;
      split(words, low.x, high.x);
      split(words + 4, low.y, high.y);
      int column = at(i), to = nibbles ? column / 128 * 128 + column / 8 % 4 * 32 + column / 32 % 4 * 8 : column;
      if (even || column < Columns) {
        *reinterpret_cast<uint2*>(lower + to) = low;
        *reinterpret_cast<uint2*>(upper + to) = high;
        u32 scale = exponent == 0x7f800000u ? 0x7fffffffu : exponent - ((INTEGER_BITS - 1 + (nibbles ? 4 : 0)) << 23);
        if (column % Group == 0) scales[column / Group] = __uint_as_float(scale);
      }
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

  // After weights, of which a factor is left out.
  __device__ float largest(const Row& weights) const {
    float most = 0;
    for (int i = 0; i < VECTORS; ++i)
      for (int j = 0; j < 8; ++j) most = fmaxf(most, fabsf(v[i][j] * weights.v[i][j]));
    return most;
  }

  __device__ void scale(float factor, const Row& weights) {
    for (int i = 0; i < VECTORS; ++i)
      for (int j = 0; j < 8; ++j) v[i][j] = rounded(v[i][j] * factor * weights.v[i][j]);
  }

  // By weights that are read only now.
  __device__ void scale(float factor, const float* weights) {
    for (int i = 0; i < VECTORS; ++i)
      for (int j = 0; j < 8; ++j) v[i][j] = rounded(v[i][j] * factor * (at(i) < Columns ? weights[at(i) + j] : 0));
  }
};

// Sum or maximum over the first threads of so many warps; every one gets it. `partial` must not be in use.
template <bool Largest, int Warps>
__device__ float across(float v, float* partial) {
  for (int o = 16; o; o /= 2) {
    float other = __shfl_xor_sync(~0u, v, o);
    v = Largest ? fmaxf(v, other) : v + other;
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  sync_first<32 * Warps>();
  v = partial[0];
  for (int w = 1; w < Warps; ++w) v = Largest ? fmaxf(v, partial[w]) : v + partial[w];
  return v;
}

// A sum and a maximum, with one barrier.
template <int Warps>
__device__ void across(float& sum, float& most, float* sums, float* mosts) {
  for (int o = 16; o; o /= 2) {
    sum += __shfl_xor_sync(~0u, sum, o);
    most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
  }
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum, mosts[threadIdx.x / 32] = most;
  sync_first<32 * Warps>();
  sum = sums[0], most = mosts[0];
  for (int w = 1; w < Warps; ++w) sum += sums[w], most = fmaxf(most, mosts[w]);
}

// Whether registers hold a norm's weights besides the rows, so that they can be read before a wait.
template <bool Branch, bool BranchNorm, int Columns, int Threads>
__device__ constexpr bool reads_early() {
  return Row<Columns, Threads>::VECTORS * (8 * (2 + BranchNorm) + 4 * Branch) <= 80;
}

// A row as products take it, into shared memory: [plus a branch, which may be normed first,] [normed,] bf16, or e4m3 held
// in float16 for e4m3 weights, bf16 times X_FACTOR for e2m1, or two planes of bytes with `scales` for integer codes. Its scale.
// The sum with the branch goes to `joined`, from one program. norm, branch_norm: of the weights, where reads_early.
template <int Format, bool Norm, bool Branch, bool BranchNorm, int Columns, int Threads>
__device__ float prepare_row(u16* to, float* scales, float (*partial)[Threads / 32], const u16* x, const u16* branch,
                             const Row<Columns, Threads>& norm, const Row<Columns, Threads>& branch_norm,
                             const float* norm_weight, const float* branch_weight, u16* joined, float eps, float branch_eps) {
  constexpr int warps = Threads / 32;
  constexpr bool early = reads_early<Branch, BranchNorm, Columns, Threads>();
  Row<Columns, Threads> row;
  if (early || !BranchNorm) row.load(x);
  if (Branch) {
    Row<Columns, Threads> other;
    other.load(branch);
    if (BranchNorm) {
      float factor = rsqrtf(across<false, warps>(other.squares(), partial[0]) / Columns + branch_eps);
      if (early) {
        other.scale(factor, branch_norm);
      } else {
        other.scale(factor, branch_weight);
        row.load(x);
      }
    }
    row.add(other);
    if (blockIdx.x == 0) row.store(joined);
  }
  float scale = 1;
  constexpr bool both = Format == E4M3 && Norm && early;
  if (both) {
    // The factor goes to all numbers alike, so the largest one is known but for it; its own rounding may differ by a last bit, and
    // none grows past what e4m3 holds.
    float sum = row.squares(), most = row.largest(norm);
    across<warps>(sum, most, partial[1], partial[2]);
    float factor = rsqrtf(sum / Columns + eps);
    scale = fmaxf(rounded(most * factor), 1e-12f) / 448.0f;
    row.scale(factor, norm);
  } else if (Norm) {
    float factor = rsqrtf(across<false, warps>(row.squares(), partial[1]) / Columns + eps);
    if (early)
      row.scale(factor, norm);
    else
      row.scale(factor, norm_weight);
  }
  if (Format == BF16) {
    row.store(to, 1, true);
  } else if (Format == MXFP4) {
    row.store(to, X_FACTOR);
  } else if (Format == E4M3) {
    if (!both) scale = fmaxf(across<true, warps>(row.largest(), partial[2]), 1e-12f) / 448.0f;
    row.store_e4m3(to, scale);
  } else {
    u8* upper = reinterpret_cast<u8*>(to);
    row.template store_bytes<512 / bits_of(Format)>(upper, upper + plane_bytes(Columns), scales);
  }
  sync_first<Threads>();
  return scale;
}

// Prepared rows of so many bytes, `stride` elements apart, of which put(row, piece, bits) takes 16 bytes at a time. Up to eight
// pieces of a thread are under way at a time: each waits for the second-level cache as long as all of them do. By the elements'
// type: through bytes eight rows of bf16 take 110 registers for 94, and leave no room for the next kernel's programs (a layer of
// 8B: 112.5 for 109.6 us).
template <int Most, int Bytes, int Threads, class T, class Put>
__device__ void load_rows(const T* from, long long stride, int rows, Put put) {
  constexpr int PIECES = Bytes / 16, MINE = (Most * PIECES + Threads - 1) / Threads, AT_ONCE = MINE < 8 ? MINE : 8;
#pragma unroll
  for (int first = 0; first < MINE; first += AT_ONCE) {
    uint4 bits[AT_ONCE];
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      int i = (first + j) * Threads + threadIdx.x, row = i / PIECES;
      if (row < rows) bits[j] = *reinterpret_cast<const uint4*>(from + row * stride + i % PIECES * (16 / int(sizeof(T))));
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      int i = (first + j) * Threads + threadIdx.x, row = i / PIECES;
      if (row < rows) put(row, i % PIECES, bits[j]);
    }
  }
  sync_first<Threads>();
}

// Rows of bf16 as e4m3 with a scale each, every row by as many warps: put as above.
template <int Most, int Columns, int Warps, class Put>
__device__ void quantize_rows(float* scales, float* partial, const u16* from, long long stride, int rows, Put put) {
  constexpr int SHARE = Warps / Most, OWN = 32 * SHARE, PIECES = Columns / 16, MINE = (PIECES + OWN - 1) / OWN;
  static_assert(Warps % Most == 0, "rows are shared out among whole warps");
  int row = threadIdx.x / OWN, own = threadIdx.x % OWN;
  uint4 bits[MINE][2] = {};
#pragma unroll
  for (int i = 0; i < MINE; ++i) {
    const uint4* at = reinterpret_cast<const uint4*>(from + row * stride) + 2 * (i * OWN + own);
    if (row < rows && i * OWN + own < PIECES) bits[i][0] = at[0], bits[i][1] = at[1];
  }
  float most = 0;
  for (int i = 0; i < MINE; ++i)
    for (uint4 four : bits[i]) {
      u32 words[] = {four.x, four.y, four.z, four.w};
      for (u32 word : words)
        most = fmaxf(most, fmaxf(fabsf(widen(word & 0xffff)), fabsf(__uint_as_float(word & 0xffff0000u))));
    }
  for (int o = 16; o; o /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
  if (SHARE > 1) {
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = most;
    sync_first<32 * Warps>();
    for (int w = 0; w < SHARE; ++w) most = fmaxf(most, partial[row * SHARE + w]);
  }
  float scale = fmaxf(most, 1e-12f) / 448.0f, inverse = 1.0f / scale;
  if (own == 0) scales[row] = scale;
#pragma unroll
  for (int i = 0; i < MINE; ++i) {
    u32 codes[4];
    for (int j = 0; j < 4; ++j) {
      uint4 four = bits[i][j / 2];
      u32 first = j % 2 ? four.z : four.x, second = j % 2 ? four.w : four.y;
      codes[j] = e4m3_of(first, inverse) | u32(e4m3_of(second, inverse)) << 16;
    }
    if (row < rows && i * OWN + own < PIECES) put(row, i * OWN + own, make_uint4(codes[0], codes[1], codes[2], codes[3]));
  }
  sync_first<32 * Warps>();
}

template <int Act>
__device__ float gated(float gate, float up) {
  gate = rounded(gate);
  float z = Act == 1 ? gate : 1.5957691216057308f * (gate + 0.044715f * gate * gate * gate);
  return rounded(gate / (1.0f + __expf(-z))) * rounded(up);
}
