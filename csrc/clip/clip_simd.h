#pragma once
#include <stddef.h>

namespace bulwark {
struct ClipKernels {
  // One function a dtype (float32, float16, bfloat16). Rows lie `stride` values apart.
  // out[r * out_stride] += sum of squares of the n values of row r
  void (*add_sq_norms[3])(const void* x, size_t stride, size_t rows, size_t n, double* out, size_t out_stride);
  // y[i] += factors[r] * x[r][i], one row after another; a row whose factor is 0 changes nothing, whatever it holds
  void (*add_rows[3])(const void* x, size_t stride, size_t rows, const float* factors, float* y, size_t n);
};
namespace base {
extern const ClipKernels clip_kernels;
}
namespace avx2 {
extern const ClipKernels clip_kernels;
}
namespace avx512 {
extern const ClipKernels clip_kernels;
}
}  // namespace bulwark
