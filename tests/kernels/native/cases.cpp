#include "cases.h"

#include <cmath>
#include <cstdio>
#include <fstream>

namespace native {
namespace {

template <class T>
T read(std::istream& in) {
  T value{};
  in.read(reinterpret_cast<char*>(&value), sizeof value);
  return value;
}

template <class Text>
Text read_text(std::istream& in, int64_t size) {
  Text text(static_cast<size_t>(size), 0);
  in.read(reinterpret_cast<char*>(text.data()), size);
  return text;
}

}  // namespace

// [i64 cases] then for each [i64 length][name][i64 items] and for each item [i64 length][key][i64 size][bytes].
std::vector<Case> read_cases(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::vector<Case> cases(static_cast<size_t>(read<int64_t>(in)));
  for (auto& c : cases) {
    c.name = read_text<std::string>(in, read<int64_t>(in));
    const auto items = read<int64_t>(in);
    for (int64_t i = 0; i < items; ++i) {
      const auto key = read_text<std::string>(in, read<int64_t>(in));
      c.items[key] = read_text<std::vector<uint8_t>>(in, read<int64_t>(in));
    }
  }
  if (!in) throw std::runtime_error(path + " is not a whole file of cases");
  return cases;
}

const std::vector<uint8_t>& Case::bytes(const std::string& key) const {
  const auto found = items.find(key);
  if (found == items.end()) throw std::runtime_error(name + ": has no " + key);
  return found->second;
}

double Case::real(const std::string& key) const {
  const auto values = array<double>(key);
  if (values.size() != 1) throw std::runtime_error(name + ": " + key + " is not one number");
  return values[0];
}

void Report::check(bool good, const std::string& what) {
  ++checks;
  if (good) return;
  if (++failures <= 40) std::printf("FAIL %s: %s\n", current_ ? current_->name.c_str() : "pool", what.c_str());
}

void Report::close(const Exact<float>& got, const Exact<double>& expected, const Exact<double>& allowed, const std::string& what) {
  if (got.size() != expected.size() || got.size() != allowed.size()) return check(false, what + ": sizes differ");
  double worst_share = 0;
  size_t at = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::abs(got[i] - expected[i]);
    if (std::isnan(expected[i]) && std::isnan(got[i])) continue;
    const double share = error <= allowed[i] ? (error > 0 ? error / allowed[i] : 0) : std::isnan(error) ? INFINITY : error / allowed[i];
    if (share > worst_share) {
      worst_share = share;
      at = i;
    }
  }
  double& most = worst[current_->kind()];
  if (worst_share > most) most = worst_share;
  char text[200] = "";
  if (!got.empty()) {
    std::snprintf(text, sizeof text, " element %zu is %.9g, expected %.9g within %.3g", at, static_cast<double>(got[at]), expected[at], allowed[at]);
  }
  check(worst_share <= 1, what + text);
}

void Report::same_bits(const Exact<float>& got, const Exact<float>& expected, const std::string& what) {
  const bool same = got.size() == expected.size() && (got.empty() || std::memcmp(got.data(), expected.data(), 4 * got.size()) == 0);
  check(same, what);
}

}  // namespace native
