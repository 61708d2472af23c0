// <metal_limits>
#pragma once
#pragma clang system_header
#include <limits>

#include "types.h"

namespace metal {
template <class T>
struct numeric_limits : std::numeric_limits<T> {};

template <class T, uint16_t inf, uint16_t largest, uint16_t smallest, uint16_t eps, uint16_t nan>
struct msl_limits_of_16_bits {
  static constexpr bool is_specialized = true, is_signed = true, is_integer = false, has_infinity = true,
                        has_quiet_NaN = true;
  static constexpr T of(uint16_t bits) { return __builtin_bit_cast(T, bits); }
  static constexpr T infinity() { return of(inf); }
  static constexpr T max() { return of(largest); }
  static constexpr T lowest() { return of(largest | 0x8000); }
  static constexpr T min() { return of(smallest); }
  static constexpr T epsilon() { return of(eps); }
  static constexpr T quiet_NaN() { return of(nan); }
};
template <>
struct numeric_limits<half> : msl_limits_of_16_bits<half, 0x7c00, 0x7bff, 0x0400, 0x1400, 0x7e00> {};
template <>
struct numeric_limits<bfloat> : msl_limits_of_16_bits<bfloat, 0x7f80, 0x7f7f, 0x0080, 0x3c00, 0x7fc0> {};
}  // namespace metal
