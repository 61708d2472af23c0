#pragma once
#include <stddef.h>

namespace bulwark {
// Of `rows` windows one behind the other: window r begins `step` floats behind the one before, its positions at[k] from
// there hold c floats each.
struct PoolKernels {
  // y[r, i] = the largest x[r * step + at[k] + i]
  void (*largest)(const float* x, size_t step, const size_t* at, size_t taps, size_t c, size_t rows, float* y);
  // dx[r * step + at[k] + i] = dy[r, i] over the number of the largest, where it is one of them, else 0 * that
  void (*shared)(const float* x, const float* dy, size_t step, const size_t* at, size_t taps, size_t c, size_t rows,
                 float* dx);
};
namespace base {
extern const PoolKernels pool_kernels;
}
namespace avx2 {
extern const PoolKernels pool_kernels;
}
namespace avx512 {
extern const PoolKernels pool_kernels;
}
}  // namespace bulwark
