// <metal_simdgroup_matrix>: 8x8 matrices, two elements a lane, laid out as on Apple's GPUs.
#pragma once
#pragma clang system_header
#include "simdgroup.h"

namespace metal {
template <class T, int R, int C>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "Metal has 8x8 only");
  vec<T, 2> elements;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    for (int k = 0; k < 2; k++) elements[k] = row(msl_lane()) == column(msl_lane()) + k ? diagonal : T(0);
  }
  MSL_INLINE vec<T, 2>& thread_elements() { return elements; }
  static constexpr int row(unsigned lane) { return ((lane >> 2) & 4) | ((lane >> 1) & 3); }
  static constexpr int column(unsigned lane) { return ((lane >> 1) & 4) | ((lane & 1) << 1); }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int R, int C>
MSL_INLINE simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T v) {
  simdgroup_matrix<T, R, C> m;
  m.elements = v;
  return m;
}

template <class T>
struct msl_whole_matrix {  // gathered from all lanes
  float e[8][8];
  msl_whole_matrix(const simdgroup_matrix<T, 8, 8>& m) {
    msl_lanes<vec<T, 2>> v(m.elements, ~0u);
    for (int lane = 0; lane < 32; lane++)
      for (int k = 0; k < 2; k++) e[m.row(lane)][m.column(lane) + k] = (float)v.values[lane][k];
  }
};

template <class D, class A, class B, class C>
MSL_INLINE void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8>& a,
                                              simdgroup_matrix<B, 8, 8>& b, simdgroup_matrix<C, 8, 8>& c) {
  msl_whole_matrix<A> left(a);
  msl_whole_matrix<B> right(b);
  int row = d.row(msl_lane()), column = d.column(msl_lane());
  for (int k = 0; k < 2; k++) {
    float sum = (float)c.elements[k];
    for (int i = 0; i < 8; i++) sum += left.e[row][i] * right.e[i][column + k];
    d.elements[k] = (D)sum;
  }
}
template <class D, class A, class B>
MSL_INLINE void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8>& a,
                                   simdgroup_matrix<B, 8, 8>& b) {
  simdgroup_matrix<D, 8, 8> zero;
  zero.elements = D(0);
  simdgroup_multiply_accumulate(d, a, b, zero);
}

template <class T, class P>
MSL_INLINE P msl_matrix_element(const simdgroup_matrix<T, 8, 8>& m, P p, ulong stride, vec<ulong, 2> origin,
                                bool transposed, int k) {
  ulong row = m.row(msl_lane()), column = m.column(msl_lane()) + k;
  return transposed ? p + (origin.y + column) * stride + origin.x + row
                    : p + (origin.y + row) * stride + origin.x + column;
}
template <class T, class P>
MSL_INLINE void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, P p, ulong stride = 8, vec<ulong, 2> origin = 0,
                               bool transposed = false) {
  for (int k = 0; k < 2; k++) m.elements[k] = *msl_matrix_element(m, p, stride, origin, transposed, k);
  msl_lanes<bool> all_lanes(true, ~0u);
}
template <class T, class P>
MSL_INLINE void simdgroup_store(simdgroup_matrix<T, 8, 8> m, P p, ulong stride = 8, vec<ulong, 2> origin = 0,
                                bool transposed = false) {
  for (int k = 0; k < 2; k++) *msl_matrix_element(m, p, stride, origin, transposed, k) = m.elements[k];
  msl_lanes<bool> all_lanes(true, ~0u);
}
}  // namespace metal
