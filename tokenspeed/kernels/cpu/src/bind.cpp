// The module `tokenspeed.kernels.cpu._walk`.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>

#include "model.h"
#include "pack.h"

namespace nb = nanobind;
using namespace nb::literals;

void bind_attention(nb::module_& m);

namespace {

template <class T>
using Array1 = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Array2 = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Out2 = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

ts::Step step_of(const Array1<int32_t>& tokens, const Array1<int32_t>& positions, const Array1<int32_t>& starts,
                 const Array1<int32_t>& tables, const Array1<int64_t>& table_starts, int64_t groups) {
  const auto sequences = static_cast<int64_t>(starts.shape(0)) - 1;
  if (tokens.shape(0) != positions.shape(0) || sequences < 1 || static_cast<int64_t>(table_starts.shape(0)) != sequences * groups) {
    throw nb::value_error("the step's arrays do not fit each other");
  }
  return {static_cast<int64_t>(tokens.shape(0)), sequences, groups, tokens.data(), positions.data(), starts.data(), tables.data(), table_starts.data()};
}

void require(const std::vector<ts::Ask>& asks, size_t rows) {
  if (asks.size() != rows) throw nb::value_error("one ask is needed for each row");
}

using Pairs = std::vector<std::vector<std::pair<int64_t, float>>>;

Pairs pairs_of(const std::vector<std::vector<ts::Pick>>& picks) {
  Pairs result;
  for (const auto& row : picks) {
    result.emplace_back();
    for (const auto& each : row) result.back().emplace_back(each.token, each.logit);
  }
  return result;
}

template <class Run>
Pairs pairs_from(Run run) {
  const std::vector<std::vector<ts::Pick>>* picks = nullptr;
  {
    nb::gil_scoped_release unlocked;
    picks = &run();
  }
  return pairs_of(*picks);
}

}  // namespace

