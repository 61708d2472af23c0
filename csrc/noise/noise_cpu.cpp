#include "common/isa.h"
#include "noise/noise_simd.h"

namespace bulwark {
void add_normals(const NoiseStream& s, float sigma, size_t first_tile, Float type, const void* x, void* y, size_t n) {
  BULWARK_PICK(noise_kernels).add_normals[int(type)](s, sigma, first_tile, x, y, n);
}

void add_normals(const NoiseStream& s, float sigma, size_t first_tile, const float* x, float* y, size_t n) {
  add_normals(s, sigma, first_tile, Float::f32, x, y, n);
}
}  // namespace bulwark
