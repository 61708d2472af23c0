// What MLX's headers call of that which is built into Apple's compiler, in terms of the standard library. The last
// argument of a mathematical function chooses between fast and precise.
#pragma once
#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 2

#define __metal_acos(x, ...) ::metal::acos(x)
#define __metal_acosh(x, ...) ::metal::acosh(x)
#define __metal_asin(x, ...) ::metal::asin(x)
#define __metal_asinh(x, ...) ::metal::asinh(x)
#define __metal_atan(x, ...) ::metal::atan(x)
#define __metal_atanh(x, ...) ::metal::atanh(x)
#define __metal_ceil(x, ...) ::metal::ceil(x)
#define __metal_cos(x, ...) ::metal::cos(x)
#define __metal_cosh(x, ...) ::metal::cosh(x)
#define __metal_cospi(x, ...) ::metal::cospi(x)
#define __metal_exp(x, ...) ::metal::exp(x)
#define __metal_exp10(x, ...) ::metal::exp10(x)
#define __metal_exp2(x, ...) ::metal::exp2(x)
#define __metal_fabs(x, ...) ::metal::fabs(x)
#define __metal_floor(x, ...) ::metal::floor(x)
#define __metal_fract(x, ...) ::metal::fract(x)
#define __metal_log(x, ...) ::metal::log(x)
#define __metal_log10(x, ...) ::metal::log10(x)
#define __metal_log2(x, ...) ::metal::log2(x)
#define __metal_rint(x, ...) ::metal::rint(x)
#define __metal_round(x, ...) ::metal::round(x)
#define __metal_rsqrt(x, ...) ::metal::rsqrt(x)
#define __metal_sin(x, ...) ::metal::sin(x)
#define __metal_sinh(x, ...) ::metal::sinh(x)
#define __metal_sinpi(x, ...) ::metal::sinpi(x)
#define __metal_sqrt(x, ...) ::metal::sqrt(x)
#define __metal_tan(x, ...) ::metal::tan(x)
#define __metal_tanh(x, ...) ::metal::tanh(x)
#define __metal_tanpi(x, ...) ::metal::tanpi(x)
#define __metal_trunc(x, ...) ::metal::trunc(x)
#define __metal_atan2(x, y, ...) ::metal::atan2(x, y)
#define __metal_divide(x, y, ...) ::metal::divide(x, y)
#define __metal_fmax(x, y, ...) ::metal::fmax(x, y)
#define __metal_fmin(x, y, ...) ::metal::fmin(x, y)
#define __metal_fmod(x, y, ...) ::metal::fmod(x, y)
#define __metal_ldexp(x, y, ...) ::metal::ldexp(x, y)
#define __metal_pow(x, y, ...) ::metal::pow(x, y)
#define __metal_powr(x, y, ...) ::metal::powr(x, y)
#define __metal_fma(x, y, z, ...) ::metal::fma(x, y, z)
#define __metal_fmax3(x, y, z, ...) ::metal::fmax3(x, y, z)
#define __metal_fmedian3(x, y, z, ...) ::metal::fmedian3(x, y, z)
#define __metal_fmin3(x, y, z, ...) ::metal::fmin3(x, y, z)
#define __metal_nextafter(x, y) ::metal::nextafter(x, y)
#define __metal_frexp(x, exponent) ::metal::frexp(x, *(exponent))

#define __metal_simd_broadcast ::metal::simd_broadcast
#define __metal_simd_max ::metal::simd_max
#define __metal_simd_min ::metal::simd_min
#define __metal_simd_prefix_exclusive_product ::metal::simd_prefix_exclusive_product
#define __metal_simd_prefix_exclusive_sum ::metal::simd_prefix_exclusive_sum
#define __metal_simd_prefix_inclusive_product ::metal::simd_prefix_inclusive_product
#define __metal_simd_prefix_inclusive_sum ::metal::simd_prefix_inclusive_sum
#define __metal_simd_product ::metal::simd_product
#define __metal_simd_shuffle ::metal::simd_shuffle
#define __metal_simd_shuffle_and_fill_down ::metal::simd_shuffle_and_fill_down
#define __metal_simd_shuffle_and_fill_up ::metal::simd_shuffle_and_fill_up
#define __metal_simd_shuffle_down ::metal::simd_shuffle_down
#define __metal_simd_shuffle_rotate_down ::metal::simd_shuffle_rotate_down
#define __metal_simd_shuffle_rotate_up ::metal::simd_shuffle_rotate_up
#define __metal_simd_shuffle_up ::metal::simd_shuffle_up
#define __metal_simd_shuffle_xor ::metal::simd_shuffle_xor
#define __metal_simd_sum ::metal::simd_sum
#define __metal_simd_xor(x) (x)  // named for floats, which have no xor; never called
#define __metal_get_simdgroup_size(type) 32
#define __metal_get_thread_index_in_simdgroup(type) ::msl_lane()
