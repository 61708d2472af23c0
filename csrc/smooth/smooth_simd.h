#pragma once
#include "noise/normals.h"

namespace bulwark {
enum class Distribution { gaussian, uniform };

// What happens to a copy after the noise. Grid values are low + (place * width) / steps; `steps` 0: no grid.
struct Limits {
  bool bounded;
  float low, high;
  float scale, width, steps;
};

struct SmoothKernels {
  // y[i] = x[i] + noise for n values that begin with a tile, computed in float32, on the calling thread: values
  // 320 * first_tile + i of the stream. One function a Float. x is read in whole tiles, and so must be there for
  // 320 * ceil(n / 320) values; sigma as in normals.h.
  void (*add_draws[3])(const NoiseStream&, Distribution, float sigma, const Limits&, size_t first_tile, const void* x,
                       void* y, size_t n);
  // winners[r] = index of the largest of the `classes` values of row r, the first of equal ones; `classes` where the
  // row holds NaN. One function a Float.
  void (*winners[3])(const void* x, size_t rows, size_t classes, int32_t* winners);
};
namespace base {
extern const SmoothKernels smooth_kernels;
}
namespace avx2 {
extern const SmoothKernels smooth_kernels;
}
namespace avx512 {
extern const SmoothKernels smooth_kernels;
}
}  // namespace bulwark
