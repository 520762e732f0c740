// What is done to rows between projections.
#include <algorithm>
#include <cmath>

#include "cases.h"

namespace native {
namespace {

bool broken(const Exact<float>& x, size_t block) {
  return std::any_of(x.begin() + static_cast<int64_t>(block * ts::kBlock), x.begin() + static_cast<int64_t>((block + 1) * ts::kBlock),
                     [](float v) { return !std::isfinite(v); });
}

// A block that holds NaN or an infinity has codes of zero and a NaN for its scale. Of others
// hi and lo must give x back within half a step of 1/256 of the scale, and sums must be theirs.
void quantize_case(const Case& c, const ts::Kernels& kernels, Report& report) {
  const auto x = c.array<float>("x");
  const size_t blocks = x.size() / ts::kBlock;
  Exact<int8_t> hi(x.size()), lo(x.size());
  Exact<float> scale(blocks);
  Exact<int32_t> sums(2 * blocks);
  kernels.quantize(x.data(), static_cast<int64_t>(x.size()), hi.data(), lo.data(), scale.data(), sums.data());
  Exact<float> back(x.size());
  Exact<double> given(x.size()), allowed(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t block = i / ts::kBlock;
    const double step = scale[block];
    if (i % ts::kBlock == 0) report.check(std::isnan(step) == broken(x, block), "block " + std::to_string(block) + " has scale " + std::to_string(step));
    back[i] = static_cast<float>((std::isnan(step) ? 1 : step) * (256 * hi[i] + lo[i]));
    given[i] = std::isnan(step) ? 0 : x[i];
    allowed[i] = std::isnan(step) ? 0 : step * 1.03 + 4e-34;  // half a step, and a whole one where lo has met its end at 127
  }
  report.close(back, given, allowed, "quantized");
  for (size_t i = 0; i < 2 * blocks; ++i) {
    int32_t sum = 0;
    for (size_t j = 16 * i; j < 16 * i + 16; ++j) sum += 256 * hi[j] + lo[j];
    report.check(sum == sums[i], "sum " + std::to_string(i) + " is " + std::to_string(sums[i]) + ", its codes give " + std::to_string(sum));
  }
}

// Entries of one key or value each, byte for byte.
void store_case(const Case& c, const ts::Kernels& kernels, Report& report) {
  const auto x = c.array<float>("x");
  const auto expected = c.array<uint8_t>("expected");
  const auto format = static_cast<ts::KvFormat>(c.number("format"));
  const auto dim = static_cast<int>(c.number("head_dim"));
  const auto bytes = static_cast<size_t>(ts::kv_entry_bytes(format, dim));
  const size_t count = x.size() / static_cast<size_t>(dim);
  if (count * bytes != expected.size()) throw std::runtime_error(c.name + ": entries have another size");
  for (size_t i = 0; i < count; ++i) {
    const Exact<float> row(x.begin() + static_cast<int64_t>(i) * dim, x.begin() + static_cast<int64_t>(i + 1) * dim);
    Exact<uint8_t> out(bytes, 0xa5);
    kernels.store_kv(format, row.data(), dim, out.data());
    const auto wrong = std::mismatch(out.begin(), out.end(), expected.begin() + static_cast<int64_t>(i * bytes));
    if (wrong.first == out.end()) { report.check(true, ""); continue; }
    report.check(false, "entry " + std::to_string(i) + ", byte " + std::to_string(wrong.first - out.begin()) + " is " +
                 std::to_string(*wrong.first) + ", not " + std::to_string(*wrong.second));
  }
}

void argmax_case(const Case& c, const ts::Kernels& kernels, Report& report) {
  const auto x = c.array<float>("x");
  const int64_t got = kernels.argmax(x.data(), static_cast<int64_t>(x.size()));
  report.check(got == c.number("expected"), "found " + std::to_string(got));
}

Exact<float> computed(const Case& c, const ts::Kernels& kernels) {
  const auto x = c.array<float>("x");
  const auto n = static_cast<int64_t>(x.size());
  Exact<float> out(x.size(), NAN);
  if (c.kind() == "rms_norm") {
    kernels.rms_norm(x.data(), c.array<float>("weight").data(), n, static_cast<float>(c.real("eps")), out.data());
  } else if (c.kind() == "add") {
    kernels.add(x.data(), c.array<float>("other").data(), n, out.data());
  } else if (c.kind() == "act_mul") {
    kernels.act_mul(x.data(), c.array<float>("up").data(), n, c.number("silu") != 0, out.data());
  } else if (c.kind() == "swiglu_clamped") {
    const auto alpha = static_cast<float>(c.real("alpha")), limit = static_cast<float>(c.real("limit"));
    kernels.swiglu_clamped(x.data(), c.array<float>("up").data(), n, alpha, limit, out.data());
  } else if (c.kind() == "rotate") {
    out = x;
    kernels.rotate(out.data(), c.array<float>("cos").data(), c.array<float>("sin").data(), static_cast<int>(n / 2));
  } else {
    throw std::runtime_error(c.name + ": no such kind of case");
  }
  return out;
}

}  // namespace

void row_case(const Case& c, const ts::Kernels& kernels, Report& report) {
  if (c.kind() == "quantize") return quantize_case(c, kernels, report);
  if (c.kind() == "store_kv") return store_case(c, kernels, report);
  if (c.kind() == "argmax") return argmax_case(c, kernels, report);
  report.close(computed(c, kernels), c.array<double>("expected"), c.array<double>("allowed"), "output");
}

}  // namespace native
