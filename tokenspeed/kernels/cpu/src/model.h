// A recorded program with its packed weights, walked in one call.
#pragma once
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "draw.h"
#include "kernels.h"
#include "pool.h"

namespace ts {

// Memory for packed weights, handed out piece by piece from large maps, so that the system can use pages of 2 MiB.
class Store {
 public:
  Store() = default;
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;
  ~Store();
  uint8_t* take(int64_t size);
  int64_t taken() const { return taken_; }

 private:
  std::vector<std::pair<uint8_t*, int64_t>> maps_;
  int64_t used_ = 0, taken_ = 0;  // of the last map, and in all
};

struct Segment {  // rows of one format
  Format format;
  int64_t rows, first_row, tiles;
  uint8_t* data;
};

struct Share {  // tiles of a segment that one thread takes at a time
  int32_t segment;
  int64_t first, last;
};

struct Matrix {
  int64_t rows = 0, cols = 0, tiles = 0;
  bool integer = false, plain = false;  // forms of activations its segments need
  std::vector<Segment> segments;
  std::vector<Share> shares;
};

struct Experts {  // the matrices of each expert: its gate and up rows, and its down rows
  std::vector<int32_t> gate_up, down;
};

// Where a value lies: columns [offset, offset + width) of rows `stride` apart in a buffer.
struct Value {
  int32_t buffer = -1;
  int64_t offset = 0, width = 0, stride = 0;
};

enum class Kind : int32_t { Embed, Linear, Norm, Add, ActMul, RopeWrite, Attention, Select, Route, Experts };
enum class Act : int32_t { Silu, Gelu, SwigluClamped };
enum class Score : int32_t { Softmax, Sigmoid, Logits };

// One record. Unused fields are -1.
struct Op {
  Kind kind;
  // Linear: x [, joined by adding branch, which branch_norm may normalise, to `sum`] [, norm] -> matrix [+ bias] [, act].
  int32_t x = -1, branch = -1, sum = -1, out = -1;
  int32_t matrix = -1, norm = -1, branch_norm = -1, bias = -1;
  int32_t act = -1;  // an Act
  float eps = 0, branch_eps = 0, scale = 1, softcap = 0;
  // RopeWrite: x, branch are q, k; v; out, sum the rotated ones. norm, branch_norm: per head.
  int32_t v = -1, rope = -1, layer = -1;
  int32_t heads = 0, kv_heads = 0, head_dim = 0, window = 0, per_head = 0;
  int32_t sinks = -1;  // of Attention
  float key_inverse = 1, value_inverse = 1;  // of RopeWrite: keys and values are stored times these
  float value_scale = 1;                     // of Attention: stored values are multiplied by it
  // Route: x are scores, norm a bias of choosing; ids (int32 in place of floats) and shares come out. Experts: both go in,
  // bias and down_bias are those of all experts, one after the other.
  int32_t ids = -1, shares = -1, experts = -1, down_bias = -1;
  int32_t score = 0, k = 0, renormalize = 0, groups = 1, kept_groups = 1;
  float alpha = 0, limit = 0;
};

struct Rope {
  int32_t half;
  std::vector<float> frequency;
  float scale = 1;  // of cosines and sines
};

// Rows in the forms that tiles are multiplied with, each row's columns side by side.
struct Prepared {
  int64_t cols = 0;
  bool integer = false, plain = false;
  std::vector<float> x, scale;
  std::vector<int8_t> hi, lo;
  std::vector<int32_t> sums;
  void resize(int64_t rows, int64_t columns, bool with_integer, bool with_plain);
  void set(const Kernels& kernels, int64_t row, const float* from);
  Rows rows(int64_t first, int64_t count) const;
};

// The pairs of a token and an expert that it chose, those of one expert side by side, in the order of their tokens.
struct Pairs {
  std::vector<int64_t> start;   // [experts + 1]
  std::vector<int64_t> token;   // of each pair
  std::vector<int32_t> expert;  // of each pair
  std::vector<int64_t> place;   // [tokens * k], the pair of each choice
  int64_t count(int32_t expert) const { return start[static_cast<size_t>(expert) + 1] - start[static_cast<size_t>(expert)]; }
};

struct Cache {  // the arena: [pages, layers per group, 2, page_size, kv_heads, entry]; the bytes from one to the next
  uint8_t* data = nullptr;
  int64_t page_bytes = 0, layer_bytes = 0, value_bytes = 0, token_bytes = 0, head_bytes = 0;
  int32_t page_size = 0;
  KvFormat format = KvFormat::BF16;
  std::vector<int32_t> group, index;  // of each layer
};

struct Step {  // packed tokens of `sequences` sequences
  int64_t tokens, sequences, groups;
  const int32_t* token;        // [tokens]
  const int32_t* position;     // [tokens]
  const int32_t* start;        // [sequences + 1], offsets into tokens
  const int32_t* table;        // block tables, one after the other
  const int64_t* table_start;  // [sequences * groups], offsets into table
};

class Model {
 public:
  Model(int threads, const std::string& isa);
  const char* isa() const { return kernels_->name; }
  int threads() const { return pool_.threads(); }
  const Kernels& kernels() const { return *kernels_; }
  Pool& pool() { return pool_; }

