// What is done to rows between projections.
#include <cmath>

#include "cases.h"

namespace native {
namespace {

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
    const double step = scale[i / ts::kBlock];
    back[i] = static_cast<float>(step * (256 * hi[i] + lo[i]));
    given[i] = x[i];
    allowed[i] = step * 1.03 + 4e-34;  // half a step, and a whole one where lo has met its end at 127
  }
  report.close(back, given, allowed, "quantized");
  for (size_t i = 0; i < 2 * blocks; ++i) {
    int32_t sum = 0;
    for (size_t j = 16 * i; j < 16 * i + 16; ++j) sum += 256 * hi[j] + lo[j];
    report.check(sum == sums[i], "sum " + std::to_string(i) + " is " + std::to_string(sums[i]) + ", its codes give " + std::to_string(sum));
  }
}

void bf16_case(const Case& c, const ts::Kernels& kernels, Report& report) {
  const auto x = c.array<float>("x");
  const auto expected = c.array<uint16_t>("expected");
  Exact<uint16_t> out(x.size());
  kernels.to_bf16(x.data(), static_cast<int64_t>(x.size()), out.data());
  for (size_t i = 0; i < x.size(); ++i) {
    report.check(out[i] == expected[i], "element " + std::to_string(i) + " is " + std::to_string(out[i]) + ", not " + std::to_string(expected[i]));
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
  if (c.kind() == "to_bf16") return bf16_case(c, kernels, report);
  if (c.kind() == "argmax") return argmax_case(c, kernels, report);
  report.close(computed(c, kernels), c.array<double>("expected"), c.array<double>("allowed"), "output");
}

}  // namespace native
