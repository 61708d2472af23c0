// <metal_integer>, and what <metal_common> has for integers and floats alike.
#pragma once
#pragma clang system_header
#include "limits.h"
#include "vectors.h"

namespace metal {
// A NaN loses against a number.
template <class T>
MSL_INLINE constexpr T msl_max(T a, T b) {
  if constexpr (!msl_is_scalar<T>)
    return msl_map([](auto x, auto y) { return msl_max(x, y); }, a, b);
  else if constexpr (is_floating_point_v<T>)
    return a != a ? b : b != b ? a : a < b ? b : a;
  else
    return a < b ? b : a;
}
template <class T>
MSL_INLINE constexpr T msl_min(T a, T b) {
  if constexpr (!msl_is_scalar<T>)
    return msl_map([](auto x, auto y) { return msl_min(x, y); }, a, b);
  else if constexpr (is_floating_point_v<T>)
    return a != a ? b : b != b ? a : b < a ? b : a;
  else
    return b < a ? b : a;
}
template <class T, class U>
struct msl_common {
  using type = decltype(declval<T>() + declval<U>());
};
template <class T>
struct msl_common<T, T> {
  using type = T;
};
template <class T, class U, class R = typename msl_common<T, U>::type>
MSL_INLINE constexpr R max(T a, U b) {
  return msl_max<R>(R(a), R(b));
}
template <class T, class U, class R = typename msl_common<T, U>::type>
MSL_INLINE constexpr R min(T a, U b) {
  return msl_min<R>(R(a), R(b));
}
template <class T>
MSL_INLINE T max3(T a, T b, T c) {
  return max(a, max(b, c));
}
template <class T>
MSL_INLINE T min3(T a, T b, T c) {
  return min(a, min(b, c));
}
template <class T>
MSL_INLINE T median3(T a, T b, T c) {
  return max(min(a, b), min(max(a, b), c));
}
template <class T, class U, class W>
MSL_INLINE T clamp(T x, U lowest, W highest) {
  return min(max(x, T(lowest)), T(highest));
}

template <class T>
constexpr int msl_bits = 8 * sizeof(T);

#define MSL_BITS_OF_ONE(NAME, EXPRESSION)                  \
  template <class T, msl_if_integer<T> = 0>                \
  MSL_INLINE T NAME(T v) {                                 \
    using E = msl_element<T>;                              \
    return msl_map(                                        \
        [](E x) -> E {                                     \
          [[maybe_unused]] auto u = (make_unsigned_t<E>)x; \
          return EXPRESSION;                               \
        },                                                 \
        v);                                                \
  }
MSL_BITS_OF_ONE(abs, x < 0 ? -x : x)
MSL_BITS_OF_ONE(popcount, __builtin_popcountll(u))
MSL_BITS_OF_ONE(clz, u ? __builtin_clzll(u) - (64 - msl_bits<E>) : msl_bits<E>)
MSL_BITS_OF_ONE(ctz, u ? __builtin_ctzll(u) : msl_bits<E>)
#undef MSL_BITS_OF_ONE

template <class T, msl_if_integer<T> = 0>
MSL_INLINE T rotate(T v, T by) {
  using E = msl_element<T>;
  return msl_map(
      [](E x, E y) -> E {
        auto u = (make_unsigned_t<E>)x;
        int s = y & (msl_bits<E> - 1);
        return s ? (u << s) | (u >> (msl_bits<E> - s)) : u;
      },
      v, by);
}
template <class T, msl_if_integer<T> = 0>
MSL_INLINE T mulhi(T a, T b) {
  using E = msl_element<T>;
  return msl_map([](E x, E y) { return (E)(((__int128)x * (__int128)y) >> msl_bits<E>); }, a, b);
}
template <class T, msl_if_integer<T> = 0>
MSL_INLINE T mad24(T a, T b, T c) {
  return a * b + c;
}
template <class T, msl_if_integer<T> = 0>
MSL_INLINE T extract_bits(T x, uint offset, uint count) {
  return count == 0 ? T(0) : T(T(x << (msl_bits<T> - count - offset)) >> (msl_bits<T> - count));
}
template <class T, msl_if_integer<T> = 0>
MSL_INLINE T insert_bits(T base, T insert, uint offset, uint count) {
  T mask = count >= msl_bits<T> ? T(~T(0)) : T((T(1) << count) - 1) << offset;
  return (base & ~mask) | ((insert << offset) & mask);
}
template <class T, msl_if_integer<T> = 0>
MSL_INLINE T reverse_bits(T x) {
  T r = 0;
  for (int i = 0; i < msl_bits<T>; i++) r |= T((x >> i) & 1) << (msl_bits<T> - 1 - i);
  return r;
}
template <class T, msl_if_integer<T> = 0>
MSL_INLINE T absdiff(T a, T b) {
  return a > b ? a - b : b - a;
}
template <class T, msl_if_integer<T> = 0>
MSL_INLINE T addsat(T a, T b) {
  T r;
  if (!__builtin_add_overflow(a, b, &r)) return r;
  return b < 0 ? numeric_limits<T>::min() : numeric_limits<T>::max();
}
template <class T, msl_if_integer<T> = 0>
MSL_INLINE T subsat(T a, T b) {
  T r;
  if (!__builtin_sub_overflow(a, b, &r)) return r;
  return is_unsigned_v<T> || b > 0 ? numeric_limits<T>::min() : numeric_limits<T>::max();
}
}  // namespace metal