  int32_t add_matrix(int64_t cols);
  // Room for the next `rows` rows of a matrix; returns the segment's index.
  int32_t reserve_segment(int32_t matrix, Format format, int64_t rows);
  // Fill rows [first, first + rows) of a segment: whole tiles, but for the segment's last rows.
  void pack_rows(int32_t matrix, int32_t segment, int64_t first, const uint8_t* source, int64_t rows);
  // A segment as it lies in memory, and its bytes.
  std::pair<uint8_t*, int64_t> packed(int32_t matrix, int32_t segment) const;
  int32_t add_vector(std::vector<float> values);
  int32_t add_rope(Rope rope);
  int32_t add_value(Value value);
  int32_t add_experts(const std::vector<int32_t>& gate_up, const std::vector<int32_t>& down);
  void add_op(Op op);
  void set_cache(Cache cache) { cache_ = std::move(cache); }
  int64_t packed_bytes() const { return store_.taken(); }

  // Everything before the head, for all tokens of a step.
  void body(const Step& step);
  // The head for some of the step's tokens: logits [rows, vocabulary].
  void head(const int32_t* rows, int64_t count, float* logits);
  // What enters the last projection for some of the step's tokens: out [count, its columns].
  void hidden(const int32_t* rows, int64_t count, float* out);
  // The head and a token for some of the step's tokens: mostly one pick each; several where only the sampler's own noise
  // can tell which is best, none where the sampler has to draw.
  const std::vector<std::vector<Pick>>& pick(const int32_t* rows, const Ask* asks, int64_t count);
  // A step of one token per sequence and a pick for each, then again with what was picked, `most` times in all. Stops after
  // a pass that picks one of `ends`, or several for a row, or none.
  std::vector<std::vector<std::vector<Pick>>> decode(Step step, std::vector<Ask> asks, const std::vector<int64_t>& ends, int64_t most);
  // Add up, from now on, the seconds that each op takes.
  void time_ops() { seconds_.assign(ops_.size(), 0.0); }
  const std::vector<double>& seconds() const { return seconds_; }
  // The same for rows x of a matrix, x [count, cols].
  const std::vector<std::vector<Pick>>& draw(int32_t matrix, const float* x, const Ask* asks, int64_t count);
  // Rows drawn from by a first look and from all logits so far, and the products that first looks made exact.
  int64_t looked() const { return looked_; }
  int64_t whole() const { return whole_; }
  int64_t rescored() const { return rescored_; }
  // rows x of a matrix: out [count, matrix rows], x [count, cols].
  void multiply(int32_t matrix, const float* x, int64_t count, float* out);
  void unpack_row(int32_t matrix, int64_t row, float* out) const;
  // One op on its own, for `tokens` rows of the values that `at` gives.
  void run_alone(const Op& op, int64_t tokens);
  float* at(int32_t value, int64_t row) const;
  const Value& value(int32_t index) const { return values_.at(static_cast<size_t>(index)); }
  void reserve(int64_t tokens);

