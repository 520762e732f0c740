// The experts that are chosen, in blocks: an expert and up to Rows of its choices.

#pragma once

#include "instructions.cuh"

// In shared memory, of up to Chosen choices of so many tokens that each has Choices.
template <int Rows, int Experts, int Chosen, int Choices, int Threads>
struct Blocks {
  static constexpr int PADDED = (Experts + 31) / 32 * 32, SLOTS = (Chosen + 31) / 32 * 32;
  static constexpr int MOST = Chosen < Experts + Chosen / Rows ? Chosen : Experts + Chosen / Rows;
  int count[PADDED];
  int number;
  short owner[SLOTS], rank[SLOTS];
  short expert[MOST], choice[MOST * Rows];

  // In the order of experts, of their choices in order, as every program must find the same; their number.
  __device__ int list(const int* ids, int chosen) {
    if (Chosen == Choices) {  // of one token, whose choices differ: a block each
      for (int i = threadIdx.x; i < MOST * Rows; i += Threads) choice[i] = i % Rows ? -1 : i / Rows;
      int own = threadIdx.x < chosen ? ids[threadIdx.x] : -1;
      if (threadIdx.x < chosen) expert[threadIdx.x] = max(own, 0);
      return __syncthreads_or(own >= 0) ? chosen : 0;
    }
    for (int e = threadIdx.x; e < PADDED; e += Threads) count[e] = 0;
    for (int i = threadIdx.x; i < MOST * Rows; i += Threads) choice[i] = -1;
    for (int c = threadIdx.x; c < SLOTS; c += Threads) owner[c] = c < chosen ? ids[c] : -1;
    __syncthreads();
    if (threadIdx.x < 32) {
      for (int c = threadIdx.x; c < SLOTS; c += 32) {
        int own = owner[c];
        u32 alike = __match_any_sync(~0u, own), before = alike & ((1u << threadIdx.x) - 1);
        if (own >= 0) rank[c] = count[own] + __popc(before);
        __syncwarp();
        if (own >= 0 && before == 0) count[own] += __popc(alike);
        __syncwarp();
      }
      constexpr int EACH = PADDED / 32;
      int first = threadIdx.x * EACH, sum = 0;
      for (int e = first; e < first + EACH; ++e) sum += (count[e] + Rows - 1) / Rows;
      int before = sum;
      for (int o = 1; o < 32; o *= 2) {
        int other = __shfl_up_sync(~0u, before, o);
        if (threadIdx.x >= o) before += other;
      }
      if (threadIdx.x == 31) number = before;
      before -= sum;
      for (int e = first; e < first + EACH; ++e) {
        int blocks = (count[e] + Rows - 1) / Rows;
        for (int i = 0; i < blocks; ++i) expert[before + i] = e;
        count[e] = before;
        before += blocks;
      }
    }
    __syncthreads();
    for (int c = threadIdx.x; c < SLOTS; c += Threads)
      if (owner[c] >= 0) choice[count[owner[c]] * Rows + rank[c]] = c;
    __syncthreads();
    return number;
  }
};
