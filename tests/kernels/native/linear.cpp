// Packed weights times rows: unpacking, products, and equal bits for any batch, any number of threads.
#include <cmath>

#include "cases.h"
#include "model.h"
#include "pack.h"

namespace native {
namespace {

struct Problem {
  ts::Format format;
  int64_t rows, cols, count;
  Exact<uint8_t> source;              // rows as the file holds them
  Exact<float> x;                     // [count, cols]
  std::vector<Exact<uint8_t>> tiles;  // each ends where its data ends
};

Problem read_problem(const Case& c) {
  Problem p{static_cast<ts::Format>(c.number("format")), c.number("rows"), c.number("cols"), c.number("count"),
            c.array<uint8_t>("source"), c.array<float>("x"), {}};
  const int64_t row_bytes = ts::file_row_bytes(p.format, p.cols);
  if (static_cast<int64_t>(p.source.size()) != p.rows * row_bytes) throw std::runtime_error(c.name + ": source has another size");
  for (int64_t first = 0; first < p.rows; first += ts::kRows) {
    p.tiles.emplace_back(static_cast<size_t>(ts::tile_bytes(p.format, p.cols)));
    ts::pack_tile(p.format, p.source.data(), p.rows, p.cols, row_bytes, first, p.tiles.back().data());
  }
  return p;
}

// Rows [first, first + count) of x through the kernels: [count, rows].
Exact<float> multiply(const Problem& p, const ts::Kernels& kernels, int64_t first, int64_t count) {
  const bool plain = ts::is_plain(p.format);
  const auto elements = static_cast<size_t>(count * p.cols);
  Exact<float> x(p.x.begin() + first * p.cols, p.x.begin() + (first + count) * p.cols);
  Exact<int8_t> hi(plain ? 0 : elements), lo(plain ? 0 : elements);
  Exact<float> scale(plain ? 0 : elements / ts::kBlock);
  Exact<int32_t> sums(plain ? 0 : elements / ts::kBlock * 2);
  for (int64_t row = 0; row < count && !plain; ++row) {
    const int64_t block = row * p.cols / ts::kBlock;
    kernels.quantize(x.data() + row * p.cols, p.cols, hi.data() + row * p.cols, lo.data() + row * p.cols, scale.data() + block,
                     sums.data() + 2 * block);
  }
  const ts::Rows rows{count, p.cols, x.data(), hi.data(), lo.data(), scale.data(), sums.data()};
  Exact<float> out(static_cast<size_t>(count * p.rows), NAN);
  for (size_t t = 0; t < p.tiles.size(); ++t) {
    const auto at = static_cast<int64_t>(t) * ts::kRows;
    const auto valid = static_cast<int>(std::min<int64_t>(ts::kRows, p.rows - at));
    kernels.tile(p.format, p.tiles[t].data(), rows, out.data() + at, p.rows, valid);
  }
  return out;
}

void check_unpacking(const Problem& p, const Case& c, const ts::Kernels& kernels, Report& report) {
  Exact<float> values(static_cast<size_t>(p.rows * p.cols), NAN);
  for (int64_t row = 0; row < p.rows; ++row) {
    Exact<float> out(static_cast<size_t>(p.cols), NAN);
    const auto& tile = p.tiles[static_cast<size_t>(row / ts::kRows)];
    kernels.unpack_row(p.format, tile.data(), static_cast<int>(row % ts::kRows), p.cols, out.data());
    std::copy(out.begin(), out.end(), values.begin() + row * p.cols);
  }
  report.close(values, c.array<double>("values"), c.array<double>("values_allowed"), "unpacked");
}

}  // namespace

void linear_case(const Case& c, const ts::Kernels& kernels, Report& report) {
  const Problem p = read_problem(c);
  check_unpacking(p, c, kernels, report);
  const Exact<float> all = multiply(p, kernels, 0, p.count);
  report.close(all, c.array<double>("expected"), c.array<double>("allowed"), "product");
  const auto part = [&](int64_t first, int64_t count) {
    return Exact<float>(all.begin() + first * p.rows, all.begin() + (first + count) * p.rows);
  };
  for (int64_t row = 0; row < p.count; ++row) {
    report.same_bits(multiply(p, kernels, row, 1), part(row, 1), "row " + std::to_string(row) + " differs from itself in the batch");
  }
  for (int64_t count = 2; count < p.count; ++count) {
    report.same_bits(multiply(p, kernels, p.count - count, count), part(p.count - count, count), "a batch of " + std::to_string(count) + " differs");
  }
  for (int threads = 1; threads <= 3; ++threads) {
    ts::Model model(threads, kernels.name);
    const int32_t matrix = model.add_matrix(p.cols);
    const int64_t cut = p.rows / 3, row_bytes = ts::file_row_bytes(p.format, p.cols);  // two segments; the first may be empty
    if (cut) model.add_segment(matrix, p.format, p.source.data(), cut);
    model.add_segment(matrix, p.format, p.source.data() + cut * row_bytes, p.rows - cut);
    Exact<float> out(static_cast<size_t>(p.count * p.rows), NAN);
    model.multiply(matrix, p.x.data(), p.count, out.data());
    report.same_bits(out, all, std::to_string(threads) + " threads differ from the kernel alone");
  }
}

}  // namespace native
