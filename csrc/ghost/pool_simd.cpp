#include "ghost/pool_simd.h"

#include "common/lanes.h"

namespace bulwark::BULWARK_ISA {
// Some channels of a position; V is a register or one float.
template <class V>
static V read(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
static V largest_of(const float* x, const size_t* at, size_t taps) {
  V m = read<V>(x + at[0]);
  for (size_t k = 1; k < taps; k++) {
    V v = read<V>(x + at[k]);
    m = v > m ? v : m;
    m = v == v ? m : v;  // NaN stays: nothing is above it
  }
  return m;
}

template <class V>
static void share(const float* x, const float* dy, const size_t* at, size_t taps, float* dx) {
  const V m = largest_of<V>(x, at, taps);
  V count{}, one = V{} + 1.0f;
  for (size_t k = 0; k < taps; k++) count += read<V>(x + at[k]) == m ? one : V{};
  const V part = read<V>(dy) / count;
  for (size_t k = 0; k < taps; k++) {
    V v = (read<V>(x + at[k]) == m ? one : V{}) * part;
    memcpy(dx + at[k], &v, sizeof v);
  }
}

static void largest(const float* x, size_t step, const size_t* at, size_t taps, size_t c, size_t rows, float* y) {
  for (size_t r = 0; r < rows; r++, x += step, y += c) {
    size_t i = 0;
    for (; i + LANES <= c; i += LANES) {
      Vec m = largest_of<Vec>(x + i, at, taps);
      memcpy(y + i, &m, sizeof m);
    }
    for (; i < c; i++) y[i] = largest_of<float>(x + i, at, taps);
  }
}

static void shared(const float* x, const float* dy, size_t step, const size_t* at, size_t taps, size_t c, size_t rows,
                   float* dx) {
  for (size_t r = 0; r < rows; r++, x += step, dx += step, dy += c) {
    size_t i = 0;
    for (; i + LANES <= c; i += LANES) share<Vec>(x + i, dy + i, at, taps, dx + i);
    for (; i < c; i++) share<float>(x + i, dy + i, at, taps, dx + i);
  }
}

const PoolKernels pool_kernels{largest, shared};
}  // namespace bulwark::BULWARK_ISA
