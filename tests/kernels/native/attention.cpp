// One key head's attention over pages, whole and in parts.
#include <cmath>
#include <limits>

#include "cases.h"

namespace native {
namespace {

struct Parts {
  Exact<float> out, max, sum;  // [parts, rows, head_dim], [parts, rows], [parts, rows]
  int count = 0;
};

Parts attend(const Case& c, const ts::Kernels& kernels, int64_t split) {
  const auto q = c.array<float>("q");
  const auto kv = c.array<uint8_t>("kv");
  const auto table = c.array<int32_t>("table");
  const auto strides = c.array<int64_t>("strides");  // page, value, token, head
  const auto window = static_cast<int>(c.number("window"));
  const int64_t queries = c.number("queries"), group = c.number("group"), dim = c.number("head_dim"), rows = queries * group;
  const int64_t first = c.number("first_position"), last = first + queries;
  const int64_t live = window ? std::max<int64_t>(0, first - window + 1) : 0, begin = live / split * split;
  Parts parts;
  parts.count = static_cast<int>((last - begin + split - 1) / split);
  parts.out.assign(static_cast<size_t>(parts.count * rows * dim), NAN);
  parts.max.assign(static_cast<size_t>(parts.count * rows), NAN);
  parts.sum.assign(static_cast<size_t>(parts.count * rows), NAN);
  for (int64_t i = 0, from = begin; from < last; ++i, from += split) {
    const int64_t end = std::min(from + split, last);
    Exact<float> scratch(static_cast<size_t>(ts::attention_scratch(rows, end - from, dim)), NAN);
    const ts::AttentionTask task{
        .q = q.data(), .q_stride = c.number("q_stride"), .queries = static_cast<int>(queries), .group = static_cast<int>(group),
        .head_dim = static_cast<int>(dim), .format = static_cast<ts::KvFormat>(c.number("format")), .kv = kv.data(), .page_bytes = strides[0],
        .value_bytes = strides[1], .token_bytes = strides[2], .head_bytes = strides[3], .table = table.data(),
        .page_size = static_cast<int>(c.number("page_size")), .first_position = first, .begin = from, .end = end,
        .live = std::max(from, live), .window = window, .scale = static_cast<float>(c.real("scale")),
        .softcap = static_cast<float>(c.real("softcap")), .scratch = scratch.data(),
        .out = parts.out.data() + i * rows * dim, .max = parts.max.data() + i * rows, .sum = parts.sum.data() + i * rows};
    kernels.attend(task);
  }
  return parts;
}

Exact<float> combined(const Parts& parts, const ts::Kernels& kernels, int64_t rows, int64_t dim) {
  Exact<float> all;
  all.reserve(static_cast<size_t>(rows * dim));
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<const float*> pieces;
    for (int p = 0; p < parts.count; ++p) pieces.push_back(parts.out.data() + (p * rows + row) * dim);
    Exact<float> result(static_cast<size_t>(dim), NAN);
    const float none = -std::numeric_limits<float>::infinity();
    kernels.combine(pieces.data(), parts.max.data() + row, parts.sum.data() + row, parts.count, rows, static_cast<int>(dim), none, result.data());
    all.insert(all.end(), result.begin(), result.end());
  }
  return all;
}

}  // namespace

void attention_case(const Case& c, const ts::Kernels& kernels, Report& report) {
  const int64_t rows = c.number("queries") * c.number("group"), dim = c.number("head_dim");
  for (const int64_t split : {int64_t{16}, int64_t{48}, int64_t{256}}) {
    const Exact<float> got = combined(attend(c, kernels, split), kernels, rows, dim);
    report.close(got, c.array<double>("expected"), c.array<double>("allowed"), "parts of " + std::to_string(split) + " keys:");
  }
}

}  // namespace native
