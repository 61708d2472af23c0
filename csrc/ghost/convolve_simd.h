#pragma once
#include <stddef.h>

namespace bulwark {
// Inner loops of convolutions that unfold nothing. x [positions, step] lies in memory with zeros where it is padded; an
// output position sees the floats x[at[k]] (or, where `run` floats follow each other, x[at[k] + i]) from its own place.
struct ConvolveKernels {
  size_t columns;  // outputs that a panel of weights holds; zeros beyond the last
  // y[r * width + j] = bias[j] + sum over k of x[r * step + at[k]] * panel[k, j] for j < n; bias may be null
  void (*wide)(const float* x, size_t step, const size_t* at, size_t depth, const float* panel, const float* bias,
               size_t rows, size_t n, float* y, size_t width);
  // y[r * width] = bias + sum over k and i of x[r * step + at[k] + i] * weight[k * run + i]
  void (*narrow)(const float* x, size_t step, const size_t* at, size_t taps, size_t run, const float* weight,
                 float bias, size_t rows, float* y, size_t width);
  // Winograd's F(2 x 2, 3 x 3). Of n kernels [3, 3, c]: u [16, c, columns].
  void (*weights)(const float* kernels, size_t n, size_t c, float* u);
  // Of a tile of 4 x 4 pixels of c floats each: v[k * distance + i] for k < 16.
  void (*tile)(const float* const* pixels, size_t c, float* v, size_t distance);
  // Of products m[k * distance + j]: y[q][j] for the 2 x 2 outputs q that are not null and j < n; bias may be null.
  // Whether all are finite.
  bool (*outputs)(const float* m, size_t distance, const float* bias, size_t n, float* const* y);
};
namespace base {
extern const ConvolveKernels convolve_kernels;
}
namespace avx2 {
extern const ConvolveKernels convolve_kernels;
}
namespace avx512 {
extern const ConvolveKernels convolve_kernels;
}
}  // namespace bulwark
