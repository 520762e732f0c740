// Sequences walked as a model's are: rotation, what pages then hold, and attention over that.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "program.h"

namespace native {
namespace {

using ts::Kind;
using ts::Op;

double bf16(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

double e4m3(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return (code & 0x7f) == 0x7f ? NAN : code & 0x80 ? -size : size;
}

// Column d of an entry.
double kv_value(ts::KvFormat format, const uint8_t* entry, int d, int dim) {
  if (format == ts::KvFormat::BF16) return bf16(entry + 2 * d);
  if (format == ts::KvFormat::Fp8) return e4m3(entry[d]);
  if (format == ts::KvFormat::Int8) return static_cast<int8_t>(entry[d]) * bf16(entry + dim + d / 32 * 2);
  float value;
  std::memcpy(&value, entry + 4 * d, 4);
  return value;
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
    rope.rope = model_.add_rope({static_cast<int32_t>(frequency.size()), {frequency.begin(), frequency.end()}, 1.0f});
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

  // What the pages hold of keys (0) or values (1): [tokens, key heads, dim].
  Exact<double> held(int part) const {
    Exact<double> out;
    for (size_t s = 0; s < lengths_.size(); ++s) {
      for (int32_t position = 0; position < lengths_[s]; ++position) {
        const int64_t page = tables_[static_cast<size_t>(table_start_[s] + position / cache_.page_size)];
        const uint8_t* entry = kv_.data() + page * cache_.page_bytes + cache_.layer_bytes + part * cache_.value_bytes +
                               position % cache_.page_size * cache_.token_bytes;
        for (int32_t h = 0; h < kv_heads_; ++h, entry += cache_.head_bytes) {
          for (int32_t d = 0; d < dim_; ++d) out.push_back(kv_value(cache_.format, entry, d, dim_));
        }
      }
    }
    return out;
  }

 private:
  void set_pages(const Case& c) {
    cache_.format = static_cast<ts::KvFormat>(c.number("format"));
    cache_.page_size = static_cast<int32_t>(c.number("page_size"));
    cache_.head_bytes = ts::kv_entry_bytes(cache_.format, dim_);
    cache_.token_bytes = kv_heads_ * cache_.head_bytes;
    cache_.value_bytes = cache_.page_size * cache_.token_bytes;
    cache_.layer_bytes = 2 * cache_.value_bytes;
    cache_.page_bytes = 2 * cache_.layer_bytes;  // two layers, of which the second is ours
    cache_.group = {0, 0};
    cache_.index = {0, 1};
    kv_.assign(static_cast<size_t>(c.number("pages") * cache_.page_bytes), 0xff);  // NaN in every format
    cache_.data = kv_.data();
    model_.set_cache(cache_);
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
  ts::Cache cache_;
  Exact<int32_t> lengths_, tables_;
  Exact<int64_t> table_start_;
  Exact<uint8_t> kv_;
  ts::Model model_;
};

// In float64, over what the pages hold: [tokens, heads, dim].
Exact<double> attended(const Case& c, const Walk& walk) {
  const auto q = c.array<double>("q");
  const Exact<double> keys = walk.held(0), values = walk.held(1);
  const int64_t heads = c.number("heads"), kv_heads = c.number("kv_heads"), dim = c.number("head_dim"), window = c.number("window");
  Exact<double> out(q.size()), weights;
  int64_t start = 0;
  for (const int32_t length : c.array<int32_t>("lengths")) {
    for (int64_t i = 0; i < length * heads; ++i) {
      const int64_t position = i / heads, kv_head = i % heads / (heads / kv_heads), at = (start * heads + i) * dim;
      const int64_t first = window ? std::max<int64_t>(0, position - window + 1) : 0;
      const auto place = [&](int64_t key) { return static_cast<size_t>(((start + key) * kv_heads + kv_head) * dim); };
      weights.clear();
      for (int64_t key = first; key <= position; ++key) {
        weights.push_back(c.real("scale") * std::inner_product(&q[static_cast<size_t>(at)], &q[static_cast<size_t>(at)] + dim, &keys[place(key)], 0.0));
      }
      const double top = *std::max_element(weights.begin(), weights.end());
      double total = 0;
      for (double& weight : weights) total += weight = std::exp(weight - top);
      for (int64_t key = first; key <= position; ++key) {
        for (int64_t d = 0; d < dim; ++d) {
          out[static_cast<size_t>(at + d)] += weights[static_cast<size_t>(key - first)] / total * values[place(key) + static_cast<size_t>(d)];
        }
      }
    }
    start += length;
  }
  return out;
}

Exact<float> floats(const Exact<double>& values) { return {values.begin(), values.end()}; }

}  // namespace

void walk_case(const Case& c, const ts::Kernels& kernels, Report& report) {
  std::vector<size_t> all(c.array<int32_t>("lengths").size());
  std::iota(all.begin(), all.end(), size_t{0});
  Walk first(c, kernels, 1);
  Exact<float> whole(c.array<double>("q").size(), NAN);
  first.feed(all, 1 << 20, whole);
  report.close(floats(first.held(0)), c.array<double>("keys"), c.array<double>("keys_allowed"), "keys held");
  report.close(floats(first.held(1)), c.array<double>("values"), c.array<double>("values_allowed"), "values held");
  report.close(whole, attended(c, first), Exact<double>(whole.size(), c.real("allowed")), "attended");
  for (const auto& [threads, chunk] : {std::pair{2, 1 << 20}, std::pair{3, 1}, std::pair{2, 7}}) {
    Exact<float> other(whole.size(), NAN);
    Walk(c, kernels, threads).feed(all, chunk, other);
    report.same_bits(other, whole, std::to_string(threads) + " threads, " + std::to_string(chunk) + " tokens a step differ");
  }
  Exact<float> alone(whole.size(), NAN);
  Walk walk(c, kernels, 2);
  for (const size_t s : all) walk.feed({s}, 1 << 20, alone);
  report.same_bits(alone, whole, "sequences alone differ");
}

}  // namespace native
