// What is done to rows between projections: quantizing, norms, activations, rotation, and the largest of a row.
constexpr float kLeast = 4e-34f;  // below it 1 / scale may overflow, and no sum would feel the block

// NaN where one of the values is NaN or infinite, else 0.
inline float broken(F a, F b) { return sum(add(sub(a, a), sub(b, b))); }

// Blocks of 32: scale is the largest magnitude / 127, hi the rounded quotient, lo what it leaves in 1/256 steps.
// A block that holds NaN or an infinity has zeros for codes and NaN for its scale: every product with it is NaN.
void quantize(const float* x, int64_t cols, int8_t* hi, int8_t* lo, float* scale, int32_t* sums) {
  for (int64_t b = 0; b < cols / ts::kBlock; ++b, x += 32, hi += 32, lo += 32) {
    F v[2] = {load(x), load(x + 16)};
    const float flaw = broken(v[0], v[1]);
    if (flaw != 0) v[0] = v[1] = set(0.0f);
    float largest = max_lane(max(abs(v[0]), abs(v[1])));
    if (largest < kLeast) largest = 0;
    const float step = largest / 127.0f;
    const F inverse = set(largest > 0 ? 127.0f / largest : 0.0f);
    scale[b] = step / 256.0f + flaw;
    for (int h = 0; h < 2; ++h) {
      const F quotient = mul(v[h], inverse);
      const F whole = max(set(-127.0f), min(set(127.0f), round(quotient)));
      const F rest = max(set(-128.0f), min(set(127.0f), round(mul(sub(quotient, whole), set(256.0f)))));
      store_s8(hi + 16 * h, whole);
      store_s8(lo + 16 * h, rest);
      sums[2 * b + h] = static_cast<int32_t>(sum(fma(whole, set(256.0f), rest)));
    }
  }
}

// exp for float32: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2], relative error about 2e-7 (Cephes expf coefficients).
inline F exp(F x) {
  x = max(set(-103.0f), min(set(88.3f), x));
  const F n = round(mul(x, set(1.44269504088896341f)));
  F r = fma(n, set(-0.693359375f), x);
  r = fma(n, set(2.12194440e-4f), r);
  F p = set(1.9875691500e-4f);
  p = fma(p, r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  p = add(fma(mul(p, r), r, r), set(1.0f));
  return scale_by_power(p, n);
}

// The same for x <= 0, and exactly 0 where it would be too small to count, -inf included.
inline F exp_or_zero(F x) { return keep_above(exp(x), x, -87.0f); }

void rms_norm(const float* x, const float* weight, int64_t cols, float eps, float* out) {
  F a = set(0.0f), b = set(0.0f);
  int64_t i = 0;
  for (; i + 32 <= cols; i += 32) {
    const F u = load(x + i), v = load(x + i + 16);
    a = fma(u, u, a);
    b = fma(v, v, b);
  }
  float total = sum(add(a, b));
  for (; i < cols; ++i) total += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(total / static_cast<float>(cols) + eps);
  for (i = 0; i + 16 <= cols; i += 16) store(out + i, mul(mul(load(x + i), set(factor)), load(weight + i)));
  for (; i < cols; ++i) out[i] = x[i] * factor * weight[i];
}

void add_rows(const float* a, const float* b, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, add(load(a + i), load(b + i)));
  for (; i < n; ++i) out[i] = a[i] + b[i];
}

// silu(g) u, or the tanh form of gelu(g) times u; both are g / (1 + exp(-t)) u.
void act_mul(const float* gate, const float* up, int64_t n, bool silu, float* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const int count = static_cast<int>(std::min<int64_t>(16, n - i));
    const F g = load_some(gate + i, count), u = load_some(up + i, count);
    const F cubed = mul(mul(g, g), g);
    const F t = silu ? g : mul(set(1.5957691216057308f), fma(set(0.044715f), cubed, g));
    const F y = div(g, add(set(1.0f), exp(sub(set(0.0f), t))));
    store_some(out + i, mul(y, u), count);
  }
}

void swiglu_clamped(const float* gate, const float* up, int64_t n, float alpha, float limit, float* out) {
  const F one = set(1.0f), top = set(limit), bottom = set(-limit);
  for (int64_t i = 0; i < n; i += 16) {
    const int count = static_cast<int>(std::min<int64_t>(16, n - i));
    const F g = min(top, load_some(gate + i, count)), u = max(bottom, min(top, load_some(up + i, count)));
    const F y = div(g, add(one, exp(mul(set(-alpha), g))));
    store_some(out + i, mul(y, add(u, one)), count);
  }
}

void rotate(float* head, const float* cosines, const float* sines, int half) {
  for (int i = 0; i < half; i += 16) {
    const int count = std::min(16, half - i);
    const F a = load_some(head + i, count), b = load_some(head + half + i, count);
    const F c = load_some(cosines + i, count), s = load_some(sines + i, count);
    store_some(head + i, sub(mul(a, c), mul(b, s)), count);
    store_some(head + half + i, add(mul(b, c), mul(a, s)), count);
  }
}

void to_bf16(const float* x, int64_t n, uint16_t* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store_bf16(out + i, load(x + i));
  if (i < n) {
    uint16_t rest[16];
    store_bf16(rest, load_some(x + i, static_cast<int>(n - i)));
    std::memcpy(out + i, rest, 2 * static_cast<size_t>(n - i));
  }
}

// Of equal largest values the first.
int64_t argmax(const float* x, int64_t n) {
  float best = -std::numeric_limits<float>::infinity();
  int64_t at = 0, i = 0;
  for (; i + 64 <= n; i += 64) {
    const F top = max(max(load(x + i), load(x + i + 16)), max(load(x + i + 32), load(x + i + 48)));
    const float value = max_lane(top);
    if (value > best) {
      best = value;
      for (int j = 0; j < 64; ++j) if (x[i + j] == value) { at = i + j; break; }
    }
  }
  for (; i < n; ++i) if (x[i] > best) { best = x[i]; at = i; }
  return at;
}
