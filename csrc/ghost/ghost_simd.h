#pragma once
#include <stddef.h>

namespace bulwark {
struct GhostKernels {
  // sum of (a[i] + add) * b[i], over short runs in float, runs in double
  double (*dot)(const float* a, const float* b, float add, size_t n);
  // y[i] = f * x[i] for float16 and bfloat16 (types 1 and 2), float32 (type 0)
  void (*scale)(int type, const void* x, float f, float* y, size_t n);
  // y[i] += x[i]
  void (*add)(const float* x, float* y, size_t n);
  // common/blas.h tells what it computes; for machines without a BLAS
  void (*sgemm)(bool ta, bool tb, size_t m, size_t n, size_t k, const float* a, size_t lda, const float* b, size_t ldb,
                float beta, float* c, size_t ldc);
};
namespace base {
extern const GhostKernels ghost_kernels;
}
namespace avx2 {
extern const GhostKernels ghost_kernels;
}
namespace avx512 {
extern const GhostKernels ghost_kernels;
}
}  // namespace bulwark
