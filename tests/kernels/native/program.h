// Pieces of small programs.
#pragma once
#include "packed.h"

namespace native {

inline int32_t add_floats(ts::Model& model, const Exact<float>& values) { return model.add_vector({values.begin(), values.end()}); }

inline int32_t add_plain(ts::Model& model, const Exact<float>& values, int64_t cols) {
  const int32_t matrix = model.add_matrix(cols);
  const auto* bytes = reinterpret_cast<const uint8_t*>(values.data());
  add_segment(model, matrix, ts::Format::F32, bytes, static_cast<int64_t>(values.size()) / cols, cols);
  return matrix;
}

// Select rows of a value and multiply by the identity, so that head() gives them as they are.
inline void add_head(ts::Model& model, int32_t value, int32_t buffer, int64_t width) {
  const int32_t selected = model.add_value({buffer, 0, width, width});
  Exact<float> identity(static_cast<size_t>(width * width));
  for (int64_t i = 0; i < width; ++i) identity[static_cast<size_t>(i * width + i)] = 1;
  model.add_op({.kind = ts::Kind::Select, .x = value, .out = selected});
  model.add_op({.kind = ts::Kind::Linear, .x = selected, .matrix = add_plain(model, identity, width)});
}

}  // namespace native
