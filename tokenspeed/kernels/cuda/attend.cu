// Attention of tokens over their pages, each the only one of its sequence, with what comes before: [norms of queries and
// keys,] their rotation, and the write of keys and values.
//
// A cluster of SPLITS programs shares the keys of one token and key head. Each warp takes tiles of 16 keys through a ring of its own,
// which it fills as soon as the program starts, before the kernel in front has ended (programmatic dependent launch): keys
// of earlier tokens, positions and block tables are older than that kernel. Both products are those of tensor
// cores, with a row for each query head. Then the programs of a cluster send each other parts of their sums. Where a sequence is
// long for that, SPLITS is 0: any number of programs without a cluster, of which the last one to end adds what all have left in memory.
//
// Compiled with -D: DIM (64, 128), GROUP query heads of a key head (1 to 8), HALF of the columns that turn, PAGE
// (a multiple of 16), SPLITS, WARPS, STAGES, SHARED bytes, and 0/1: NORMED, SINKS.

#include "row.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int KEYS = 16;
constexpr int ROW_BYTES = 2 * DIM;
constexpr int CHUNKS = ROW_BYTES / 16;
constexpr int STEPS = DIM / 32;
constexpr int COLUMNS = DIM / 8;
constexpr int QUERY_PITCH = DIM + 32;
constexpr bool CLUSTER = SPLITS > 0;
constexpr int SHARERS = CLUSTER ? SPLITS : 1;
constexpr int VALUES = GROUP * DIM / SHARERS;
constexpr float NONE = -1e38f;
static_assert(DIM % 64 == 0 && 32 % CHUNKS == 0 && GROUP <= 8 && PAGE % KEYS == 0 && GROUP * DIM % SHARERS == 0, "unfit sizes");

struct Tile {
  u8 keys[KEYS][ROW_BYTES];
  u8 values[KEYS][ROW_BYTES];
};

struct Shared {
  union {
    Tile ring[WARPS][STAGES];
    float sums[WARPS][GROUP][DIM];
  };
  Tile own;
  u16 queries[8][QUERY_PITCH];
  float cosines[HALF], sines[HALF];
  float norms[2][NORMED ? DIM : 1];
  float tops[WARPS][GROUP], totals[WARPS][GROUP];
  float all_tops[SHARERS][GROUP], all_totals[SHARERS][GROUP], all_sums[SHARERS][VALUES];
  int last;
};
static_assert(sizeof(Shared) == SHARED, "the launch must know the size");

// Where a row's chunk of 16 bytes lies, so that threads which read at once touch different banks: four chunks of a row of
// keys and of the next; one chunk of eight rows of values.
__device__ int key_chunk(int row, int chunk) { return (chunk ^ (row & 1) << 2) * 16; }
__device__ int value_chunk(int row, int chunk) { return (chunk ^ (row & 7)) * 16; }

// One row of bf16, [normed,] turned by the token's position and rounded, by one warp: lane + 32 i is column i of a thread.
struct Turn {
  const float* norm;
  const float* cosines;
  const float* sines;
  float eps;
  float x[DIM / 32], y[DIM / 32];

  __device__ static int column(int i) { return threadIdx.x % 32 + 32 * i; }
  // The column that turns with it.
  __device__ static int partner(int c) { return c < HALF ? c + HALF : c < 2 * HALF ? c - HALF : c; }

  __device__ void load(const u16* from) {
    for (int i = 0; i < DIM / 32; ++i) {
      x[i] = widen(from[column(i)]);
      y[i] = widen(from[partner(column(i))]);
    }
  }