 private:
  void run(const Op& op, int64_t tokens);
  template <class Work>
  void timed(const Op& op, Work work) {
    if (seconds_.empty()) return work();
    const auto start = std::chrono::steady_clock::now();
    work();
    seconds_[static_cast<size_t>(&op - ops_.data())] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  void look_ahead(size_t op);
  const Op& before_head(const int32_t* rows, int64_t count);
  void prepare_plain(const Matrix& m, const float* x, int64_t count);
  const std::vector<std::vector<Pick>>& pick_prepared(const Op& last, const Ask* asks, int64_t count);
  void measure_reach(const Matrix& m, int64_t count);
  void look(const Matrix& m, const Rows& input, const Share& share, const Ask* asks, Scored* likely);
  Scored look_closer(const Matrix& m, const Share& share, int64_t row, const Ask& ask);
  void fetch_tile(const Matrix& m, int64_t tile, const float* upper, float threshold) const;
  void rescore(const Matrix& m, const Rows& input, int64_t row, int64_t tile, const float* upper, float threshold, const Ask& ask,
               std::vector<Scored>* found);
  template <class Work>
  std::vector<Scored> found_by_shares(const Matrix& m, Work work);
  std::vector<Scored> reaching(const Matrix& m, const Rows& input, int64_t row, float threshold, const Ask& ask);
  std::vector<int64_t> screen(const Matrix& m, const Ask* asks, int64_t count);
  float threshold_of(const Matrix& m, const Rows& input, int64_t row, const Ask& ask, const std::vector<Scored>& likely);
  struct Front {  // of a first look: what was made exact, no more than what filters leave, and the best of that with noise
    float floor, noisy;
    std::vector<Scored> found;
  };
  bool pick_filtered(const Matrix& m, const Rows& input, int64_t row, const Ask& ask, std::vector<Pick>* picks);
  Front front_of(const Matrix& m, const Rows& input, int64_t row, const Ask& ask);
  std::vector<Scored> noisy_from(const Matrix& m, const Rows& input, int64_t row, const Front& front, const Ask& ask);
  float rescore_noisy(const Matrix& m, const Rows& input, int64_t row, const Share& tiles, float floor, float best, const Ask& ask,
                      std::vector<Scored>* found);
  bool reached_by_few(const Matrix& m, int64_t row, float threshold, int64_t parts) const;
  void embed(const Op& op);
  void linear(const Op& op, int64_t rows, float* out, int64_t stride);
  void prepare(const Op& op, const Matrix& m, int64_t rows);
  void prepare_row(const Op& op, const Matrix& m, int64_t row);
  void each_tile(const Matrix& m, const Op& op, int64_t rows, float* out, int64_t stride);
  void pair_tiles(const Matrix& m, const Op& op, const Rows& input, int64_t first, int64_t last, float* out, int64_t stride);
  void rope_write(const Op& op);
  void rope_row(const Op& op, int64_t token, int64_t sequence);
  void attention(const Op& op);
  void make_angles();
  void share_tiles(const Matrix& m, const Share& share, const Rows& input, float* out, int64_t stride, const float* bias) const;
  void route(const Op& op, int64_t tokens);
  void experts(const Op& op, int64_t tokens);
  void pair_up(const Op& op, int64_t tokens, int64_t count);
  void multiply_pairs(const std::vector<int32_t>& matrices, const Prepared& input, bool one_row, float* out);
  void activate(const Op& op, int32_t expert, int64_t ff, float* both) const;
  void combine_pairs(const Op& op, int64_t token);
  void rows_of(int64_t count, const std::function<void(int64_t)>& work);

  const Kernels* kernels_;
  Store store_;
  Pool pool_;  // goes first: idle threads read the store
  std::vector<Matrix> matrices_;
  std::vector<std::vector<float>> vectors_;
  std::vector<Rope> ropes_;
  std::vector<Value> values_;
  std::vector<Experts> experts_;
  std::vector<Op> ops_;
  std::vector<double> seconds_;  // of each op, where they are timed
  size_t head_ = 0;  // index of the select op
  Cache cache_;

  Step step_{};
  int64_t capacity_ = 0;
  std::vector<std::vector<float>> buffers_;
  std::vector<std::vector<float>> cosines_, sines_;  // per rope [tokens, half]
  std::vector<float> normed_, scale_, scratch_;
  Pairs pairs_;
  Prepared chosen_, hidden_;  // rows that enter the experts' projections
  std::vector<float> both_, partial_;
  std::vector<int8_t> hi_, lo_;
  std::vector<int32_t> sums_, owner_;
  std::vector<int32_t> fed_, fed_at_, fed_rows_;  // of a decode: tokens, positions, 0 to count - 1
  std::vector<float> near_, upper_, most_, reach_;  // of the head's first look
  std::vector<std::vector<Pick>> picks_;
  int64_t looked_ = 0, whole_ = 0, rescored_ = 0;
};

}  // namespace ts
