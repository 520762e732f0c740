// Tokens drawn by the screened head and by the whole one against all logits, and the noise they are drawn with.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "packed.h"

namespace native {
namespace {

std::vector<ts::Ask> read_asks(const Case& c) {
  const auto temperature = c.array<float>("temperature");
  const auto seed = c.array<uint64_t>("seed");
  const auto sample = c.array<uint32_t>("sample"), position = c.array<uint32_t>("position");
  std::vector<ts::Ask> asks;
  const auto top_k = c.array<int64_t>("top_k");
  const auto top_p = c.array<double>("top_p");
  const auto log_min_p = c.array<float>("log_min_p");
  for (size_t i = 0; i < seed.size(); ++i) {
    asks.push_back({temperature[i], sample[i], position[i], seed[i], top_k[i], top_p[i], log_min_p[i]});
  }
  return asks;
}

// Logits over the temperature, with noise: what the largest is taken of.
Exact<float> noisy(const float* logits, int64_t width, const ts::Ask& ask, const ts::Kernels& kernels) {
  Exact<float> values(logits, logits + width), noise(64, NAN);
  for (int64_t i = 0; ask.temperature != 0 && i < width; ++i) {
    if (i % 64 == 0) kernels.gumbel({ask.seed, ask.sample, ask.position}, i, noise.data());
    values[static_cast<size_t>(i)] = logits[i] / ask.temperature + noise[static_cast<size_t>(i % 64)];
  }
  return values;
}

// Drop the values of tokens that filters leave out, as slowly and plainly as can be. False where float64 and the sampler's own
// masses may disagree about which these are.
bool filter(Exact<float>* values, const float* logits, int64_t width, const ts::Ask& ask) {
  if (!ts::filtered(ask)) return true;
  Exact<float> scaled(logits, logits + width);
  for (float& value : scaled) value /= ask.temperature;
  Exact<float> sorted = scaled;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  float floor = std::max(sorted[0] + ask.log_min_p, std::numeric_limits<float>::lowest());
  if (ask.top_k > 0 && ask.top_k <= width) floor = std::max(floor, sorted[static_cast<size_t>(ask.top_k) - 1]);
  double total = 0, before = 0;
  for (const float value : sorted) total += value >= floor ? std::exp(static_cast<double>(value) - sorted[0]) : 0;
  bool sure = true;
  for (size_t i = 0; ask.top_p < 1 && i < sorted.size() && sorted[i] >= floor; ++i) {
    if (i > 0 && sorted[i] < sorted[i - 1]) {
      sure = sure && std::fabs(before - ask.top_p * total) > 1e-5 * total;
      if (before > ask.top_p * total) floor = std::nextafter(sorted[i], INFINITY);
    }
    before += std::exp(static_cast<double>(sorted[i]) - sorted[0]);
  }
  for (size_t i = 0; i < scaled.size(); ++i) if (!(scaled[i] >= floor)) (*values)[i] = -INFINITY;
  return sure;
}

// The lowest of the largest; with noise all that the sampler's own could still put first. None where none is a number.
std::vector<int64_t> wanted(const Exact<float>& values, bool greedy) {
  float best = -INFINITY;
  for (const float value : values) best = value > best ? value : best;
  const float least = greedy ? best : best - (2e-4f + 3e-7f * std::fabs(best));
  std::vector<int64_t> tokens;
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i] >= least && (tokens.empty() || !greedy)) tokens.push_back(static_cast<int64_t>(i));
  }
  return tokens;
}

std::string listed(const std::vector<int64_t>& tokens) {
  std::string text = std::to_string(tokens.size()) + ":";
  for (size_t i = 0; i < std::min<size_t>(8, tokens.size()); ++i) text += " " + std::to_string(tokens[i]);
  return text;
}

void check_picks(const std::vector<ts::Pick>& picks, const float* logits, int64_t width, const ts::Ask& ask, const ts::Kernels& kernels,
                 Report& report, const std::string& name) {
  std::vector<int64_t> tokens;
  for (const auto& pick : picks) {
    const bool known = pick.token >= 0 && pick.token < width;
    report.check(known && std::memcmp(&pick.logit, &logits[pick.token], 4) == 0, name + "token " + std::to_string(pick.token) + " has another logit");
    tokens.push_back(pick.token);
  }
  const auto finite = std::count_if(logits, logits + width, [&](float logit) { return std::isfinite(logit / ask.temperature); });
  if (ts::filtered(ask) && finite < width) {
    return report.check(finite > 0 || tokens.empty(), name + "drew " + listed(tokens) + " of what is not finite");
  }
  Exact<float> values = noisy(logits, width, ask, kernels);
  if (!filter(&values, logits, width, ask)) return;
  const std::vector<int64_t> expected = wanted(values, ask.temperature == 0);
  // Values beyond all floats may also be left to the sampler.
  if (tokens.empty() && !expected.empty() && std::isinf(values[static_cast<size_t>(expected[0])])) return;
  report.check(tokens == expected, name + "drew " + listed(tokens) + ", not " + listed(expected));
}

}  // namespace

void draw_case(const Case& c, const ts::Kernels& kernels, Report& report) {
  const Problem p = read_problem(c);
  const std::vector<ts::Ask> asks = read_asks(c);
  for (int threads = 1; threads <= 3; ++threads) {
    ts::Model model(threads, kernels.name);
    const int32_t matrix = model.add_matrix(p.cols);
    add_segment(model, matrix, p.format, p.source.data(), p.rows, p.cols, 32);
    Exact<float> logits(static_cast<size_t>(p.count * p.rows), NAN);
    model.multiply(matrix, p.x.data(), p.count, logits.data());
    const auto name = [&](int64_t row, const char* how) { return std::to_string(threads) + " threads, row " + std::to_string(row) + how; };
    for (int turn = 0; turn < 2; ++turn) {  // scratch memory of the last draw must not matter
      const auto picks = model.draw(matrix, p.x.data(), asks.data(), p.count);
      for (int64_t i = 0; i < p.count; ++i) check_picks(picks[static_cast<size_t>(i)], logits.data() + i * p.rows, p.rows, asks[static_cast<size_t>(i)], kernels, report, name(i, ": "));
    }
    for (int64_t i = 0; i < p.count; ++i) {
      const auto& alone = model.draw(matrix, p.x.data() + i * p.cols, &asks[static_cast<size_t>(i)], 1);
      check_picks(alone[0], logits.data() + i * p.rows, p.rows, asks[static_cast<size_t>(i)], kernels, report, name(i, " alone: "));
    }
  }
}

void gumbel_case(const Case& c, const ts::Kernels& kernels, Report& report) {
  const std::vector<ts::Ask> asks = read_asks(c);
  const auto first = c.array<int64_t>("first");
  Exact<float> all;
  for (size_t i = 0; i < asks.size(); ++i) {
    Exact<float> noise(64, NAN);
    kernels.gumbel({asks[i].seed, asks[i].sample, asks[i].position}, first[i], noise.data());
    all.insert(all.end(), noise.begin(), noise.end());
  }
  report.close(all, c.array<double>("expected"), c.array<double>("allowed"), "noise");
}

}  // namespace native
