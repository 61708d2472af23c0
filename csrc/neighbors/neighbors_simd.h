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
  // products[j], as the sum over the rates of 2^(rate * min(products[j] - x - y[j], 0)); the sum of these
  double (*gaussian)(float* products, float x, const float* y, const float* rates, size_t num_rates, size_t n);
  // y[i] = bit i of the words, n a multiple of 32
  void (*unpack)(const uint32_t* words, float* y, size_t n);
  // inside[i] += a[i] * x[i] and across[i] += x[i]
  void (*add_products)(const float* a, const float* x, float* inside, float* across, size_t n);
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
