// Gumbel noise as tokenspeed/runner/noise.py defines it: Philox4x32-10 words, then -log(-log(1 - u)), in float32.

// Natural logarithm of normal positive numbers, relative error a few 1e-7 also near 1 (Cephes logf coefficients).
inline F log(F x) {
  const I root = int_set(-0x3f3504f3);  // so that what the exponent leaves lies in [sqrt(1/2), sqrt(2))
  const I exponent = int_shift_right<23>(int_add(bits_of(x), root));
  const F e = to_float(exponent);
  const F f = sub(float_of_bits(int_add(bits_of(x), int_shift<23>(int_add(int_xor(exponent, int_set(-1)), int_set(1))))), set(1.0f));
  F p = fma(set(7.0376836292e-2f), f, set(-1.1514610310e-1f));
  p = fma(p, f, set(1.1676998740e-1f));
  p = fma(p, f, set(-1.2420140846e-1f));
  p = fma(p, f, set(1.4249322787e-1f));
  p = fma(p, f, set(-1.6668057665e-1f));
  p = fma(p, f, set(2.0000714765e-1f));
  p = fma(p, f, set(-2.4999993993e-1f));
  p = fma(p, f, set(3.3333331174e-1f));
  const F square = mul(f, f);
  const F low = fma(e, set(-2.12194440e-4f), mul(square, fma(p, f, set(-0.5f))));
  return fma(e, set(0.693359375f), add(f, low));
}

// Sixteen blocks of four words; counter (block, position, sample, 0).
inline void philox(const ts::NoiseKey& key, uint32_t first, I (&c)[4]) {
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32), blocks[16];
  for (uint32_t i = 0; i < 16; ++i) blocks[i] = first + i;
  std::memcpy(&c[0], blocks, 64);
  c[1] = int_set(static_cast<int32_t>(key.position));
  c[2] = int_set(static_cast<int32_t>(key.sample));
  c[3] = int_set(0);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    I high0, low0, high1, low1;
    mul_wide(c[0], 0xD2511F53u, &high0, &low0);
    mul_wide(c[2], 0xCD9E8D57u, &high1, &low1);
    c[0] = int_xor(int_xor(high1, c[1]), int_set(static_cast<int32_t>(k0)));
    c[1] = low1;
    c[2] = int_xor(int_xor(high0, c[3]), int_set(static_cast<int32_t>(k1)));
    c[3] = low0;
  }
}

void gumbel(const ts::NoiseKey& key, int64_t first, float* out) {
  I words[4];
  philox(key, static_cast<uint32_t>(first / 4), words);
  float noise[4][16];
  for (int j = 0; j < 4; ++j) {
    const F u = min(mul(add(unsigned_to_float(words[j]), set(0.5f)), set(0x1p-32f)), set(1.0f - 0x1p-24f));
    const F rest = sub(set(1.0f), u), taken = max(sub(set(1.0f), rest), set(0x1p-24f));
    const F t = max(u, mul(sub(set(0.0f), log(rest)), div(u, taken)));  // -log(1 - u), which is u where 1 - u is 1
    store(noise[j], sub(set(0.0f), log(t)));
  }
  for (int i = 0; i < 16; ++i) for (int j = 0; j < 4; ++j) out[4 * i + j] = noise[j][i];
}

// A tile of 64 logits, filled up where it has fewer.
struct LogitTile {
  LogitTile(const float* x, int64_t n, float filler) : at(x) {
    if (n == 64) return;
    std::fill(std::copy(x, x + n, filled), filled + 64, filler);
    at = filled;
  }
  float filled[64];
  const float* at;
};

// The largest of each 64 logits; NaN where one of them is not finite.
void tile_maxima(const float* x, int64_t n, float* out) {
  for (; n > 0; x += 64, n -= 64) {
    const LogitTile tile(x, std::min<int64_t>(n, 64), std::numeric_limits<float>::lowest());
    const F a = load(tile.at), b = load(tile.at + 16), c = load(tile.at + 32), d = load(tile.at + 48);
    *out++ = max_lane(max(max(a, b), max(c, d))) + broken(a, b) + broken(c, d);
  }
}

// Up to 64 logits over the temperature are added to as many values; gives the largest sum.
float add_scaled(const float* x, int64_t n, float temperature, float* values) {
  const float none = -std::numeric_limits<float>::infinity();
  const LogitTile tile(x, n, none);
  F most = set(none);
  for (int i = 0; i < 64; i += 16) {
    const F sum = add(div(load(tile.at + i), set(temperature)), load(values + i));
    store(values + i, sum);
    most = max(sum, most);  // of a sum that is no number, what was there
  }
  return max_lane(most);
}

// The sum of exp(x / temperature - best) over those of up to 64 logits for which x / temperature > above.
float mass(const float* x, int64_t n, float temperature, float best, float above) {
  const LogitTile tile(x, n, -std::numeric_limits<float>::infinity());
  F total = set(0.0f);
  for (int i = 0; i < 64; i += 16) {
    const F value = div(load(tile.at + i), set(temperature));
    total = add(total, keep_above(exp_or_zero(sub(value, set(best))), value, above));
  }
  return sum(total);
}
