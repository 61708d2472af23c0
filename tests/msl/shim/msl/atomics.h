// <metal_atomic>: all through the runtime, whose race detector tells them from plain accesses.
#pragma once
#pragma clang system_header
#include "address_spaces.h"
#include "atomic_operations.h"
#include "synchronization.h"
#include "traits.h"

extern "C" uint64_t msl_atomic(void* address, unsigned size, msl::Atomic op, uint64_t value, uint64_t expected,
                               int* exchanged);  // the runtime

namespace metal {
#ifdef MSL_STRICT  // a class cannot live in a disjoint address space in plain C++
template <class T>
using atomic = _Atomic(T);
#else
template <class T>
struct atomic {
  T value;
};
#endif
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<ulong> atomic_ulong;
typedef atomic<bool> atomic_bool;

template <class T>
MSL_INLINE T msl_atomic_operation(void* address, msl::Atomic op, T value, T expected = T(0), int* exchanged = nullptr) {
  uint64_t v = 0, e = 0;
  __builtin_memcpy(&v, &value, sizeof(T));
  __builtin_memcpy(&e, &expected, sizeof(T));
  uint64_t old = msl_atomic(address, sizeof(T), op, v, e, exchanged);
  T result;
  __builtin_memcpy(&result, &old, sizeof(T));
  return result;
}

template <class P>
struct msl_atomic_pointer {};
#define MSL_ATOMIC_POINTER(QUALIFIERS)               \
  template <class T>                                 \
  struct msl_atomic_pointer<QUALIFIERS atomic<T>*> { \
    using type = T;                                  \
  };
MSL_ATOMIC_POINTER(device)
MSL_ATOMIC_POINTER(const device)
MSL_ATOMIC_POINTER(volatile device)
MSL_ATOMIC_POINTER(const volatile device)
MSL_ATOMIC_POINTER(threadgroup)
MSL_ATOMIC_POINTER(const threadgroup)
MSL_ATOMIC_POINTER(volatile threadgroup)
MSL_ATOMIC_POINTER(const volatile threadgroup)
#undef MSL_ATOMIC_POINTER

#define MSL_ATOMIC(NAME, SIGNED, UNSIGNED)                                                                            \
  template <class P, class V, class T = typename msl_atomic_pointer<P>::type>                                         \
  MSL_INLINE T atomic_##NAME##_explicit(P p, V value, memory_order) {                                                 \
    return msl_atomic_operation<T>((void*)p, is_signed_v<T> ? msl::Atomic::SIGNED : msl::Atomic::UNSIGNED, (T)value); \
  }
#define MSL_ATOMIC_OF_FLOAT(NAME, INTEGER, FLOAT)                                                                     \
  template <class P, class V, class T = typename msl_atomic_pointer<P>::type>                                         \
  MSL_INLINE T atomic_##NAME##_explicit(P p, V value, memory_order) {                                                 \
    return msl_atomic_operation<T>((void*)p, is_integral_v<T> ? msl::Atomic::INTEGER : msl::Atomic::FLOAT, (T)value); \
  }
MSL_ATOMIC(store, store, store)
MSL_ATOMIC(exchange, exchange, exchange)
MSL_ATOMIC(fetch_and, bit_and, bit_and)
MSL_ATOMIC(fetch_or, bit_or, bit_or)
MSL_ATOMIC(fetch_xor, bit_xor, bit_xor)
MSL_ATOMIC(fetch_min, min_signed, min_unsigned)
MSL_ATOMIC(fetch_max, max_signed, max_unsigned)
MSL_ATOMIC_OF_FLOAT(fetch_add, add, add_float)
MSL_ATOMIC_OF_FLOAT(fetch_sub, sub, sub_float)
#undef MSL_ATOMIC
#undef MSL_ATOMIC_OF_FLOAT

template <class P, class T = typename msl_atomic_pointer<P>::type>
MSL_INLINE T atomic_load_explicit(P p, memory_order) {
  return msl_atomic_operation<T>((void*)p, msl::Atomic::load, T(0));
}
template <class P, class T = typename msl_atomic_pointer<P>::type>
MSL_INLINE bool atomic_compare_exchange_weak_explicit(P p, T* expected, T desired, memory_order, memory_order) {
  int exchanged = 0;
  T old = msl_atomic_operation<T>((void*)p, msl::Atomic::compare_exchange, desired, *expected, &exchanged);
  if (!exchanged) *expected = old;
  return exchanged;
}
}  // namespace metal
