// Host side of neighbors.metal: shapes, grid, order of buffers. Compiled on every platform.
#include <algorithm>
#include <limits>
#include <stdexcept>

#include "neighbors/neighbors.h"

namespace bulwark {
namespace {
constexpr uint32_t THREADS = 128, TILE = 64, SORTED = 2048;
constexpr uint32_t BUSY = 256;  // threadgroups: some for each of 80 cores
constexpr uint32_t LEAST_COLUMNS = 512, MOST_SEGMENTS = 16;
constexpr uint32_t MMD_GROUPS = 1024;  // at most: each has sums of all permutations

uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

struct Sizes {  // as in neighbors.metal
  uint32_t n, m, d, k, kept, room, segments, columns;
};

Sizes sizes_of(const mx::array& x, const mx::array& y, int k) {
  Sizes s{uint32_t(x.shape(0)), uint32_t(y.shape(0)), uint32_t(x.shape(1)), uint32_t(k), 0, 0, 1, 0};
  s.kept = s.k + s.k / 8 + 16;
  s.room = std::max(s.kept <= 96 ? 128u : 256u, s.kept + std::max(32u, s.kept / 4));
  const uint32_t wanted = ceil_div(BUSY, ceil_div(s.n, TILE));
  s.segments = std::max(1u, std::min({wanted, ceil_div(s.m, LEAST_COLUMNS), SORTED / s.kept, MOST_SEGMENTS}));
  s.columns = ceil_div(ceil_div(s.m, s.segments), TILE) * TILE;
  if (uint64_t(s.n) * std::max(s.segments, THREADS) > std::numeric_limits<uint32_t>::max())
    throw std::runtime_error("[bulwark] knn: x has too many rows for Metal");
  return s;
}
}  // namespace

// Behind its inputs stands what ops/neighbors.py prepares: rows of x and y near 1, the same centred, and of each row of
// x the rounding of a product and what keys lack, of each row of y its length and the least that its key has beside the
// product.
void Knn::metal(const Arrays& in, Arrays& out) {
  for (auto& a : out) allocate(stream(), a);
  const mx::array* p = in.data() + inputs_;
  const mx::array &x = p[0], &y = p[1];
  const Sizes s = sizes_of(x, y, k_);
  if (!s.n) return;
  const bool excludes = inputs_ != 2;
  const auto& exclude = inputs_ == 1 ? p[9] : in[inputs_ - 1];
  const int lists = int(s.n * s.segments), room = int(s.room);
  auto low = temporary(stream(), {lists, room}, mx::float32), index = temporary(stream(), {lists, room}, mx::uint32);
  auto filled = temporary(stream(), {lists}, mx::uint32), bound = temporary(stream(), {lists}, mx::float32);
  KernelCall find{neighbors_source, "find_candidates", ceil_div(s.n, TILE) * s.segments, THREADS};
  find.in(p[2]).in(p[3]).in(p[4]).in(p[6]).in(p[7]);
  excludes ? find.in(exclude) : find.unused();
  launch(stream(), find.out(low).out(index).out(filled).out(bound).bytes(s).constant(0, excludes));
  KernelCall choose{neighbors_source, "choose_nearest", s.n, THREADS};
  choose.in(x).in(y).in(p[5]).in(p[7]);
  excludes ? choose.in(exclude) : choose.unused();
  choose.in(low).in(index).in(filled).in(bound).in(p[8]).out(out[0]).out(out[1]).bytes(s);
  choose.bytes(float(s.d + 32) * 0x1p-23f).constant(0, excludes).constant(1, metric_ == Metric::inner_product);
  launch(stream(), choose.constant(2, metric_ == Metric::cosine).constant(3, metric_ == Metric::euclidean));
}

namespace {
struct SampleSizes {  // Samples of neighbors.metal
  uint32_t count, d, n, permutations, words, num_rates, tiles;
};
}  // namespace

void Mmd::metal(const Arrays& in, Arrays& out) {
  for (auto& a : out) allocate(stream(), a);
  const auto &rows = in[0], &words = in[1];
  SampleSizes s{uint32_t(rows.shape(0)),
                uint32_t(rows.shape(1)),
                uint32_t(n_),
                uint32_t(permutations_),
                uint32_t(words.shape(1)),
                uint32_t(rates_.size()),
                1};
  const uint64_t blocks = ceil_div(s.count, TILE), pairs = blocks * (blocks + 1) / 2;
  if (blocks > 60000) throw std::runtime_error("[bulwark] mmd: there are too many rows for Metal");
  s.tiles = uint32_t((pairs + MMD_GROUPS - 1) / MMD_GROUPS);
  const uint32_t groups = uint32_t((pairs + s.tiles - 1) / s.tiles), size = 3 + 2 * s.permutations;
  auto half = temporary(stream(), {int(s.count)}, mx::float32);
  auto parts = temporary(stream(), {int(groups), int(size), 2}, mx::float32);
  launch(
      stream(),
      KernelCall{neighbors_source, "half_squares", ceil_div(s.count, THREADS / 32), THREADS}.in(rows).out(half).bytes(
          s));
  KernelCall add{neighbors_source, "add_kernels", groups, THREADS};
  add.in(rows);
  s.permutations ? add.in(words) : add.unused();
  launch(stream(), add.in(half).out(parts).bytes(rates_).bytes(s));
  launch(stream(), KernelCall{neighbors_source, "add_parts", ceil_div(size, THREADS), THREADS}
                       .in(parts)
                       .out(out[0])
                       .bytes(groups)
                       .bytes(size));
}
}  // namespace bulwark
