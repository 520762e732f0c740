// From a step's last hidden rows to tokens: the whole head, or a screen of it that reads half of its bytes.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "model.h"

namespace ts {
namespace {

constexpr int64_t kScreened = 4;       // most rows at once for which reading half of the head pays
constexpr size_t kRescored = 64;       // rows made exact to find the threshold
constexpr int64_t kListed = 1024;      // most tokens for which top_k is looked for in a first look

// Whether a first look shows all tokens that a row may draw: not where top_p needs the mass of all others.
inline bool screenable(const Ask& ask) {
  return !filtered(ask) || (ask.top_k > 0 && ask.top_k <= kListed) || ask.log_min_p > kNone;
}

// Whether tokens are compared with their noise from the start: filters come before it.
inline bool noisy(const Ask& ask) { return ask.temperature != 0 && !filtered(ask); }

}  // namespace

const std::vector<std::vector<Pick>>& Model::pick(const int32_t* rows, const Ask* asks, int64_t count) {
  const Op& last = before_head(rows, count);
  rows_of(count, [&](int64_t row) { prepare_row(last, matrices_[static_cast<size_t>(last.matrix)], row); });
  return pick_prepared(last, asks, count);
}

const std::vector<std::vector<Pick>>& Model::draw(int32_t matrix, const float* x, const Ask* asks, int64_t count) {
  prepare_plain(matrices_.at(static_cast<size_t>(matrix)), x, count);
  Op op{Kind::Linear};
  op.matrix = matrix;
  return pick_prepared(op, asks, count);
}

const std::vector<std::vector<Pick>>& Model::pick_prepared(const Op& last, const Ask* asks, int64_t count) {
  const Matrix& m = matrices_[static_cast<size_t>(last.matrix)];
  picks_.assign(static_cast<size_t>(count), {});
  std::vector<int64_t> left(static_cast<size_t>(count));
  std::iota(left.begin(), left.end(), 0);
  const bool planes = m.segments[0].format == Format::Planes && last.bias < 0;
  if (planes && count <= kScreened && std::all_of(asks, asks + count, screenable)) left = screen(m, asks, count);
  if (left.empty()) return picks_;
  whole_ += count;
  near_.resize(static_cast<size_t>(count * m.rows));
  each_tile(m, last, count, near_.data(), m.rows);
  for (const int64_t row : left) {
    picks_[static_cast<size_t>(row)] = draw_row(*kernels_, pool_, near_.data() + row * m.rows, m.rows, asks[row]);
  }
  return picks_;
}

// How far a unit of low-plane length can move a product: the activations' own length, by block.
void Model::measure_reach(const Matrix& m, int64_t count) {
  const int64_t blocks = m.cols / kBlock;
  reach_.resize(static_cast<size_t>(count * blocks));
  for (int64_t i = 0; i < count * blocks; ++i) {
    double squares = 0;
    for (int64_t k = i * kBlock; k < (i + 1) * kBlock; ++k) {
      const double a = 256.0 * hi_[static_cast<size_t>(k)] + lo_[static_cast<size_t>(k)];
      squares += a * a;
    }
    const double rounding = 1.0 + static_cast<double>(blocks + 8) * 0x1p-23;
    reach_[static_cast<size_t>(i)] = static_cast<float>(std::sqrt(squares) * scale_[static_cast<size_t>(i)] / 6.0 * rounding);
  }
}

// One share of the first look: near_ and upper_ of its tokens, the most any of a tile can reach, and its likely best tile.
void Model::look(const Matrix& m, const Rows& input, const Share& share, const Ask* asks, Scored* likely) {
  const int64_t width = m.tiles * kRows;
  const uint8_t* high = m.segments[0].data;
  for (int64_t t = share.first; t < share.last; ++t) {
    kernels_->screen_tile(high + t * high_bytes(m.cols), input, reach_.data(), near_.data() + t * kRows, upper_.data() + t * kRows, width);
  }
  for (int64_t row = 0; row < input.count; ++row) likely[row] = look_closer(m, share, row, asks[row]);
}

// Scale, add noise, bound; the token that looks best.
Scored Model::look_closer(const Matrix& m, const Share& share, int64_t row, const Ask& ask) {
  const int64_t width = m.tiles * kRows;
  const bool with_noise = noisy(ask);
  const float inverse = ask.temperature != 0 ? 1.0f / ask.temperature : 1.0f;
  float noise[64], value;
  Scored likely{-1, 0, kNone};
  for (int64_t t = share.first; t < share.last; ++t) {
    const int64_t at = t * kRows;
    if (with_noise && (at % 64 == 0 || t == share.first)) kernels_->gumbel({ask.seed, ask.sample, ask.position}, at / 64 * 64, noise);
    const float* near = near_.data() + row * width + at;
    float* upper = upper_.data() + row * width + at;
    kernels_->weigh_look(near, upper, with_noise ? noise + at % 64 : nullptr, inverse, &value, &most_[static_cast<size_t>(row * m.tiles + t)]);
    for (int64_t r = m.rows - at; r < kRows; ++r) upper[r] = std::numeric_limits<float>::quiet_NaN();  // rows that only fill the last tile reach nothing
    if (value > likely.value) likely = {at, 0, value};
  }
  return likely;
}

// The exact values of the tokens of one tile that may reach `threshold`.
void Model::rescore(const Matrix& m, const Rows& input, int64_t row, int64_t tile, float threshold, const Ask& ask, std::vector<Scored>* found) {
  const int64_t width = m.tiles * kRows, at = tile * kRows;
  const float* upper = upper_.data() + row * width + at;
  float exact[kRows], noise[64] = {};
  if (noisy(ask)) kernels_->gumbel({ask.seed, ask.sample, ask.position}, at / 64 * 64, noise);
  const uint8_t* high = m.segments[0].data;
  const uint8_t* low = high + m.tiles * high_bytes(m.cols);
  for (int part = 0; part < 4; ++part) {
    bool wanted = false;
    for (int r = part; r < kRows; r += 4) wanted |= upper[r] >= threshold;
    if (!wanted) continue;
    kernels_->refine(high + tile * high_bytes(m.cols), low + tile * low_bytes(m.cols), input, row, part, near_.data() + row * width + at, exact);
    for (int r = part; r < kRows; r += 4) {
      if (upper[r] >= threshold) found->push_back({at + r, exact[r], scaled(exact[r], ask) + noise[at % 64 + r]});
    }
  }
}

// All tokens that may reach `threshold`, with their exact values.
std::vector<Scored> Model::reaching(const Matrix& m, const Rows& input, int64_t row, float threshold, const Ask& ask) {
  const auto shares = static_cast<int64_t>(m.shares.size());
  std::vector<std::vector<Scored>> found(static_cast<size_t>(shares));
  pool_.run(shares, [&](int64_t i) {
    const Share& share = m.shares[static_cast<size_t>(i)];
    for (int64_t t = share.first; t < share.last; ++t) {
      if (most_[static_cast<size_t>(row * m.tiles + t)] < threshold) continue;
      rescore(m, input, row, t, threshold, ask, &found[static_cast<size_t>(i)]);
    }
  });
  std::vector<Scored> all;
  for (const auto& part : found) all.insert(all.end(), part.begin(), part.end());
  rescored_ += static_cast<int64_t>(all.size());
  return all;
}

// Draws what half of the head's bytes and few exact products can tell; gives the rows that need all logits.
std::vector<int64_t> Model::screen(const Matrix& m, const Ask* asks, int64_t count) {
  const Rows input{count, m.cols, normed_.data(), hi_.data(), lo_.data(), scale_.data(), sums_.data()};
  const auto shares = static_cast<int64_t>(m.shares.size());
  near_.resize(static_cast<size_t>(count * m.tiles * kRows));
  upper_.resize(near_.size());
  most_.resize(static_cast<size_t>(count * m.tiles));
  measure_reach(m, count);
  looked_ += count;
  std::vector<Scored> likely(static_cast<size_t>(shares * count)), mine(static_cast<size_t>(shares));
  pool_.run(shares, [&](int64_t i) { look(m, input, m.shares[static_cast<size_t>(i)], asks, likely.data() + i * count); });
  std::vector<int64_t> left;
  for (int64_t row = 0; row < count; ++row) {
    const Ask& ask = asks[row];
    for (int64_t i = 0; i < shares; ++i) mine[static_cast<size_t>(i)] = likely[static_cast<size_t>(i * count + row)];
    const float threshold = filtered(ask) ? filter_threshold(m, input, row, ask) : threshold_of(m, input, row, ask, mine);
    if (filtered(ask) && !reached_by_few(m, row, threshold)) {
      left.push_back(row);
      continue;
    }
    std::vector<Scored> found = reaching(m, input, row, threshold, ask);
    picks_[static_cast<size_t>(row)] = filtered(ask) ? draw_listed(*kernels_, std::move(found), ask) : best_of(found, ask);
  }
  return left;
}

// What the best of the likely tokens really reaches, less the doubt about it.
float Model::threshold_of(const Matrix& m, const Rows& input, int64_t row, const Ask& ask, const std::vector<Scored>& likely) {
  std::vector<Scored> front = likely;
  const size_t keep = std::min(kRescored, front.size());
  std::nth_element(front.begin(), front.begin() + static_cast<int64_t>(keep) - 1, front.end(),
                   [](const Scored& a, const Scored& b) { return a.value > b.value; });
  std::vector<Scored> exact;
  for (size_t i = 0; i < keep; ++i) {
    if (front[i].token < 0) continue;
    const int64_t tile = front[i].token / kRows;
    rescore(m, input, row, tile, most_[static_cast<size_t>(row * m.tiles + tile)], ask, &exact);
  }
  float best = kNone;
  for (const auto& each : exact) best = std::max(best, each.value);
  return ask.temperature == 0 ? best : best - doubt(best);
}

// A scaled logit below which no token passes top_k and min_p: that of the kth best of tokens that may reach most, and what
// min_p leaves below their best.
float Model::filter_threshold(const Matrix& m, const Rows& input, int64_t row, const Ask& ask) {
  const int64_t k = ask.top_k > 0 && ask.top_k <= kListed ? ask.top_k : 1;
  Largest front(std::max(static_cast<int64_t>(kRescored), 2 * k)), kth(k), best(1);
  for (int64_t t = 0; t < m.tiles; ++t) front.push(most_[static_cast<size_t>(row * m.tiles + t)]);
  for (const auto& each : reaching(m, input, row, front.kth(), ask)) {
    kth.push(each.value);
    best.push(each.value);
  }
  const float floor = min_p_floor(best.kth(), ask);
  return ask.top_k > 0 && ask.top_k <= kListed ? std::max(floor, kth.kth()) : floor;
}

// Whether exact products of the tokens that may reach `threshold` cost less than all do.
bool Model::reached_by_few(const Matrix& m, int64_t row, float threshold) const {
  const float* most = most_.data() + row * m.tiles;
  return 4 * std::count_if(most, most + m.tiles, [&](float value) { return value >= threshold; }) <= m.tiles;
}

}  // namespace ts
