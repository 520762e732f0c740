// The chosen experts of up to eight tokens, in two kernels of one source: gate and up with their activation, then down with the
// weighted sum over a token's choices. Each expert that is chosen is read once, through rings as in stream.cu.
//
// Every program lists the experts that are chosen, in the order of their first choice: its slots. A unit is 8 rows of W; of
// gate and up those of one slot, of down those of all slots, so that a token's sum needs no other program. A unit's items are
// SEGMENT bytes of its rows, of a slot; a warp takes every WARPS-th one through a ring of its own. Rows of x are tokens, of
// which those that chose the slot are read: of gate and up they stay in shared memory, for down they come into the ring.
//
// down asks for its experts before its wait: gate and up lets it start after its own wait, so that the router has ended.
//
// e4m3 is taken for the bf16 number of its bits, 2^-120 of its value, some of them subnormal, which tensor cores multiply
// exactly; x is X_FACTOR times as large. Within eight columns x lies as the products take it (place).
//
// Compiled with -D: ROWS of x that fit (1, 2, 4 or 8), CHOICES of a token, K columns, N outputs, FORMAT (row.cuh's), WARPS,
// SEGMENT, STAGES, ACT (0: down, 1: silu, 2: gelu tanh), SHARED bytes.

#include "units.cuh"

constexpr bool DOWN = ACT == 0;
constexpr int THREADS = 32 * WARPS;
constexpr int ROW_BYTES = K * bits_of(FORMAT) / 8;
constexpr int SEGMENTS = ROW_BYTES / SEGMENT;
constexpr int X_SEGMENT = SEGMENT * 16 / bits_of(FORMAT);
constexpr int X_PITCH = DOWN ? X_SEGMENT + (ROWS > 1 ? 64 : 0) : 2 * K + (ROWS > 1 ? 64 : 0);
constexpr int UNITS = (N + OUTPUTS - 1) / OUTPUTS;
constexpr int SLOTS = ROWS * CHOICES;
constexpr bool SCALED = FORMAT == E4M3;
constexpr int X_AT = rows_bytes(SEGMENT);
constexpr int SCALES_AT = X_AT + DOWN * ROWS * X_PITCH;
constexpr int SCALES = DOWN && SCALED ? 4 * UNIT : 0;
constexpr float WIDE = SCALED ? X_FACTOR : 1, BACK = SCALED ? 72057594037927936.0f : 1;  // 2^(120 - 64)
static_assert(SEGMENT % 128 == 0 && ROW_BYTES % SEGMENT == 0 && K % 8 == 0 && N % OUTPUTS == 0 && SLOTS <= THREADS,
              "sizes do not fit the tiles");

struct Shared {
  u8 ring[WARPS][STAGES][SCALES_AT + SCALES];
  u8 x[DOWN ? 16 : ROWS * X_PITCH];
  u64 full[WARPS][STAGES];
  float sums[2][WARPS][ROWS * UNIT];
  int ids[SLOTS];
  int first[SLOTS];
  int expert[SLOTS];
  float given[SLOTS];
  int choice[SLOTS][ROWS];
  float share[SLOTS][ROWS];
  int slots, unused;
};
static_assert(sizeof(Shared) == SHARED, "the launch must know the size");

// Where a column of eight lies among them, as the first factor's registers have it: pairs 0, 2, 1, 3 of bf16; of e4m3 the even
// bytes of both words, then the odd ones.
__device__ int place(int column) {
  int c = column % 8;
  int pair = SCALED ? c % 2 * 2 + c / 4 : c / 2 % 2 * 2 + c / 4;
  return column - c + 2 * pair + (SCALED ? c / 2 % 2 : c % 2);
}

// The experts that are chosen; ids are there.
__device__ void list(Shared& s, const int* ids, const float* shares, int tokens) {
  int c = threadIdx.x;
  if (ROWS == 1) {
    if (c < CHOICES) {
      s.expert[c] = ids[c];
      s.choice[c][0] = c;
      if (DOWN) s.share[c][0] = shares[c];
      if (c == 0) s.slots = ids[0] < 0 ? 0 : CHOICES;
    }
    __syncthreads();
    return;
  }
  int own = -1, at = 0;
  if (c < SLOTS) {
    own = c < tokens * CHOICES ? ids[c] : -1;
    s.ids[c] = own;
    if (DOWN && own >= 0) s.given[c] = shares[c];
  }
  __syncthreads();
  bool first = own >= 0;
  if (c < SLOTS) {
    for (int other = 0; other < SLOTS; ++other) first &= other >= c || s.ids[other] != own;
    s.first[c] = first;
  }
  __syncthreads();
  if (c < SLOTS) {
    for (int other = 0; other < SLOTS; ++other) at += other < c ? s.first[other] : 0;
    if (c == SLOTS - 1) s.slots = at + first;
  }
  if (first) {
    s.expert[at] = own;
    for (int row = 0; row < ROWS; ++row) s.choice[at][row] = -1, s.share[at][row] = 0;
    for (int other = c; other < SLOTS; ++other)
      if (s.ids[other] == own) {
        s.choice[at][other / CHOICES] = other;
        if (DOWN) s.share[at][other / CHOICES] = s.given[other];
      }
  }
  __syncthreads();
}

