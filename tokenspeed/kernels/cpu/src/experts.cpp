// The ops of a layer with experts: choosing them, and their gated MLPs, each chosen expert's weights read once for a step.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "model.h"

namespace ts {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// The places of the `count` largest of n values, larger first, of equal ones the earlier first.
template <class Use>
void best_of(const float* values, int64_t n, int64_t count, const Use& use) {
  thread_local std::vector<uint8_t> taken;
  taken.assign(static_cast<size_t>(n), 0);
  for (int64_t i = 0; i < count; ++i) {
    int64_t best = -1;
    for (int64_t at = 0; at < n; ++at) {
      if (!taken[static_cast<size_t>(at)] && (best < 0 || values[at] > values[best])) best = at;
    }
    taken[static_cast<size_t>(best)] = 1;
    use(i, best);
  }
}

void softmax(float* x, int64_t n) {
  const float top = *std::max_element(x, x + n);
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] = std::exp(x[i] - top);
  for (int64_t i = 0; i < n; ++i) x[i] /= sum;
}

// Take the experts of all but the best groups out of the choice.
void keep_groups(const Op& op, float* choice, int64_t n) {
  const int64_t width = n / op.groups, summed = op.score == static_cast<int32_t>(Score::Sigmoid) ? std::min<int64_t>(2, width) : 1;
  std::vector<float> scores(static_cast<size_t>(op.groups), 0.0f);
  for (int64_t g = 0; g < op.groups; ++g) {
    best_of(choice + g * width, width, summed, [&](int64_t, int64_t at) { scores[static_cast<size_t>(g)] += choice[g * width + at]; });
  }
  std::vector<uint8_t> kept(static_cast<size_t>(op.groups), 0);
  best_of(scores.data(), op.groups, op.kept_groups, [&](int64_t, int64_t at) { kept[static_cast<size_t>(at)] = 1; });
  for (int64_t g = 0; g < op.groups; ++g) if (!kept[static_cast<size_t>(g)]) std::fill_n(choice + g * width, width, kNone);
}

void choose(const Op& op, const float* logits, const float* bias, int64_t n, float* ids, float* shares) {
  std::vector<float> scores(logits, logits + n);
  if (op.score == static_cast<int32_t>(Score::Softmax)) softmax(scores.data(), n);
  if (op.score == static_cast<int32_t>(Score::Sigmoid)) for (auto& x : scores) x = 1.0f / (1.0f + std::exp(-x));
  std::vector<float> choice = scores;
  if (bias != nullptr) for (int64_t i = 0; i < n; ++i) choice[static_cast<size_t>(i)] += bias[i];
  if (op.groups > 1) keep_groups(op, choice.data(), n);
  best_of(choice.data(), n, op.k, [&](int64_t i, int64_t at) {
    ids[i] = std::bit_cast<float>(static_cast<int32_t>(at));
    shares[i] = scores[static_cast<size_t>(at)];
  });
  if (op.score == static_cast<int32_t>(Score::Logits)) softmax(shares, op.k);
  float sum = 1e-20f;
  for (int32_t i = 0; i < op.k; ++i) sum += shares[i];
  const bool divide = op.renormalize && op.score != static_cast<int32_t>(Score::Logits);
  for (int32_t i = 0; i < op.k; ++i) shares[i] = op.scale * (divide ? shares[i] / sum : shares[i]);
}

}  // namespace

void Prepared::resize(int64_t rows, int64_t columns, bool with_integer, bool with_plain) {
  cols = columns;
  integer = with_integer;
  plain = with_plain;
  const auto grow = [](auto& vector, int64_t size) { if (vector.size() < static_cast<size_t>(size)) vector.resize(static_cast<size_t>(size)); };
  if (plain) grow(x, rows * cols);
  if (!integer) return;
  grow(hi, rows * cols);
  grow(lo, rows * cols);
  grow(scale, rows * (cols / kBlock));
  grow(sums, 2 * rows * (cols / kBlock));
}

void Prepared::set(const Kernels& kernels, int64_t row, const float* from) {
  if (plain) std::memcpy(x.data() + row * cols, from, sizeof(float) * static_cast<size_t>(cols));
  if (!integer) return;
  const int64_t at = row * cols, block = row * (cols / kBlock);
  kernels.quantize(from, cols, hi.data() + at, lo.data() + at, scale.data() + block, sums.data() + 2 * block);
}

Rows Prepared::rows(int64_t first, int64_t count) const {
  const int64_t at = first * cols, block = first * (cols / kBlock);
  return {count, cols, x.data() + at, hi.data() + at, lo.data() + at, scale.data() + block, sums.data() + 2 * block};
}

void Model::route(const Op& op, int64_t tokens) {
  const float* bias = op.norm < 0 ? nullptr : vectors_[static_cast<size_t>(op.norm)].data();
  const int64_t n = values_[static_cast<size_t>(op.x)].width;
  rows_of(tokens, [&](int64_t t) { choose(op, at(op.x, t), bias, n, at(op.ids, t), at(op.shares, t)); });
}

