#include "noise/noise_simd.h"

#include <float.h>
#include <string.h>

#include "noise/normals_simd.h"

namespace bulwark::BULWARK_ISA {
namespace {
template <Float F, bool ADD, typename T = typename Stored<F>::type>
INLINE void add_tile(const Constants& s, float sigma, uint64_t counter, const T* x, T* y) {
  for (int lane = 0; lane < int(BLOCKS_PER_TILE); lane += GROUPS * LANES) {
    Words w[GROUPS][16];
    chacha20(s, counter + lane, w);
#pragma GCC unroll 5
    for (int pair = 0; pair < 5; pair++) {
#pragma GCC unroll 2
      for (int g = 0; g < GROUPS; g++) {
        Floats z[2];
        box_muller(w[g][3 * pair], w[g][3 * pair + 1], w[g][3 * pair + 2], z[0], z[1]);
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
          const int at = int(BLOCKS_PER_TILE) * (2 * pair + k) + lane + g * LANES;
          Stored<F>::store(y + at, ADD ? Stored<F>::load(x + at) + sigma * z[k] : sigma * z[k]);
        }
      }
    }
  }
}

template <Float F, bool ADD, typename T = typename Stored<F>::type>
void add_tiles(const NoiseStream& s, float sigma, size_t first_tile, const T* x, T* y, size_t n) {
  const Constants constants(s);
  uint64_t counter = s.counter + BLOCKS_PER_TILE * first_tile;
  size_t i = 0;
  for (; i + NORMALS_PER_TILE <= n; i += NORMALS_PER_TILE, counter += BLOCKS_PER_TILE)
    add_tile<F, ADD>(constants, sigma, counter, ADD ? x + i : x, y + i);
  if (i == n) return;
  T last[NORMALS_PER_TILE] = {};
  if (ADD) memcpy(last, x + i, (n - i) * sizeof(T));
  add_tile<F, ADD>(constants, sigma, counter, last, last);
  memcpy(y + i, last, (n - i) * sizeof(T));
}

template <Float F, typename T = typename Stored<F>::type>
void add_normals(const NoiseStream& s, float sigma, size_t first_tile, const void* x, void* y, size_t n) {
  if (n == 0) return;
  if (sigma == 0) {
    if (!x) memset(y, 0, n * sizeof(T));
    if (x && x != y) memmove(y, x, n * sizeof(T));
    return;
  }
  if (!(sigma > 0 && sigma <= FLT_MAX)) sigma = __builtin_nanf("");
  if (x)
    add_tiles<F, true>(s, sigma, first_tile, static_cast<const T*>(x), static_cast<T*>(y), n);
  else
    add_tiles<F, false>(s, sigma, first_tile, static_cast<const T*>(nullptr), static_cast<T*>(y), n);
}

void keystream(const NoiseStream& s, size_t first_block, uint32_t* y, size_t n) {
  const Constants constants(s);
  uint64_t counter = s.counter + first_block;
  for (size_t i = 0; i < n; counter += GROUPS * LANES) {
    Words w[GROUPS][16];
    chacha20(constants, counter, w);
    for (int block = 0; block < GROUPS * LANES && i < n; block++)
      for (int k = 0; k < 16 && i < n; k++) y[i++] = w[block / LANES][k][block % LANES];
  }
}

void transform(const uint32_t* words, float* y, size_t n) {
  for (size_t i = 0; i < n; i += LANES) {
    const int count = n - i < size_t(LANES) ? int(n - i) : LANES;
    Words w[3] = {};
    Floats first, second;
    for (int lane = 0; lane < count; lane++)
      for (int k = 0; k < 3; k++) w[k][lane] = words[3 * (i + lane) + k];
    box_muller(w[0], w[1], w[2], first, second);
    for (int lane = 0; lane < count; lane++) {
      y[2 * (i + lane)] = first[lane];
      y[2 * (i + lane) + 1] = second[lane];
    }
  }
}
}  // namespace

const NoiseKernels noise_kernels{
    {add_normals<Float::f32>, add_normals<Float::f16>, add_normals<Float::bf16>}, keystream, transform};
}  // namespace bulwark::BULWARK_ISA
