// <metal_math>: computed in float for every floating type, with the accuracy of the host's libm. Metal's own functions
// may be off by a few ulp more.
#pragma once
#pragma clang system_header
#include "vectors.h"

namespace metal {
#define MSL_UNARY(NAME, EXPRESSION)       \
  template <class T, msl_if_float<T> = 0> \
  MSL_INLINE T NAME(T v) {                \
    using E = msl_element<T>;             \
    return msl_map(                       \
        [](E e) {                         \
          float x = e;                    \
          return (E)(EXPRESSION);         \
        },                                \
        v);                               \
  }
#define MSL_BINARY(NAME, EXPRESSION)      \
  template <class T, msl_if_float<T> = 0> \
  MSL_INLINE T NAME(T a, T b) {           \
    using E = msl_element<T>;             \
    return msl_map(                       \
        [](E p, E q) {                    \
          float x = p, y = q;             \
          return (E)(EXPRESSION);         \
        },                                \
        a, b);                            \
  }
#define MSL_TERNARY(NAME, EXPRESSION)     \
  template <class T, msl_if_float<T> = 0> \
  MSL_INLINE T NAME(T a, T b, T c) {      \
    using E = msl_element<T>;             \
    return msl_map(                       \
        [](E p, E q, E r) {               \
          float x = p, y = q, z = r;      \
          return (E)(EXPRESSION);         \
        },                                \
        a, b, c);                         \
  }
#define MSL_CLASSIFY(NAME)                                                                            \
  template <class T, msl_if_float<T> = 0>                                                             \
  MSL_INLINE auto NAME(T v) {                                                                         \
    if constexpr (msl_is_scalar<T>)                                                                   \
      return (bool)__builtin_##NAME((float)v);                                                        \
    else                                                                                              \
      return msl_map([](msl_element<T> e) -> int { return __builtin_##NAME((float)e) ? -1 : 0; }, v); \
  }

// These exist three times: as the compiler's options say, and in the namespaces precise and fast.
#define MSL_FUNCTIONS                                           \
  MSL_UNARY(acos, __builtin_acosf(x))                           \
  MSL_UNARY(acosh, __builtin_acoshf(x))                         \
  MSL_UNARY(asin, __builtin_asinf(x))                           \
  MSL_UNARY(asinh, __builtin_asinhf(x))                         \
  MSL_UNARY(atan, __builtin_atanf(x))                           \
  MSL_UNARY(atanh, __builtin_atanhf(x))                         \
  MSL_UNARY(ceil, __builtin_ceilf(x))                           \
  MSL_UNARY(cos, __builtin_cosf(x))                             \
  MSL_UNARY(cosh, __builtin_coshf(x))                           \
  MSL_UNARY(cospi, __builtin_cosf(x* M_PI_F))                   \
  MSL_UNARY(exp, __builtin_expf(x))                             \
  MSL_UNARY(exp2, __builtin_exp2f(x))                           \
  MSL_UNARY(exp10, __builtin_powf(10.f, x))                     \
  MSL_UNARY(fabs, __builtin_fabsf(x))                           \
  MSL_UNARY(floor, __builtin_floorf(x))                         \
  MSL_UNARY(fract, x - __builtin_floorf(x))                     \
  MSL_UNARY(log, __builtin_logf(x))                             \
  MSL_UNARY(log10, __builtin_log10f(x))                         \
  MSL_UNARY(log2, __builtin_log2f(x))                           \
  MSL_UNARY(rint, __builtin_rintf(x))                           \
  MSL_UNARY(round, __builtin_roundf(x))                         \
  MSL_UNARY(rsqrt, 1.f / __builtin_sqrtf(x))                    \
  MSL_UNARY(sin, __builtin_sinf(x))                             \
  MSL_UNARY(sinh, __builtin_sinhf(x))                           \
  MSL_UNARY(sinpi, __builtin_sinf(x* M_PI_F))                   \
  MSL_UNARY(sqrt, __builtin_sqrtf(x))                           \
  MSL_UNARY(tan, __builtin_tanf(x))                             \
  MSL_UNARY(tanh, __builtin_tanhf(x))                           \
  MSL_UNARY(tanpi, __builtin_tanf(x* M_PI_F))                   \
  MSL_UNARY(trunc, __builtin_truncf(x))                         \
  MSL_BINARY(atan2, __builtin_atan2f(x, y))                     \
  MSL_BINARY(copysign, __builtin_copysignf(x, y))               \
  MSL_BINARY(divide, x / y)                                     \
  MSL_BINARY(fdim, __builtin_fdimf(x, y))                       \
  MSL_BINARY(fmax, __builtin_fmaxf(x, y))                       \
  MSL_BINARY(fmin, __builtin_fminf(x, y))                       \
  MSL_BINARY(fmod, __builtin_fmodf(x, y))                       \
  MSL_BINARY(nextafter, __builtin_nextafterf(x, y))             \
  MSL_BINARY(pow, __builtin_powf(x, y))                         \
  MSL_BINARY(powr, __builtin_powf(x, y))                        \
  MSL_TERNARY(fma, __builtin_fmaf(x, y, z))                     \
  MSL_TERNARY(fmax3, __builtin_fmaxf(x, __builtin_fmaxf(y, z))) \
  MSL_TERNARY(fmin3, __builtin_fminf(x, __builtin_fminf(y, z))) \
  MSL_TERNARY(fmedian3, __builtin_fmaxf(__builtin_fminf(x, y), __builtin_fminf(__builtin_fmaxf(x, y), z)))
namespace precise {
MSL_FUNCTIONS
}
namespace fast {
MSL_FUNCTIONS
}
MSL_FUNCTIONS

MSL_CLASSIFY(isnan)
MSL_CLASSIFY(isinf)
MSL_CLASSIFY(isfinite)
MSL_CLASSIFY(isnormal)
MSL_CLASSIFY(signbit)
MSL_UNARY(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.f), 1.f))
MSL_UNARY(sign, x > 0 ? 1.f : x < 0 ? -1.f : x == 0 ? x : 0.f)
MSL_BINARY(step, y < x ? 0.f : 1.f)
MSL_TERNARY(mix, x + (y - x) * z)
#undef MSL_FUNCTIONS
#undef MSL_UNARY
#undef MSL_BINARY
#undef MSL_TERNARY
#undef MSL_CLASSIFY

template <class T, msl_if_float<T> = 0>
MSL_INLINE T smoothstep(T a, T b, T x) {
  T t = saturate((x - a) / (b - a));
  return t * t * (3 - 2 * t);
}
template <class T, msl_if_float<T> = 0>
MSL_INLINE T abs(T x) {
  return fabs(x);
}
template <class T, msl_if_float<T> = 0>
MSL_INLINE T ldexp(T x, int exponent) {
  return (T)__builtin_ldexpf((float)x, exponent);
}
template <class T, msl_if_float<T> = 0>
MSL_INLINE T frexp(T x, int& exponent) {
  return (T)__builtin_frexpf((float)x, &exponent);
}
template <class T, msl_if_float<T> = 0>
MSL_INLINE int ilogb(T x) {
  return __builtin_ilogbf((float)x);
}
template <class T, msl_if_float<T> = 0>
MSL_INLINE T modf(T x, T& whole) {
  whole = trunc(x);
  return x - whole;
}
template <class T, msl_if_float<T> = 0>
MSL_INLINE T sincos(T x, T& cosine) {
  cosine = cos(x);
  return sin(x);
}
}  // namespace metal
