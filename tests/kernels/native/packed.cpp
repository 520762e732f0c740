#include "packed.h"

#include <cmath>

namespace native {

Problem read_problem(const Case& c) {
  Problem p{static_cast<ts::Format>(c.number("format")), c.number("rows"), c.number("cols"), c.number("count"),
            c.array<uint8_t>("source"), c.array<float>("x"), {}, {}};
  const int64_t row_bytes = ts::file_row_bytes(p.format, p.cols);
  if (static_cast<int64_t>(p.source.size()) != p.rows * row_bytes) throw std::runtime_error(c.name + ": source has another size");
  for (int64_t first = 0; first < p.rows; first += ts::kRows) {
    const auto here = static_cast<int>(std::min<int64_t>(ts::kRows, p.rows - first));
    const uint8_t* source = p.source.data() + first * row_bytes;
    if (p.format == ts::Format::Planes) {
      p.tiles.emplace_back(static_cast<size_t>(ts::high_bytes(p.cols)));
      p.low.emplace_back(static_cast<size_t>(ts::low_bytes(p.cols)));
      ts::pack_planes(source, here, p.cols, p.tiles.back().data(), p.low.back().data());
    } else {
      p.tiles.emplace_back(static_cast<size_t>(ts::tile_bytes(p.format, p.cols)));
      ts::pack_tile(p.format, source, here, p.cols, p.tiles.back().data());
    }
  }
  return p;
}

void add_segment(ts::Model& model, int32_t matrix, ts::Format format, const uint8_t* source, int64_t rows, int64_t cols, int64_t part) {
  const int32_t segment = model.reserve_segment(matrix, format, rows);
  const int64_t row_bytes = ts::file_row_bytes(format, cols);
  for (int64_t first = (rows - 1) / part * part; first >= 0; first -= part) {
    const int64_t here = std::min(part, rows - first);
    const Exact<uint8_t> some(source + first * row_bytes, source + (first + here) * row_bytes);
    model.pack_rows(matrix, segment, first, some.data(), here);
  }
}

Activations::Activations(const ts::Kernels& kernels, Exact<float> x, int64_t cols, bool plain) : cols_(cols), x_(std::move(x)) {
  if (plain) return;
  hi_.resize(x_.size());
  lo_.resize(x_.size());
  scale_.resize(x_.size() / ts::kBlock);
  sums_.resize(2 * scale_.size());
  for (int64_t at = 0; at < static_cast<int64_t>(x_.size()); at += cols) {
    const int64_t block = at / ts::kBlock;
    kernels.quantize(x_.data() + at, cols, hi_.data() + at, lo_.data() + at, scale_.data() + block, sums_.data() + 2 * block);
  }
}

ts::Rows Activations::rows() const {
  return {static_cast<int64_t>(x_.size()) / cols_, cols_, x_.data(), hi_.data(), lo_.data(), scale_.data(), sums_.data()};
}

Exact<float> Activations::reach() const {
  Exact<float> out(scale_.size());
  const double rounding = 1 + static_cast<double>(cols_ / ts::kBlock + 8) * 0x1p-23;  // of the sums of bounds
  for (size_t block = 0; block < out.size(); ++block) {
    double squares = 0;
    for (size_t i = block * ts::kBlock; i < (block + 1) * ts::kBlock; ++i) squares += std::pow(256.0 * hi_[i] + lo_[i], 2);
    out[block] = static_cast<float>(std::sqrt(squares) * scale_[block] / 6 * rounding);
  }
  return out;
}

}  // namespace native
