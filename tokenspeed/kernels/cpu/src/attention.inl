// Attention over pages, one task at a time, and the parts of a row put together.
// A type of this file's own: functions of a vector of any other would be linked once for all instruction sets.
struct Place {
  const uint8_t* entry;
};

// Where the task's keys lie, by position - begin, from `live` on. A division per key would cost more than its sums.
inline const Place* find_keys(const ts::AttentionTask& t) {
  thread_local std::vector<Place> places;
  places.resize(static_cast<size_t>(t.end - t.begin));
  int64_t page = t.live / t.page_size, offset = t.live % t.page_size;
  for (int64_t key = t.live; key < t.end; ++key) {
    places[static_cast<size_t>(key - t.begin)].entry = t.kv + t.table[page] * t.page_bytes + offset * t.token_bytes + t.head_bytes;
    if (++offset == t.page_size) {
      offset = 0;
      ++page;
    }
  }
  return places.data();
}

inline float bf16_at(const void* p, int i) {
  uint16_t half;
  std::memcpy(&half, static_cast<const uint8_t*>(p) + 2 * i, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Sixteen values of an entry, from column d on.
inline F widen(const float* entry, int d, int) { return load(entry + d); }
inline F widen(const uint16_t* entry, int d, int) { return load_bf16(entry + d); }
inline F widen(const int8_t* entry, int d, int head_dim) { return mul(load_s8(entry + d), set(bf16_at(entry + head_dim, d / ts::kBlock))); }
inline F widen(const uint8_t* entry, int d, int) { return mul(load_e4m3(entry + d), set(256.0f)); }

// Dot products of Q query rows and K keys, the sums kept apart until the end.
template <class T, int Q, int K>
inline void score_block(const float* const* q, const T* const* k, int head_dim, float (*out)[4]) {
  F acc[Q][K];
  for (auto& row : acc) for (auto& x : row) x = set(0.0f);
  for (int d = 0; d < head_dim; d += 16) {
    F keys[K];
    for (int j = 0; j < K; ++j) keys[j] = widen(k[j], d, head_dim);
    for (int i = 0; i < Q; ++i) {
      const F x = load(q[i] + d);
      for (int j = 0; j < K; ++j) acc[i][j] = fma(x, keys[j], acc[i][j]);
    }
  }
  for (int i = 0; i < Q; ++i) for (int j = 0; j < K; ++j) out[i][j] = sum(acc[i][j]);
}

template <class T>
inline void score_some(int rows, int keys, const float* const* q, const T* const* k, int head_dim, float (*out)[4]) {
  if (rows == 4 && keys == 4) return score_block<T, 4, 4>(q, k, head_dim, out);
  for (int i = 0; i < rows; ++i) {
    if (keys == 4) {
      score_block<T, 1, 4>(q + i, k, head_dim, out + i);
    } else {
      for (int j = 0; j < keys; ++j) {
        float cell[1][4];
        score_block<T, 1, 1>(q + i, k + j, head_dim, cell);
        out[i][j] = cell[0][0];
      }
    }
  }
}

inline bool sees(const ts::AttentionTask& t, int64_t query, int64_t key) {
  return key <= query && (t.window == 0 || key > query - t.window);
}

// Entries lie a few hundred bytes each in pages strewn over the arena, where the hardware's own prefetch finds nothing:
// while four keys are used, their values are fetched, and the keys of two blocks on.
inline void fetch(const ts::AttentionTask& t, const Place* keys, int64_t key) {
  constexpr int64_t ahead = 8;
  const int64_t bytes = kv_entry_bytes(t.format, t.head_dim);
  for (int64_t k = key; k < std::min(t.end, key + 4); ++k) {
    const uint8_t* value = keys[k - t.begin].entry + t.value_bytes;
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(value + at);
    if (k + ahead >= t.end) continue;
    const uint8_t* next = keys[k + ahead - t.begin].entry;
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(next + at);
  }
}

// Scores of up to four rows; a key that a row does not see gets -inf.
template <class T>
void scores_of(const ts::AttentionTask& t, const Place* keys, int first, int rows, int64_t width) {
  const float none = -std::numeric_limits<float>::infinity();
  const float* q[4];
  for (int i = 0; i < rows; ++i) q[i] = t.q + (first + i) / t.group * t.q_stride + (first + i) % t.group * t.head_dim;
  for (int i = 0; i < rows; ++i) std::fill_n(t.scores + (first + i) * width, width, none);
  const int64_t last = t.first_position + (first + rows - 1) / t.group;
  const int64_t end = std::min(t.end, last + 1);
  for (int64_t key = t.live; key < end; key += 4) {
    const int some = static_cast<int>(std::min<int64_t>(4, end - key));
    if (first == 0) fetch(t, keys, key);
    const T* k[4];
    for (int n = 0; n < some; ++n) k[n] = reinterpret_cast<const T*>(keys[key + n - t.begin].entry);
    float cells[4][4];
    score_some<T>(rows, some, q, k, t.head_dim, cells);
    for (int i = 0; i < rows; ++i) {
      const int64_t query = t.first_position + (first + i) / t.group;
      float* out = t.scores + (first + i) * width + key - t.begin;
      for (int n = 0; n < some; ++n) if (sees(t, query, key + n)) out[n] = cells[i][n] * t.scale;
    }
  }
}

// exp(s - max) in place; a row that sees no key here has max -inf and sum 0.
void soften(const ts::AttentionTask& t, int rows, int64_t width) {
  const float none = -std::numeric_limits<float>::infinity();
  for (int r = 0; r < rows; ++r) {
    float* s = t.scores + r * width;
    F top = set(none);
    for (int64_t j = 0; j < width; j += 16) top = max(top, load(s + j));
    t.max[r] = max_lane(top);
    t.sum[r] = 0.0f;
    if (t.max[r] == none) continue;
    F total = set(0.0f);
    for (int64_t j = 0; j < width; j += 16) {
      const F e = exp_or_zero(sub(load(s + j), set(t.max[r])));
      store(s + j, e);
      total = add(total, e);
    }
    t.sum[r] = sum(total);
  }
}

template <class T, int Q, int V>
inline void weigh_block(const ts::AttentionTask& t, const Place* keys, int first, int d, int64_t width) {
  F acc[Q][V];
  for (auto& row : acc) for (auto& x : row) x = set(0.0f);
  const int64_t end = std::min(t.end, t.first_position + (first + Q - 1) / t.group + 1);
  for (int64_t key = t.live; key < end; ++key) {
    const T* v = reinterpret_cast<const T*>(keys[key - t.begin].entry + t.value_bytes);
    F values[V];
    for (int n = 0; n < V; ++n) values[n] = widen(v, d + 16 * n, t.head_dim);
    for (int i = 0; i < Q; ++i) {
      const F p = set(t.scores[(first + i) * width + key - t.begin]);
      for (int n = 0; n < V; ++n) acc[i][n] = fma(p, values[n], acc[i][n]);
    }
  }
  for (int i = 0; i < Q; ++i) for (int n = 0; n < V; ++n) store(t.out + (first + i) * t.head_dim + d + 16 * n, acc[i][n]);
}

template <class T, int Q>
void weigh(const ts::AttentionTask& t, const Place* keys, int first, int64_t width) {
  int d = 0;
  for (; d + 64 <= t.head_dim; d += 64) weigh_block<T, Q, 4>(t, keys, first, d, width);
  for (; d < t.head_dim; d += 16) weigh_block<T, Q, 1>(t, keys, first, d, width);
}

template <class T>
void attend_to(const ts::AttentionTask& t) {
  const int rows = t.queries * t.group;
  const int64_t width = (t.end - t.begin + 15) / 16 * 16;
  const Place* const keys = find_keys(t);
  for (int first = 0; first < rows; first += 4) scores_of<T>(t, keys, first, std::min(4, rows - first), width);
  soften(t, rows, width);
  int first = 0;
  for (; first + 4 <= rows; first += 4) weigh<T, 4>(t, keys, first, width);
  for (; first < rows; ++first) weigh<T, 1>(t, keys, first, width);
}

void attend(const ts::AttentionTask& t) {
  switch (t.format) {
    case KvFormat::F32: return attend_to<float>(t);
    case KvFormat::BF16: return attend_to<uint16_t>(t);
    case KvFormat::Int8: return attend_to<int8_t>(t);
    case KvFormat::Fp8: return attend_to<uint8_t>(t);
  }
}

// Scale: the largest magnitude of a block / 127, rounded first. A block too small for a normal scale becomes zeros;
// one that holds NaN or an infinity zeros with NaN for its scale.
inline void store_int8(const float* x, int head_dim, int8_t* out) {
  for (int from = 0; from < head_dim; from += ts::kBlock) {
    const int end = std::min(head_dim, from + ts::kBlock);
    F top = set(0.0f);
    bool flaw = false;
    for (int i = from; i < end; i += 16) {
      top = max(top, abs(load(x + i)));
      flaw |= broken(load(x + i), set(0.0f)) != 0;
    }
    const float least = std::numeric_limits<float>::min(), largest = max_lane(top) / 127.0f;
    uint16_t half = 0x7fc0;  // NaN
    if (!flaw) to_bf16(&largest, 1, &half);
    const float scale = bf16_at(&half, 0);
    const F inverse = set(scale >= least ? 1.0f / scale : 0.0f);
    for (int i = from; i < end; i += 16) {
      const F codes = flaw ? set(0.0f) : mul(load(x + i), inverse);
      store_s8(out + i, max(set(-127.0f), min(set(127.0f), round(codes))));
    }
    std::memcpy(out + head_dim + from / ts::kBlock * 2, &half, 2);
  }
}

// To e4m3, nearest even; what is beyond 448, its largest, becomes that.
inline uint8_t to_e4m3(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 24 & 0x80;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint8_t>(sign | 0x7f);
  const float magnitude = std::min(std::fabs(x), 448.0f);
  const float shifted = magnitude * 512.0f + 8388608.0f;  // below 2^-6 steps are 2^-9: 2^23 has steps of 1
  uint32_t small, normal;
  std::memcpy(&small, &shifted, 4);
  std::memcpy(&normal, &magnitude, 4);
  normal = (normal + 0x7ffff + (normal >> 20 & 1)) >> 20;
  return static_cast<uint8_t>(sign | (magnitude < 0.015625f ? small & 15 : normal - (120 << 3)));
}

void store_kv(KvFormat format, const float* x, int head_dim, uint8_t* out) {
  switch (format) {
    case KvFormat::F32: std::memcpy(out, x, sizeof(float) * static_cast<size_t>(head_dim)); return;
    case KvFormat::BF16: return to_bf16(x, head_dim, reinterpret_cast<uint16_t*>(out));
    case KvFormat::Int8: return store_int8(x, head_dim, reinterpret_cast<int8_t*>(out));
    case KvFormat::Fp8:
      for (int i = 0; i < head_dim; ++i) out[i] = to_e4m3(x[i]);
  }
}

// One row's parts, in order, to their softmax-weighted mean.
void combine(const float* const* out, const float* maxima, const float* sums, int parts, int64_t stride, int head_dim, float* result) {
  float top = -std::numeric_limits<float>::infinity(), total = 0.0f;
  for (int p = 0; p < parts; ++p) top = std::max(top, maxima[p * stride]);
  for (int i = 0; i < head_dim; i += 16) store(result + i, set(0.0f));
  for (int p = 0; p < parts; ++p) {
    if (sums[p * stride] == 0.0f) continue;
    const float factor = std::exp(maxima[p * stride] - top);
    total += factor * sums[p * stride];
    for (int i = 0; i < head_dim; i += 16) store(result + i, fma(set(factor), load(out[p] + i), load(result + i)));
  }
  for (int i = 0; i < head_dim; i += 16) store(result + i, mul(load(result + i), set(1.0f / total)));
}
