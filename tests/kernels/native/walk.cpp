// Small programs walked as a model's are: rotation, page writes and attention; and a block of joined, normed projections.
#include <cmath>
#include <numeric>

#include "cases.h"
#include "model.h"

namespace native {
namespace {

using ts::Kind;
using ts::Op;

int32_t add_floats(ts::Model& model, const Exact<float>& values) { return model.add_vector({values.begin(), values.end()}); }

int32_t add_plain(ts::Model& model, const Exact<float>& values, int64_t cols) {
  const int32_t matrix = model.add_matrix(cols);
  model.add_segment(matrix, ts::Format::F32, reinterpret_cast<const uint8_t*>(values.data()), static_cast<int64_t>(values.size()) / cols);
  return matrix;
}

// Select rows of a value and multiply by the identity, so that head() gives them as they are.
void add_head(ts::Model& model, int32_t value, int32_t buffer, int64_t width) {
  const int32_t selected = model.add_value({buffer, 0, width, width});
  Exact<float> identity(static_cast<size_t>(width * width));
  for (int64_t i = 0; i < width; ++i) identity[static_cast<size_t>(i * width + i)] = 1;
  model.add_op({.kind = Kind::Select, .x = value, .out = selected});
  model.add_op({.kind = Kind::Linear, .x = selected, .matrix = add_plain(model, identity, width)});
}

class Walk {
 public:
  Walk(const Case& c, const ts::Kernels& kernels, int threads)
      : heads_(static_cast<int32_t>(c.number("heads"))), kv_heads_(static_cast<int32_t>(c.number("kv_heads"))),
        dim_(static_cast<int32_t>(c.number("head_dim"))), lengths_(c.array<int32_t>("lengths")), tables_(c.array<int32_t>("tables")),
        table_start_(c.array<int64_t>("table_start")), model_(threads, kernels.name) {
    set_pages(c);
    const int64_t q = heads_ * dim_, kv = kv_heads_ * dim_, width = q + 2 * kv;
    const int32_t all = model_.add_value({0, 0, width, width}), turned = model_.add_value({1, 0, q, q}), out = model_.add_value({2, 0, q, q});
    const int32_t parts[3] = {model_.add_value({0, 0, q, width}), model_.add_value({0, q, kv, width}), model_.add_value({0, q + kv, kv, width})};
    model_.add_op({.kind = Kind::Embed, .out = all, .matrix = add_plain(model_, c.array<float>("embeddings"), width)});
    const auto frequency = c.array<float>("frequency");
    Op rope{.kind = Kind::RopeWrite, .x = parts[0], .branch = parts[1], .out = turned};
    rope.v = parts[2];
    rope.rope = model_.add_rope({static_cast<int32_t>(frequency.size()), {frequency.begin(), frequency.end()}});
    rope.eps = rope.branch_eps = static_cast<float>(c.real("eps"));
    if (!c.bytes("q_norm").empty()) {
      rope.norm = add_floats(model_, c.array<float>("q_norm"));
      rope.branch_norm = add_floats(model_, c.array<float>("k_norm"));
    }
    place(rope);
    Op attention{.kind = Kind::Attention, .x = turned, .out = out, .scale = static_cast<float>(c.real("scale"))};
    attention.window = static_cast<int32_t>(c.number("window"));
    place(attention);
    add_head(model_, out, 3, q);
  }

  // Feed the sequences named, up to `chunk` tokens of each at a step; their outputs go to `result` [tokens, heads * dim].
  void feed(const std::vector<size_t>& sequences, int32_t chunk, Exact<float>& result) {
    for (int32_t done = 0;; done += chunk) {
      std::vector<int32_t> tokens, positions, starts{0};
      std::vector<int64_t> table_starts;
      for (const size_t s : sequences) {
        const int32_t first = std::accumulate(lengths_.begin(), lengths_.begin() + static_cast<int64_t>(s), 0);
        if (done >= lengths_[s]) continue;
        for (int32_t p = done; p < std::min(done + chunk, lengths_[s]); ++p) {
          tokens.push_back(first + p);
          positions.push_back(p);
        }
        starts.push_back(static_cast<int32_t>(tokens.size()));
        table_starts.push_back(table_start_[s]);
      }
      if (tokens.empty()) return;
      step(tokens, positions, starts, table_starts, result);
    }
  }

