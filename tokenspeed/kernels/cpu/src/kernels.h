// The kernels each instruction set provides, as a table chosen once at start.
#pragma once
#include <cstdint>
#include <string>

#include "formats.h"

namespace ts {

// Rows of activations, prepared for the formats of a weight. Integer form: x = scale * (256 hi + lo) in each block of 32.
struct Rows {
  int64_t count = 0, cols = 0;
  const float* x = nullptr;          // [count, cols], for plain formats
  const int8_t* hi = nullptr;        // [count, cols]
  const int8_t* lo = nullptr;        // [count, cols]
  const float* scale = nullptr;      // [count, cols / 32]
  const int32_t* sums = nullptr;     // [count, cols / 16], of 256 hi + lo
};

// How pages hold a key or a value of one head. Int8: head_dim codes, then a bfloat16 scale for each 32 of them,
// value = scale * code. Fp8: e4m3; scales are the caller's.
enum class KvFormat : int32_t { F32, BF16, Int8, Fp8 };

constexpr int kv_entry_bytes(KvFormat format, int head_dim) {
  switch (format) {
    case KvFormat::F32: return 4 * head_dim;
    case KvFormat::BF16: return 2 * head_dim;
    case KvFormat::Int8: return head_dim + (head_dim + kBlock - 1) / kBlock * 2;
    default: return head_dim;
  }
}

// Floats that a task needs for the scores of its query rows and for the rows themselves.
constexpr int64_t attention_scratch(int64_t rows, int64_t keys, int64_t head_dim) { return rows * ((keys + 15) / 16 * 16 + head_dim); }

struct AttentionTask {
  const float* q;          // [queries, q_stride]; the group's heads of a token lie side by side
  int64_t q_stride;
  int queries, group;      // tokens, query heads per key head
  int head_dim;
  KvFormat format;
  const uint8_t* kv;       // the layer's part of page 0
  int64_t page_bytes;      // from a page to the next
  int64_t value_bytes;     // from a page's keys to its values
  int64_t token_bytes;     // from a token's entry to the next
  int64_t head_bytes;      // from the page's start to the key head
  const int32_t* table;
  int page_size;
  int64_t first_position;  // of the first query
  int64_t begin, end;      // positions of keys this task covers; begin is a multiple of 16
  int64_t live;            // keys before it are seen by no query and must not be read: their pages may be gone
  int window;              // 0: no window
  float scale;
  float softcap;           // of scores; 0: none
  float* scratch;          // attention_scratch of them
  float* out;              // [queries * group, head_dim]: sum of exp(s - max) v
  float* max;              // [queries * group]
  float* sum;              // [queries * group]
};

struct NoiseKey {  // what decides a row's noise, beside the token
  uint64_t seed;
  uint32_t sample, position;
};

struct Kernels {
  const char* name;
  // out[m * stride + r] for the rows r of one tile, r < valid, m = 0 .. rows.count - 1.
  void (*tile)(Format, const uint8_t* tile, const Rows& rows, float* out, int64_t stride, int valid);
  void (*unpack_row)(Format, const uint8_t* tile, int row, int64_t cols, float* out);
  void (*quantize)(const float* x, int64_t cols, int8_t* hi, int8_t* lo, float* scale, int32_t* sums);
  void (*rms_norm)(const float* x, const float* weight, int64_t cols, float eps, float* out);
  void (*add)(const float* a, const float* b, int64_t n, float* out);
  void (*act_mul)(const float* gate, const float* up, int64_t n, bool silu, float* out);
  // gate sigmoid(alpha gate) (up + 1), the gate cut at `limit` and up at both ends.
  void (*swiglu_clamped)(const float* gate, const float* up, int64_t n, float alpha, float limit, float* out);
  void (*rotate)(float* head, const float* cos, const float* sin, int half);
  void (*store_kv)(KvFormat, const float* x, int head_dim, uint8_t* out);
  void (*attend)(const AttentionTask&);
  // sink: a score that takes part in the softmax without a value; -inf for none.
  void (*combine)(const float* const* out, const float* max, const float* sum, int parts, int64_t stride, int head_dim, float sink,
                  float* result);
  int64_t (*argmax)(const float* x, int64_t n);
  // Weights in planes (formats.h): exact products, one row unpacked, a first look (products by the high plane alone and how
  // far off they can be, given each block's `reach`), and exact products of one of a tile's four parts after that look.
  void (*planes_tile)(const uint8_t* high, const uint8_t* low, const Rows& rows, float* out, int64_t stride, int valid);
  void (*planes_row)(const uint8_t* high, const uint8_t* low, int row, int64_t cols, float* out);
  void (*screen_tile)(const uint8_t* high, const Rows& rows, const float* reach, float* near, float* bound, int64_t stride);
  void (*weigh_look)(const float* near, float* bound, const float* noise, float inverse, float* value, float* most);
  void (*refine)(const uint8_t* high, const uint8_t* low, const Rows& rows, int64_t row, int part, const float* near, float* out);
  // Gumbel noise of 64 tokens from `first`, a multiple of 64, within 1e-5 of the sampler's own.
  void (*gumbel)(const NoiseKey& key, int64_t first, float* out);
  // Tiles of 64 logits (noise.inl): the largest of each; up to 64, scaled, added to values; masses, within 1e-6 of themselves.
  void (*tile_maxima)(const float* x, int64_t n, float* out);
  float (*add_scaled)(const float* x, int64_t n, float temperature, float* values);
  float (*mass)(const float* x, int64_t n, float temperature, float best, float above);
};

const Kernels* generic_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

// The best this processor runs, or the one named; null where it cannot run that.
const Kernels* kernels_for(const std::string& isa);

}  // namespace ts
