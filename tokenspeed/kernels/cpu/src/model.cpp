#include "model.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "pack.h"

namespace ts {
namespace {

constexpr int64_t kAheadBytes = 512 << 10;  // of the next projection, fetched by threads without work: half of a second-level cache
constexpr int64_t kItemBytes = 96 << 10;  // of weights one thread takes at a time

const Kernels* kernels_or_throw(const std::string& isa) {
  if (const Kernels* found = kernels_for(isa)) return found;
  throw std::invalid_argument("this processor has no kernels for instruction set " + isa);
}

// Whether every tile lies in one half and has its partner in the other.
bool halves_are_tiles(const Matrix& m) {
  const auto whole = [](const Segment& s) { return s.first_row % kRows == 0; };
  return m.rows / 2 % kRows == 0 && std::all_of(m.segments.begin(), m.segments.end(), whole);
}

}  // namespace

uint8_t* Store::take(int64_t size) {
  constexpr int64_t kMap = 64 << 20, kAlign = 4096;
  size = (size + kAlign - 1) / kAlign * kAlign;
  if (maps_.empty() || used_ + size > maps_.back().second) {
    const int64_t bytes = std::max(kMap, size);
    void* p = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(p, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
    maps_.emplace_back(static_cast<uint8_t*>(p), bytes);
    used_ = 0;
  }
  uint8_t* piece = maps_.back().first + used_;
  used_ += size;
  taken_ += size;
  return piece;
}

Store::~Store() {
  for (const auto& [p, bytes] : maps_) munmap(p, static_cast<size_t>(bytes));
}

Model::Model(int threads, const std::string& isa) : kernels_(kernels_or_throw(isa)), pool_(threads) {}

int32_t Model::add_matrix(int64_t cols) {
  matrices_.emplace_back();
  matrices_.back().cols = cols;
  return static_cast<int32_t>(matrices_.size() - 1);
}

int32_t Model::reserve_segment(int32_t matrix, Format format, int64_t rows) {
  Matrix& m = matrices_.at(static_cast<size_t>(matrix));
  const int64_t tiles = (rows + kRows - 1) / kRows, size = tile_bytes(format, m.cols);
  const auto index = static_cast<int32_t>(m.segments.size());
  const int64_t group = std::max<int64_t>(1, std::min(tiles / (4 * pool_.threads()), kItemBytes / size));
  for (int64_t t = 0; t < tiles; t += group) m.shares.push_back({index, t, std::min(tiles, t + group)});
  (is_plain(format) ? m.plain : m.integer) = true;
  m.segments.push_back({format, rows, m.rows, tiles, store_.take(tiles * size)});
  m.rows += rows;
  m.tiles += tiles;
  return index;
}

void Model::pack_rows(int32_t matrix, int32_t segment, int64_t first, const uint8_t* source, int64_t rows) {
  constexpr int64_t kItemTiles = 16;
  const Matrix& m = matrices_.at(static_cast<size_t>(matrix));
  const Segment& s = m.segments.at(static_cast<size_t>(segment));
  if (first % kRows || first < 0 || first + rows > s.rows || (rows % kRows && first + rows < s.rows)) {
    throw std::invalid_argument("rows to pack are whole tiles of a segment");
  }
  const int64_t tiles = (rows + kRows - 1) / kRows, size = tile_bytes(s.format, m.cols);
  const int64_t file_bytes = kRows * file_row_bytes(s.format, m.cols);
  uint8_t* out = s.data + first / kRows * size;
  uint8_t* high = s.data + first / kRows * high_bytes(m.cols);
  uint8_t* low = s.data + s.tiles * high_bytes(m.cols) + first / kRows * low_bytes(m.cols);
  pool_.run((tiles + kItemTiles - 1) / kItemTiles, [&](int64_t item) {
    for (int64_t t = kItemTiles * item; t < std::min(tiles, kItemTiles * (item + 1)); ++t) {
      const int64_t here = std::min<int64_t>(kRows, rows - t * kRows);
      if (s.format == Format::Planes) {
        pack_planes(source + t * file_bytes, static_cast<int>(here), m.cols, high + t * high_bytes(m.cols), low + t * low_bytes(m.cols));
      } else {
        pack_tile(s.format, source + t * file_bytes, static_cast<int>(here), m.cols, out + t * size);
      }
    }
  });
}

std::pair<uint8_t*, int64_t> Model::packed(int32_t matrix, int32_t segment) const {
  const Matrix& m = matrices_.at(static_cast<size_t>(matrix));
  const Segment& s = m.segments.at(static_cast<size_t>(segment));
  return {s.data, s.tiles * tile_bytes(s.format, m.cols)};
}

int32_t Model::add_vector(std::vector<float> values) {
  vectors_.push_back(std::move(values));
  return static_cast<int32_t>(vectors_.size() - 1);
}

int32_t Model::add_rope(Rope rope) {
  ropes_.push_back(std::move(rope));
  return static_cast<int32_t>(ropes_.size() - 1);
}

int32_t Model::add_value(Value value) {
  values_.push_back(value);
  return static_cast<int32_t>(values_.size() - 1);
}

int32_t Model::add_experts(const std::vector<int32_t>& gate_up, const std::vector<int32_t>& down) {
  experts_.push_back({gate_up, down});
  return static_cast<int32_t>(experts_.size() - 1);
}

void Model::add_op(Op op) {
  if (op.kind == Kind::Select) head_ = ops_.size();
  ops_.push_back(op);
}

float* Model::at(int32_t value, int64_t row) const {
  const Value& v = values_[static_cast<size_t>(value)];
  return const_cast<float*>(buffers_[static_cast<size_t>(v.buffer)].data()) + row * v.stride + v.offset;
}

// Grow all scratch memory to a step of `tokens`.
void Model::reserve(int64_t tokens) {
  if (tokens <= capacity_) return;
  capacity_ = tokens;
  int64_t widest = 0;
  for (const auto& m : matrices_) widest = std::max(widest, m.cols);
  for (const auto& v : values_) {
    if (v.buffer < 0) continue;
    if (buffers_.size() <= static_cast<size_t>(v.buffer)) buffers_.resize(static_cast<size_t>(v.buffer) + 1);
    auto& buffer = buffers_[static_cast<size_t>(v.buffer)];
    buffer.resize(std::max(buffer.size(), static_cast<size_t>(tokens * v.stride)));
  }
  const auto elements = static_cast<size_t>(tokens * widest);
  normed_.resize(elements);
  hi_.resize(elements);
  lo_.resize(elements);
  scale_.resize(elements / kBlock + 1);
  sums_.resize(elements / kBlock * 2 + 2);
  cosines_.resize(ropes_.size());
  sines_.resize(ropes_.size());
  for (size_t i = 0; i < ropes_.size(); ++i) {
    cosines_[i].resize(static_cast<size_t>(tokens * ropes_[i].half));
    sines_[i].resize(static_cast<size_t>(tokens * ropes_[i].half));
  }
}

void Model::rows_of(int64_t count, const std::function<void(int64_t)>& work) {
  if (count < 2 * pool_.threads()) {
    for (int64_t i = 0; i < count; ++i) work(i);
  } else {
    pool_.run(count, work);
  }
}

void Model::body(const Step& step) {
  step_ = step;
  reserve(step.tokens);
  owner_.resize(static_cast<size_t>(step.tokens));
  for (int64_t s = 0; s < step.sequences; ++s) {
    for (int32_t t = step.start[s]; t < step.start[s + 1]; ++t) owner_[static_cast<size_t>(t)] = static_cast<int32_t>(s);
  }
  make_angles();
  for (size_t i = 0; i < head_; ++i) {
    if (ops_[i].kind == Kind::Attention) look_ahead(i);
    timed(ops_[i], [&] { run(ops_[i], step.tokens); });
  }
}

// Tell the pool which projection comes after an op.
void Model::look_ahead(size_t op) {
  while (++op < ops_.size() && ops_[op].matrix < 0) {}
  if (op == ops_.size()) return;
  const Matrix& m = matrices_[static_cast<size_t>(ops_[op].matrix)];
  const Segment& s = m.segments[0];
  pool_.look_ahead(s.data, std::min(kAheadBytes, s.tiles * tile_bytes(s.format, m.cols)));
}

// Everything between the body and the last projection, which it returns.
const Op& Model::before_head(const int32_t* rows, int64_t count) {
  const Op& select = ops_[head_];
  const Value& from = values_[static_cast<size_t>(select.x)];
  timed(select, [&] {
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(at(select.out, i), at(select.x, rows[i]), sizeof(float) * static_cast<size_t>(from.width));
    }
  });
  for (size_t i = head_ + 1; i + 1 < ops_.size(); ++i) timed(ops_[i], [&] { run(ops_[i], count); });
  return ops_.back();
}

void Model::head(const int32_t* rows, int64_t count, float* logits) {
  const Op& last = before_head(rows, count);
  timed(last, [&] { linear(last, count, logits, matrices_[static_cast<size_t>(last.matrix)].rows); });
}

void Model::hidden(const int32_t* rows, int64_t count, float* out) {
  const Op& last = before_head(rows, count);
  const Matrix& m = matrices_[static_cast<size_t>(last.matrix)];
  rows_of(count, [&](int64_t row) {
    prepare_row(last, m, row);
    std::memcpy(out + row * m.cols, normed_.data() + row * m.cols, sizeof(float) * static_cast<size_t>(m.cols));
  });
}

void Model::run(const Op& op, int64_t tokens) {
  switch (op.kind) {
    case Kind::Embed: return embed(op);
    case Kind::Linear: return linear(op, tokens, at(op.out, 0), values_[static_cast<size_t>(op.out)].stride);
    case Kind::Norm:
      return rows_of(tokens, [&](int64_t t) {
        const int64_t width = values_[static_cast<size_t>(op.x)].width, part = op.per_head ? op.per_head : width;
        for (int64_t i = 0; i < width; i += part) {
          kernels_->rms_norm(at(op.x, t) + i, vectors_[static_cast<size_t>(op.norm)].data(), part, op.eps, at(op.out, t) + i);
        }
      });
    case Kind::Add:
      return rows_of(tokens, [&](int64_t t) {
        kernels_->add(at(op.x, t), at(op.branch, t), values_[static_cast<size_t>(op.x)].width, at(op.out, t));
      });
    case Kind::ActMul:
      return rows_of(tokens, [&](int64_t t) {
        const int64_t half = values_[static_cast<size_t>(op.out)].width;
        kernels_->act_mul(at(op.x, t), at(op.x, t) + half, half, op.act == 0, at(op.out, t));
      });
    case Kind::RopeWrite: return rope_write(op);
    case Kind::Attention: return attention(op);
    case Kind::Route: return route(op, tokens);
    case Kind::Experts: return experts(op, tokens);
    case Kind::Select: throw std::logic_error("a second select");
  }
}

void Model::run_alone(const Op& op, int64_t tokens) {
  reserve(tokens);
  run(op, tokens);
}

void Model::unpack_row(int32_t matrix, int64_t row, float* out) const {
  const Matrix& m = matrices_.at(static_cast<size_t>(matrix));
  for (const auto& s : m.segments) {
    const int64_t r = row - s.first_row;
    if (r < 0 || r >= s.rows) continue;
    if (s.format == Format::Planes) {
      const uint8_t* low = s.data + s.tiles * high_bytes(m.cols);
      return kernels_->planes_row(s.data + r / kRows * high_bytes(m.cols), low + r / kRows * low_bytes(m.cols), static_cast<int>(r % kRows), m.cols, out);
    }
    kernels_->unpack_row(s.format, s.data + r / kRows * tile_bytes(s.format, m.cols), static_cast<int>(r % kRows), m.cols, out);
  }
}

void Model::embed(const Op& op) {
  rows_of(step_.tokens, [&](int64_t t) {
    float* out = at(op.out, t);
    unpack_row(op.matrix, step_.token[t], out);
    for (int64_t i = 0; i < matrices_[static_cast<size_t>(op.matrix)].cols; ++i) out[i] *= op.scale;
  });
}

// One row's way into a projection: branch norm, residual add, norm, then the forms its weights need.
void Model::prepare_row(const Op& op, const Matrix& m, int64_t row) {
  const float* x = at(op.x, row);
  float* normed = normed_.data() + row * m.cols;
  if (op.branch >= 0) {
    const float* branch = at(op.branch, row);
    if (op.branch_norm >= 0) {
      kernels_->rms_norm(branch, vectors_[static_cast<size_t>(op.branch_norm)].data(), m.cols, op.branch_eps, normed);
      branch = normed;
    }
    kernels_->add(x, branch, m.cols, at(op.sum, row));
    x = at(op.sum, row);
  }
  if (op.norm >= 0) kernels_->rms_norm(x, vectors_[static_cast<size_t>(op.norm)].data(), m.cols, op.eps, normed);
  else std::memcpy(normed, x, sizeof(float) * static_cast<size_t>(m.cols));
  if (m.integer) {
    const int64_t at_block = row * (m.cols / kBlock);
    kernels_->quantize(normed, m.cols, hi_.data() + row * m.cols, lo_.data() + row * m.cols, scale_.data() + at_block,
                       sums_.data() + 2 * at_block);
  }
}

void Model::linear(const Op& op, int64_t rows, float* out, int64_t stride) {
  const Matrix& m = matrices_[static_cast<size_t>(op.matrix)];
  rows_of(rows, [&](int64_t row) { prepare_row(op, m, row); });
  each_tile(m, op, rows, out, stride);
}

void Model::prepare_plain(const Matrix& m, const float* x, int64_t count) {
  reserve(count);
  for (int64_t row = 0; row < count; ++row) {
    std::memcpy(normed_.data() + row * m.cols, x + row * m.cols, sizeof(float) * static_cast<size_t>(m.cols));
    const int64_t b = row * (m.cols / kBlock);
    if (m.integer) kernels_->quantize(x + row * m.cols, m.cols, hi_.data() + row * m.cols, lo_.data() + row * m.cols, scale_.data() + b, sums_.data() + 2 * b);
  }
}

void Model::multiply(int32_t matrix, const float* x, int64_t count, float* out) {
  const Matrix& m = matrices_.at(static_cast<size_t>(matrix));
  prepare_plain(m, x, count);
  each_tile(m, Op{Kind::Linear}, count, out, m.rows);
}

void Model::each_tile(const Matrix& m, const Op& op, int64_t rows, float* out, int64_t stride) {
  const Rows input{rows, m.cols, normed_.data(), hi_.data(), lo_.data(), scale_.data(), sums_.data()};
  if (op.act >= 0 && !(op.bias < 0 && halves_are_tiles(m))) {
    std::vector<float> both(static_cast<size_t>(rows * m.rows));
    Op linear = op;
    linear.act = -1;
    each_tile(m, linear, rows, both.data(), m.rows);
    return rows_of(rows, [&](int64_t row) {
      const float* gate = both.data() + row * m.rows;
      kernels_->act_mul(gate, gate + m.rows / 2, m.rows / 2, op.act == 0, out + row * stride);
    });
  }
  if (op.act >= 0) {  // a gate tile and its up tile together
    const int64_t tiles = m.rows / 2 / kRows;
    const int64_t group = std::max<int64_t>(1, std::min(tiles / (4 * pool_.threads()), kItemBytes / (2 * tile_bytes(m.segments[0].format, m.cols))));
    return pool_.run((tiles + group - 1) / group, [&](int64_t item) {
      pair_tiles(m, op, input, item * group, std::min(tiles, (item + 1) * group), out, stride);
    });
  }
  const float* bias = op.bias < 0 ? nullptr : vectors_[static_cast<size_t>(op.bias)].data();
  pool_.run(static_cast<int64_t>(m.shares.size()), [&](int64_t item) { share_tiles(m, m.shares[static_cast<size_t>(item)], input, out, stride, bias); });
}

// Rows of activations times one share of a matrix. bias: of the matrix's rows, or null.
void Model::share_tiles(const Matrix& m, const Share& share, const Rows& input, float* out, int64_t stride, const float* bias) const {
  const Segment& s = m.segments[static_cast<size_t>(share.segment)];
  for (int64_t t = share.first; t < share.last; ++t) {
    const int64_t first = t * kRows, at_row = s.first_row + first;
    const int valid = static_cast<int>(std::min<int64_t>(kRows, s.rows - first));
    float* to = out + at_row;
    if (s.format == Format::Planes) {
      const uint8_t* low = s.data + s.tiles * high_bytes(m.cols);
      kernels_->planes_tile(s.data + t * high_bytes(m.cols), low + t * low_bytes(m.cols), input, to, stride, valid);
    } else {
      kernels_->tile(s.format, s.data + t * tile_bytes(s.format, m.cols), input, to, stride, valid);
    }
    if (bias == nullptr) continue;
    for (int64_t row = 0; row < input.count; ++row) for (int r = 0; r < valid; ++r) to[row * stride + r] += bias[at_row + r];
  }
}

// The gate's tiles, then the up tiles of the same columns: two long streams, not a change of stream with each tile.
void Model::pair_tiles(const Matrix& m, const Op& op, const Rows& input, int64_t first, int64_t last, float* out, int64_t stride) {
  thread_local std::vector<float> halves;
  const int64_t half = m.rows / 2, width = (last - first) * kRows;
  halves.resize(static_cast<size_t>(input.count * 2 * width));
  for (int h = 0; h < 2; ++h) {
    for (int64_t t = first; t < last; ++t) {
      const int64_t row = h * half + t * kRows;
      for (const auto& s : m.segments) {
        if (row < s.first_row || row >= s.first_row + s.rows) continue;
        const uint8_t* data = s.data + (row - s.first_row) / kRows * tile_bytes(s.format, m.cols);
        kernels_->tile(s.format, data, input, halves.data() + h * width + (t - first) * kRows, 2 * width, kRows);
      }
    }
  }
  for (int64_t row = 0; row < input.count; ++row) {
    const float* pair = halves.data() + row * 2 * width;
    kernels_->act_mul(pair, pair + width, width, op.act == 0, out + row * stride + first * kRows);
  }
}

}  // namespace ts
