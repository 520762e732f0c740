// Attention's kernels by themselves, one key head at a time, as tests call them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T, size_t Dims>
using Array = nb::ndarray<T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;

const ts::Kernels& kernels_of(const std::string& isa) {
  if (const ts::Kernels* found = ts::kernels_for(isa)) return *found;
  throw nb::value_error("this processor has no kernels for that instruction set");
}

void store_kv(const std::string& isa, int32_t format, const Array<const float, 2>& x, const Array<uint8_t, 2>& out) {
  const auto kind = static_cast<ts::KvFormat>(format);
  const auto head_dim = static_cast<int>(x.shape(1));
  if (out.shape(0) != x.shape(0) || static_cast<int>(out.shape(1)) != ts::kv_entry_bytes(kind, head_dim)) {
    throw nb::value_error("entries do not fit");
  }
  for (size_t i = 0; i < x.shape(0); ++i) kernels_of(isa).store_kv(kind, x.data() + i * x.shape(1), head_dim, out.data() + i * out.shape(1));
}

// q, out: [queries, group, head_dim]; sinks: [group]; pages: [pages, 2, page_size, entry]; entries before the first query's window are not read.
void attend(const std::string& isa, int32_t format, const Array<const float, 3>& q, const Array<const uint8_t, 4>& pages,
            const Array<const int32_t, 1>& table, int64_t first_position, int window, float scale, const Array<float, 3>& out,
            const std::optional<Array<const float, 1>>& sinks) {
  const auto queries = static_cast<int>(q.shape(0)), group = static_cast<int>(q.shape(1)), head_dim = static_cast<int>(q.shape(2));
  const auto page_size = static_cast<int>(pages.shape(2));
  const auto token_bytes = static_cast<int64_t>(pages.shape(3)), value_bytes = page_size * token_bytes;
  const int64_t end = first_position + queries, live = window ? std::max<int64_t>(0, first_position - window + 1) : 0;
  const int64_t begin = live / 16 * 16, rows = queries * group;
  std::vector<float> scratch(static_cast<size_t>(ts::attention_scratch(rows, end - begin, head_dim)));
  std::vector<float> sums(static_cast<size_t>(rows * head_dim)), max(static_cast<size_t>(rows)), sum(static_cast<size_t>(rows));
  const ts::Kernels& kernels = kernels_of(isa);
  kernels.attend({q.data(), static_cast<int64_t>(group) * head_dim, queries, group, head_dim, static_cast<ts::KvFormat>(format),
                  pages.data(), 2 * value_bytes, value_bytes, token_bytes, 0, table.data(), page_size, first_position, begin, end,
                  live, window, scale, 0.0f, scratch.data(), sums.data(), max.data(), sum.data()});
  for (int64_t r = 0; r < rows; ++r) {
    const float* part = sums.data() + r * head_dim;
    const float sink = sinks ? sinks->data()[r % group] : -std::numeric_limits<float>::infinity();
    kernels.combine(&part, &max[static_cast<size_t>(r)], &sum[static_cast<size_t>(r)], 1, rows, head_dim, sink, out.data() + r * head_dim);
  }
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("store_kv", store_kv, "isa"_a, "format"_a, "x"_a, "out"_a);
  m.def("attend", attend, "isa"_a, "format"_a, "q"_a, "pages"_a, "table"_a, "first_position"_a, "window"_a, "scale"_a, "out"_a,
        "sinks"_a = nb::none());
}
