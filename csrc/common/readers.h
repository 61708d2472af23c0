// For <family>_simd.cpp whose pace memory sets: readers of float32, float16 and bfloat16. 32-byte loads draw more from
// the caches than 64-byte loads (measured on Zen 4). C headers alone, as isa.h says.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
  #include <immintrin.h>
#elif defined(__aarch64__)
  #include <arm_neon.h>
#endif

namespace bulwark::BULWARK_ISA {
#if defined(__AVX2__)
constexpr size_t LANES = 8;
#else
constexpr size_t LANES = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

template <class V>
static V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

// Float from the bits of a half, for one value or a vector of them: scaling by 2^112 moves the exponent's bias and
// makes subnormals normal; infinities and NaN come out at 2^16 and above, and get the largest exponent.
template <class F, class U>
static F from_half_bits(U h) {
  U magnitude = (h & 0x7fff) << 13, sign = (h & 0x8000) << 16;
  F scaled;
  memcpy(&scaled, &magnitude, sizeof scaled);
  scaled *= 0x1p112f;
  U bits;
  memcpy(&bits, &scaled, sizeof bits);
  bits |= sign | (magnitude >= 0x0f800000 ? U{} + 0x7f800000 : U{});
  memcpy(&scaled, &bits, sizeof scaled);
  return scaled;
}

struct F32 {
  typedef float Value;
  static Vec vector(const Value* p) { return load<Vec>(p); }
  static float scalar(Value x) { return x; }
};

struct F16 {
  typedef uint16_t Value;
  static Vec vector(const Value* p) {
#if defined(__AVX2__)
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
    return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
    return from_half_bits<Vec>(__builtin_convertvector(load<Halves>(p), Bits));
#endif
  }
  static float scalar(Value x) { return from_half_bits<float>(uint32_t(x)); }
};

struct BF16 {
  typedef uint16_t Value;
  static Vec vector(const Value* p) { return (Vec)(__builtin_convertvector(load<Halves>(p), Bits) << 16); }
  static float scalar(Value x) {
    uint32_t bits = uint32_t(x) << 16;
    return load<float>(&bits);
  }
};
}  // namespace bulwark::BULWARK_ISA
