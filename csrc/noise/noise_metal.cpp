// Host side of noise.metal: shapes, grid, order of buffers. Compiled on every platform.
#include <algorithm>

#include "mlx/backend/common/utils.h"
#include "noise/noise.h"
#include "noise/normals.h"

namespace bulwark {
namespace {
constexpr uint32_t THREADS = 256, TILES_PER_GROUP = THREADS / 32;

uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

// x: what the noise is added to, or null.
void add(const mx::Stream& s, const mx::array* x, const mx::array& y, const mx::array* sigma_key_counter, Domain domain,
         uint64_t first_tile) {
  const uint64_t n = y.size(), tiles = ceil_div(n, NORMALS_PER_TILE);
  if (n == 0) return;
  KernelCall call{noise_source, std::string("add_gaussian") + suffix(y.dtype()),
                  uint32_t(ceil_div(tiles, TILES_PER_GROUP)), THREADS};
  x ? call.in(*x) : call.unused();
  call.out(y).in(sigma_key_counter[0]).in(sigma_key_counter[1]).in(sigma_key_counter[2]);
  launch(s, call.bytes(domain).bytes(first_tile).bytes(n).constant(0, x != nullptr));
}
}  // namespace

void Gaussian::metal(const Arrays& in, Arrays& out) {
  allocate(stream(), out[0]);
  add(stream(), nullptr, out[0], in.data(), domain, 0);
}

void AddGaussian::metal(const Arrays& in, Arrays& out) {
  let_go_of_inputs(in, out);
  uint64_t tile = first_tile_;
  for (size_t i = 0; i < out.size(); i++) {
    if (in[i].flags().row_contiguous && mx::is_donatable(in[i], out[i]))
      out[i].copy_shared_buffer(in[i]);
    else
      allocate(stream(), out[i]);
    add(stream(), &in[i], out[i], &in[out.size()], domain, tile);
    tile += ceil_div(in[i].size(), NORMALS_PER_TILE);
  }
}

void RandomBits::metal(const Arrays& in, Arrays& out) {
  allocate(stream(), out[0]);
  const uint64_t n = out[0].size();
  if (n == 0) return;
  KernelCall call{noise_source, "random_bits", uint32_t(ceil_div(n, 16 * THREADS)), THREADS};
  launch(stream(), call.out(out[0]).in(in[0]).in(in[1]).bytes(domain).bytes(n));
}
}  // namespace bulwark
