// Vectors, arrays, as_type, and how an operation on elements becomes one on vectors.
#pragma once
#pragma clang system_header
#include "address_spaces.h"
#include "traits.h"
#include "types.h"

namespace metal {
template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

template <class T>
struct msl_vector {
  using element = T;
  static constexpr int size = 1;
  template <class U>
  using of = U;
};
template <class T, int N>
struct msl_vector<T __attribute__((ext_vector_type(N)))> {
  using element = T;
  static constexpr int size = N;
  template <class U>
  using of = vec<U, N>;
};
template <class T>
using msl_element = typename msl_vector<T>::element;
template <class T>
constexpr int msl_size = msl_vector<T>::size;
template <class T>
constexpr bool msl_is_scalar = msl_size<T> == 1;

template <class V, class A>
MSL_INLINE void msl_append(V& v, int& i, A a) {
  if constexpr (msl_is_scalar<A>)
    v[i++] = (msl_element<V>)a;
  else
    for (int k = 0; k < msl_size<A>; k++) v[i++] = (msl_element<V>)a[k];
}

// The constructor V(a...): of one scalar for all elements, of a vector of another type, or of pieces.
template <class V, class... A>
MSL_INLINE constexpr V msl_make(A... a) {
  using E = msl_element<V>;
  if constexpr (msl_is_scalar<V>) {
    return V(a...);
  } else if constexpr (sizeof...(A) == 0) {
    return V{};
  } else if constexpr (sizeof...(A) == 1) {
    if constexpr (((std::is_class_v<A> && is_convertible_v<A, V>) && ...))  // a packed vector
      return (a, ...);
    else if constexpr ((msl_is_scalar<A> && ...))
      return V((E(a), ...));
    else
      return (__builtin_convertvector(a, V), ...);
  } else {
    static_assert((msl_size<A> + ...) == msl_size<V>, "a vector's constructor takes as many elements as it has");
    if constexpr ((msl_is_scalar<A> && ...)) {
      return V{(E)a...};
    } else {
      V v{};
      int i = 0;
      (msl_append(v, i, a), ...);
      return v;
    }
  }
}

#define MSL_VECTORS(T)    \
  typedef vec<T, 2> T##2; \
  typedef vec<T, 3> T##3; \
  typedef vec<T, 4> T##4;
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(long)
MSL_VECTORS(ulong)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(float)
#undef MSL_VECTORS
typedef vec<int, 2> bool2;  // what a comparison of vectors gives
typedef vec<int, 3> bool3;
typedef vec<int, 4> bool4;

template <class T, int N>
struct packed_vec {                                                           // aligned as its elements are
  typedef vec<T, N> together __attribute__((aligned(sizeof(T)), may_alias));  // moved at once, as Apple's GPUs do
  T e[N];
  constexpr packed_vec() = default;
  constexpr packed_vec(const packed_vec& v) { *this = v; }
  constexpr packed_vec& operator=(const packed_vec& v) {
    if constexpr (N == 3)
      __builtin_memcpy(e, v.e, sizeof e);
    else
      *(together*)e = *(const together*)v.e;
    return *this;
  }
#ifdef MSL_STRICT  // which does not convert one space to another
  packed_vec(const device packed_vec& v) {
    for (int i = 0; i < N; i++) e[i] = v.e[i];
  }
#endif
  template <class V, class = enable_if_t<msl_size<V> == N>>
  packed_vec(V v) {
    for (int i = 0; i < N; i++) e[i] = v[i];
  }
  template <class... A, class = enable_if_t<sizeof...(A) == N>>
  constexpr packed_vec(A... a) : e{(T)a...} {}
  operator vec<T, N>() const {
    if constexpr (N == 3) {
      return {e[0], e[1], e[2]};
    } else {
      return *(const together*)e;
    }
  }
  T& operator[](int i) { return e[i]; }
  T operator[](int i) const { return e[i]; }
};
#define MSL_PACKED_VECTORS(T)             \
  typedef packed_vec<T, 2> packed_##T##2; \
  typedef packed_vec<T, 3> packed_##T##3; \
  typedef packed_vec<T, 4> packed_##T##4;
MSL_PACKED_VECTORS(char)
MSL_PACKED_VECTORS(uchar)
MSL_PACKED_VECTORS(short)
MSL_PACKED_VECTORS(ushort)
MSL_PACKED_VECTORS(int)
MSL_PACKED_VECTORS(uint)
MSL_PACKED_VECTORS(half)
MSL_PACKED_VECTORS(bfloat)
MSL_PACKED_VECTORS(float)
#undef MSL_PACKED_VECTORS

template <class T, size_t N>
struct array {
  T e[N];
  constexpr T& operator[](size_t i) { return e[i]; }
  constexpr const T& operator[](size_t i) const { return e[i]; }
  static constexpr size_t size() { return N; }
};

template <class To, class From>
MSL_INLINE constexpr To as_type(From v) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  return __builtin_bit_cast(To, v);
}

// f on scalars, or element by element.
template <class F, class V, class... W>
MSL_INLINE auto msl_map(F f, V v, W... w) {
  if constexpr (msl_is_scalar<V>) {
    return f(v, w...);
  } else {
    using R = decltype(f(v[0], w[0]...));
    typename msl_vector<V>::template of<R> r;
    for (int i = 0; i < msl_size<V>; i++) r[i] = f(v[i], w[i]...);
    return r;
  }
}

template <class T>
using msl_if_float = enable_if_t<is_floating_point_v<msl_element<T>>, int>;
template <class T>
using msl_if_integer = enable_if_t<is_integral_v<msl_element<T>>, int>;

template <class T>
using uniform = T;
template <class T>
MSL_INLINE constexpr T make_uniform(T v) {
  return v;
}

struct os_log {  // what kernels log is not shown
  template <class... A>
  constexpr os_log(A...) {}
  template <class... A>
  void log(A...) const {}
  template <class... A>
  void log_debug(A...) const {}
  template <class... A>
  void log_info(A...) const {}
  template <class... A>
  void log_error(A...) const {}
};
}  // namespace metal

// The names of the types are built into Metal; those of its functions stand in namespace metal.
#define MSL_GLOBAL(T) \
  using metal::T##2;  \
  using metal::T##3;  \
  using metal::T##4;
MSL_GLOBAL(char)
MSL_GLOBAL(uchar)
MSL_GLOBAL(short)
MSL_GLOBAL(ushort)
MSL_GLOBAL(int)
MSL_GLOBAL(uint)
MSL_GLOBAL(long)
MSL_GLOBAL(ulong)
MSL_GLOBAL(half)
MSL_GLOBAL(bfloat)
MSL_GLOBAL(float)
MSL_GLOBAL(bool)
MSL_GLOBAL(packed_char)
MSL_GLOBAL(packed_uchar)
MSL_GLOBAL(packed_short)
MSL_GLOBAL(packed_ushort)
MSL_GLOBAL(packed_int)
MSL_GLOBAL(packed_uint)
MSL_GLOBAL(packed_half)
MSL_GLOBAL(packed_bfloat)
MSL_GLOBAL(packed_float)
#undef MSL_GLOBAL
