#include "clip/clip_simd.h"

namespace bulwark::BULWARK_ISA {
static float sum_of_squares(const float* x, size_t n) {
  float lane[16] = {};
  size_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int k = 0; k < 16; k++) lane[k] += x[i + k] * x[i + k];
  for (; i < n; i++) lane[i % 16] += x[i] * x[i];
  for (int w = 8; w; w /= 2)
    for (int k = 0; k < w; k++) lane[k] += lane[k + w];
  return lane[0];
}
const ClipKernels clip_kernels{sum_of_squares};
}  // namespace bulwark::BULWARK_ISA
