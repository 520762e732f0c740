#include "draw.h"

#include <algorithm>
#include <functional>

namespace ts {
namespace {

constexpr float kMostNoise = 22.89f, kLeastNoise = -2.83f;  // bounds of the sampler's noise
constexpr int64_t kTile = 64, kChunk = 4096;

// Masses. The sampler's are floor(2^42 exp(scaled - best)), of an exp within 4e-7; ours are sums of 64 terms at a time in
// float32, of an exp within 5e-7: together within 2e-6 of either, but for what the floor takes.
constexpr double kMassDoubt = 2e-6, kMassUnit = 0x1p-42;
constexpr float kMassless = -29.2f;  // exp of it is less than a unit

// A whole row in tiles. Work is cut into chunks of tiles, whose results are taken in order: nothing depends on threads.
class Row {
 public:
  Row(const Kernels& kernels, Pool& pool, const float* logits, int64_t width, const Ask& ask)
      : kernels_(kernels), pool_(pool), logits_(logits), width_(width), ask_(ask), maxima_(static_cast<size_t>((width + kTile - 1) / kTile)) {
    each_chunk([&](int64_t at, int64_t end) { kernels_.tile_maxima(logits_ + at, end - at, &maxima_[static_cast<size_t>(at / kTile)]); });
  }
  int64_t size() const { return width_; }
  float best() const { return *std::max_element(maxima_.begin(), maxima_.end()); }
  bool finite() const {
    return std::none_of(maxima_.begin(), maxima_.end(), [](float value) { return std::isnan(value); });
  }
  float kth(int64_t k) const;
  std::vector<Scored> noisy(float floor) const;
  double mass(float best, float above) const;

 private:
  void each_chunk(const std::function<void(int64_t, int64_t)>& work) const {
    pool_.run((width_ + kChunk - 1) / kChunk, [&](int64_t item) { work(item * kChunk, std::min(width_, (item + 1) * kChunk)); });
  }
  float most(int64_t at) const { return scaled(maxima_[static_cast<size_t>(at / kTile)], ask_); }

  const Kernels& kernels_;
  Pool& pool_;
  const float* logits_;
  int64_t width_;
  const Ask& ask_;
  std::vector<float> maxima_;
};

// The kth largest logit lies in the k tiles of the largest maxima: each tile left out has k logits that are no smaller beside it.
float Row::kth(int64_t k) const {
  if (k >= width_) return kNone;
  Largest tiles(k);
  for (const float value : maxima_) tiles.push(value);
  const float least = tiles.kth();
  Largest tokens(k, std::nextafter(least, kNone));
  for (int64_t at = 0; at < width_; at += kTile) {
    if (maxima_[static_cast<size_t>(at / kTile)] < least) continue;
    for (int64_t i = at; i < std::min(width_, at + kTile); ++i) tokens.push(logits_[i]);
  }
  return tokens.kth();
}

// Tokens from `floor` on, with noise; of those that cannot be drawn only some.
std::vector<Scored> Row::noisy(float floor) const {
  const NoiseKey key{ask_.seed, ask_.sample, ask_.position};
  std::vector<std::vector<Scored>> found(static_cast<size_t>((width_ + kChunk - 1) / kChunk));
  each_chunk([&](int64_t first, int64_t last) {
    auto& mine = found[static_cast<size_t>(first / kChunk)];
    float best = kNone, values[kTile];
    for (int64_t at = first; at < last; at += kTile) {
      if (most(at) < floor) continue;
      const int64_t n = std::min(kTile, last - at);
      kernels_.gumbel(key, at, values);
      if (kernels_.add_scaled(logits_ + at, n, ask_.temperature, values) < best - doubt(best)) continue;
      for (int64_t i = 0; i < n; ++i) {
        if (values[i] < best - doubt(best) || scaled(logits_[at + i], ask_) < floor) continue;
        best = std::max(best, values[i]);
        mine.push_back({at + i, logits_[at + i], values[i]});
      }
    }
  });
  std::vector<Scored> all;
  for (const auto& part : found) all.insert(all.end(), part.begin(), part.end());
  return all;
}

double Row::mass(float best, float above) const {
  std::vector<double> parts(static_cast<size_t>((width_ + kChunk - 1) / kChunk));
  each_chunk([&](int64_t first, int64_t last) {
    double sum = 0;
    for (int64_t at = first; at < last; at += kTile) {
      if (most(at) <= above || most(at) - best < kMassless) continue;
      sum += kernels_.mass(logits_ + at, std::min(kTile, last - at), ask_.temperature, best, above);
    }
    parts[static_cast<size_t>(first / kChunk)] = sum;
  });
  double sum = 0;
  for (const double part : parts) sum += part;
  return sum;
}

// Some tokens.
class List {
 public:
  List(const Kernels& kernels, const std::vector<Scored>& found, const Ask& ask) : kernels_(kernels), found_(found), ask_(ask) {
    for (const auto& each : found_) logits_.push_back(each.logit);
  }
  int64_t size() const { return static_cast<int64_t>(found_.size()); }
  std::vector<Scored> noisy(float floor) const;
  double mass(float best, float above) const {
    double sum = 0;
    for (int64_t at = 0; at < size(); at += kTile) sum += kernels_.mass(logits_.data() + at, std::min(kTile, size() - at), ask_.temperature, best, above);
    return sum;
  }

