// ChaCha20 and Box-Muller in vectors, and the storage types: what the kernels that draw noise are made of. For
// _simd.cpp files alone, each of which gets its own copy.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
  #include <immintrin.h>
#elif defined(__aarch64__)
  #include <arm_neon.h>
#else
  #error "the noise kernels know x86-64 and arm64"
#endif

#include "noise/normals.h"

namespace bulwark::BULWARK_ISA {
namespace {
#define INLINE inline __attribute__((always_inline))

// Vectors of the machine's own width; a lane is a block.
#if defined(__AVX512F__)
constexpr int BYTES = 64;
constexpr __mmask16 ALL = 0xffff;  // the unmasked intrinsics draw a false warning from GCC 12
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int LANES = BYTES / 4;
constexpr int GROUPS = BYTES == 64 ? 2 : 1;  // vectors of blocks at once: 32 registers hold two states
typedef uint32_t Words __attribute__((vector_size(BYTES)));
typedef int32_t Ints __attribute__((vector_size(BYTES)));
typedef float Floats __attribute__((vector_size(BYTES)));
typedef uint16_t Halves __attribute__((vector_size(BYTES / 2)));

template <typename V>
INLINE V load_bits(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE Words splat(uint32_t x) { return Words{} + x; }

// ---- ChaCha20

template <int N>
INLINE uint32_t rotate(uint32_t x) {
  return x << N | x >> (32 - N);
}

template <int N>
INLINE Words rotate(Words x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (N == 16 || N == 8) {  // one byte shuffle in place of two shifts and an or
    const long long lo = N == 16 ? 0x0504070601000302 : 0x0605040702010003;
    const long long hi = N == 16 ? 0x0D0C0F0E09080B0A : 0x0E0D0C0F0A09080B;
    return (Words)_mm256_shuffle_epi8((__m256i)x, _mm256_setr_epi64x(lo, hi, lo, hi));
  }
#endif
  return x << N | x >> (32 - N);
}

template <typename V>
INLINE void quarter_round(V& a, V& b, V& c, V& d) {
  a += b, d = rotate<16>(d ^ a);
  c += d, b = rotate<12>(b ^ c);
  a += b, d = rotate<8>(d ^ a);
  c += d, b = rotate<7>(b ^ c);
}

// What all blocks of a stream share: the constant words, and these after the first quarter rounds of columns 2 and 3,
// which no counter reaches.
struct Constants {
  explicit Constants(const NoiseStream& s) {
    const uint32_t head[4] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
    memcpy(start, head, sizeof head);
    memcpy(start + 4, s.key, sizeof s.key);
    memcpy(start + 14, s.domain, sizeof s.domain);
    memcpy(later, start, sizeof start);
    quarter_round(later[2], later[6], later[10], later[14]);
    quarter_round(later[3], later[7], later[11], later[15]);
  }
  uint32_t start[16] = {}, later[16];
};

INLINE void columns_0_and_1(Words* x) {
  quarter_round(x[0], x[4], x[8], x[12]);
  quarter_round(x[1], x[5], x[9], x[13]);
}
INLINE void columns_2_and_3(Words* x) {
  quarter_round(x[2], x[6], x[10], x[14]);
  quarter_round(x[3], x[7], x[11], x[15]);
}
INLINE void diagonals(Words* x) {
  quarter_round(x[0], x[5], x[10], x[15]);
  quarter_round(x[1], x[6], x[11], x[12]);
  quarter_round(x[2], x[7], x[8], x[13]);
  quarter_round(x[3], x[4], x[9], x[14]);
}

// Blocks counter .. counter + GROUPS * LANES, one a lane.
INLINE void chacha20(const Constants& s, uint64_t counter, Words x[GROUPS][16]) {
  Words lane, low[GROUPS], high[GROUPS];
  for (int i = 0; i < LANES; i++) lane[i] = i;
#pragma GCC unroll 2
  for (int g = 0; g < GROUPS; g++) {
    const uint64_t c = counter + g * LANES;
    low[g] = lane + uint32_t(c);
    high[g] = uint32_t(c >> 32) - (Words)(low[g] < uint32_t(c));  // a true comparison is -1
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) x[g][i] = splat(s.later[i]);
    x[g][12] = low[g];
    x[g][13] = high[g];
    columns_0_and_1(x[g]);
    diagonals(x[g]);
  }
  for (int round = 1; round < 10; round++) {
#pragma GCC unroll 2
    for (int g = 0; g < GROUPS; g++) {
      columns_0_and_1(x[g]);
      columns_2_and_3(x[g]);
      diagonals(x[g]);
    }
  }
#pragma GCC unroll 2
  for (int g = 0; g < GROUPS; g++) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) x[g][i] += i == 12 ? low[g] : i == 13 ? high[g] : splat(s.start[i]);
  }
}

// ---- Box-Muller

INLINE Floats square_root(Floats x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_sqrt_ps(ALL, (__m512)x);
#elif defined(__AVX2__)
  return (Floats)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (Floats)_mm_sqrt_ps((__m128)x);
#else
  return (Floats)vsqrtq_f32((float32x4_t)x);
#endif
}

INLINE Floats to_float(Ints x) { return __builtin_convertvector(x, Floats); }
INLINE Floats to_float(Words x) { return __builtin_convertvector(x, Floats); }

