// The ops of a step that touch the KV pages: rotation and writing, and attention.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "model.h"

namespace ts {

void Model::make_angles() {
  for (size_t i = 0; i < ropes_.size(); ++i) {
    const Rope& rope = ropes_[i];
    rows_of(step_.tokens, [&](int64_t t) {
      for (int32_t j = 0; j < rope.half; ++j) {
        const float angle = static_cast<float>(step_.position[t]) * rope.frequency[static_cast<size_t>(j)];
        cosines_[i][static_cast<size_t>(t * rope.half + j)] = rope.scale * std::cos(angle);
        sines_[i][static_cast<size_t>(t * rope.half + j)] = rope.scale * std::sin(angle);
      }
    });
  }
}

namespace {
// The row times a factor, in `to` unless the factor is 1.
const float* times(const float* row, float factor, size_t count, std::vector<float>* to) {
  if (factor == 1.0f) return row;
  to->resize(count);
  std::transform(row, row + count, to->begin(), [factor](float x) { return x * factor; });
  return to->data();
}
}  // namespace

void Model::rope_write(const Op& op) {
  rows_of(step_.tokens, [&](int64_t t) { rope_row(op, t, owner_[static_cast<size_t>(t)]); });
}

// Queries and keys of one token: norm and turn each head in place of the output, then keys and values into their page.
void Model::rope_row(const Op& op, int64_t t, int64_t sequence) {
  const Rope& rope = ropes_[static_cast<size_t>(op.rope)];
  const float* cosines = cosines_[static_cast<size_t>(op.rope)].data() + t * rope.half;
  const float* sines = sines_[static_cast<size_t>(op.rope)].data() + t * rope.half;
  thread_local std::vector<float> keys, scaled_keys, scaled_values;
  const auto width = static_cast<size_t>(op.kv_heads * op.head_dim);
  keys.resize(width);
  const auto turn = [&](const float* in, int32_t heads, int32_t norm, float* out) {
    for (int32_t h = 0; h < heads; ++h, in += op.head_dim, out += op.head_dim) {
      if (norm >= 0) kernels_->rms_norm(in, vectors_[static_cast<size_t>(norm)].data(), op.head_dim, op.eps, out);
      else std::memcpy(out, in, sizeof(float) * static_cast<size_t>(op.head_dim));
      kernels_->rotate(out, cosines, sines, rope.half);
    }
  };
  turn(at(op.x, t), op.heads, op.norm, at(op.out, t));
  turn(at(op.branch, t), op.kv_heads, op.branch_norm, keys.data());
  const int32_t group = cache_.group[static_cast<size_t>(op.layer)], position = step_.position[t];
  const int32_t* table = step_.table + step_.table_start[sequence * step_.groups + group];
  uint8_t* to = cache_.data + table[position / cache_.page_size] * cache_.page_bytes +
                cache_.index[static_cast<size_t>(op.layer)] * cache_.layer_bytes + position % cache_.page_size * cache_.token_bytes;
  const float* const key = times(keys.data(), op.key_inverse, width, &scaled_keys);
  const float* const value = times(at(op.v, t), op.value_inverse, width, &scaled_values);
  for (int32_t h = 0; h < op.kv_heads; ++h, to += cache_.head_bytes) {
    kernels_->store_kv(cache_.format, key + h * op.head_dim, op.head_dim, to);
    kernels_->store_kv(cache_.format, value + h * op.head_dim, op.head_dim, to + cache_.value_bytes);
  }
}

namespace {
constexpr int64_t kSplit = 256;   // positions of keys per task: fixed, so that a row's sums do not depend on the batch
constexpr int kQueryRows = 64;    // query rows per task

struct Work {
  int32_t sequence, head, first_query, queries;
  int64_t begin, end, live, slot;
};
}  // namespace

void Model::attention(const Op& op) {
  const int32_t layer = op.layer, group = op.heads / op.kv_heads;
  const int32_t block = std::max(1, kQueryRows / group);
  std::vector<Work> work;
  std::vector<std::array<int64_t, 4>> sets;  // first slot, parts, first row (token), queries with head in high bits
  int64_t slots = 0;
  for (int64_t s = 0; s < step_.sequences; ++s) {
    for (int32_t q = step_.start[s]; q < step_.start[s + 1]; q += block) {
      const int32_t queries = std::min(block, step_.start[s + 1] - q);
      const int64_t first = step_.position[q], last = first + queries;
      const int64_t live = op.window ? std::max<int64_t>(0, first - op.window + 1) : 0;
      for (int32_t h = 0; h < op.kv_heads; ++h) {
        const int64_t from = slots;
        for (int64_t begin = live / kSplit * kSplit; begin < last; begin += kSplit) {
          work.push_back({static_cast<int32_t>(s), h, q, queries, begin, std::min(begin + kSplit, last), std::max(begin, live), slots});
          slots += queries * group;
        }
        sets.push_back({from, (slots - from) / (queries * group), q, static_cast<int64_t>(h) << 32 | queries});
      }
    }
  }
  scratch_.resize(static_cast<size_t>(slots * (op.head_dim + 2)));
  float* const out = scratch_.data();
  float* const maxima = out + slots * op.head_dim;
  float* const sums = maxima + slots;
  const int64_t q_stride = values_[static_cast<size_t>(op.x)].stride;
  pool_.run(static_cast<int64_t>(work.size()), [&](int64_t i) {
    const Work& w = work[static_cast<size_t>(i)];
    thread_local std::vector<float> scratch;
    scratch.resize(static_cast<size_t>(attention_scratch(w.queries * group, kSplit, op.head_dim)));
    const int32_t cache_group = cache_.group[static_cast<size_t>(layer)];
    kernels_->attend({at(op.x, w.first_query) + w.head * group * op.head_dim, q_stride, w.queries, group, op.head_dim, cache_.format,
                      cache_.data + cache_.index[static_cast<size_t>(layer)] * cache_.layer_bytes, cache_.page_bytes,
                      cache_.value_bytes, cache_.token_bytes, w.head * cache_.head_bytes,
                      step_.table + step_.table_start[w.sequence * step_.groups + cache_group], cache_.page_size,
                      step_.position[w.first_query], w.begin, w.end, w.live, op.window, op.scale, op.softcap, scratch.data(),
                      out + w.slot * op.head_dim, maxima + w.slot, sums + w.slot});
  });
  const float* const sinks = op.sinks < 0 ? nullptr : vectors_[static_cast<size_t>(op.sinks)].data();
  rows_of(static_cast<int64_t>(sets.size()), [&](int64_t i) {
    const auto& [from, parts, query, packed] = sets[static_cast<size_t>(i)];
    const int64_t head = packed >> 32, rows = (packed & 0xffffffff) * group;
    std::vector<const float*> pieces(static_cast<size_t>(parts));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t p = 0; p < parts; ++p) pieces[static_cast<size_t>(p)] = out + (from + p * rows + r) * op.head_dim;
      float* result = at(op.out, query + r / group) + (head * group + r % group) * op.head_dim;
      const float sink = sinks ? sinks[head * group + r % group] : -std::numeric_limits<float>::infinity();
      kernels_->combine(pieces.data(), maxima + from + r, sums + from + r, static_cast<int>(parts), rows, op.head_dim, sink, result);
      if (op.value_scale != 1.0f) std::for_each(result, result + op.head_dim, [&op](float& x) { x *= op.value_scale; });
    }
  });
}

}  // namespace ts
