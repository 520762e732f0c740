// From a step's last hidden rows to tokens: the whole head, or a screen of it that reads half of its bytes.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "model.h"

namespace ts {
namespace {

constexpr int64_t kScreened = 4;       // most rows at once for which reading half of the head pays
constexpr size_t kRescored = 64;       // rows made exact to find the threshold
constexpr float kMostNoise = 22.89f, kLeastNoise = -2.83f;  // bounds of the sampler's noise
constexpr float kNone = -std::numeric_limits<float>::infinity();

// The kernels' noise, and sums with it, are this close to the sampler's own: whatever is nearer is left to it.
inline float doubt(float value) { return 2e-4f + 3e-7f * std::fabs(value); }

inline float scaled(float logit, const Ask& ask) { return ask.temperature == 0 ? logit : logit / ask.temperature; }

// Keep those that may still be the best: of equal logits the lowest id without noise, all within doubt with it.
std::vector<Pick> best_of(const std::vector<Scored>& found, const Ask& ask) {
  float best = kNone;
  for (const auto& each : found) best = std::max(best, each.value);
  std::vector<Pick> picks;
  for (const auto& each : found) {
    if (ask.temperature == 0 ? each.value == best : each.value >= best - doubt(best)) picks.push_back({each.token, each.logit});
  }
  std::sort(picks.begin(), picks.end(), [](const Pick& a, const Pick& b) { return a.token < b.token; });
  if (ask.temperature == 0) picks.resize(std::min<size_t>(1, picks.size()));
  return picks;
}

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
  if (m.segments[0].format == Format::Planes && last.bias < 0 && count <= kScreened) {
    screen(m, asks, count);
  } else {
    near_.resize(static_cast<size_t>(count * m.rows));
    each_tile(m, last, count, near_.data(), m.rows);
    for (int64_t i = 0; i < count; ++i) pick_full(near_.data() + i * m.rows, m.rows, asks[i], &picks_[static_cast<size_t>(i)]);
  }
  return picks_;
}

void Model::pick_full(const float* logits, int64_t width, const Ask& ask, std::vector<Pick>* picks) {
  const int64_t first = kernels_->argmax(logits, width);
  if (std::isnan(logits[first])) return;  // none is a number above -inf
  if (ask.temperature == 0) return picks->push_back({first, logits[first]});
  const NoiseKey key{ask.seed, ask.sample, ask.position};
  const float floor = scaled(logits[first], ask) + kLeastNoise - kMostNoise;
  constexpr int64_t chunk = 4096;
  std::vector<std::vector<Scored>> found(static_cast<size_t>((width + chunk - 1) / chunk));
  pool_.run(static_cast<int64_t>(found.size()), [&](int64_t item) {
    auto& mine = found[static_cast<size_t>(item)];
    float best = kNone, noise[64];
    for (int64_t at = item * chunk; at < std::min(width, (item + 1) * chunk); at += 64) {
      const int64_t end = std::min(width, at + 64);
      if (scaled(logits[at + kernels_->argmax(logits + at, end - at)], ask) < floor) continue;
      kernels_->gumbel(key, at, noise);
      for (int64_t i = at; i < end; ++i) {
        const float value = scaled(logits[i], ask) + noise[i - at];
        if (value < best - doubt(best)) continue;
        best = std::max(best, value);
        mine.push_back({i, logits[i], value});
      }
    }
  });
  std::vector<Scored> all;
  for (const auto& part : found) all.insert(all.end(), part.begin(), part.end());
  *picks = best_of(all, ask);
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
  const bool noisy = ask.temperature != 0;
  const float inverse = noisy ? 1.0f / ask.temperature : 1.0f;
  float noise[64], value;
  Scored likely{-1, 0, kNone};
  for (int64_t t = share.first; t < share.last; ++t) {
    const int64_t at = t * kRows;
    if (noisy && (at % 64 == 0 || t == share.first)) kernels_->gumbel({ask.seed, ask.sample, ask.position}, at / 64 * 64, noise);
    const float* near = near_.data() + row * width + at;
    float* upper = upper_.data() + row * width + at;
    kernels_->weigh_look(near, upper, noisy ? noise + at % 64 : nullptr, inverse, &value, &most_[static_cast<size_t>(row * m.tiles + t)]);
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
  if (ask.temperature != 0) kernels_->gumbel({ask.seed, ask.sample, ask.position}, at / 64 * 64, noise);
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

void Model::screen(const Matrix& m, const Ask* asks, int64_t count) {
  const Rows input{count, m.cols, normed_.data(), hi_.data(), lo_.data(), scale_.data(), sums_.data()};
  const auto shares = static_cast<int64_t>(m.shares.size());
  near_.resize(static_cast<size_t>(count * m.tiles * kRows));
  upper_.resize(near_.size());
  most_.resize(static_cast<size_t>(count * m.tiles));
  measure_reach(m, count);
  std::vector<Scored> likely(static_cast<size_t>(shares * count));
  pool_.run(shares, [&](int64_t i) { look(m, input, m.shares[static_cast<size_t>(i)], asks, likely.data() + i * count); });
  for (int64_t row = 0; row < count; ++row) {
    const float threshold = threshold_of(m, input, row, asks[row], likely, shares, count);
    std::vector<std::vector<Scored>> found(static_cast<size_t>(shares));
    pool_.run(shares, [&](int64_t i) {
      const Share& share = m.shares[static_cast<size_t>(i)];
      for (int64_t t = share.first; t < share.last; ++t) {
        if (most_[static_cast<size_t>(row * m.tiles + t)] < threshold) continue;
        rescore(m, input, row, t, threshold, asks[row], &found[static_cast<size_t>(i)]);
      }
    });
    std::vector<Scored> all;
    for (const auto& part : found) all.insert(all.end(), part.begin(), part.end());
    rescored_ += static_cast<int64_t>(all.size());
    picks_[static_cast<size_t>(row)] = best_of(all, asks[row]);
  }
}

// What the best of the likely tokens really reaches, less the doubt about it.
float Model::threshold_of(const Matrix& m, const Rows& input, int64_t row, const Ask& ask, const std::vector<Scored>& likely,
                          int64_t shares, int64_t count) {
  std::vector<Scored> front;
  for (int64_t i = 0; i < shares; ++i) front.push_back(likely[static_cast<size_t>(i * count + row)]);
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

}  // namespace ts