// A warp's way through its items: what it asks for next.
struct Stream {
  const Shared* s;
  const u8* weight;
  const u8* x;
  const float* scale;
  int units, items, unit, item;
  u64 policy, x_policy;

  // Of W, of x, or both.
  __device__ void request(u8* to, u32 full, bool of_w, bool of_x) {
    int lane = threadIdx.x % 32;
    if (unit >= units) return;
    int slot = DOWN ? item / SEGMENTS : unit / UNITS, segment = item % SEGMENTS, rows = DOWN ? unit : unit % UNITS;
    int expert = s->expert[slot];
    if (lane == 0) {
      if (of_w) expect_bytes(full, UNIT * SEGMENT + SCALES);
      if (DOWN && of_x) {
        int there = 0;
        for (int row = 0; row < ROWS; ++row) there += s->choice[slot][row] >= 0;
        expect_bytes(full, there * X_SEGMENT);
      }
    }
    __syncwarp();
    if (of_w && lane < UNIT) {
      long long row = (long long)expert * (N * (DOWN ? 1 : 2)) + weight_row(rows, lane, N);
      copy_bulk(shared_address(to) + row_at(lane, SEGMENT), weight + row * ROW_BYTES + segment * SEGMENT, SEGMENT, full, policy);
    }
    if (DOWN && of_x && lane >= UNIT && lane < UNIT + ROWS) {
      int row = lane - UNIT, choice = s->choice[slot][row];
      if (choice >= 0)
        copy_bulk(shared_address(to) + X_AT + row * X_PITCH, x + (long long)choice * (2 * K) + segment * X_SEGMENT, X_SEGMENT, full,
                  x_policy);
    }
    if (SCALES && of_w && lane == UNIT + ROWS)
      copy_bulk(shared_address(to) + SCALES_AT, reinterpret_cast<const u8*>(scale + (long long)expert * N + rows * UNIT), SCALES,
                full, policy);
    item += WARPS;
    if (item >= items) {
      item = threadIdx.x / 32;
      unit += gridDim.x;
    }
  }
};

// Tokens' rows, in the order of `place`, times WIDE.
__device__ void load_tokens(u8* to, const u16* from, long long stride, int tokens) {
#pragma unroll 2
  for (int i = threadIdx.x; i < tokens * (K / 8); i += THREADS) {
    int row = i / (K / 8), at = i % (K / 8) * 8;
    uint4 v = *reinterpret_cast<const uint4*>(from + row * stride + at);
    uint4 made = make_uint4(v.x, v.z, v.y, v.w);
    if (SCALED) {
      u32 words[] = {v.x, v.y, v.z, v.w};
      for (int j = 0; j < 4; ++j) words[j] = pair(widen(words[j] & 0xffff) * WIDE, __uint_as_float(words[j] & 0xffff0000u) * WIDE);
      made = make_uint4(bytes_of(words[0], words[1], 0x5410), bytes_of(words[2], words[3], 0x5410),
                        bytes_of(words[0], words[1], 0x7632), bytes_of(words[2], words[3], 0x7632));
    }
    *reinterpret_cast<uint4*>(to + row * X_PITCH + at * 2) = made;
  }
}

// Two codes of e4m3 in the upper halves of 16 bits as bf16, of a word shifted so that their signs are top bits, and so that
// their other bits are 10 to 4.
__device__ inline u32 e4m3_wide(u32 signs, u32 others) { return signs & 0x80008000u | others & 0x07f007f0u; }

__device__ inline void add_products(float (&sums)[4][4], uint4 a, u32 w0, u32 w1, u32 w2, u32 w3, int turn) {
  multiply_tile<false>(sums[turn * 2], a.x, a.y, a.z, a.w, w0, w1);
  multiply_tile<false>(sums[turn * 2 + 1], a.x, a.y, a.z, a.w, w2, w3);
}

__device__ inline uint4 read_x(const u8* from, bool wanted) {
  return wanted ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
}

