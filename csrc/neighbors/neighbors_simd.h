#pragma once
#include <stddef.h>
#include <stdint.h>

namespace bulwark {
struct NeighborsKernels {
  // hits: every j with a[j] - b <= s[j] + f * c[j], in order; how many they are
  size_t (*scan)(const float* a, float b, const float* s, float f, const float* c, size_t n, uint32_t* hits);
  // sum of (fx * x[i] - fy * y[i])^2, and of x[i] * y[i]
  double (*sq_distance)(const float* x, double fx, const float* y, double fy, size_t n);
  double (*product)(const float* x, const float* y, size_t n);
};
namespace base {
extern const NeighborsKernels neighbors_kernels;
}
namespace avx2 {
extern const NeighborsKernels neighbors_kernels;
}
namespace avx512 {
extern const NeighborsKernels neighbors_kernels;
}
}  // namespace bulwark
