// Attention of prompts over their pages by Hopper's warpgroup products: the same work items as the Triton kernel.
//
// A program takes a tile after another: a work item (tokens of one sequence) and a key head. The tile's 128 rows are the
// item's tokens times the group's query heads, 64 for each of two warpgroups. One more warp has keys and values copied
// into a ring of slots, in the order of their use: page by page through a tensor map, which lays them out as the
// products want them and gives zeros beyond the last page. Each warpgroup asks for the scores of a block of keys, then for
// the weighted values of the block before; while these are made, it turns the scores into weights.
//
// Compiled with -D: DIM (64, 128), GROUP query heads of a key head and GROUP_PAD (a power of two) rows for them, PAGE and BOX
// (tokens of a page, and of one copy), SHARED bytes.

#include "products.cuh"

constexpr int ROWS = 128, KEYS = 128, SLOTS = 6;
constexpr int WARPS = 8, THREADS = 32 * WARPS + 128;
constexpr int REGISTERS = 232, LOADER_REGISTERS = 40;
constexpr int HALVES = DIM / 64, BOXES = KEYS / BOX;
constexpr int KEY_HALF = KEYS * LINE, ROW_HALF = 64 * LINE;
constexpr int CHUNKS = DIM / 8;
constexpr float NONE = -1e38f;
static_assert(DIM % 64 == 0 && KEYS % BOX == 0 && PAGE % BOX == 0 && BOX % 8 == 0 && BOXES * HALVES <= 32 && GROUP_PAD <= ROWS,
              "unfit sizes");

struct Shared {
  u8 ring[SLOTS][HALVES * KEY_HALF];
  u8 rows[2][HALVES * ROW_HALF];  // queries; then results
  u64 full[SLOTS], empty[SLOTS];
  int live;
};
static_assert(sizeof(Shared) == SHARED, "the launch must know the size");

// A place in the ring, which goes on from tile to tile.
struct Place {
  int slot = 0, parity = 0;

  __device__ void next() {
    if (++slot == SLOTS) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// What a program does next: tokens `first` to first + count of the step, at positions from `start` on, of a sequence.
struct Tile {
  int sequence, first, count, start, head;

  __device__ int end() const { return start + count; }
  __device__ int blocks() const { return (end() + KEYS - 1) / KEYS; }
};

struct Work {
  const int4* items;
  int live, heads, round = 0;

  // Later tokens have more keys: the longest tiles come first. They are dealt to and fro, so that who had the longest of
  // one round gets the shortest of the next.
  __device__ bool next(Tile& tile) {
    int at = round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    if (at >= live * heads) return false;
    int4 item = items[live - 1 - at / heads];
    tile = {item.x, item.y, item.z, item.w, at % heads};
    ++round;
    return true;
  }
};

// The warp that asks for keys and values.
struct Loader {
  Shared& s;
  const TensorMap& map;
  const int* table;
  long long table_slot;
  int none;  // a page that does not exist
  Place place;

  // Page of this lane's part of a block.
  __device__ int page_of(const Tile& tile, int block) const {
    int key = block * KEYS + threadIdx.x % 32 % BOXES * BOX;
    return key < tile.end() ? table[tile.sequence * table_slot + key / PAGE] : none;
  }

  __device__ void load(const Tile& tile, int block, int which, int page) {
    int lane = threadIdx.x % 32, box = lane % BOXES, half = lane / BOXES;
    u32 full = shared_address(&s.full[place.slot]);
    wait_barrier(shared_address(&s.empty[place.slot]), place.parity ^ 1);
    if (lane == 0) expect_bytes(full, HALVES * KEY_HALF);
    __syncwarp();
    if (half < HALVES) {
      u32 to = shared_address(s.ring[place.slot]) + half * KEY_HALF + box * BOX * LINE;
      copy_tensor(to, map, half * 64, (block * KEYS + box * BOX) % PAGE, tile.head, which, page, full, usual_policy());
    }
    place.next();
  }

  __device__ void run(Work work) {
    Tile tile;
    while (work.next(tile)) {
      if (tile.sequence < 0 || tile.count <= 0) continue;
      int blocks = tile.blocks(), page = page_of(tile, 0), before = 0;
      for (int block = 0; block < blocks; ++block) {
        int next = block + 1 < blocks ? page_of(tile, block + 1) : none;
        load(tile, block, 0, page);
        if (block) load(tile, block - 1, 1, before);
        before = page;
        page = next;
      }
      load(tile, blocks - 1, 1, before);
    }
  }
};

// Part i of 16 bytes of a warp's 16 rows that this lane moves.
struct Part {
  int row, chunk;

  __device__ explicit Part(int i) {
    int thread;  // volatile: where parts lie is not kept in registers from tile to tile
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    int at = i * 32 + thread % 32;
    row = thread / 32 % 4 * 16 + at / CHUNKS;
    chunk = at % CHUNKS;
  }
  __device__ int shared() const { return chunk / 8 * ROW_HALF + swizzled(row, chunk); }
};

// A warpgroup's 64 rows of a tile. Thread 4 r + t of a warp holds, of rows r and r + 8 of the warp's 16, columns
// 8 c + 2 t and the next.
struct Attention {
  Shared& s;
  float scale;
  int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // so the compiler knows that a warp has one
  Place place;
  float sums[DIM / 2], scores[KEYS / 2], top[2], total[2], shrink[2];
  u32 weights[KEYS / 4];
  uint4 queries[CHUNKS / 2];  // of the next tile

  __device__ void sync() const { asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory"); }
  __device__ u32 wait() const {
    wait_barrier(shared_address(&s.full[place.slot]), place.parity);
    return shared_address(s.ring[place.slot]);
  }
  __device__ void release(const Place& done) const {
    if (threadIdx.x % 32 == 0)
      asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(&s.empty[done.slot])) : "memory");
  }
  __device__ static bool own(const Tile& tile, int row) {
    return row / GROUP_PAD < tile.count && row % GROUP_PAD < GROUP;
  }
  // Where a row lies in a matrix of `stride` elements per token.
  __device__ static long long at(const Tile& tile, int row, long long stride) {
    return (tile.first + row / GROUP_PAD) * stride + (tile.head * GROUP + row % GROUP_PAD) * DIM;
  }

  __device__ void fetch_queries(const Tile& tile, const u16* q, long long q_row) {
#pragma unroll
    for (int i = 0; i < CHUNKS / 2; ++i) {
      Part part(i);
      int row = group * 64 + part.row;
      queries[i] = make_uint4(0, 0, 0, 0);
      if (own(tile, row)) queries[i] = *reinterpret_cast<const uint4*>(q + at(tile, row, q_row) + part.chunk * 8);
    }
  }

  __device__ void put_queries() {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < CHUNKS / 2; ++i) *reinterpret_cast<uint4*>(s.rows[group] + Part(i).shared()) = queries[i];
    products_see();
    sync();
  }

