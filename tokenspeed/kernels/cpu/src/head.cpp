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
constexpr int64_t kFront = 256;        // the same for rows with filters, beside what top_k asks for
constexpr int64_t kListed = 1024;      // a larger top_k is not looked for in a first look

// Tokens that top_k surely leaves; 0 where they are too many to look for.
inline int64_t listed(const Ask& ask) { return ask.top_k <= kListed ? ask.top_k : 0; }

// Whether tokens are compared with their noise from the start: filters come before it.
inline bool noisy(const Ask& ask) { return ask.temperature != 0 && !filtered(ask); }

}  // namespace

const std::vector<std::vector<Pick>>& Model::pick(const int32_t* rows, const Ask* asks, int64_t count) {
  const Op& last = before_head(rows, count);
  timed(last, [&] {
    rows_of(count, [&](int64_t row) { prepare_row(last, matrices_[static_cast<size_t>(last.matrix)], row); });
    pick_prepared(last, asks, count);
  });
  return picks_;
}

std::vector<std::vector<std::vector<Pick>>> Model::decode(Step step, std::vector<Ask> asks, const std::vector<int64_t>& ends, int64_t most) {
  const auto count = static_cast<size_t>(step.tokens);
  fed_.assign(step.token, step.token + count);
  fed_at_.assign(step.position, step.position + count);
  fed_rows_.resize(count);
  std::iota(fed_rows_.begin(), fed_rows_.end(), 0);
  step.token = fed_.data();
  step.position = fed_at_.data();
  std::vector<std::vector<std::vector<Pick>>> passes;
  for (bool more = true; more;) {
    body(step);
    passes.push_back(pick(fed_rows_.data(), asks.data(), step.tokens));
    more = static_cast<int64_t>(passes.size()) < most;
    for (size_t i = 0; i < count && more; ++i) {
      const auto& found = passes.back()[i];
      more = found.size() == 1 && std::find(ends.begin(), ends.end(), found[0].token) == ends.end();
      if (!more) break;
      fed_[i] = static_cast<int32_t>(found[0].token);
      ++fed_at_[i];
      ++asks[i].position;
    }
  }
  return passes;
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
  if (planes && count <= kScreened) left = screen(m, asks, count);
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

// Whether one of the tokens of a tile's part reaches `threshold`.
inline bool part_reaches(const float* upper, int part, float threshold) {
  bool any = false;
  for (int r = part; r < kRows; r += 4) any |= upper[r] >= threshold;
  return any;
}

// What `rescore` will read of a tile: lines strewn over both planes, whose latency is most of its time.
void Model::fetch_tile(const Matrix& m, int64_t tile, const float* upper, float threshold) const {
  const int64_t blocks = m.cols / kBlock;
  const uint8_t* high = m.segments[0].data + tile * high_bytes(m.cols);
  const uint8_t* low = m.segments[0].data + m.tiles * high_bytes(m.cols) + tile * low_bytes(m.cols);
  for (int64_t b = 0; b < blocks; ++b) __builtin_prefetch(high + b * kHighBlock + 256);
  for (int part = 0; part < 4; ++part) {
    if (!part_reaches(upper, part, threshold)) continue;
    for (int64_t b = part * blocks; b < (part + 1) * blocks; ++b) __builtin_prefetch(low + b * 64);
  }
}

// The exact values of those tokens of one tile whose `upper` reaches `threshold`.
void Model::rescore(const Matrix& m, const Rows& input, int64_t row, int64_t tile, const float* upper, float threshold, const Ask& ask,
                    std::vector<Scored>* found) {
  const int64_t width = m.tiles * kRows, at = tile * kRows;
  float exact[kRows], noise[64] = {};
  if (noisy(ask)) kernels_->gumbel({ask.seed, ask.sample, ask.position}, at / 64 * 64, noise);
  const uint8_t* high = m.segments[0].data;
  const uint8_t* low = high + m.tiles * high_bytes(m.cols);
  for (int part = 0; part < 4; ++part) {
    if (!part_reaches(upper, part, threshold)) continue;
    kernels_->refine(high + tile * high_bytes(m.cols), low + tile * low_bytes(m.cols), input, row, part, near_.data() + row * width + at, exact);
    for (int r = part; r < kRows; r += 4) {
      if (upper[r] >= threshold) found->push_back({at + r, exact[r], scaled(exact[r], ask) + noise[at % 64 + r]});
    }
  }
}

// Run work(share, found) for all shares of a matrix; gives what they found, in order.
template <class Work>
std::vector<Scored> Model::found_by_shares(const Matrix& m, Work work) {
  std::vector<std::vector<Scored>> found(m.shares.size());
  pool_.run(static_cast<int64_t>(m.shares.size()), [&](int64_t i) { work(m.shares[static_cast<size_t>(i)], &found[static_cast<size_t>(i)]); });
  std::vector<Scored> all;
  for (const auto& part : found) all.insert(all.end(), part.begin(), part.end());
  rescored_ += static_cast<int64_t>(all.size());
  return all;
}

// All tokens that may reach `threshold`, with their exact values.
std::vector<Scored> Model::reaching(const Matrix& m, const Rows& input, int64_t row, float threshold, const Ask& ask) {
  return found_by_shares(m, [&](const Share& share, std::vector<Scored>* found) {
    const float* most = most_.data() + row * m.tiles;
    const float* upper = upper_.data() + row * m.tiles * kRows;
    int64_t fetched = -1;
    const auto rescore_fetched = [&] {
      if (fetched >= 0) rescore(m, input, row, fetched, upper + fetched * kRows, threshold, ask, found);
    };
    for (int64_t t = share.first; t < share.last; ++t) {
      if (most[t] < threshold) continue;
      fetch_tile(m, t, upper + t * kRows, threshold);
      rescore_fetched();
      fetched = t;
    }
    rescore_fetched();
  });
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
    auto& picks = picks_[static_cast<size_t>(row)];
    if (!filtered(ask)) picks = best_of(reaching(m, input, row, threshold_of(m, input, row, ask, mine), ask), ask);
    else if (!left.empty() || !pick_filtered(m, input, row, ask, &picks)) left.push_back(row);
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
    if (i + 1 < keep && front[i + 1].token >= 0) {
      const int64_t next = front[i + 1].token / kRows, at = row * m.tiles + next;
      fetch_tile(m, next, upper_.data() + at * kRows, most_[static_cast<size_t>(at)]);
    }
    if (front[i].token < 0) continue;
    const int64_t tile = front[i].token / kRows, at = row * m.tiles + tile;
    rescore(m, input, row, tile, upper_.data() + at * kRows, most_[static_cast<size_t>(at)], ask, &exact);
  }
  float best = kNone;
  for (const auto& each : exact) best = std::max(best, each.value);
  return ask.temperature == 0 ? best : best - doubt(best);
}

