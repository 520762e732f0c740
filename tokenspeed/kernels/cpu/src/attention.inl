// Attention over pages, one task at a time, and the parts of a row put together.
constexpr int kChunk = 16;  // keys whose entries stay in the first cache while all rows use them

inline float bf16_at(const void* p, int i) {
  uint16_t half;
  std::memcpy(&half, static_cast<const uint8_t*>(p) + 2 * i, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// fn(0) to fn(N - 1) without a loop: of nested loops compilers leave the arrays of vectors in memory.
template <int... I, class Fn>
inline void each(std::integer_sequence<int, I...>, const Fn& fn) { (fn(std::integral_constant<int, I>()), ...); }
template <int N, class Fn>
inline void repeat(const Fn& fn) { each(std::make_integer_sequence<int, N>(), fn); }

// What a stored value is to be multiplied by.
template <class T>
constexpr float kUnit = std::is_same_v<T, uint8_t> ? 256.0f : 1.0f;

// Sixteen values of an entry, from column d on.
inline F widen_half(const float* entry, int d, int) { return load(entry + d); }
inline F widen_half(const uint16_t* entry, int d, int) { return load_bf16(entry + d); }
inline F widen_half(const int8_t* entry, int d, int head_dim) { return mul(load_s8(entry + d), set(bf16_at(entry + head_dim, d / ts::kBlock))); }
inline F widen_half(const uint8_t* entry, int d, int) { return load_e4m3(entry + d); }

// Thirty-two. Those of bfloat16 are taken apart, even columns and odd ones: it is cheaper, and queries and sums of values
// are kept in that order too.
template <class T>
inline void widen(const T* entry, int d, int head_dim, F* x) {
  if constexpr (std::is_same_v<T, uint16_t>) {
    load_bf16_apart(entry + d, x, x + 1);
  } else {
    x[0] = widen_half(entry, d, head_dim);
    x[1] = widen_half(entry, d + 16, head_dim);
  }
}

template <class T>
inline void order(const float* row, int head_dim, float* out) {
  int d = 0;
  for (; std::is_same_v<T, uint16_t> && d + 32 <= head_dim; d += 32) {
    F even, odd;
    take_apart(load(row + d), load(row + d + 16), &even, &odd);
    store(out + d, even);
    store(out + d + 16, odd);
  }
  for (; d < head_dim; d += 16) store(out + d, load(row + d));
}

template <class T>
inline void order_back(float* row, int head_dim) {
  int d = 0;
  for (; std::is_same_v<T, uint16_t> && d + 32 <= head_dim; d += 32) {
    F first, second;
    put_together(load(row + d), load(row + d + 16), &first, &second);
    store(row + d, first);
    store(row + d + 16, second);
  }
  if (kUnit<T> == 1.0f) return;
  for (d = 0; d < head_dim; d += 16) store(row + d, mul(load(row + d), set(kUnit<T>)));
}

inline int64_t first_key(const ts::AttentionTask& t) { return t.live - (t.live - t.begin) % kChunk; }  // of the first chunk
inline int64_t chunks_of(const ts::AttentionTask& t) { return (t.end - first_key(t) + kChunk - 1) / kChunk; }

// Where the entries of a chunk lie: first all chunks of keys, then all of values. In place of one that no query sees, which
// must not be read, is the nearest that one may see.
struct Chunk {
  const uint8_t* entry[kChunk];
};

inline Chunk find_chunk(const ts::AttentionTask& t, int64_t index) {
  const int64_t all = chunks_of(t);
  const int64_t first = first_key(t) + index % all * kChunk;
  int64_t key = std::max(first, t.live), page = key / t.page_size, place = key % t.page_size;
  const uint8_t* layer = t.kv + t.head_bytes + (index < all ? 0 : t.value_bytes);
  const uint8_t* at = layer + t.table[page] * t.page_bytes + place * t.token_bytes;
  Chunk chunk;
  for (int n = 0; n < kChunk; ++n) {
    chunk.entry[n] = at;
    if (first + n < key || key + 1 >= t.end) continue;
    ++key;
    at += t.token_bytes;
    if (++place == t.page_size) {
      place = 0;
      at = layer + t.table[++page] * t.page_bytes;
    }
  }
  return chunk;
}

// Fetch the lines of 32 columns. Pages are strewn over the arena, where the hardware's own prefetch ends with each of them.
// To the second cache: the first has room for some twenty requests at a time, and then everything waits (Zen 4).
template <class T>
inline void fetch(const uint8_t* entry, int d) {
  for (size_t at = 0; at < 32 * sizeof(T); at += 64) __builtin_prefetch(entry + static_cast<size_t>(d) * sizeof(T) + at, 0, 2);
}

// Dot products of Q rows and K keys, their sums kept apart: those of row i and key j in sums[i * stride + j].
template <class T, int Q, int K, bool Ahead>
inline void score_block(const float* q, const uint8_t* const* entry, const uint8_t* const* next, int head_dim, F* sums, int stride) {
  F acc[Q][K];
  for (auto& row : acc) for (auto& x : row) x = set(0.0f);
  int d = 0;
  for (; d + 32 <= head_dim; d += 32) {
    F rows[Q][2];
    for (int i = 0; i < Q; ++i) for (int h = 0; h < 2; ++h) rows[i][h] = load(q + i * head_dim + d + 16 * h);
    repeat<K>([&](auto j) {
      F key[2];
      widen(reinterpret_cast<const T*>(entry[j.value]), d, head_dim, key);
      if constexpr (Ahead) fetch<T>(next[j.value], d);
      for (int h = 0; h < 2; ++h) for (int i = 0; i < Q; ++i) acc[i][j.value] = fma(rows[i][h], key[h], acc[i][j.value]);
    });
  }
  for (; d < head_dim; d += 16) {
    for (int j = 0; j < K; ++j) {
      const F key = widen_half(reinterpret_cast<const T*>(entry[j]), d, head_dim);
      for (int i = 0; i < Q; ++i) acc[i][j] = fma(load(q + i * head_dim + d), key, acc[i][j]);
    }
  }
  for (int i = 0; i < Q; ++i) for (int j = 0; j < K; ++j) sums[i * stride + j] = acc[i][j];
}

// cap * tanh(x / cap) as cap (1 - 2 / (1 + exp(2 x / cap))).
inline F capped(F x, float cap) {
  const F above = add(set(1.0f), exp(mul(x, set(2.0f / cap))));
  return sub(set(cap), div(set(2.0f * cap), above));
}

// Scores of Q rows and 16 / Q keys: lane 16 / Q * i + j is that of row i and key j.
template <class T, int Q, bool Ahead>
inline F score_keys(const ts::AttentionTask& t, const float* q, const uint8_t* const* entry, const uint8_t* const* next) {
  constexpr int K = 16 / Q, part = std::min(K, 8);
  F sums[16];
  for (int j = 0; j < K; j += part) score_block<T, Q, part, Ahead>(q, entry + j, next + j, t.head_dim, sums + j, K);
  const F scores = mul(sums_of_16(sums), set(t.scale * kUnit<T>));
  return t.softcap > 0 ? capped(scores, t.softcap) : scores;
}

// work(how many rows, whether they are the first, the first of them) for all rows. The first fetch for all.
template <class Work>
inline void by_rows(int rows, const Work& work) {
  const std::integral_constant<int, 4> four;
  const std::integral_constant<int, 2> two;
  const std::integral_constant<int, 1> one;
  int row = rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
  if (row == 4) work(four, std::true_type(), 0);
  else if (row == 2) work(two, std::true_type(), 0);
  else work(one, std::true_type(), 0);
  for (; row + 4 <= rows; row += 4) work(four, std::false_type(), row);
  for (; row + 2 <= rows; row += 2) work(two, std::false_type(), row);
  if (row < rows) work(one, std::false_type(), row);
}

struct Seen {  // keys from first to before last
  int64_t first, last;
};

// Of what the task covers.
inline Seen seen_by(const ts::AttentionTask& t, int row) {
  const int64_t query = t.first_position + row / t.group;
  return {t.window ? std::max(t.live, query - t.window + 1) : t.live, std::min(t.end, query + 1)};
}

// Scores of Q rows and the chunk that begins at position `begin`; those that a row does not see are left as they are.
template <class T, int Q, bool Ahead>
inline void score_rows(const ts::AttentionTask& t, const float* q, int row, int64_t begin, const Chunk& chunk, const Chunk& next, int64_t width) {
  constexpr int K = 16 / Q;
  const Seen low = seen_by(t, row), high = seen_by(t, row + Q - 1);
  for (int n = 0; n < kChunk && begin + n < high.last; n += K) {
    float cells[16];
    store(cells, score_keys<T, Q, Ahead>(t, q + row * t.head_dim, chunk.entry + n, next.entry + n));
    const int64_t key = begin + n;
    float* out = t.scratch + row * width + key - t.begin;
    if (key >= high.first && key + K <= low.last) {
      for (int i = 0; i < Q; ++i) std::memcpy(out + i * width, cells + i * K, sizeof(float) * K);
      continue;
    }
    for (int i = 0; i < Q; ++i) {
      const Seen seen = seen_by(t, row + i);
      const int64_t to = std::min<int64_t>(K, seen.last - key);
      for (int64_t j = std::max<int64_t>(0, seen.first - key); j < to; ++j) out[i * width + j] = cells[i * K + j];
    }
  }
}

// While a chunk is used, the next is fetched; after the last one of keys that is the first one of values.
template <class T>
void score(const ts::AttentionTask& t, const float* q, int rows, int64_t width) {
  std::fill_n(t.scratch, rows * width, -std::numeric_limits<float>::infinity());
  Chunk next = find_chunk(t, 0);
  for (const uint8_t* entry : next.entry) for (int d = 0; d < t.head_dim; d += 32) fetch<T>(entry, d);
  for (int64_t i = 0; i < chunks_of(t); ++i) {
    const Chunk chunk = next;
    next = find_chunk(t, i + 1);
    by_rows(rows, [&](auto count, auto first, int row) {
      score_rows<T, count.value, first.value>(t, q, row, first_key(t) + i * kChunk, chunk, next, width);
    });
  }
}

// exp(s - max) in place; a row that sees no key here has max -inf and sum 0.
void soften(const ts::AttentionTask& t, int rows, int64_t width) {
  const float none = -std::numeric_limits<float>::infinity();
  for (int r = 0; r < rows; ++r) {
    float* s = t.scratch + r * width;
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

// Add a chunk's values, from the n-th to before the end, to 32 V columns of Q rows.
template <class T, int Q, int V, bool Ahead>
inline void weigh_block(const ts::AttentionTask& t, float* out, int d, const float* weights, int64_t width, const Chunk& chunk, const Chunk& next, int n, int end) {
  F acc[Q][2 * V];
  for (int i = 0; i < Q; ++i) for (int h = 0; h < 2 * V; ++h) acc[i][h] = load(out + i * t.head_dim + d + 16 * h);
  for (; n < end; ++n) {
    F values[2 * V];
    for (int h = 0; h < V; ++h) {
      widen(reinterpret_cast<const T*>(chunk.entry[n]), d + 32 * h, t.head_dim, values + 2 * h);
      if constexpr (Ahead) fetch<T>(next.entry[n], d + 32 * h);
    }
    for (int i = 0; i < Q; ++i) {
      const F p = set(weights[i * width + n]);
      for (int h = 0; h < 2 * V; ++h) acc[i][h] = fma(p, values[h], acc[i][h]);
    }
  }
  for (int i = 0; i < Q; ++i) for (int h = 0; h < 2 * V; ++h) store(out + i * t.head_dim + d + 16 * h, acc[i][h]);
}

// The last sixteen columns, where they are not 32.
template <class T>
inline void weigh_rest(float* out, int d, int head_dim, const float* weights, const Chunk& chunk, int n, int end) {
  F acc = load(out + d);
  for (; n < end; ++n) acc = fma(set(weights[n]), widen_half(reinterpret_cast<const T*>(chunk.entry[n]), d, head_dim), acc);
  store(out + d, acc);
}

template <class T, int Q, bool Ahead>
inline void weigh_rows(const ts::AttentionTask& t, int row, int64_t begin, const Chunk& chunk, const Chunk& next, int64_t width) {
  const float* weights = t.scratch + row * width + begin - t.begin;
  float* out = t.out + row * t.head_dim;
  const int from = static_cast<int>(std::max<int64_t>(0, t.live - begin));
  const int to = static_cast<int>(std::min<int64_t>(kChunk, seen_by(t, row + Q - 1).last - begin));
  int d = 0;
  for (; d + 64 <= t.head_dim; d += 64) weigh_block<T, Q, 2, Ahead>(t, out, d, weights, width, chunk, next, from, to);
  for (; d + 32 <= t.head_dim; d += 32) weigh_block<T, Q, 1, Ahead>(t, out, d, weights, width, chunk, next, from, to);
  for (int i = 0; d < t.head_dim && i < Q; ++i) weigh_rest<T>(out + i * t.head_dim, d, t.head_dim, weights + i * width, chunk, from, to);
}

template <class T>
void weigh(const ts::AttentionTask& t, int rows, int64_t width) {
  std::fill_n(t.out, rows * t.head_dim, 0.0f);
  const int64_t all = chunks_of(t);
  Chunk next = find_chunk(t, all);
  for (int64_t i = 0; i < all; ++i) {
    const Chunk chunk = next;
    next = find_chunk(t, std::min(all + i + 1, 2 * all - 1));
    by_rows(rows, [&](auto count, auto first, int row) {
      weigh_rows<T, count.value, first.value>(t, row, first_key(t) + i * kChunk, chunk, next, width);
    });
  }
  for (int row = 0; row < rows; ++row) order_back<T>(t.out + row * t.head_dim, t.head_dim);
}

template <class T>
void attend_to(const ts::AttentionTask& t) {
  const int rows = t.queries * t.group;
  const int64_t width = (t.end - t.begin + 15) / 16 * 16;
  float* const q = t.scratch + rows * width;
  for (int r = 0; r < rows; ++r) order<T>(t.q + r / t.group * t.q_stride + r % t.group * t.head_dim, t.head_dim, q + r * t.head_dim);
  score<T>(t, q, rows, width);
  soften(t, rows, width);
  weigh<T>(t, rows, width);
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
void combine(const float* const* out, const float* maxima, const float* sums, int parts, int64_t stride, int head_dim, float sink,
             float* result) {
  float top = sink;
  for (int p = 0; p < parts; ++p) top = std::max(top, maxima[p * stride]);
  float total = sink == -std::numeric_limits<float>::infinity() ? 0.0f : std::exp(sink - top);
  for (int i = 0; i < head_dim; i += 16) store(result + i, set(0.0f));
  for (int p = 0; p < parts; ++p) {
    if (sums[p * stride] == 0.0f) continue;
    const float factor = std::exp(maxima[p * stride] - top);
    total += factor * sums[p * stride];
    for (int i = 0; i < head_dim; i += 16) store(result + i, fma(set(factor), load(out[p] + i), load(result + i)));
  }
  for (int i = 0; i < head_dim; i += 16) store(result + i, mul(load(result + i), set(1.0f / total)));
}