// Sort the choices of all tokens by expert.
void Model::pair_up(const Op& op, int64_t tokens, int64_t count) {
  const int64_t pairs = tokens * op.k;
  std::vector<int32_t> chosen(static_cast<size_t>(pairs));
  pairs_.start.assign(static_cast<size_t>(count) + 1, 0);
  for (int64_t i = 0; i < pairs; ++i) {
    const int32_t id = std::bit_cast<int32_t>(at(op.ids, i / op.k)[i % op.k]);
    chosen[static_cast<size_t>(i)] = id;
    ++pairs_.start[static_cast<size_t>(id) + 1];
  }
  for (int64_t e = 0; e < count; ++e) pairs_.start[static_cast<size_t>(e) + 1] += pairs_.start[static_cast<size_t>(e)];
  std::vector<int64_t> next(pairs_.start.begin(), pairs_.start.end() - 1);
  pairs_.place.resize(static_cast<size_t>(pairs));
  pairs_.token.resize(static_cast<size_t>(pairs));
  pairs_.expert.resize(static_cast<size_t>(pairs));
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t place = next[static_cast<size_t>(chosen[static_cast<size_t>(i)])]++;
    pairs_.place[static_cast<size_t>(i)] = place;
    pairs_.token[static_cast<size_t>(place)] = i / op.k;
    pairs_.expert[static_cast<size_t>(place)] = chosen[static_cast<size_t>(i)];
  }
}

// Each pair's row times its expert's matrix: out [pairs, matrix rows]. one_row: all pairs are of the one row there is.
void Model::multiply_pairs(const std::vector<int32_t>& matrices, const Prepared& input, bool one_row, float* out) {
  struct Item {
    int32_t expert, share;
  };
  std::vector<Item> items;
  for (size_t e = 0; e < matrices.size(); ++e) {
    if (pairs_.count(static_cast<int32_t>(e)) == 0) continue;
    const size_t shares = matrices_[static_cast<size_t>(matrices[e])].shares.size();
    for (size_t i = 0; i < shares; ++i) items.push_back({static_cast<int32_t>(e), static_cast<int32_t>(i)});
  }
  pool_.run(static_cast<int64_t>(items.size()), [&](int64_t i) {
    const Item item = items[static_cast<size_t>(i)];
    const Matrix& m = matrices_[static_cast<size_t>(matrices[static_cast<size_t>(item.expert)])];
    const int64_t first = pairs_.start[static_cast<size_t>(item.expert)];
    const Rows rows = input.rows(one_row ? 0 : first, pairs_.count(item.expert));
    share_tiles(m, m.shares[static_cast<size_t>(item.share)], rows, out + first * m.rows, m.rows, nullptr);
  });
}

// A pair's gate and up rows, with their biases, to what goes down, in place of the gate rows.
void Model::activate(const Op& op, int32_t expert, int64_t ff, float* both) const {
  if (op.bias >= 0) {
    const float* bias = vectors_[static_cast<size_t>(op.bias)].data() + expert * 2 * ff;
    for (int64_t i = 0; i < 2 * ff; ++i) both[i] += bias[i];
  }
  const auto act = static_cast<Act>(op.act);
  if (act == Act::SwigluClamped) kernels_->swiglu_clamped(both, both + ff, ff, op.alpha, op.limit, both);
  else kernels_->act_mul(both, both + ff, ff, act == Act::Silu, both);
}

// A token's choices, weighted, in the order of its choosing.
void Model::combine_pairs(const Op& op, int64_t token) {
  const int64_t cols = values_[static_cast<size_t>(op.out)].width;
  const float* biases = op.down_bias < 0 ? nullptr : vectors_[static_cast<size_t>(op.down_bias)].data();
  float* out = at(op.out, token);
  std::fill_n(out, cols, 0.0f);
  for (int32_t j = 0; j < op.k; ++j) {
    const int64_t pair = pairs_.place[static_cast<size_t>(token * op.k + j)];
    const float share = at(op.shares, token)[j];
    const float* y = partial_.data() + pair * cols;
    if (biases == nullptr) {
      for (int64_t i = 0; i < cols; ++i) out[i] += share * y[i];
    } else {
      const float* bias = biases + pairs_.expert[static_cast<size_t>(pair)] * cols;
      for (int64_t i = 0; i < cols; ++i) out[i] += share * (y[i] + bias[i]);
    }
  }
}

void Model::experts(const Op& op, int64_t tokens) {
  const Experts& of = experts_[static_cast<size_t>(op.experts)];
  const int64_t cols = values_[static_cast<size_t>(op.x)].width, pairs = tokens * op.k;
  const auto needs = [&](const std::vector<int32_t>& matrices, bool Matrix::*form) {
    return std::any_of(matrices.begin(), matrices.end(), [&](int32_t m) { return matrices_[static_cast<size_t>(m)].*form; });
  };
  pair_up(op, tokens, static_cast<int64_t>(of.gate_up.size()));
  const int64_t inputs = tokens == 1 ? 1 : pairs;
  chosen_.resize(inputs, cols, needs(of.gate_up, &Matrix::integer), needs(of.gate_up, &Matrix::plain));
  rows_of(inputs, [&](int64_t i) { chosen_.set(*kernels_, i, at(op.x, pairs_.token[static_cast<size_t>(i)])); });
  const int64_t ff = matrices_[static_cast<size_t>(of.down[0])].cols;
  both_.resize(std::max(both_.size(), static_cast<size_t>(pairs * 2 * ff)));
  multiply_pairs(of.gate_up, chosen_, tokens == 1, both_.data());
  hidden_.resize(pairs, ff, needs(of.down, &Matrix::integer), needs(of.down, &Matrix::plain));
  rows_of(pairs, [&](int64_t i) {
    float* both = both_.data() + i * 2 * ff;
    activate(op, pairs_.expert[static_cast<size_t>(i)], ff, both);
    hidden_.set(*kernels_, i, both);
  });
  partial_.resize(std::max(partial_.size(), static_cast<size_t>(pairs * cols)));
  multiply_pairs(of.down, hidden_, false, partial_.data());
  rows_of(tokens, [&](int64_t t) { combine_pairs(op, t); });
}

}  // namespace ts