  __device__ void turn(u16 (&out)[DIM / 32]) {
    if (NORMED) {
      float squares = 0;
      for (int i = 0; i < DIM / 32; ++i) squares += x[i] * x[i];
      for (int o = 16; o; o /= 2) squares += __shfl_xor_sync(~0u, squares, o);
      float factor = rsqrtf(squares / DIM + eps);
      for (int i = 0; i < DIM / 32; ++i) {
        x[i] = rounded(x[i] * factor * norm[column(i)]);
        y[i] = rounded(y[i] * factor * norm[partner(column(i))]);
      }
    }
    for (int i = 0; i < DIM / 32; ++i) {
      int c = column(i);
      float turned = x[i];
      if (c < 2 * HALF) turned = x[i] * cosines[c % HALF] + y[i] * (c < HALF ? -sines[c % HALF] : sines[c % HALF]);
      out[i] = narrow(turned);
    }
  }
};

// What a warp has seen. Thread 4 h + t holds head h's highest score, in units of log 2, its share of the sum of weights,
// and columns 8 c + 2 t and the next of the sum of values.
struct Seen {
  float top = NONE, total = 0, sums[COLUMNS][4] = {};

  __device__ void absorb(const Tile& tile, const uint4 (&queries)[STEPS], int first, int begin, int end, float scale) {
    int lane = threadIdx.x % 32, group = lane / 4, part = lane % 4;
    float scores[2][4] = {}, others[2][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
      for (int i = 0; i < 2; ++i) {
        uint4 k = *reinterpret_cast<const uint4*>(tile.keys[8 * i + group] + key_chunk(group, 4 * step + part));
        multiply_columns<false>(scores[i], queries[step].x, queries[step].y, k.x, k.y);
        multiply_columns<false>(others[i], queries[step].z, queries[step].w, k.z, k.w);
      }
    float score[4], highest = top;
    for (int i = 0; i < 4; ++i) {
      int key = first + i / 2 * 8 + 2 * part + i % 2;
      score[i] = key >= begin && key < end ? (scores[i / 2][i % 2] + others[i / 2][i % 2]) * scale : NONE;
      highest = fmaxf(highest, score[i]);
    }
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
    if (__any_sync(~0u, highest > top)) {
      float shrink = exp2_fast(top - highest);
      top = highest;
      total *= shrink;
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c)
        for (int i = 0; i < 2; ++i) sums[c][i] *= shrink;
    }
    for (int i = 0; i < 4; ++i) {
      score[i] = exp2_fast(score[i] - top);
      total += score[i];
    }
    u32 low = pair(score[0], score[1]), high = pair(score[2], score[3]);
    int row = lane % 16;
    const u8* values = tile.values[row];
#pragma unroll
    for (int c = 0; c < COLUMNS; c += 2) {
      u32 v[4];
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                   : "r"(shared_address(values + value_chunk(row, c + lane / 16))) : "memory");
      multiply_columns<false>(sums[c], low, high, v[0], v[1]);
      multiply_columns<false>(sums[c + 1], low, high, v[2], v[3]);
    }
  }

  // Into shared memory.
  __device__ void leave(float (*to)[DIM], float* tops, float* totals) {
    int h = threadIdx.x % 32 / 4, part = threadIdx.x % 4;
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    if (h >= GROUP) return;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
      *reinterpret_cast<float2*>(&to[h][8 * c + 2 * part]) = make_float2(sums[c][0], sums[c][1]);
    if (part == 0) {
      tops[h] = top;
      totals[h] = total;
    }
  }
};

// A warp's way through its tiles: what it asks for next.
struct Stream {
  const u16* head;
  const int* pages;
  long long kv_page, kv_which, kv_entry;
  int tile, last, begin, end, page;

  __device__ void turn_to(int next) {
    tile = next;
    if (tile < last) page = pages[tile * KEYS / PAGE];
  }

