// <metal_relational> and <metal_geometric>
#pragma once
#pragma clang system_header
#include "math.h"

namespace metal {
template <class T>
MSL_INLINE bool any(T v) {
  if constexpr (msl_is_scalar<T>) {
    return v;
  } else {
    bool r = false;
    for (int i = 0; i < msl_size<T>; i++) r |= v[i] != 0;
    return r;
  }
}
template <class T>
MSL_INLINE bool all(T v) {
  if constexpr (msl_is_scalar<T>) {
    return v;
  } else {
    bool r = true;
    for (int i = 0; i < msl_size<T>; i++) r &= v[i] != 0;
    return r;
  }
}
template <class T, class C>
MSL_INLINE T select(T no, T yes, C condition) {
  if constexpr (msl_is_scalar<T>) {
    return condition ? yes : no;
  } else {
    T r;
    for (int i = 0; i < msl_size<T>; i++) r[i] = condition[i] ? yes[i] : no[i];
    return r;
  }
}
template <class T>
MSL_INLINE msl_element<T> dot(T a, T b) {
  msl_element<T> r = 0;
  for (int i = 0; i < msl_size<T>; i++) r += a[i] * b[i];
  return r;
}
template <class T>
MSL_INLINE msl_element<T> length_squared(T a) {
  return dot(a, a);
}
template <class T>
MSL_INLINE msl_element<T> length(T a) {
  return sqrt(dot(a, a));
}
template <class T>
MSL_INLINE msl_element<T> distance(T a, T b) {
  return length(a - b);
}
template <class T>
MSL_INLINE T normalize(T a) {
  return a * rsqrt(dot(a, a));
}
template <class T>
MSL_INLINE T cross(T a, T b) {
  return a.yzx * b.zxy - a.zxy * b.yzx;
}
}  // namespace metal
