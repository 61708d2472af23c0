#include <metal_stdlib>
using namespace metal;
#include "normals.metal"

constant bool has_x [[function_constant(0)]];

// y = x + sigma z, or sigma z. A simdgroup draws a tile.
template <typename T>
[[kernel]] void add_gaussian(
    device const T* x [[buffer(0)]], device T* y [[buffer(1)]], constant float& sigma_given [[buffer(2)]],
    constant uint* key [[buffer(3)]], constant uint* counter [[buffer(4)]], constant uint2& domain [[buffer(5)]],
    constant ulong& first_tile [[buffer(6)]], constant ulong& n [[buffer(7)]],
    uint index [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  float sigma = valid_sigma(sigma_given);
  ulong tile = ulong(index / 32u), at = tile * NORMALS_PER_TILE + lane;
  if (is_zero(sigma)) {
    for (uint j = 0; j < 10u; j++, at += 32u)
      if (at < n) y[at] = has_x ? x[at] : T(0.0f);
    return;
  }
  float z[10];
  block_normals(key, counter, domain, (first_tile + tile) * 32u + lane, z);
  for (uint j = 0; j < 10u; j++, at += 32u)
    if (at < n) y[at] = T(has_x ? fma(sigma, z[j], float(x[at])) : sigma * z[j]);
}

// y[16 b .. 16 b + 16] = block b of the keystream. A thread draws a block.
[[kernel]] void random_bits(
    device uint* y [[buffer(0)]], constant uint* key [[buffer(1)]], constant uint* counter [[buffer(2)]],
    constant uint2& domain [[buffer(3)]], constant ulong& n [[buffer(4)]], uint block [[thread_position_in_grid]]) {
  ulong at = ulong(block) * 16u;
  if (at >= n) return;
  uint x[16];
  chacha20(key, counter, domain, ulong(block), x);
  if (at + 16u <= n) {
    device uint4* quads = (device uint4*)(y + at);
    for (uint k = 0; k < 4u; k++) quads[k] = uint4(x[4u * k], x[4u * k + 1u], x[4u * k + 2u], x[4u * k + 3u]);
  } else {
    for (uint k = 0; k < 16u; k++)
      if (at + k < n) y[at + k] = x[k];
  }
}

#define INSTANTIATE(name, type) \
  template [[host_name("add_gaussian_" #name)]] [[kernel]] decltype(add_gaussian<type>) add_gaussian<type>;
INSTANTIATE(float32, float)
INSTANTIATE(float16, half)
INSTANTIATE(bfloat16, bfloat)
