// ChaCha20 (RFC 8439) with a 64-bit block counter, and Box-Muller: the words of noise_simd.cpp to the bit, and its
// formulas. A simdgroup draws a tile, one block a lane (normals.h).
constant uint NORMALS_PER_TILE = 320u;

inline void quarter_round(thread uint& a, thread uint& b, thread uint& c, thread uint& d) {
  a += b; d = rotate(d ^ a, 16u);
  c += d; b = rotate(b ^ c, 12u);
  a += b; d = rotate(d ^ a, 8u);
  c += d; b = rotate(b ^ c, 7u);
}

// Block `index` after the one that counter names (low word first).
inline void chacha20(constant uint* key, constant uint* counter, uint2 domain, ulong index, thread uint* x) {
  ulong block = ((ulong(counter[1]) << 32) | ulong(counter[0])) + index;
  x[0] = 0x61707865u; x[1] = 0x3320646eu; x[2] = 0x79622d32u; x[3] = 0x6b206574u;
  for (uint i = 0; i < 8u; i++) x[4u + i] = key[i];
  x[12] = uint(block); x[13] = uint(block >> 32); x[14] = domain.x; x[15] = domain.y;
  for (uint round = 0; round < 10u; round++) {
    quarter_round(x[0], x[4], x[8], x[12]);
    quarter_round(x[1], x[5], x[9], x[13]);
    quarter_round(x[2], x[6], x[10], x[14]);
    quarter_round(x[3], x[7], x[11], x[15]);
    quarter_round(x[0], x[5], x[10], x[15]);
    quarter_round(x[1], x[6], x[11], x[12]);
    quarter_round(x[2], x[7], x[8], x[13]);
    quarter_round(x[3], x[4], x[9], x[14]);
  }
  x[0] += 0x61707865u; x[1] += 0x3320646eu; x[2] += 0x79622d32u; x[3] += 0x6b206574u;
  for (uint i = 0; i < 8u; i++) x[4u + i] += key[i];
  x[12] += uint(block); x[13] += uint(block >> 32); x[14] += domain.x; x[15] += domain.y;
}

// sqrt(-2 ln u), u = (U + 1/2) 2^-64 with U = high:low; near u = 1 it starts from 1 - u.
inline float radius(uint high, uint low) {
  uint upper = uint(int(high) >> 31);  // all ones where u > 1/2
  float v = fma(float(high ^ upper), 2.3283064365386963e-10f,
                fma(float(low ^ upper), 5.421010862427522e-20f, 2.710505431213761e-20f));  // 2^-32, 2^-64, 2^-65
  float y = upper != 0u ? 1.0f - v : v;
  int bits = as_type<int>(y) - 0x3f3504f3;  // of sqrt(1/2)
  int exponent = bits >> 23;
  float mantissa = as_type<float>((bits & 0x7fffff) + 0x3f3504f3);
  float t = exponent == 0 ? -v : mantissa - 1.0f;
  float q = fma(t, 1.52435243e-1f, -2.58088678e-1f);
  q = fma(q, t, 2.64859945e-1f);
  q = fma(q, t, -2.83636540e-1f);
  q = fma(q, t, 3.32181633e-1f);
  q = fma(q, t, -4.00039464e-1f);
  q = fma(q, t, 5.00031650e-1f);
  q = fma(q, t, -6.66666508e-1f);
  q = fma(q, t, 9.99999762e-1f);
  q = fma(q, t, -2.0f);
  return precise::sqrt(fma(t, q, float(exponent) * -1.38629436f));
}

// radius * (cos, sin) of the angle that w tells.
inline float2 box_muller(uint high, uint low, uint w) {
  float phi = fma(float(int(w << 2)), 3.65729520e-10f, 7.31459040e-10f);  // pi 2^-33, pi 2^-32
  float z = phi * phi;
  float s = fma(z, -1.95152825e-4f, 8.33216030e-3f);
  s = fma(s, z, -1.66666552e-1f);
  s = fma(s, z, 1.0f) * phi;
  float c = fma(z, 2.43835711e-5f, -1.38866820e-3f);
  c = fma(c, z, 4.16666195e-2f);
  c = fma(c, z, -0.5f);
  c = fma(c, z, 1.0f);
  c = as_type<float>(as_type<uint>(c) ^ (w & 0x80000000u));
  bool swap = (w & 0x40000000u) != 0u;
  float r = radius(high, low);
  return r * float2(swap ? s : c, swap ? c : s);
}

// The ten normals of a block; normal j is number 320 tile + 32 j + lane of the stream.
inline void block_normals(
    constant uint* key, constant uint* counter, uint2 domain, ulong block, thread float* z) {
  uint x[16];
  chacha20(key, counter, domain, block, x);
  for (uint k = 0; k < 5u; k++) {
    float2 pair = box_muller(x[3u * k], x[3u * k + 1u], x[3u * k + 2u]);
    z[2u * k] = pair.x;
    z[2u * k + 1u] = pair.y;
  }
}

// By its bits, so that no setting of fast arithmetic loses it: 0 where sigma is 0, NaN where it is no finite number >= 0.
inline float valid_sigma(float sigma) {
  uint bits = as_type<uint>(sigma);
  if (bits == 0x80000000u) return 0.0f;
  return bits > 0x7f7fffffu ? as_type<float>(0x7fc00000u) : sigma;
}
inline bool is_zero(float sigma) { return as_type<uint>(sigma) == 0u; }