NB_MODULE(_walk, m) {
  m.doc() = "Packed weights, kernels and the program walk of the CPU backend.";
  bind_attention(m);
  m.attr("LAYOUT_VERSION") = ts::kLayoutVersion;

  nb::enum_<ts::Kind>(m, "Kind")
      .value("Embed", ts::Kind::Embed).value("Linear", ts::Kind::Linear).value("Norm", ts::Kind::Norm)
      .value("Add", ts::Kind::Add).value("ActMul", ts::Kind::ActMul).value("RopeWrite", ts::Kind::RopeWrite)
      .value("Attention", ts::Kind::Attention).value("Select", ts::Kind::Select)
      .value("Route", ts::Kind::Route).value("Experts", ts::Kind::Experts);

  nb::class_<ts::Op>(m, "Op")
      .def("__init__", [](ts::Op* op, ts::Kind kind) { new (op) ts::Op{kind}; })
      .def_rw("x", &ts::Op::x).def_rw("branch", &ts::Op::branch).def_rw("sum", &ts::Op::sum).def_rw("out", &ts::Op::out)
      .def_rw("matrix", &ts::Op::matrix).def_rw("norm", &ts::Op::norm).def_rw("branch_norm", &ts::Op::branch_norm)
      .def_rw("bias", &ts::Op::bias).def_rw("act", &ts::Op::act).def_rw("eps", &ts::Op::eps)
      .def_rw("branch_eps", &ts::Op::branch_eps).def_rw("scale", &ts::Op::scale).def_rw("v", &ts::Op::v)
      .def_rw("rope", &ts::Op::rope).def_rw("layer", &ts::Op::layer).def_rw("heads", &ts::Op::heads)
      .def_rw("kv_heads", &ts::Op::kv_heads).def_rw("head_dim", &ts::Op::head_dim).def_rw("window", &ts::Op::window)
      .def_rw("per_head", &ts::Op::per_head).def_rw("softcap", &ts::Op::softcap)
      .def_rw("key_inverse", &ts::Op::key_inverse).def_rw("value_inverse", &ts::Op::value_inverse)
      .def_rw("value_scale", &ts::Op::value_scale)
      .def_rw("sinks", &ts::Op::sinks).def_rw("ids", &ts::Op::ids).def_rw("shares", &ts::Op::shares).def_rw("experts", &ts::Op::experts)
      .def_rw("down_bias", &ts::Op::down_bias).def_rw("score", &ts::Op::score).def_rw("k", &ts::Op::k)
      .def_rw("renormalize", &ts::Op::renormalize).def_rw("groups", &ts::Op::groups).def_rw("kept_groups", &ts::Op::kept_groups)
      .def_rw("alpha", &ts::Op::alpha).def_rw("limit", &ts::Op::limit);

  nb::class_<ts::Ask>(m, "Ask")
      .def("__init__", [](ts::Ask* ask, float temperature, uint64_t seed, uint32_t sample, uint32_t position, int64_t top_k, double top_p,
                          float log_min_p) {
        new (ask) ts::Ask{temperature, sample, position, seed, top_k, top_p, log_min_p};
      });

  nb::class_<ts::Model>(m, "Model")
      .def(nb::init<int, const std::string&>(), "threads"_a, "isa"_a = "")
      .def_prop_ro("isa", &ts::Model::isa)
      .def_prop_ro("threads", &ts::Model::threads)
      .def_prop_ro("packed_bytes", &ts::Model::packed_bytes)
      .def("add_matrix", &ts::Model::add_matrix, "cols"_a)
      .def("reserve_segment", [](ts::Model& model, int32_t matrix, int32_t format, int64_t rows) {
        return model.reserve_segment(matrix, static_cast<ts::Format>(format), rows);
      }, "matrix"_a, "format"_a, "rows"_a)
      .def("pack_rows", [](ts::Model& model, int32_t matrix, int32_t segment, int64_t first, const Array2<uint8_t>& source) {
        nb::gil_scoped_release unlocked;
        model.pack_rows(matrix, segment, first, source.data(), static_cast<int64_t>(source.shape(0)));
      }, "matrix"_a, "segment"_a, "first"_a, "source"_a)
      .def("add_segment", [](ts::Model& model, int32_t matrix, int32_t format, const Array2<uint8_t>& source) {
        const auto rows = static_cast<int64_t>(source.shape(0));
        nb::gil_scoped_release unlocked;
        model.pack_rows(matrix, model.reserve_segment(matrix, static_cast<ts::Format>(format), rows), 0, source.data(), rows);
      }, "matrix"_a, "format"_a, "source"_a)
      .def("packed", [](const ts::Model& model, int32_t matrix, int32_t segment) {
        const auto [data, bytes] = model.packed(matrix, segment);
        return nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>(data, {static_cast<size_t>(bytes)});
      }, nb::rv_policy::reference_internal, "matrix"_a, "segment"_a)
      .def("add_vector", [](ts::Model& model, const Array1<float>& values) {
        return model.add_vector({values.data(), values.data() + values.shape(0)});
      })
      .def("add_rope", [](ts::Model& model, const Array1<float>& frequency, float scale) {
        return model.add_rope({static_cast<int32_t>(frequency.shape(0)), {frequency.data(), frequency.data() + frequency.shape(0)}, scale});
      })
      .def("add_value", [](ts::Model& model, int32_t buffer, int64_t offset, int64_t width, int64_t stride) {
        return model.add_value({buffer, offset, width, stride});
      }, "buffer"_a, "offset"_a, "width"_a, "stride"_a)
      .def("add_experts", &ts::Model::add_experts, "gate_up"_a, "down"_a)
      .def("add_op", &ts::Model::add_op)
      .def("time_ops", &ts::Model::time_ops)
      .def_prop_ro("seconds", &ts::Model::seconds)
      .def("run_alone", [](ts::Model& model, const ts::Op& op, const std::vector<std::pair<int32_t, Array2<float>>>& inputs,
                           const std::vector<std::pair<int32_t, Out2<float>>>& outputs) {
        const auto rows = static_cast<int64_t>(inputs.at(0).second.shape(0));
        model.reserve(rows);
        for (const auto& [value, from] : inputs) {
          if (static_cast<int64_t>(from.shape(1)) != model.value(value).width) throw nb::value_error("a row is as wide as its value");
          for (int64_t r = 0; r < rows; ++r) std::memcpy(model.at(value, r), from.data() + r * from.shape(1), sizeof(float) * from.shape(1));
        }
        model.run_alone(op, rows);
        for (const auto& [value, to] : outputs) {
          for (int64_t r = 0; r < rows; ++r) std::memcpy(to.data() + r * to.shape(1), model.at(value, r), sizeof(float) * to.shape(1));
        }
      }, "op"_a, "inputs"_a, "outputs"_a)
      .def("set_cache", [](ts::Model& model, uintptr_t data, std::vector<int64_t> strides, int32_t page_size,
                           int32_t format, std::vector<int32_t> group, std::vector<int32_t> index) {
        model.set_cache({reinterpret_cast<uint8_t*>(data), strides.at(0), strides.at(1), strides.at(2), strides.at(3), strides.at(4),
                         page_size, static_cast<ts::KvFormat>(format), std::move(group), std::move(index)});
      }, "data"_a, "strides"_a, "page_size"_a, "format"_a, "group"_a, "index"_a)
      .def("body", [](ts::Model& model, const Array1<int32_t>& tokens, const Array1<int32_t>& positions, const Array1<int32_t>& starts,
                      const Array1<int32_t>& tables, const Array1<int64_t>& table_starts, int64_t groups) {
        const ts::Step step = step_of(tokens, positions, starts, tables, table_starts, groups);
        nb::gil_scoped_release unlocked;
        model.body(step);
      })
      .def("head", [](ts::Model& model, const Array1<int32_t>& rows, const Out2<float>& logits) {
        nb::gil_scoped_release unlocked;
        model.head(rows.data(), static_cast<int64_t>(rows.shape(0)), logits.data());
      })
      .def("hidden", [](ts::Model& model, const Array1<int32_t>& rows, const Out2<float>& out) {
        nb::gil_scoped_release unlocked;
        model.hidden(rows.data(), static_cast<int64_t>(rows.shape(0)), out.data());
      })
      .def("pick", [](ts::Model& model, const Array1<int32_t>& rows, const std::vector<ts::Ask>& asks) {
        require(asks, rows.shape(0));
        return pairs_from([&]() -> auto& { return model.pick(rows.data(), asks.data(), static_cast<int64_t>(asks.size())); });
      })
      .def("decode", [](ts::Model& model, int64_t most, const std::vector<int64_t>& ends, const std::vector<ts::Ask>& asks,
                        const Array1<int32_t>& tokens, const Array1<int32_t>& positions, const Array1<int32_t>& starts,
                        const Array1<int32_t>& tables, const Array1<int64_t>& table_starts, int64_t groups) {
        const ts::Step step = step_of(tokens, positions, starts, tables, table_starts, groups);
        if (step.tokens != step.sequences) throw nb::value_error("decode takes one token per sequence");
        require(asks, tokens.shape(0));
        std::vector<std::vector<std::vector<ts::Pick>>> passes;
        {
          nb::gil_scoped_release unlocked;
          passes = model.decode(step, asks, ends, most);
        }
        std::vector<Pairs> result;
        for (const auto& picks : passes) result.push_back(pairs_of(picks));
        return result;
      })
      .def("draw", [](ts::Model& model, int32_t matrix, const Array2<float>& x, const std::vector<ts::Ask>& asks) {
        require(asks, x.shape(0));
        return pairs_from([&]() -> auto& { return model.draw(matrix, x.data(), asks.data(), static_cast<int64_t>(asks.size())); });
      })
      .def("gumbel", [](const ts::Model& model, uint64_t seed, uint32_t sample, uint32_t position, int64_t first) {
        std::vector<float> noise(64);
        model.kernels().gumbel({seed, sample, position}, first, noise.data());
        return noise;
      })
      .def("mass", [](const ts::Model& model, const Array1<float>& logits, float temperature, float best, float above) {
        double sum = 0;
        const auto count = static_cast<int64_t>(logits.shape(0));
        for (int64_t at = 0; at < count; at += 64) sum += model.kernels().mass(logits.data() + at, std::min<int64_t>(64, count - at), temperature, best, above);
        return sum;
      })
      .def_prop_ro("looked", &ts::Model::looked)
      .def_prop_ro("whole", &ts::Model::whole)
      .def_prop_ro("rescored", &ts::Model::rescored)
      .def("multiply", [](ts::Model& model, int32_t matrix, const Array2<float>& x, const Out2<float>& out) {
        nb::gil_scoped_release unlocked;
        model.multiply(matrix, x.data(), static_cast<int64_t>(x.shape(0)), out.data());
      })
      .def("unpack_row", [](const ts::Model& model, int32_t matrix, int64_t row, const nb::ndarray<float, nb::ndim<1>, nb::c_contig>& out) {
        model.unpack_row(matrix, row, out.data());
      });
}