 private:
  void set_pages(const Case& c) {
    const bool wide = c.number("wide") != 0;
    const int64_t head = dim_ * (wide ? 4 : 2), token = kv_heads_ * head, page_size = c.number("page_size"), value = page_size * token;
    kv_.assign(static_cast<size_t>(c.number("pages") * 4 * value), 0xff);  // NaN in either type
    ts::Cache cache;
    cache.data = kv_.data();
    cache.page_bytes = 4 * value;  // two layers, of which the second is ours
    cache.layer_bytes = 2 * value;
    cache.value_bytes = value;
    cache.token_bytes = token;
    cache.page_size = static_cast<int32_t>(page_size);
    cache.head_bytes = static_cast<int32_t>(head);
    cache.wide = wide;
    cache.group = {0, 0};
    cache.index = {0, 1};
    model_.set_cache(cache);
  }

  void place(Op op) {
    op.layer = 1;
    op.heads = heads_;
    op.kv_heads = kv_heads_;
    op.head_dim = dim_;
    model_.add_op(op);
  }

  void step(const std::vector<int32_t>& tokens, const std::vector<int32_t>& positions, const std::vector<int32_t>& starts,
            const std::vector<int64_t>& table_starts, Exact<float>& result) {
    const auto count = static_cast<int64_t>(tokens.size()), width = static_cast<int64_t>(heads_) * dim_;
    model_.body({count, static_cast<int64_t>(table_starts.size()), 1, tokens.data(), positions.data(), starts.data(), tables_.data(), table_starts.data()});
    std::vector<int32_t> rows(tokens.size());
    std::iota(rows.begin(), rows.end(), 0);
    Exact<float> out(static_cast<size_t>(count * width), NAN);
    model_.head(rows.data(), count, out.data());
    for (int64_t i = 0; i < count; ++i) std::copy_n(out.begin() + i * width, width, result.begin() + tokens[static_cast<size_t>(i)] * width);
  }

