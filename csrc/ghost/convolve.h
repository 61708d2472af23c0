// Convolutions of images on the CPU that unfold nothing, where the sizes suit one of three ways:
// wide: few values make an output, and stay in registers while many outputs are computed from them;
// narrow: few outputs are made of many channels, as in the gradient with respect to an image;
// Winograd's F(2 x 2, 3 x 3): 16 multiplications where 36 stood, 3 x 3 kernels of stride 1 and many channels.
#pragma once
#include <array>
#include <cstddef>
#include <vector>

namespace bulwark {
// x [batch, *space, channels], weight [outputs, *kernel, channels], bias [outputs] or null, y [batch, *out, outputs]
struct Images {
  const float *x, *weight, *bias;
  float* y;
  size_t batch, channels, outputs;
  std::array<size_t, 2> space, out, kernel, stride, padding, dilation;
};

enum class Way { unfolded, wide, narrow, winograd };

// By the sizes alone.
Way way_of(const Images&);

// The images whose outputs must be computed again unfolded: Winograd's sums spread what is not finite over the tile.
std::vector<size_t> convolve_images(const Images&, Way);
}  // namespace bulwark
