// Behind a kernel: how its entry point hands it the arguments that its parameters ask for.
#pragma once
#pragma clang system_header
#include <tuple>

#include "kernel.h"
#include "vectors.h"

namespace msl {
template <class F>
struct Parameters;
template <class... P>
struct Parameters<void (*)(P...)> {
  template <int i>
  using type = std::tuple_element_t<i, std::tuple<P...>>;
};

// A buffer that nothing is bound to may be passed on, but not used.
template <class T>
struct Pointer {
  __attribute__((no_sanitize("null"))) static inline T of(void* p) { return (T)p; }
};
template <class T>
struct Pointer<T&> {
  __attribute__((no_sanitize("null"))) static inline T& of(void* p) { return *(T*)p; }
};

template <class T>
MSL_INLINE T position(unsigned v) {
  return (T)v;
}
template <class T>
MSL_INLINE T position(Uint3 v) {
  using E = metal::msl_element<T>;
  if constexpr (metal::msl_size<T> == 1)
    return (T)v.x;
  else if constexpr (metal::msl_size<T> == 2)
    return T{(E)v.x, (E)v.y};
  else
    return T{(E)v.x, (E)v.y, (E)v.z};
}
}  // namespace msl