// Whether at most one in `parts` tokens may reach `threshold`.
bool Model::reached_by_few(const Matrix& m, int64_t row, float threshold, int64_t parts) const {
  const float* upper = upper_.data() + row * m.tiles * kRows;
  int64_t reaching = 0;
  for (int64_t i = 0; i < m.rows; ++i) reaching += upper[i] >= threshold;
  return parts * reaching <= m.rows;
}

// Draw under filters. Where few tokens may pass top_k and min_p, from all of these; else look which token the noise puts
// first, and where it seems to pass all filters make those exact that may have larger logits, to be sure. False where more
// exact products would be needed than pay.
bool Model::pick_filtered(const Matrix& m, const Rows& input, int64_t row, const Ask& ask, std::vector<Pick>* picks) {
  const Front front = front_of(m, input, row, ask);
  if (!reached_by_few(m, row, front.floor, 100)) {
    *picks = best_of(noisy_from(m, input, row, front, ask), ask);
    float least = -kNone;
    for (const auto& pick : *picks) least = std::min(least, scaled(pick.logit, ask));
    const bool likely = !picks->empty() && surely_kept(*kernels_, front.found, least, ask) && reached_by_few(m, row, least, 16);
    if (likely && surely_kept(*kernels_, reaching(m, input, row, least, ask), least, ask)) return true;
    if (!reached_by_few(m, row, front.floor, 12)) return false;
  }
  *picks = draw_listed(*kernels_, reaching(m, input, row, front.floor, ask), ask);
  return true;
}

