#pragma once
#include <stddef.h>

namespace bulwark {
struct ClipKernels {
  float (*sum_of_squares)(const float* x, size_t n);
};
namespace base { extern const ClipKernels clip_kernels; }
namespace avx2 { extern const ClipKernels clip_kernels; }
namespace avx512 { extern const ClipKernels clip_kernels; }
}  // namespace bulwark
