// Packed weights times rows: unpacking, products, and equal bits for any batch, any number of threads.
#include <cmath>

#include "packed.h"

namespace native {
namespace {

// Rows [first, first + count) of x through the kernels: [count, rows].
Exact<float> multiply(const Problem& p, const ts::Kernels& kernels, int64_t first, int64_t count) {
  const Activations x(kernels, {p.x.begin() + first * p.cols, p.x.begin() + (first + count) * p.cols}, p.cols, ts::is_plain(p.format));
  Exact<float> out(static_cast<size_t>(count * p.rows), NAN);
  for (size_t t = 0; t < p.tiles.size(); ++t) {
    const auto at = static_cast<int64_t>(t) * ts::kRows;
    const auto valid = static_cast<int>(std::min<int64_t>(ts::kRows, p.rows - at));
    if (p.low.empty()) kernels.tile(p.format, p.tiles[t].data(), x.rows(), out.data() + at, p.rows, valid);
    else kernels.planes_tile(p.tiles[t].data(), p.low[t].data(), x.rows(), out.data() + at, p.rows, valid);
  }
  return out;
}

void check_unpacking(const Problem& p, const Case& c, const ts::Kernels& kernels, Report& report) {
  Exact<float> values(static_cast<size_t>(p.rows * p.cols), NAN);
  for (int64_t row = 0; row < p.rows; ++row) {
    Exact<float> out(static_cast<size_t>(p.cols), NAN);
    const auto t = static_cast<size_t>(row / ts::kRows);
    const auto r = static_cast<int>(row % ts::kRows);
    if (p.low.empty()) kernels.unpack_row(p.format, p.tiles[t].data(), r, p.cols, out.data());
    else kernels.planes_row(p.tiles[t].data(), p.low[t].data(), r, p.cols, out.data());
    std::copy(out.begin(), out.end(), values.begin() + row * p.cols);
  }
  report.close(values, c.array<double>("values"), c.array<double>("values_allowed"), "unpacked");
}

void check_batches(const Problem& p, const ts::Kernels& kernels, const Exact<float>& all, Report& report) {
  const auto part = [&](int64_t first, int64_t count) {
    return Exact<float>(all.begin() + first * p.rows, all.begin() + (first + count) * p.rows);
  };
  for (int64_t row = 0; row < p.count; ++row) {
    report.same_bits(multiply(p, kernels, row, 1), part(row, 1), "row " + std::to_string(row) + " differs from itself in the batch");
  }
  for (int64_t count = 2; count < p.count; ++count) {
    report.same_bits(multiply(p, kernels, p.count - count, count), part(p.count - count, count), "a batch of " + std::to_string(count) + " differs");
  }
}

// Two segments, of which the first may be empty, packed at once or in parts.
void check_threads(const Problem& p, const ts::Kernels& kernels, const Exact<float>& all, Report& report) {
  const int64_t cut = p.rows / 3, row_bytes = ts::file_row_bytes(p.format, p.cols);
  for (int threads = 1; threads <= 3; ++threads) {
    ts::Model model(threads, kernels.name);
    const int32_t matrix = model.add_matrix(p.cols);
    const int64_t part = threads == 1 ? 1 << 20 : 16 * (threads - 1);
    if (cut) add_segment(model, matrix, p.format, p.source.data(), cut, p.cols, part);
    add_segment(model, matrix, p.format, p.source.data() + cut * row_bytes, p.rows - cut, p.cols, part);
    Exact<float> out(static_cast<size_t>(p.count * p.rows), NAN);
    model.multiply(matrix, p.x.data(), p.count, out.data());
    report.same_bits(out, all, std::to_string(threads) + " threads differ from the kernel alone");
  }
}

bool refused(ts::Model& model, int32_t matrix, const Problem& p, int64_t first, int64_t rows) {
  try {
    model.pack_rows(matrix, 0, first, p.source.data(), rows);
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

void check_refusals(const Problem& p, const ts::Kernels& kernels, Report& report) {
  ts::Model model(1, kernels.name);
  const int32_t matrix = model.add_matrix(p.cols);
  model.reserve_segment(matrix, p.format, p.rows);
  report.check(refused(model, matrix, p, -16, 16), "rows before a segment are taken");
  report.check(refused(model, matrix, p, 8, 1), "rows from the middle of a tile on are taken");
  report.check(refused(model, matrix, p, 0, p.rows + 1), "more rows than the segment has are taken");
  if (p.rows > 1) report.check(refused(model, matrix, p, 0, 1), "a part that is no whole tile is taken");
}

// The first look of every row: never further from the product than it says; and what refines it gives the product's bits.
void check_screen(const Problem& p, const ts::Kernels& kernels, const Exact<float>& all, Report& report) {
  const Activations x(kernels, p.x, p.cols);
  const Exact<float> reach = x.reach();
  Exact<float> near(all.size(), NAN), refined(all.size(), NAN);
  Exact<double> bounds(all.size());
  for (size_t t = 0; t < p.tiles.size(); ++t) {
    const auto at = static_cast<int64_t>(t) * ts::kRows, valid = std::min<int64_t>(ts::kRows, p.rows - at);
    Exact<float> look(static_cast<size_t>(p.count * ts::kRows), NAN), bound(look.size(), NAN);
    kernels.screen_tile(p.tiles[t].data(), x.rows(), reach.data(), look.data(), bound.data(), ts::kRows);
    for (int64_t row = 0; row < p.count; ++row) {
      const Exact<float> own(look.begin() + row * ts::kRows, look.begin() + (row + 1) * ts::kRows);
      for (int64_t r = 0; r < valid; ++r) {
        Exact<float> out(ts::kRows, NAN);
        kernels.refine(p.tiles[t].data(), p.low[t].data(), x.rows(), row, static_cast<int>(r % 4), own.data(), out.data());
        const auto to = static_cast<size_t>(row * p.rows + at + r);
        refined[to] = out[static_cast<size_t>(r)];
        near[to] = own[static_cast<size_t>(r)];
        bounds[to] = bound[static_cast<size_t>(row * ts::kRows + r)];
      }
    }
  }
  report.same_bits(refined, all, "refined looks differ from the products");
  report.close(near, {all.begin(), all.end()}, bounds, "first look");
}

}  // namespace

void linear_case(const Case& c, const ts::Kernels& kernels, Report& report) {
  const Problem p = read_problem(c);
  check_unpacking(p, c, kernels, report);
  const Exact<float> all = multiply(p, kernels, 0, p.count);
  report.close(all, c.array<double>("expected"), c.array<double>("allowed"), "product");
  check_batches(p, kernels, all, report);
  check_threads(p, kernels, all, report);
  check_refusals(p, kernels, report);
  if (p.format == ts::Format::Planes) check_screen(p, kernels, all, report);
}

}  // namespace native