// From the tokens that may reach most: a scaled logit below which none passes top_k and min_p, and what noise makes of them.
Model::Front Model::front_of(const Matrix& m, const Rows& input, int64_t row, const Ask& ask) {
  Largest tiles(kFront + 2 * listed(ask)), kth(std::max<int64_t>(1, listed(ask))), best(1);
  for (int64_t t = 0; t < m.tiles; ++t) tiles.push(most_[static_cast<size_t>(row * m.tiles + t)]);
  Front front{kNone, kNone, reaching(m, input, row, tiles.kth(), ask)};
  for (const auto& each : front.found) {
    kth.push(each.value);
    best.push(each.value);
  }
  front.floor = min_p_floor(best.kth(), ask);
  if (listed(ask) > 0) front.floor = std::max(front.floor, kth.kth());
  float noise[64];
  for (const auto& each : front.found) {
    if (each.value < front.floor) continue;
    kernels_->gumbel({ask.seed, ask.sample, ask.position}, each.token / 64 * 64, noise);
    front.noisy = std::max(front.noisy, each.value + noise[each.token % 64]);
  }
  return front;
}

// Tokens from the front's floor on that noise may put first, with it, and some others.
std::vector<Scored> Model::noisy_from(const Matrix& m, const Rows& input, int64_t row, const Front& front, const Ask& ask) {
  return found_by_shares(m, [&](const Share& share, std::vector<Scored>* found) {
    float best = front.noisy;
    for (int64_t t = share.first; t < share.last;) {
      const int64_t end = std::min(share.last, (t / 4 + 1) * 4);
      const float* most = most_.data() + row * m.tiles;
      if (std::any_of(most + t, most + end, [&](float value) { return value >= front.floor; })) {
        best = rescore_noisy(m, input, row, {share.segment, t, end}, front.floor, best, ask, found);
      }
      t = end;
    }
  });
}

// The same for tiles that have their noise from one call; gives the best value by now.
float Model::rescore_noisy(const Matrix& m, const Rows& input, int64_t row, const Share& tiles, float floor, float best, const Ask& ask,
                           std::vector<Scored>* found) {
  const int64_t first = tiles.first * kRows, group = first / 64 * 64, n = tiles.last * kRows - first;
  const float* bare = upper_.data() + row * m.tiles * kRows + first;
  float noise[64], upper[128] = {};  // room for 64 from any of the first 64
  kernels_->gumbel({ask.seed, ask.sample, ask.position}, group, noise);
  std::copy(noise, noise + 64, upper);
  float* values = upper + (first - group);
  const float rounding = 1e-5f;
  if (kernels_->add_scaled(bare, n, 1.0f, values) + rounding < best - doubt(best)) return best;
  for (int64_t i = 0; i < n; ++i) values[i] = bare[i] < floor ? kNone : values[i] + rounding;
  for (int64_t t = tiles.first; t < tiles.last; ++t) {
    const size_t before = found->size();
    rescore(m, input, row, t, values + (t - tiles.first) * kRows, best - doubt(best), ask, found);
    for (size_t i = before; i < found->size(); ++i) {
      Scored& each = (*found)[i];
      each.value = each.value < floor ? kNone : each.value + noise[each.token - group];
      best = std::max(best, each.value);
    }
  }
  return best;
}

}  // namespace ts
