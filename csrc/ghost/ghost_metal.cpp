// Host side of ghost.metal: shapes, grid, order of buffers. Compiled on every platform.
#include <algorithm>
#include <limits>
#include <optional>
#include <stdexcept>

#include "ghost/ghost.h"
#include "ghost/pool.h"

namespace bulwark {
namespace {
constexpr uint32_t THREADS = 128;  // of gram and direct
// Tiles of 64 rows or columns halve the traffic of those of 32, but leave a GPU idle where they are few.
constexpr uint64_t MANY_GROUPS = 256;

uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

struct Sizes {  // as in ghost.metal
  uint32_t batch, rows, units, d, p, tiles = 1, across = 1;
};

uint32_t checked(uint64_t n) {
  if (n > std::numeric_limits<int32_t>::max())
    throw std::runtime_error("[bulwark] a layer has too many rows or columns for Metal");
  return uint32_t(n);
}

struct Norms {
  const mx::Stream& stream;
  const mx::array *x = nullptr, *dy = nullptr, *mask = nullptr, *tokens = nullptr, *segments = nullptr;
  bool bias = false;
  Sizes sizes{};

  Norms(const mx::Stream& s, const mx::array& dy, const mx::array* segments, int units)
      : stream(s), dy(&dy), segments(segments) {
    uint64_t rows = 1;
    for (size_t i = 1; i + 1 < dy.ndim(); i++) rows *= dy.shape(i);
    checked(uint64_t(dy.shape(0)) * rows);
    sizes = {uint32_t(dy.shape(0)), uint32_t(rows), uint32_t(units), 0, uint32_t(dy.shape(-1))};
  }

  uint64_t rows_of_unit() const {
    return segments && sizes.units ? ceil_div(uint64_t(sizes.batch) * sizes.rows, sizes.units) : sizes.rows;
  }

  uint64_t gram_tiles(uint64_t tile) const { return ceil_div(sizes.rows, tile); }
  uint64_t gram_groups(uint64_t tile) const {
    const auto n = gram_tiles(tile);
    return sizes.batch * (segments ? n : n * (n + 1) / 2);
  }
  uint64_t across(uint64_t tile) const { return ceil_div(sizes.d + bias, tile); }
  uint64_t direct_tiles(uint64_t tile) const { return across(tile) * ceil_div(sizes.p, tile); }

  bool prefers_gram() const {
    const double r = rows_of_unit(), d = sizes.d + bias, p = sizes.p;
    return (r + 32) / 2 * (d + p) < d * p;
  }

  void run(Ghost::Method method, const mx::array& out) {
    if (!sizes.units) return;
    if (!segments && sizes.rows == 1 && x) return outer(out);
    std::optional<mx::array> order, start;
    if (segments) {
      order = temporary(stream, {int(sizes.batch)}, mx::uint32);
      start = temporary(stream, {int(sizes.units) + 1}, mx::uint32);
      KernelCall c{ghost_source, "order_units", checked(ceil_div(uint64_t(sizes.units) + 1, 64)), 64};
      launch(stream, c.in(*segments).out(*order).out(*start).bytes(sizes));
    }
    const bool gram = method == Ghost::gram || (method == Ghost::automatic && (!x || prefers_gram()));
    uint64_t groups;
    std::string name;
    if (gram) {
      const uint64_t tile = gram_groups(64) >= MANY_GROUPS && rows_of_unit() > 32 ? 64 : 32;
      sizes.tiles = gram_tiles(tile), groups = gram_groups(tile);
      name = "gram_" + std::to_string(size_t(tile));
    } else {
      const uint64_t tile = sizes.units * direct_tiles(64) >= MANY_GROUPS && sizes.d > 32 && sizes.p > 32 ? 64 : 32;
      sizes.tiles = checked(direct_tiles(tile)), sizes.across = across(tile), groups = sizes.units * direct_tiles(tile);
      name = "direct_" + std::to_string(size_t(tile));
    }
    const auto partial = temporary(stream, {int(checked(groups))}, mx::float32);
    if (groups) {
      KernelCall c{ghost_source, name + suffix(dy->dtype()), uint32_t(groups), THREADS};
      x ? c.in(*x) : c.unused();
      c.in(*dy);
      for (auto* a : {mask, tokens, segments}) a ? c.in(*a) : c.unused();
      for (auto* a : {&order, &start}) *a ? c.in(**a) : c.unused();
      launch(stream, constants(c.out(partial).bytes(sizes)));
    }
    const bool by_start = gram && segments;
    const uint32_t each = gram && !segments ? groups / std::max(1u, sizes.batch) : sizes.tiles;
    KernelCall c{ghost_source, "add_partial", checked(ceil_div(uint64_t(sizes.units) * 32, 256)), 256};
    c.in(partial).out(out);
    by_start ? c.in(*start) : c.unused();
    launch(stream, c.bytes(sizes.units).bytes(groups ? each : 0u).constant(0, by_start));
  }

 private:
  KernelCall constants(KernelCall c) const {
    return c.constant(0, segments).constant(1, mask).constant(2, bias).constant(3, tokens);
  }

  void outer(const mx::array& out) const {
    KernelCall c{ghost_source, std::string("outer") + suffix(dy->dtype()),
                 checked(ceil_div(uint64_t(sizes.batch) * 32, 256)), 256};
    c.in(*x).in(*dy);
    mask ? c.in(*mask) : c.unused();
    launch(stream, constants(c.out(out).bytes(sizes)));
  }
};

void none() { throw std::runtime_error("[bulwark] this op of the family ghost has no Metal kernel"); }
}  // namespace

// One call, one group, rows as they stand, x and dy of one type: ops/ghost.py brings what is more into this form.
void GhostSqNorms::metal(const Arrays& in, Arrays& out) {
  allocate(stream(), out[0]);
  Norms n(stream(), in[1], segmented_ ? &in.back() : nullptr, units(in));
  n.x = &in[0];
  n.mask = ghost_.masked ? &in[2] : nullptr;
  n.bias = ghost_.bias;
  n.sizes.d = in[0].shape(-1);
  n.run(ghost_.method, out[0]);
}

void EmbeddingSqNorms::metal(const Arrays& in, Arrays& out) {
  allocate(stream(), out[0]);
  Norms n(stream(), in[1], segmented_ ? &in.back() : nullptr, units(in));
  n.tokens = &in[0];
  n.run(Ghost::gram, out[0]);
}

void GhostGrads::metal(const Arrays&, Arrays&) { none(); }
void GhostClippedSum::metal(const Arrays&, Arrays&) { none(); }
void Convolved::metal(const Arrays&, Arrays&) { none(); }
void MaxPool::metal(const Arrays&, Arrays&) { none(); }
void MaxPoolGradient::metal(const Arrays&, Arrays&) { none(); }
void EmbeddingClippedSum::metal(const Arrays&, Arrays&) { none(); }
void EmbeddingLinearProducts::metal(const Arrays&, Arrays&) { none(); }
}  // namespace bulwark
