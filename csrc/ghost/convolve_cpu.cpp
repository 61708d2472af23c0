#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "common/cpu.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "ghost/convolve.h"
#include "ghost/convolve_simd.h"

namespace bulwark {
static constexpr size_t MOST_WIDE = 64, MOST_NARROW = 4, LEAST_CHANNELS = 16;
static constexpr size_t LEAST_POSITIONS = 512;  // or transforming the weights takes longer than what it saves
static constexpr size_t BAND_VALUES = 16384;    // of padded input: they stay in the nearest cache but one
static constexpr size_t TILES_VALUES = 131072, LEAST_TILES = 24, MOST_TILES = 96;

static const ConvolveKernels& kernels() { return BULWARK_PICK(convolve_kernels); }

// Where a BLAS computes in units of its own (Accelerate), or vectors are short, unfolding is not worse.
static bool vectors_are_long() { return isa() != Isa::base; }

Way way_of(const Images& a) {
  const size_t taps = a.kernel[0] * a.kernel[1];
  if (a.outputs <= MOST_NARROW && a.channels >= LEAST_CHANNELS) return Way::narrow;
  if (taps * a.channels <= MOST_WIDE && a.outputs > MOST_NARROW) return Way::wide;
  const bool three = a.kernel[0] == 3 && a.kernel[1] == 3 && a.stride[0] == 1 && a.stride[1] == 1 &&
                     a.dilation[0] == 1 && a.dilation[1] == 1;
  const bool many =
      std::min(a.channels, a.outputs) >= LEAST_CHANNELS && a.batch * a.out[0] * a.out[1] >= LEAST_POSITIONS;
  return three && many && vectors_are_long() ? Way::winograd : Way::unfolded;
}

// Rows [first, first + count) of an image between its margins, zeros where they lie outside.
static void pad_rows(const Images& a, size_t image, size_t first, size_t count, size_t width, float* to) {
  const size_t c = a.channels, line = width * c, left = a.padding[1] * c;
  for (size_t i = 0; i < count; i++, to += line) {
    const size_t row = first + i - a.padding[0];  // wraps round above the image
    if (row >= a.space[0]) {
      std::fill_n(to, line, 0.0f);
      continue;
    }
    const size_t n = a.space[1] * c;
    std::fill_n(to, left, 0.0f);
    std::memcpy(to + left, a.x + (image * a.space[0] + row) * n, n * sizeof(float));
    std::fill_n(to + left + n, line - left - n, 0.0f);
  }
}

// weight [outputs, depth] as panels [depth, columns] one behind the other, zeros beyond the last output
static Buffer panels_of(const float* weight, size_t outputs, size_t depth, size_t columns) {
  Buffer r(ceil_div(outputs, columns) * depth * columns);
  for (size_t j = 0; j < outputs; j++)
    for (size_t k = 0; k < depth; k++) r[(j / columns * depth + k) * columns + j % columns] = weight[j * depth + k];
  return r;
}

// Where what an output sees lies, from its own place on: each tap, or each value of each tap.
static std::vector<size_t> offsets(const Images& a, size_t width, bool each_value) {
  std::vector<size_t> r;
  for (size_t y = 0; y < a.kernel[0]; y++)
    for (size_t x = 0; x < a.kernel[1]; x++)
      for (size_t i = 0; i < (each_value ? a.channels : 1); i++)
        r.push_back((y * a.dilation[0] * width + x * a.dilation[1]) * a.channels + i);
  return r;
}

// Wide and narrow: bands of an image's output rows, each from a padded copy of what it sees.
static void convolve_bands(const Images& a, bool is_wide) {
  const size_t width = a.space[1] + 2 * a.padding[1], reach = a.dilation[0] * (a.kernel[0] - 1) + 1;
  const size_t band = std::clamp<size_t>(BAND_VALUES / (width * a.channels * a.stride[0]), 1, a.out[0]);
  const size_t bands = ceil_div(a.out[0], band), step = a.stride[1] * a.channels;
  const size_t taps = a.kernel[0] * a.kernel[1], depth = taps * a.channels;
  const auto at = offsets(a, width, is_wide);
  auto& k = kernels();
  const Buffer panels = is_wide ? panels_of(a.weight, a.outputs, depth, k.columns) : Buffer();
  parallel_for(a.batch * bands, [&](size_t task) {
    thread_local Buffer padded;
    const size_t image = task / bands, from = task % bands * band, to = std::min(a.out[0], from + band);
    const size_t rows = (to - from - 1) * a.stride[0] + reach;
    float* x = room(padded, rows * width * a.channels);
    pad_rows(a, image, from * a.stride[0], rows, width, x);
    for (size_t row = from; row < to; row++, x += a.stride[0] * width * a.channels) {
      float* y = a.y + (image * a.out[0] + row) * a.out[1] * a.outputs;
      for (size_t j = 0; !is_wide && j < a.outputs; j++)
        k.narrow(x, step, at.data(), taps, a.channels, a.weight + j * depth, a.bias ? a.bias[j] : 0, a.out[1], y + j,
                 a.outputs);
      for (size_t j = 0; is_wide && j < a.outputs; j += k.columns)
        k.wide(x, step, at.data(), depth, panels.data() + j * depth, a.bias ? a.bias + j : nullptr, a.out[1],
               std::min(k.columns, a.outputs - j), y + j, a.outputs);
    }
  });
}

// 4 x 4 pixels and the 2 x 2 outputs that they make. Null: an output outside the image.
struct WinogradTile {
  const float* pixels[16];
  size_t image;
  float* y[4];

