// The CPU's stream of secure standard normals: ChaCha20 (RFC 8439) with a 64-bit block counter, then Box-Muller.
// A tile is 32 consecutive blocks; normal j (0..9) of block b of tile t is number 320 t + 32 j + b of the stream.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace bulwark {
constexpr size_t NORMALS_PER_TILE = 320, BLOCKS_PER_TILE = 32;

struct NoiseStream {
  uint32_t key[8];
  uint64_t counter;  // of the first block
  uint32_t domain[2];
};

enum class Float { f32, f16, bf16 };

// y[i] = (x ? x[i] : 0) + sigma * z[320 * first_tile + i] for i in [0, n), computed in float32, on the calling thread.
// y may be x. sigma = 0 copies x; a sigma that is negative, infinite or NaN makes every y NaN, never un-noised data.
void add_normals(const NoiseStream&, float sigma, size_t first_tile, const float* x, float* y, size_t n);
void add_normals(const NoiseStream&, float sigma, size_t first_tile, Float, const void* x, void* y, size_t n);
}  // namespace bulwark
