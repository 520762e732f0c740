// From logits to the token that a request draws: filters, noise, and what is too close to tell.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace ts {

constexpr float kNone = -std::numeric_limits<float>::infinity();

struct Ask {  // how to draw one token from a row: greedily at temperature 0, else with noise
  float temperature;
  uint32_t sample, position;
  uint64_t seed;
  int64_t top_k = 0;        // 0 is none
  double top_p = 1;         // 1 is none
  float log_min_p = kNone;  // -inf is none
};

struct Pick {
  int64_t token;
  float logit;
};

struct Scored {  // value: scaled, and with noise
  int64_t token;
  float logit, value;
};

// The kernels' noise, and sums with it, are this close to the sampler's own: whatever is nearer is left to it.
inline float doubt(float value) { return 2e-4f + 3e-7f * std::fabs(value); }

inline float scaled(float logit, const Ask& ask) { return ask.temperature == 0 ? logit : logit / ask.temperature; }

inline bool filtered(const Ask& ask) {
  return ask.temperature != 0 && (ask.top_k > 0 || ask.top_p < 1 || ask.log_min_p > kNone);
}

// The k largest of many values.
class Largest {
 public:
  // Values up to `least` do not count.
  explicit Largest(int64_t k, float least = kNone) : k_(static_cast<size_t>(k)), least_(least) {}
  void push(float value) {
    if (!(value > least_)) return;
    kept_.push_back(value);
    if (kept_.size() >= 2 * k_ + 64) prune();
  }
  // The kth largest; -inf where there are fewer.
  float kth();

 private:
  void prune();
  size_t k_;
  float least_;
  std::vector<float> kept_;
};

// Of tokens with their values those that may be drawn: of equal logits the lowest id without noise, all within doubt with it.
std::vector<Pick> best_of(const std::vector<Scored>& found, const Ask& ask);

// The same for a whole row of logits, filters included. None where logits are not finite (without noise, where none is a
// number above -inf), and where only the sampler's own arithmetic can say which tokens top_p leaves.
std::vector<Pick> draw_row(const Kernels& kernels, Pool& pool, const float* logits, int64_t width, const Ask& ask);

// The same for tokens among which are all that top_k and min_p leave, in any order. At least one of both filters is asked
// for; values are not read.
std::vector<Pick> draw_listed(const Kernels& kernels, std::vector<Scored> found, const Ask& ask);

// Whether filters leave a token of this scaled logit for sure, given all tokens from there on and some others.
bool surely_kept(const Kernels& kernels, std::vector<Scored> found, float value, const Ask& ask);

// What min_p leaves of tokens of which the best has this scaled logit; as the sampler computes it.
inline float min_p_floor(float best, const Ask& ask) { return std::fmax(best + ask.log_min_p, std::numeric_limits<float>::lowest()); }

}  // namespace ts
