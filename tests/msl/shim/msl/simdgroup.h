// <metal_simdgroup> and <metal_quadgroup>: values that lanes hand to each other.
#pragma once
#pragma clang system_header
#include "integers.h"
#include "vectors.h"

extern "C" {  // the runtime
MSL_MEETING const void* msl_simd_exchange(const void* value, unsigned size, unsigned* mask, unsigned need);
unsigned msl_lane();
void msl_report(const char* what);
}

namespace metal {
template <class T>
struct msl_lanes {  // one value of every lane that came along
  const T* values;
  unsigned mask;

  MSL_INLINE msl_lanes(const T& mine, unsigned need = 0) {
    static_assert(sizeof(T) <= 64, "the runtime's exchange holds 64 bytes a lane");
    values = (const T*)msl_simd_exchange(&mine, sizeof(T), &mask, need);
  }
  MSL_INLINE bool has(unsigned lane) const { return lane < 32 && (mask >> lane & 1); }
  MSL_INLINE T operator[](unsigned lane) const {
    if (has(lane)) return values[lane];
    msl_report("simdgroup function reads an inactive lane");
    return values[msl_lane()];
  }
  // Pairwise, as hardware may do it; inactive lanes are left out.
  template <class F>
  MSL_INLINE T fold(F f) const {
    T v[32];
    bool present[32];
    for (int i = 0; i < 32; i++) {
      present[i] = has(i);
      if (present[i]) v[i] = values[i];
    }
    for (int step = 16; step; step >>= 1)
      for (int i = 0; i < step; i++)
        if (present[i + step]) {
          v[i] = present[i] ? T(f(v[i], v[i + step])) : v[i + step];
          present[i] = true;
        }
    return v[0];
  }
};

#define MSL_REDUCTION(NAME, EXPRESSION)                                    \
  template <class T>                                                       \
  MSL_INLINE T simd_##NAME(T x) {                                          \
    return msl_lanes<T>(x).fold([](T a, T b) -> T { return EXPRESSION; }); \
  }                                                                        \
  template <class T>                                                       \
  MSL_INLINE T quad_##NAME(T x) {                                          \
    auto f = [](T a, T b) -> T { return EXPRESSION; };                     \
    msl_lanes<T> v(x);                                                     \
    unsigned q = msl_lane() & ~3u;                                         \
    return f(f(v[q], v[q + 1]), f(v[q + 2], v[q + 3]));                    \
  }
MSL_REDUCTION(sum, a + b)
MSL_REDUCTION(product, a* b)
MSL_REDUCTION(max, msl_max(a, b))
MSL_REDUCTION(min, msl_min(a, b))
MSL_REDUCTION(and, a& b)
MSL_REDUCTION(or, a | b)
MSL_REDUCTION(xor, a ^ b)
#undef MSL_REDUCTION

#define MSL_PREFIX(NAME, INCLUDED, START, OPERATOR)      \
  template <class T>                                     \
  MSL_INLINE T simd_prefix_##NAME(T x) {                 \
    msl_lanes<T> v(x);                                   \
    T r = T(START);                                      \
    for (unsigned i = 0; i < msl_lane() + INCLUDED; i++) \
      if (v.has(i)) r = T(r OPERATOR v.values[i]);       \
    return r;                                            \
  }
MSL_PREFIX(inclusive_sum, 1, 0, +)
MSL_PREFIX(exclusive_sum, 0, 0, +)
MSL_PREFIX(inclusive_product, 1, 1, *)
MSL_PREFIX(exclusive_product, 0, 1, *)
#undef MSL_PREFIX

// The value of lane FROM where IN_RANGE, else one's own.
#define MSL_SHUFFLE(NAME, FROM, IN_RANGE) \
  template <class T>                      \
  MSL_INLINE T NAME(T x, ushort d) {      \
    msl_lanes<T> v(x);                    \
    int me = msl_lane();                  \
    int from = FROM;                      \
    return (IN_RANGE) ? v[from] : x;      \
  }
MSL_SHUFFLE(simd_shuffle, d, true)
MSL_SHUFFLE(simd_broadcast, d, true)
MSL_SHUFFLE(simd_shuffle_xor, me ^ d, true)
MSL_SHUFFLE(simd_shuffle_down, me + d, from < 32)
MSL_SHUFFLE(simd_shuffle_up, me - d, from >= 0)
MSL_SHUFFLE(simd_shuffle_rotate_down, (me + d) & 31, true)
MSL_SHUFFLE(simd_shuffle_rotate_up, (me - d) & 31, true)
MSL_SHUFFLE(quad_shuffle, (me & ~3) | (d & 3), true)
MSL_SHUFFLE(quad_broadcast, (me & ~3) | (d & 3), true)
MSL_SHUFFLE(quad_shuffle_xor, me ^ (d & 3), true)
MSL_SHUFFLE(quad_shuffle_down, me + d, (me & 3) + d < 4)
MSL_SHUFFLE(quad_shuffle_up, me - d, (me & 3) - d >= 0)
#undef MSL_SHUFFLE

template <class T>
MSL_INLINE T simd_shuffle_and_fill_down(T x, T fill, ushort d, ushort width = 32) {
  msl_lanes<T> v(x), filling(fill);
  unsigned base = msl_lane() / width * width, from = msl_lane() - base + d;
  return from < width ? v[base + from] : filling[base + from - width];
}
template <class T>
MSL_INLINE T simd_shuffle_and_fill_up(T x, T fill, ushort d, ushort width = 32) {
  msl_lanes<T> v(x), filling(fill);
  int base = msl_lane() / width * width, from = (int)msl_lane() - base - d;
  return from >= 0 ? v[base + from] : filling[base + from + width];
}
template <class T>
MSL_INLINE T simd_broadcast_first(T x) {
  msl_lanes<T> v(x);
  return v[__builtin_ctz(v.mask)];
}

struct simd_vote {
  typedef uint64_t vote_t;
  unsigned mask;
  explicit operator vote_t() const { return mask; }
  bool all() const { return mask == ~0u; }
  bool any() const { return mask != 0; }
};
MSL_INLINE simd_vote simd_ballot(bool p) {
  msl_lanes<bool> v(p);
  unsigned r = 0;
  for (int i = 0; i < 32; i++)
    if (v.has(i) && v.values[i]) r |= 1u << i;
  return {r};
}
MSL_INLINE bool simd_any(bool p) { return simd_ballot(p).mask != 0; }
MSL_INLINE bool simd_all(bool p) { return simd_ballot(!p).mask == 0; }
MSL_INLINE simd_vote simd_active_threads_mask() { return {msl_lanes<bool>(true).mask}; }
MSL_INLINE bool simd_is_first() { return msl_lane() == (unsigned)__builtin_ctz(simd_active_threads_mask().mask); }
}  // namespace metal
