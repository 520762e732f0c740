// A block of joined, normed projections, and the plain ops that fusing leaves out.
#include <cmath>
#include <numeric>

#include "program.h"

namespace native {
namespace {

using ts::Kind;

// x + branch, normed, through gate and up, their product through down, added to the sum, normed.
void add_block(ts::Model& model, const Case& c) {
  const auto format = static_cast<ts::Format>(c.number("format"));
  const int64_t cols = c.number("cols"), ff = c.number("ff");
  const auto vector = [&](const char* name) { return add_floats(model, c.array<float>(name)); };
  const auto matrix = [&](const char* name, int64_t width, int64_t rows) {
    const int32_t handle = model.add_matrix(width);
    add_segment(model, handle, format, c.array<uint8_t>(name).data(), rows, width, 16);
    return handle;
  };
  const int32_t pair = model.add_value({0, 0, 2 * cols, 2 * cols}), x = model.add_value({0, 0, cols, 2 * cols}), branch = model.add_value({0, cols, cols, 2 * cols});
  const int32_t sum = model.add_value({1, 0, cols, cols}), hidden = model.add_value({2, 0, ff, ff}), down = model.add_value({3, 0, cols, cols});
  const int32_t gated = model.add_value({4, 0, cols, cols}), joined = model.add_value({5, 0, cols, cols}), normed = model.add_value({6, 0, cols, cols});
  const auto eps = static_cast<float>(c.real("eps"));
  const auto act = static_cast<int32_t>(c.number("act"));
  model.add_op({.kind = Kind::Embed, .out = pair, .matrix = add_plain(model, c.array<float>("embeddings"), 2 * cols), .scale = 0.5f});
  model.add_op({.kind = Kind::Linear, .x = x, .branch = branch, .sum = sum, .out = hidden, .matrix = matrix("gate_up", cols, 2 * ff),
                .norm = vector("norm"), .branch_norm = vector("branch_norm"), .act = act, .eps = eps, .branch_eps = eps});
  model.add_op({.kind = Kind::Linear, .x = hidden, .out = down, .matrix = matrix("down", ff, cols), .bias = vector("bias")});
  model.add_op({.kind = Kind::ActMul, .x = pair, .out = gated, .act = act});
  model.add_op({.kind = Kind::Add, .x = sum, .branch = down, .out = joined});
  model.add_op({.kind = Kind::Add, .x = joined, .branch = gated, .out = joined});
  model.add_op({.kind = Kind::Norm, .x = joined, .out = normed, .norm = vector("out_norm"), .eps = eps});
  add_head(model, normed, 7, cols);
}

Exact<float> block_outputs(const Case& c, const ts::Kernels& kernels, int threads, int64_t chunk) {
  const int64_t cols = c.number("cols"), tokens = c.number("tokens");
  ts::Model model(threads, kernels.name);
  add_block(model, c);
  Exact<float> out(static_cast<size_t>(tokens * cols), NAN);
  for (int64_t done = 0; done < tokens; done += chunk) {
    const int64_t count = std::min(chunk, tokens - done);
    std::vector<int32_t> ids(static_cast<size_t>(count)), rows(ids.size()), starts{0, static_cast<int32_t>(count)};
    std::iota(ids.begin(), ids.end(), static_cast<int32_t>(done));
    std::iota(rows.begin(), rows.end(), 0);
    const int64_t table_start = 0;
    model.body({count, 1, 1, ids.data(), ids.data(), starts.data(), nullptr, &table_start});
    model.head(rows.data(), count, out.data() + done * cols);
  }
  return out;
}

}  // namespace

void block_case(const Case& c, const ts::Kernels& kernels, Report& report) {
  const int64_t tokens = c.number("tokens");
  const Exact<float> whole = block_outputs(c, kernels, 1, tokens);
  report.close(whole, c.array<double>("expected"), c.array<double>("allowed"), "output");
  for (const auto& [threads, chunk] : {std::pair{2, tokens}, std::pair{3, int64_t{1}}, std::pair{3, int64_t{3}}}) {
    report.same_bits(block_outputs(c, kernels, threads, chunk), whole, std::to_string(threads) + " threads, " + std::to_string(chunk) + " tokens a step differ");
  }
}

}  // namespace native