 private:
  const Kernels& kernels_;
  const std::vector<Scored>& found_;
  const Ask& ask_;
  std::vector<float> logits_;
};

std::vector<Scored> List::noisy(float floor) const {
  std::vector<Scored> kept;
  float noise[kTile];
  int64_t known = -1;
  for (const auto& each : found_) {
    const float value = scaled(each.logit, ask_);
    if (value < floor) continue;
    if (each.token / kTile != known) kernels_.gumbel({ask_.seed, ask_.sample, ask_.position}, each.token / kTile * kTile, noise);
    known = each.token / kTile;
    kept.push_back({each.token, each.logit, value + noise[each.token % kTile]});
  }
  return kept;
}

// Draw from tokens from `floor` on, and look whether top_p leaves what was drawn: whether those with larger logits weigh less
// than they may. If not, nothing from there down is left: draw again. None where the answer is within doubt.
template <class Tokens>
std::vector<Pick> draw_kept(const Tokens& tokens, float best, float floor, const Ask& ask) {
  const double wanted = ask.top_p < 1 ? ask.top_p * tokens.mass(best, std::nextafter(floor, kNone)) : 0;
  const double units = static_cast<double>(tokens.size()) * kMassUnit;
  for (;;) {
    std::vector<Pick> picks = best_of(tokens.noisy(std::fmax(floor, best + kLeastNoise - kMostNoise)), ask);
    float dropped = kNone;
    for (const auto& pick : picks) {
      const float value = scaled(pick.logit, ask);
      if (ask.top_p >= 1 || value == best) continue;
      const double before = tokens.mass(best, value), over = before - wanted;
      if (std::fabs(over) <= kMassDoubt * (before + wanted) + units) return {};
      if (over > 0) dropped = std::fmax(dropped, value);
    }
    if (dropped == kNone) return picks;
    floor = std::nextafter(dropped, -kNone);
  }
}

float best_scaled(const std::vector<Scored>& found, const Ask& ask) {
  float best = kNone;
  for (const auto& each : found) best = std::max(best, scaled(each.logit, ask));
  return best;
}

}  // namespace

float Largest::kth() {
  if (kept_.size() < k_) return kNone;
  prune();
  return least_;
}

void Largest::prune() {
  const auto last = kept_.begin() + static_cast<int64_t>(k_) - 1;
  std::nth_element(kept_.begin(), last, kept_.end(), std::greater<>());
  kept_.resize(k_);
  least_ = kept_.back();
}

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

std::vector<Pick> draw_row(const Kernels& kernels, Pool& pool, const float* logits, int64_t width, const Ask& ask) {
  if (ask.temperature == 0) {
    const int64_t first = kernels.argmax(logits, width);
    if (std::isnan(logits[first])) return {};  // none is a number above -inf
    return {{first, logits[first]}};
  }
  const Row row(kernels, pool, logits, width, ask);
  if (!row.finite()) return {};
  const float best = scaled(row.best(), ask);
  if (!std::isfinite(best)) return {};
  float floor = min_p_floor(best, ask);
  if (ask.top_k > 0) floor = std::fmax(floor, scaled(row.kth(ask.top_k), ask));
  return draw_kept(row, best, floor, ask);
}

std::vector<Pick> draw_listed(const Kernels& kernels, std::vector<Scored> found, const Ask& ask) {
  const float best = best_scaled(found, ask);
  if (!std::isfinite(best)) return {};
  float floor = min_p_floor(best, ask);
  if (ask.top_k > 0) {
    Largest largest(ask.top_k);
    for (const auto& each : found) largest.push(each.logit);
    floor = std::fmax(floor, scaled(largest.kth(), ask));
  }
  std::erase_if(found, [&](const Scored& each) { return scaled(each.logit, ask) < floor; });
  std::sort(found.begin(), found.end(), [](const Scored& a, const Scored& b) { return a.token < b.token; });
  return draw_kept(List(kernels, found, ask), best, floor, ask);
}

bool surely_kept(const Kernels& kernels, std::vector<Scored> found, float value, const Ask& ask) {
  const float best = best_scaled(found, ask), floor = min_p_floor(best, ask);
  if (!std::isfinite(best) || value < floor) return false;
  const auto above = std::count_if(found.begin(), found.end(), [&](const Scored& each) { return scaled(each.logit, ask) > value; });
  if (ask.top_k > 0 && above >= ask.top_k) return false;
  if (ask.top_p >= 1 || above == 0) return true;
  // Whatever else there is, the tokens that top_k leaves weigh no less than as many of these.
  if (ask.top_k > 0 && ask.top_k < static_cast<int64_t>(found.size())) {
    std::nth_element(found.begin(), found.begin() + ask.top_k, found.end(), [](const Scored& a, const Scored& b) { return a.logit > b.logit; });
    found.resize(static_cast<size_t>(ask.top_k));
  }
  const List list(kernels, found, ask);
  const double before = list.mass(best, value), wanted = ask.top_p * list.mass(best, std::nextafter(floor, kNone));
  return before - wanted < -kMassDoubt * (before + wanted) - static_cast<double>(list.size()) * kMassUnit;
}

}  // namespace ts