  WinogradTile(const Images& a, size_t tile, const float* zeros) {
    const size_t down = ceil_div(a.out[0], 2), across = ceil_div(a.out[1], 2);
    image = tile / (down * across);
    const size_t top = tile / across % down * 2, left = tile % across * 2;
    for (size_t i = 0; i < 16; i++) {
      const size_t r = top + i / 4 - a.padding[0], c = left + i % 4 - a.padding[1];  // wrap round before the image
      const bool inside = r < a.space[0] && c < a.space[1];
      pixels[i] = inside ? a.x + ((image * a.space[0] + r) * a.space[1] + c) * a.channels : zeros;
    }
    for (size_t i = 0; i < 4; i++) {
      const size_t r = top + i / 2, c = left + i % 2;
      const bool inside = r < a.out[0] && c < a.out[1];
      y[i] = inside ? a.y + ((image * a.out[0] + r) * a.out[1] + c) * a.outputs : nullptr;
    }
  }
};

static std::vector<size_t> convolve_winograd(const Images& a) {
  auto& k = kernels();
  const size_t c = a.channels, panels = ceil_div(a.outputs, k.columns), panel = 16 * c * k.columns;
  Buffer u(panels * panel);
  parallel_for(panels, [&](size_t i) {
    const size_t first = i * k.columns;
    k.weights(a.weight + first * 9 * c, std::min(k.columns, a.outputs - first), c, u.data() + i * panel);
  });
  const Buffer zeros(c);
  const size_t tiles = a.batch * ceil_div(a.out[0], 2) * ceil_div(a.out[1], 2);
  const size_t block = std::clamp(TILES_VALUES / (16 * c), LEAST_TILES, MOST_TILES);
  std::vector<size_t> at(c), again;
  for (size_t i = 0; i < c; i++) at[i] = i;
  auto spoilt = std::make_unique<std::atomic<bool>[]>(a.batch);
  parallel_for(ceil_div(tiles, block), [&](size_t task) {
    thread_local Buffer values, products;
    const size_t from = task * block, n = std::min(block, tiles - from);
    float *v = room(values, 16 * n * c), *m = room(products, 16 * n * k.columns);
    std::vector<WinogradTile> places;
    for (size_t t = 0; t < n; t++) places.emplace_back(a, from + t, zeros.data());
    for (size_t t = 0; t < n; t++) k.tile(places[t].pixels, c, v + t * c, n * c);
    for (size_t j = 0; j < a.outputs; j += k.columns) {
      const float* w = u.data() + j / k.columns * panel;
      for (size_t i = 0; i < 16; i++)
        k.wide(v + i * n * c, c, at.data(), c, w + i * c * k.columns, nullptr, n, k.columns, m + i * n * k.columns,
               k.columns);
      const size_t count = std::min(k.columns, a.outputs - j);
      for (size_t t = 0; t < n; t++) {
        float* y[4];
        for (size_t q = 0; q < 4; q++) y[q] = places[t].y[q] ? places[t].y[q] + j : nullptr;
        if (!k.outputs(m + t * k.columns, n * k.columns, a.bias ? a.bias + j : nullptr, count, y))
          spoilt[places[t].image] = true;
      }
    }
  });
  for (size_t b = 0; b < a.batch; b++)
    if (spoilt[b]) again.push_back(b);
  return again;
}

std::vector<size_t> convolve_images(const Images& a, Way way) {
  if (way == Way::winograd) return convolve_winograd(a);
  convolve_bands(a, way == Way::wide);
  return {};
}
}  // namespace bulwark
