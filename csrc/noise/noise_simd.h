#pragma once
#include "noise/normals.h"

namespace bulwark {
struct NoiseKernels {
  // One function a Float; x and y hold that type. See normals.h.
  void (*add_normals[3])(const NoiseStream&, float sigma, size_t first_tile, const void* x, void* y, size_t n);
  // Words 16 first_block .. 16 first_block + n of the keystream, in the order of RFC 8439.
  void (*keystream)(const NoiseStream&, size_t first_block, uint32_t* y, size_t n);
  // Two normals from each three words (radius high, radius low, angle): y[2i], y[2i + 1] from words[3i ..].
  void (*transform)(const uint32_t* words, float* y, size_t n);
};
namespace base {
extern const NoiseKernels noise_kernels;
}
namespace avx2 {
extern const NoiseKernels noise_kernels;
}
namespace avx512 {
extern const NoiseKernels noise_kernels;
}
}  // namespace bulwark
