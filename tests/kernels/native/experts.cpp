// A router, and the experts that it chooses, on their own.
#include <cmath>

#include "program.h"

namespace native {
namespace {

using ts::Kind;

struct Layer {
  ts::Op route, experts;
};

Layer add_layer(ts::Model& model, const Case& c) {
  const int64_t cols = c.number("cols"), ff = c.number("ff"), count = c.number("experts"), k = c.number("k");
  const auto format = static_cast<ts::Format>(c.number("format"));
  const auto gate_up = c.array<uint8_t>("gate_up"), down = c.array<uint8_t>("down");
  const auto matrices = [&](const Exact<uint8_t>& data, int64_t rows, int64_t width) {
    std::vector<int32_t> made;
    for (int64_t e = 0; e < count; ++e) {
      made.push_back(model.add_matrix(width));
      add_segment(model, made.back(), format, data.data() + e * static_cast<int64_t>(data.size()) / count, rows, width, 16);
    }
    return made;
  };
  const auto vector = [&](const char* name) { return c.number("biased") ? add_floats(model, c.array<float>(name)) : -1; };
  const int32_t x = model.add_value({0, 0, cols, cols}), out = model.add_value({1, 0, cols, cols}), logits = model.add_value({2, 0, count, count});
  const int32_t ids = model.add_value({3, 0, k, k}), shares = model.add_value({4, 0, k, k});
  ts::Op route{.kind = Kind::Route, .x = logits}, experts{.kind = Kind::Experts, .x = x, .out = out, .bias = vector("gate_up_bias")};
  for (ts::Op* op : {&route, &experts}) {
    op->ids = ids;
    op->shares = shares;
    op->k = static_cast<int32_t>(k);
  }
  route.norm = vector("router_bias");
  route.score = static_cast<int32_t>(ts::Score::Sigmoid);
  route.groups = 2;
  experts.experts = model.add_experts(matrices(gate_up, 2 * ff, cols), matrices(down, cols, ff));
  experts.down_bias = vector("down_bias");
  experts.act = static_cast<int32_t>(ts::Act::SwigluClamped);
  experts.alpha = static_cast<float>(c.real("alpha"));
  experts.limit = static_cast<float>(c.real("limit"));
  return {route, experts};
}

Exact<float> outputs(const Case& c, const ts::Kernels& kernels, int threads, int64_t chunk) {
  const int64_t cols = c.number("cols"), count = c.number("experts"), tokens = c.number("tokens");
  const auto x = c.array<float>("x"), logits = c.array<float>("logits");
  ts::Model model(threads, kernels.name);
  const Layer layer = add_layer(model, c);
  Exact<float> out(static_cast<size_t>(tokens * cols), NAN);
  for (int64_t done = 0; done < tokens; done += chunk) {
    const int64_t rows = std::min(chunk, tokens - done);
    model.reserve(rows);
    const auto put = [&](int32_t value, const float* from, int64_t width) { std::memcpy(model.at(value, 0), from + done * width, sizeof(float) * static_cast<size_t>(rows * width)); };
    put(layer.route.x, logits.data(), count);
    put(layer.experts.x, x.data(), cols);
    model.run_alone(layer.route, rows);
    model.run_alone(layer.experts, rows);
    std::memcpy(out.data() + done * cols, model.at(layer.experts.out, 0), sizeof(float) * static_cast<size_t>(rows * cols));
  }
  return out;
}

}  // namespace

void experts_case(const Case& c, const ts::Kernels& kernels, Report& report) {
  const int64_t tokens = c.number("tokens");
  const Exact<float> whole = outputs(c, kernels, 1, tokens);
  report.close(whole, c.array<double>("expected"), c.array<double>("allowed"), "output");
  for (const auto& [threads, chunk] : {std::pair{2, tokens}, std::pair{3, int64_t{1}}, std::pair{3, int64_t{3}}}) {
    report.same_bits(outputs(c, kernels, threads, chunk), whole, std::to_string(threads) + " threads, " + std::to_string(chunk) + " tokens at a time differ");
  }
}

}  // namespace native