// sqrt(-2 ln u), u = (U + 1/2) 2^-64 with U = high:low. Near u = 1 it starts from v = 1 - u, which float32 holds to its
// full relative accuracy: a radius is never rounded to 0.
INLINE Floats radius(Words high, Words low) {
  const Ints upper = (Ints)high >> 31;  // u > 1/2
  const Floats v = to_float((Ints)high ^ upper) * 0x1p-32f + (to_float(low ^ (Words)upper) * 0x1p-64f + 0x1p-65f);
  const Floats y = upper ? 1.0f - v : v;
  const Ints bits = (Ints)y - 0x3f3504f3;  // of sqrt(1/2)
  const Ints exponent = bits >> 23;
  const Floats mantissa = (Floats)((bits & 0x7fffff) + 0x3f3504f3);  // [sqrt(1/2), sqrt(2))
  const Floats t = exponent == 0 ? -v : mantissa - 1.0f;             // exponent 0 means 1 - v > sqrt(1/2)
  // -2 ln(1 + t) = t (t q(t) - 2), relative error of the minimax q 2^-27.5
  Floats q = t * 1.52435243e-1f - 2.58088678e-1f;
  q = q * t + 2.64859945e-1f;
  q = q * t - 2.83636540e-1f;
  q = q * t + 3.32181633e-1f;
  q = q * t - 4.00039464e-1f;
  q = q * t + 5.00031650e-1f;
  q = q * t - 6.66666508e-1f;
  q = q * t + 9.99999762e-1f;
  q = q * t - 2.0f;
  return square_root(t * q + to_float(exponent) * -1.38629436f);
}

// radius * (cos, sin) of the angle that w tells: phi = 2 pi (r + 1/2) 2^-32 in (-pi/4, pi/4), where r are the lower 30
// bits as a signed number, so that neither is ever 0; bit 31 negates the cosine, bit 30 swaps the two.
INLINE void box_muller(Words high, Words low, Words w, Floats& first, Floats& second) {
  const Floats phi = to_float((Ints)(w << 2)) * 3.65729520e-10f + 7.31459040e-10f;  // pi 2^-33, pi 2^-32
  const Floats z = phi * phi;
  Floats s = z * -1.95152825e-4f + 8.33216030e-3f;
  s = s * z - 1.66666552e-1f;
  s = (s * z + 1.0f) * phi;
  Floats c = z * 2.43835711e-5f - 1.38866820e-3f;
  c = c * z + 4.16666195e-2f;
  c = c * z - 0.5f;
  c = c * z + 1.0f;
  c = (Floats)((Words)c ^ (w & 0x80000000u));
  const Ints swap = (w & 0x40000000u) != 0u;
  const Floats r = radius(high, low);
  first = r * (swap ? s : c);
  second = r * (swap ? c : s);
}

// ---- Storage types

template <Float>
struct Stored;

template <>
struct Stored<Float::f32> {
  using type = float;
  static INLINE Floats load(const float* p) { return load_bits<Floats>(p); }
  static INLINE void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }
};

template <>
struct Stored<Float::bf16> {
  using type = uint16_t;
  static INLINE Floats load(const uint16_t* p) {
    return (Floats)(__builtin_convertvector(load_bits<Halves>(p), Words) << 16);
  }
  static INLINE void store(uint16_t* p, Floats v) {  // to nearest, ties to even
    const Words b = (Words)v;
    const Words rounded = (b + 0x7fffu + (b >> 16 & 1u)) >> 16;
    const Halves h = __builtin_convertvector(v == v ? rounded : splat(0x7fc0), Halves);
    memcpy(p, &h, sizeof h);
  }
};

template <>
struct Stored<Float::f16> {
  using type = uint16_t;
#if defined(__AVX512F__)
  static INLINE Floats load(const uint16_t* p) { return (Floats)_mm512_maskz_cvtph_ps(ALL, load_bits<__m256i>(p)); }
  static INLINE void store(uint16_t* p, Floats v) {
    const __m256i h = _mm512_maskz_cvtps_ph(ALL, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    memcpy(p, &h, sizeof h);
  }
#elif defined(__AVX2__)
  static INLINE Floats load(const uint16_t* p) { return (Floats)_mm256_cvtph_ps(load_bits<__m128i>(p)); }
  static INLINE void store(uint16_t* p, Floats v) {
    const __m128i h = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
    memcpy(p, &h, sizeof h);
  }
#else
  static INLINE Floats load(const uint16_t* p) {
    const Words h = __builtin_convertvector(load_bits<Halves>(p), Words);
    const Words sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
    const Words normal = magnitude + (112u << 23);
    const Floats subnormal = (Floats)(magnitude + (113u << 23)) - (Floats)splat(113u << 23);
    const Words finite = magnitude < (1u << 23) ? (Words)subnormal : normal;
    return (Floats)((magnitude >= (31u << 23) ? normal + (112u << 23) : finite) | sign);
  }
  static INLINE void store(uint16_t* p, Floats v) {  // to nearest, ties to even
    const Words b = (Words)v & 0x7fffffffu, sign = (Words)v >> 16 & 0x8000u;
    const Words normal = (b - (112u << 23) + 0xfffu + (b >> 13 & 1u)) >> 13;
    const Words subnormal = (Words)((Floats)b + 0.5f) - (Words)(Floats{} + 0.5f);  // the addition rounds at 2^-24
    const Words finite = b < (113u << 23) ? subnormal : normal;
    const Words large = b > (255u << 23) ? splat(0x7e00) : splat(0x7c00);
    const Halves h = __builtin_convertvector((b >= (143u << 23) ? large : finite) | sign, Halves);
    memcpy(p, &h, sizeof h);
  }
#endif
};
}  // namespace
}  // namespace bulwark::BULWARK_ISA