  __device__ void request(Tile& to) {
    if (tile < last) {
      int row = threadIdx.x % 32 / CHUNKS, chunk = threadIdx.x % CHUNKS, first = tile * KEYS;
      const u16* from = head + page * kv_page + (first % PAGE + row) * kv_entry + chunk * 8;
      bool whole = first >= begin && first + KEYS <= end;
#pragma unroll
      for (int i = 0; i < KEYS; i += 32 / CHUNKS, row += 32 / CHUNKS, from += 32 / CHUNKS * kv_entry) {
        int bytes = whole || (first + row >= begin && first + row < end) ? 16 : 0;
        copy(to.keys[row] + key_chunk(row, chunk), from, bytes);
        copy(to.values[row] + value_chunk(row, chunk), from + kv_which, bytes);
      }
      turn_to(tile + WARPS);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  // Zeros where `bytes` is 0.
  __device__ static void copy(u8* to, const u16* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
  }
};

// What the warps of a program have seen together: one head's highest score and sum of weights, one column of the sums.
struct Together {
  const Shared& s;

  __device__ float top(int h) const {
    float top = NONE;
    for (int w = 0; w < WARPS; ++w) top = fmaxf(top, s.tops[w][h]);
    return top;
  }
  __device__ float total(int h, float top) const {
    float total = 0;
    for (int w = 0; w < WARPS && top > NONE; ++w) total += s.totals[w][h] * exp2_fast(s.tops[w][h] - top);
    return total;
  }
  __device__ float sum(int i, float top) const {
    float sum = 0;
    for (int w = 0; w < WARPS && top > NONE; ++w) sum += s.sums[w][i / DIM][i % DIM] * exp2_fast(s.tops[w][i / DIM] - top);
    return sum;
  }
};

// How much each of so many parts of a head counts, [parts][GROUP], in place of its highest score: by one warp for some heads.
__device__ void weigh(int parts, float* tops, const float* totals, const float* sinks) {
  int lane = threadIdx.x % 32;
  for (int h = threadIdx.x / 32; h < GROUP; h += WARPS) {
    float sink = SINKS ? sinks[h] * 1.4426950408889634f : NONE, top = sink;
    for (int r = lane; r < parts; r += 32) top = fmaxf(top, tops[r * GROUP + h]);
    for (int o = 16; o; o /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, o));
    float total = 0;
    for (int r = lane; r < parts && top > NONE; r += 32) total += totals[r * GROUP + h] * exp2_fast(tops[r * GROUP + h] - top);
    for (int o = 16; o; o /= 2) total += __shfl_xor_sync(~0u, total, o);
    if (SINKS) total += exp2_fast(sink - top);
    for (int r = lane; r < parts; r += 32) tops[r * GROUP + h] = total > 0 ? exp2_fast(tops[r * GROUP + h] - top) / total : 0.0f;
  }
  __syncthreads();
}

// A program's sums, each to the program of the cluster that adds those of its columns.
__device__ void merge_cluster(Shared& s, u16* out, const float* sinks, bool alive) {
  int rank = blockIdx.x;
  Together own{s};
  cluster_wait();
  for (int i = threadIdx.x; i < GROUP * DIM; i += THREADS)
    store_remote(&s.all_sums[rank][i % VALUES], i / VALUES, own.sum(i, own.top(i / DIM)));
  for (int i = threadIdx.x; i < GROUP * SHARERS; i += THREADS) {
    int h = i % GROUP;
    float top = own.top(h);
    store_remote(&s.all_tops[rank][h], i / GROUP, top);
    store_remote(&s.all_totals[rank][h], i / GROUP, own.total(h, top));
  }
  cluster_arrive();
  cluster_wait();
  for (int i = threadIdx.x; i < VALUES; i += THREADS) {
    int column = rank * VALUES + i, h = column / DIM;
    float top = SINKS ? sinks[h] * 1.4426950408889634f : NONE, total = SINKS ? 1.0f : 0.0f, sum = 0;
    for (int r = 0; r < SHARERS; ++r) top = fmaxf(top, s.all_tops[r][h]);
    if (SINKS) total = exp2_fast(sinks[h] * 1.4426950408889634f - top);
    for (int r = 0; r < SHARERS && top > NONE; ++r) {
      float weight = exp2_fast(s.all_tops[r][h] - top);
      total += s.all_totals[r][h] * weight;
      sum += s.all_sums[r][i] * weight;
    }
    out[column] = narrow(alive && total > 0 ? sum / total : 0.0f);
  }
}

// Of what other programs wrote meanwhile, past a cache that may hold what was there before.
__device__ float4 written(const float* at) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(at));
  return v;
}