  __device__ void ask_scores(u32 keys) {
    u64 a = matrix(shared_address(s.rows[group]), 16), b = matrix(keys, 16);
    products_fence();
#pragma unroll
    for (int step = 0; step < DIM / 16; ++step)
      multiply(scores, a + (step / 4 * ROW_HALF + step % 4 * 32) / 16, b + (step / 4 * KEY_HALF + step % 4 * 32) / 16,
               step > 0);
    products_commit();
  }

  __device__ void ask_sums(u32 values) {
    u64 b = matrix(values, KEY_HALF);
    products_fence();
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step) multiply(sums, weights + 4 * step, b + step * 16 * LINE / 16);
    products_commit();
  }

  __device__ void mask(const Tile& tile, int block) {
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    int last[2] = {tile.start + row / GROUP_PAD, tile.start + (row + 8) / GROUP_PAD};
    int key = block * KEYS + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i)
      if (key + i / 4 * 8 + i % 2 > last[i / 2 % 2]) scores[i] = NONE;
  }

  // Scores to weights, and how much what was summed before counts now. Several chains, as each step waits for the last.
  __device__ void weigh(const Tile& tile, int block) {
    if ((block + 1) * KEYS > tile.start + 1) mask(tile, block);
    float highest[4], sum[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) highest[i] = top[i / 2];
#pragma unroll
    for (int i = 0; i < KEYS / 2; i += 2) {
      float& each = highest[i / 2 % 2 * 2 + i / 4 % 2];
      each = fmaxf(each, fmaxf(scores[i], scores[i + 1]));
    }
    float base[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = fmaxf(highest[2 * r], highest[2 * r + 1]);
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      shrink[r] = exp2_fast((top[r] - most) * scale);
      top[r] = most;
      base[r] = most * scale;
    }
#pragma unroll
    for (int i = 0; i < KEYS / 2; i += 2) {
      int r = i / 2 % 2;
      scores[i] = exp2_fast(fmaf(scores[i], scale, -base[r]));
      scores[i + 1] = exp2_fast(fmaf(scores[i + 1], scale, -base[r]));
      sum[r * 2 + i / 4 % 2] += scores[i] + scores[i + 1];
    }
    for (int r = 0; r < 2; ++r) total[r] = total[r] * shrink[r] + (sum[2 * r] + sum[2 * r + 1]);
  }

  __device__ void round_weights() {
#pragma unroll
    for (int i = 0; i < KEYS / 4; ++i) weights[i] = pair(scores[2 * i], scores[2 * i + 1]);
  }

  // Values of tokens that do not exist, in the last page of a sequence, may be anything: not a number times zero, say.
  __device__ void clear_values(const Tile& tile, u8* values) {
    int end = tile.end() - (tile.blocks() - 1) * KEYS, whole = min((end + BOX - 1) / BOX * BOX, KEYS);
    for (int i = threadIdx.x % 128; i < (whole - end) * CHUNKS; i += 128) {
      int row = end + i / CHUNKS, chunk = i % CHUNKS;
      *reinterpret_cast<uint4*>(values + chunk / 8 * KEY_HALF + row * LINE + chunk % 8 * 16) = make_uint4(0, 0, 0, 0);
    }
    products_see();
    sync();
  }

  // All but the values of the last block.
  __device__ void accumulate(const Tile& tile) {
    int blocks = tile.blocks();
#pragma unroll
    for (int i = 0; i < DIM / 2; ++i) sums[i] = 0;
    top[0] = top[1] = NONE;
    total[0] = total[1] = 0;
    ask_scores(wait());
    products_wait<0>();
    hold(scores);
    release(place);
    place.next();
    weigh(tile, 0);
    round_weights();
    for (int block = 1; block < blocks; ++block) {
      Place keys = place;
      ask_scores(wait());
      place.next();
      ask_sums(wait());
      products_wait<1>();
      hold(scores);
      release(keys);
      weigh(tile, block);
      hold(scores);
      // Never so. It keeps the compiler from making the weights after the wait.
      if (__any_sync(~0u, total[0] + total[1] < 0)) asm volatile("trap;");
      products_wait<0>();
      hold(sums);
      hold(weights);
      release(place);
      place.next();
#pragma unroll
      for (int i = 0; i < DIM / 2; ++i) sums[i] *= shrink[i / 2 % 2];
      round_weights();
    }
  }

  __device__ void finish(const Tile& tile) {
    u32 values = wait();
    clear_values(tile, s.ring[place.slot]);
    ask_sums(values);
    products_wait<0>();
    hold(sums);
    release(place);
    place.next();
  }

  __device__ void store(const Tile& tile, u16* out, long long out_row) {
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    u8* rows = s.rows[group];
    sync();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] += __shfl_xor_sync(~0u, total[r], 1);
      total[r] += __shfl_xor_sync(~0u, total[r], 2);
      float inverse = 1.0f / total[r];
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
        *reinterpret_cast<u32*>(rows + c / 8 * ROW_HALF + swizzled(row + 8 * r, c) + lane % 4 * 4) =
            pair(sums[4 * c + 2 * r] * inverse, sums[4 * c + 2 * r + 1] * inverse);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < CHUNKS / 2; ++i) {
      Part part(i);
      int of_tile = group * 64 + part.row;
      uint4 bits = *reinterpret_cast<const uint4*>(rows + part.shared());
      if (own(tile, of_tile)) *reinterpret_cast<uint4*>(out + at(tile, of_tile, out_row) + part.chunk * 8) = bits;
    }
  }

  // The next tile with keys; rows of those without are made zeros.
  __device__ bool next(Work& work, Tile& tile, u16* out) const {
    long long out_row = (long long)work.heads * GROUP * DIM;
    while (work.next(tile)) {
      if (tile.sequence >= 0 && tile.count > 0) return true;
      for (int i = threadIdx.x; i < ROWS * CHUNKS; i += 32 * WARPS)
        if (own(tile, i / CHUNKS))
          *reinterpret_cast<uint4*>(out + at(tile, i / CHUNKS, out_row) + i % CHUNKS * 8) = make_uint4(0, 0, 0, 0);
    }
    return false;
  }

  __device__ void run(Work work, const u16* q, u16* out, long long q_row) {
    Tile tile, after;
    bool more = next(work, tile, out);
    if (more) fetch_queries(tile, q, q_row);
    while (more) {
      put_queries();
      accumulate(tile);
      more = next(work, after, out);
      if (more) fetch_queries(after, q, q_row);
      finish(tile);
      store(tile, out, (long long)work.heads * GROUP * DIM);
      tile = after;
    }
  }
};

// One more than the last item that has tokens.
__device__ int count_live(Shared& s, const int4* items, int number) {
  int live = 0;
  for (int i = threadIdx.x; i < number; i += THREADS)
    if (items[i].z > 0) live = i + 1;
  if (live) atomicMax(&s.live, live);
  __syncthreads();
  return s.live;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) prefill(
    const __grid_constant__ TensorMap map, const u16* q, const int* table, const int4* items, u16* out, long long q_row,
    long long table_slot, int number, int heads, int pages, float scale) {
  extern __shared__ __align__(1024) u8 memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
    for (int i = 0; i < SLOTS; ++i) {
      barrier_init(&s.full[i], 1);
      barrier_init(&s.empty[i], WARPS);
    }
    s.live = 0;
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  asm volatile("griddepcontrol.wait;" ::: "memory");
  Work work{items, count_live(s, items, number), heads};
  if (threadIdx.x < 32 * WARPS) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
    Attention{s, scale}.run(work, q, out, q_row);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(LOADER_REGISTERS));
    if (threadIdx.x < 32 * WARPS + 32) Loader{s, map, table, table_slot, pages}.run(work);
  }
}
