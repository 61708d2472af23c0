// For <family>_simd.cpp whose pace the arithmetic sets: a register's floats. C headers alone, as isa.h says.
#pragma once
#include <stddef.h>
#include <string.h>

namespace bulwark::BULWARK_ISA {
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float HalfVec __attribute__((vector_size(2 * LANES)));
typedef double Doubles __attribute__((vector_size(4 * LANES)));  // one for each lane of a HalfVec

[[maybe_unused]] static Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
}  // namespace bulwark::BULWARK_ISA