// A program's sums to memory; the last one of an item adds them. `parts`: of this item, sums, tops and totals of every program.
__device__ void merge_memory(Shared& s, u16* out, float* parts, int* counter, const float* sinks, bool alive) {
  int rank = blockIdx.x, programs = gridDim.x;
  float *sums = parts, *tops = sums + programs * GROUP * DIM, *totals = tops + programs * GROUP;
  Together own{s};
  for (int i = threadIdx.x; i < GROUP * DIM; i += THREADS) sums[rank * GROUP * DIM + i] = own.sum(i, own.top(i / DIM));
  for (int h = threadIdx.x; h < GROUP; h += THREADS) {
    tops[rank * GROUP + h] = own.top(h);
    totals[rank * GROUP + h] = own.total(h, own.top(h));
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    s.last = atomicAdd(counter, 1) == programs - 1;
    if (s.last) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  if (!s.last) return;
  // Four columns a thread, of some programs at once; where threads are left, two share the programs.
  constexpr int WIDTH = GROUP * DIM / 4, TEAMS = 2 * WIDTH <= THREADS ? 2 : 1, HELD = 16;
  int team = TEAMS > 1 ? threadIdx.x / WIDTH : 0, column = threadIdx.x - team * WIDTH;
  bool mine = team < TEAMS;
  float4 held[HELD];
  auto ask = [&](int from) {
#pragma unroll
    for (int j = 0; j < HELD; ++j)
      if (from + j * TEAMS < programs && mine && column < WIDTH)
        held[j] = written(sums + (from + j * TEAMS) * GROUP * DIM + 4 * column);
  };
  ask(team);
  float* here = reinterpret_cast<float*>(s.ring);
  float4* sent = reinterpret_cast<float4*>(here + 2 * programs * GROUP);
  for (int i = threadIdx.x; i < programs * GROUP / 2; i += THREADS) reinterpret_cast<float4*>(here)[i] = written(tops + 4 * i);
  __syncthreads();
  weigh(programs, here, here + programs * GROUP, sinks);
  for (int done = 0; done < WIDTH; done += THREADS, column += THREADS) {
    if (done) ask(team);
    float4 sum = {};
    for (int from = team; from < programs && mine && column < WIDTH; from += HELD * TEAMS) {
      if (from != team) ask(from);
#pragma unroll
      for (int j = 0; j < HELD; ++j) {
        if (from + j * TEAMS >= programs) continue;
        float weight = here[(from + j * TEAMS) * GROUP + 4 * column / DIM];
        sum.x += held[j].x * weight, sum.y += held[j].y * weight, sum.z += held[j].z * weight, sum.w += held[j].w * weight;
      }
    }
    if (TEAMS > 1) {
      if (team == 1) sent[column] = sum;
      __syncthreads();
      if (team == 0) sum.x += sent[column].x, sum.y += sent[column].y, sum.z += sent[column].z, sum.w += sent[column].w;
    }
    if (team == 0 && column < WIDTH)
      *reinterpret_cast<uint2*>(out + 4 * column) = alive ? make_uint2(pair(sum.x, sum.y), pair(sum.z, sum.w)) : make_uint2(0, 0);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) attend(
    const u16* q, const u16* k, const u16* v, const float* q_norm, const float* k_norm, const float* frequency,
    const int* positions, const int* slots, const int* table, u16* kv, u16* out, const float* sinks, float* parts,
    int* counters, long long q_row, long long k_row, long long v_row, long long table_slot, long long kv_page,
    long long kv_which, long long kv_entry, long long kv_head, int window, float scale, float turn_scale, float q_eps, float k_eps) {
  extern __shared__ __align__(128) u8 memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  let_next_start();
  if (CLUSTER) asm volatile("barrier.cluster.arrive.relaxed.aligned;");
  int rank = blockIdx.x, programs = gridDim.x, head = blockIdx.y, token = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int position = positions[token], slot = slots[token];
  bool alive = slot >= 0;
  int begin = window > 0 ? max(position - window + 1, 0) : 0, tiles = (position + KEYS - 1) / KEYS - begin / KEYS;
  tiles = alive && position > begin ? tiles : 0;
  int first = begin / KEYS + rank * tiles / programs, last = begin / KEYS + (rank + 1) * tiles / programs;
  const int* pages = table + slot * table_slot;
  Stream stream{kv + head * kv_head, pages, kv_page, kv_which, kv_entry, 0, last, begin, position, 0};
  stream.turn_to(first + warp);
  for (int i = 0; i < STAGES; ++i) stream.request(s.ring[warp][i]);
  for (int i = threadIdx.x; i < HALF; i += THREADS) {
    float angle = position * frequency[i];
    s.cosines[i] = turn_scale * cosf(angle);
    s.sines[i] = turn_scale * sinf(angle);
  }
  if (NORMED)
    for (int i = threadIdx.x; i < DIM; i += THREADS) s.norms[0][i] = q_norm[i], s.norms[1][i] = k_norm[i];
  for (int i = threadIdx.x; i < (int)sizeof(Tile) / 4; i += THREADS) reinterpret_cast<u32*>(&s.own)[i] = 0;
  bool writes = rank == programs - 1 && alive;
  u16* entry = alive ? kv + pages[position / PAGE] * kv_page + position % PAGE * kv_entry + head * kv_head : kv;
  __syncthreads();

  wait_for_previous();
  // Query heads' rows, and one of the key: all are asked for before the first is turned.
  constexpr int ROWS = (GROUP + WARPS) / WARPS;
  Turn turns[ROWS];
  u16 value[DIM / 32] = {};
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    int row = warp + i * WARPS;
    bool is_key = row == GROUP;
    turns[i] = {s.norms[is_key], s.cosines, s.sines, is_key ? k_eps : q_eps};
    if (row < GROUP + writes)
      turns[i].load(is_key ? k + token * k_row + head * DIM : q + token * q_row + (head * GROUP + row) * DIM);
    if (is_key && writes)
      for (int c = 0; c < DIM / 32; ++c) value[c] = v[token * v_row + head * DIM + Turn::column(c)];
  }
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    int row = warp + i * WARPS;
    if (row >= GROUP + writes) continue;
    u16 turned[DIM / 32];
    turns[i].turn(turned);
    for (int c = 0; c < DIM / 32; ++c) {
      int column = Turn::column(c);
      if (row < GROUP) {
        s.queries[row][column] = turned[c];
        continue;
      }
      entry[column] = turned[c];
      entry[kv_which + column] = value[c];
      reinterpret_cast<u16*>(s.own.keys[0])[column] = turned[c];
      reinterpret_cast<u16*>(s.own.values[0])[column] = value[c];
    }
  }
  __syncthreads();
  uint4 queries[STEPS];
  for (int step = 0; step < STEPS; ++step)
    queries[step] = lane / 4 < GROUP ? *reinterpret_cast<const uint4*>(&s.queries[lane / 4][32 * step + lane % 4 * 8])
                                     : make_uint4(0, 0, 0, 0);
  Seen seen;
  int at = 0;
  for (int tile = first + warp; tile < last; tile += WARPS) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
    __syncwarp();
    seen.absorb(s.ring[warp][at], queries, tile * KEYS, begin, position, scale);
    __syncwarp();
    stream.request(s.ring[warp][at]);
    if (++at == STAGES) at = 0;
  }
  if (writes && warp == WARPS - 1) seen.absorb(s.own, queries, position, position, position + 1, scale);
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  seen.leave(s.sums[warp], s.tops[warp], s.totals[warp]);
  __syncthreads();

  int item = token * gridDim.y + head;
  u16* to = out + (long long)item * GROUP * DIM;
  const float* logits = sinks + head * GROUP;
  if (CLUSTER) merge_cluster(s, to, logits, alive);
  else merge_memory(s, to, parts + (long long)item * programs * GROUP * (DIM + 2), counters + item, logits, alive);
}