// An item: SEGMENT bytes of each of 8 rows, by a thread's row of W and of x.
__device__ inline void multiply_item(float (&sums)[4][4], const u8* weights, const u8* x, int part, bool chosen) {
#pragma unroll
  for (int step = 0; step < SEGMENT / 64; ++step) {
    uint4 w = *reinterpret_cast<const uint4*>(weights + step * 64 + part * 16);
    if (SCALED) {
      const u8* columns = x + step * 128 + part * 32;
      add_products(sums, read_x(columns, chosen), e4m3_wide(w.x << 8, w.x << 4), e4m3_wide(w.x, w.x >> 4),
                   e4m3_wide(w.y << 8, w.y << 4), e4m3_wide(w.y, w.y >> 4), 0);
      add_products(sums, read_x(columns + 16, chosen), e4m3_wide(w.z << 8, w.z << 4), e4m3_wide(w.z, w.z >> 4),
                   e4m3_wide(w.w << 8, w.w << 4), e4m3_wide(w.w, w.w >> 4), 1);
    } else {
      add_products(sums, read_x(x + step * 64 + part * 16, chosen), w.x, w.y, w.z, w.w, step % 2);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) experts(const u16* x, const int* ids, const float* shares,
                                                                 const u8* weight, const float* scale, u16* y,
                                                                 long long x_stride, int tokens) {
  Shared& s = *reinterpret_cast<Shared*>(launched_memory());
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, part = lane % 4;
  if (lane == 0) {
    for (int i = 0; i < STAGES; ++i) barrier_init(&s.full[warp][i], 1 + DOWN);
    barriers_ready();
  }
  __syncwarp();
  if (!DOWN) wait_for_previous();
  let_next_start();
  list(s, ids, shares, tokens);
  int units = DOWN ? UNITS : s.slots * UNITS, items = DOWN ? s.slots * SEGMENTS : SEGMENTS;
  Stream stream{&s, weight, reinterpret_cast<const u8*>(x), scale, warp < items ? units : 0, items, (int)blockIdx.x, warp,
                read_once_policy(), usual_policy()};
  Stream of_x = stream;
  for (int i = 0; i < STAGES; ++i) stream.request(s.ring[warp][i], shared_address(&s.full[warp][i]), true, false);
  if (DOWN) {
    wait_for_previous();
    for (int i = 0; i < STAGES; ++i) of_x.request(s.ring[warp][i], shared_address(&s.full[warp][i]), false, true);
  } else {
    load_tokens(s.x, x, x_stride, tokens);
    __syncthreads();
  }
  int at = 0, parity = 0, flip = 0;
  for (int unit = blockIdx.x; unit < units; unit += gridDim.x, flip ^= 1) {
    int own = unit / UNITS, rows = DOWN ? unit : unit % UNITS;
    float sums[4][4] = {}, total[2] = {};
    float row_scale = !DOWN && SCALED ? scale[s.expert[own] * (2 * N) + weight_row(rows, lane % UNIT, N)] : 1;
    for (int item = warp; item < items; item += WARPS) {
      int slot = DOWN ? item / SEGMENTS : own;
      u32 full = shared_address(&s.full[warp][at]);
      wait_barrier(full, parity);
      const u8* stage = s.ring[warp][at];
      const u8* columns = DOWN ? stage + X_AT : s.x + item * X_SEGMENT;
      multiply_item(sums, stage + row_at(group, SEGMENT), columns + group % ROWS * X_PITCH, part,
                    group < ROWS && s.choice[slot][group % ROWS] >= 0);
      if (DOWN) {
        float share = s.share[slot][group % ROWS];
        for (int i = 0; i < 2; ++i) {
          float scaled = SCALED ? share * reinterpret_cast<const float*>(stage + SCALES_AT)[2 * part + i] : share;
          total[i] += scaled * ((sums[0][i] + sums[1][2 + i]) + (sums[2][i] + sums[3][2 + i]));
        }
        for (int i = 0; i < 4; ++i)
          for (int j = 0; j < 4; ++j) sums[i][j] = 0;
      }
      __syncwarp();
      stream.request(s.ring[warp][at], full, true, DOWN);
      if (++at == STAGES) at = 0, parity ^= 1;
    }
    if (group < ROWS) {
      for (int i = 0; i < 2; ++i)
        s.sums[flip][warp][group * UNIT + 2 * part + i] =
            DOWN ? total[i] : (sums[0][i] + sums[1][2 + i]) + (sums[2][i] + sums[3][2 + i]);
    }
    __syncthreads();
    if (threadIdx.x < (ROWS * UNIT + 31) / 32 * 32) {
      int row = threadIdx.x / UNIT, local = lane % UNIT, column = rows * OUTPUTS + local;
      float out = 0;
      for (int w = 0; w < WARPS; ++w) out += s.sums[flip][w][row % ROWS * UNIT + local];
      out *= BACK * row_scale;
      if (DOWN) {
        if (row < tokens && row < ROWS) y[(long long)row * N + column] = narrow(out);
      } else {
        out = gated<ACT>(out, __shfl_down_sync(~0u, out, UNIT / 2));
        int choice = s.choice[own][row % ROWS];
        if (row < ROWS && choice >= 0 && local < OUTPUTS) y[(long long)choice * N + place(column)] = narrow(out * WIDE);
      }
    }
  }
}