  int32_t heads_, kv_heads_, dim_;
  Exact<int32_t> lengths_, tables_;
  Exact<int64_t> table_start_;
  Exact<uint8_t> kv_;
  ts::Model model_;
};

void attention_walk(const Case& c, const ts::Kernels& kernels, Report& report) {
  const auto expected = c.array<double>("expected");
  std::vector<size_t> all(c.array<int32_t>("lengths").size());
  std::iota(all.begin(), all.end(), size_t{0});
  Exact<float> whole(expected.size(), NAN);
  Walk(c, kernels, 1).feed(all, 1 << 20, whole);
  report.close(whole, expected, c.array<double>("allowed"), "attended");
  for (const auto& [threads, chunk] : {std::pair{2, 1 << 20}, std::pair{3, 1}, std::pair{2, 7}}) {
    Exact<float> other(expected.size(), NAN);
    Walk(c, kernels, threads).feed(all, chunk, other);
    report.same_bits(other, whole, std::to_string(threads) + " threads, " + std::to_string(chunk) + " tokens a step differ");
  }
  Exact<float> alone(expected.size(), NAN);
  Walk walk(c, kernels, 2);
  for (const size_t s : all) walk.feed({s}, 1 << 20, alone);
  report.same_bits(alone, whole, "sequences alone differ");
}

// x + branch, normed, through gate and up, their product through down, added to the sum, normed.
void add_block(ts::Model& model, const Case& c) {
  const auto format = static_cast<ts::Format>(c.number("format"));
  const int64_t cols = c.number("cols"), ff = c.number("ff");
  const auto vector = [&](const char* name) { return add_floats(model, c.array<float>(name)); };
  const auto matrix = [&](const char* name, int64_t width, int64_t rows) {
    const int32_t handle = model.add_matrix(width);
    model.add_segment(handle, format, c.array<uint8_t>(name).data(), rows);
    return handle;
  };
  const int32_t pair = model.add_value({0, 0, 2 * cols, 2 * cols}), x = model.add_value({0, 0, cols, 2 * cols}), branch = model.add_value({0, cols, cols, 2 * cols});
  const int32_t sum = model.add_value({1, 0, cols, cols}), hidden = model.add_value({2, 0, ff, ff}), down = model.add_value({3, 0, cols, cols});
  const int32_t gated = model.add_value({4, 0, cols, cols}), joined = model.add_value({5, 0, cols, cols}), normed = model.add_value({6, 0, cols, cols});
  const auto eps = static_cast<float>(c.real("eps"));
  const auto act = static_cast<int32_t>(c.number("act"));
  model.add_op({.kind = Kind::Embed, .out = pair, .matrix = add_plain(model, c.array<float>("embeddings"), 2 * cols), .scale = 0.5f});
  model.add_op({.kind = Kind::Linear, .x = x, .branch = branch, .sum = sum, .out = hidden, .matrix = matrix("gate_up", cols, 2 * ff),
                .norm = vector("norm"), .branch_norm = vector("branch_norm"), .act = act, .eps = eps, .branch_eps = eps});
  model.add_op({.kind = Kind::Linear, .x = hidden, .out = down, .matrix = matrix("down", ff, cols), .bias = vector("bias")});
  model.add_op({.kind = Kind::ActMul, .x = pair, .out = gated, .act = act});
  model.add_op({.kind = Kind::Add, .x = sum, .branch = down, .out = joined});
  model.add_op({.kind = Kind::Add, .x = joined, .branch = gated, .out = joined});
  model.add_op({.kind = Kind::Norm, .x = joined, .out = normed, .norm = vector("out_norm"), .eps = eps});
  add_head(model, normed, 7, cols);
}

Exact<float> block_outputs(const Case& c, const ts::Kernels& kernels, int threads, int64_t chunk) {
  const int64_t cols = c.number("cols"), tokens = c.number("tokens");
  ts::Model model(threads, kernels.name);
  add_block(model, c);
  Exact<float> out(static_cast<size_t>(tokens * cols), NAN);
  for (int64_t done = 0; done < tokens; done += chunk) {
    const int64_t count = std::min(chunk, tokens - done);
    std::vector<int32_t> ids(static_cast<size_t>(count)), rows(ids.size()), starts{0, static_cast<int32_t>(count)};
    std::iota(ids.begin(), ids.end(), static_cast<int32_t>(done));
    std::iota(rows.begin(), rows.end(), 0);
    const int64_t table_start = 0;
    model.body({count, 1, 1, ids.data(), ids.data(), starts.data(), nullptr, &table_start});
    model.head(rows.data(), count, out.data() + done * cols);
  }
  return out;
}

void block(const Case& c, const ts::Kernels& kernels, Report& report) {
  const int64_t tokens = c.number("tokens");
  const Exact<float> whole = block_outputs(c, kernels, 1, tokens);
  report.close(whole, c.array<double>("expected"), c.array<double>("allowed"), "output");
  for (const auto& [threads, chunk] : {std::pair{2, tokens}, std::pair{3, int64_t{1}}, std::pair{3, int64_t{3}}}) {
    report.same_bits(block_outputs(c, kernels, threads, chunk), whole, std::to_string(threads) + " threads, " + std::to_string(chunk) + " tokens a step differ");
  }
}

}  // namespace

void walk_case(const Case& c, const ts::Kernels& kernels, Report& report) {
  if (c.kind() == "walk") attention_walk(c, kernels, report);
  else block(c, kernels, report);
}

}  // namespace native
