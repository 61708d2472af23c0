// Host side of clip.metal: shapes, grid, order of buffers. Compiled on every platform.
#include <algorithm>
#include <limits>
#include <optional>
#include <stdexcept>

#include "clip/clip.h"
#include "noise/normals.h"

namespace bulwark {
namespace {
// These stand in clip.metal too.
constexpr uint32_t BUFFERS = 8, NORM_THREADS = 512, SUM_THREADS = 480, SHORT_THREADS = 512;
constexpr uint64_t HELD = 6144, MOST_HELD = 1024;
// How a sample is cut depends on its size alone, so that its norm does not depend on the batch around it: into enough
// chunks to keep a large GPU busy with one sample.
constexpr uint64_t MOST_CHUNKS = 64, LEAST_CHUNK = 4096;
// Every threadgroup of the sums reads all partial norms, which so many columns make up for, also where they are of 16
// bits. Else it has few columns, so that there are many threadgroups.
constexpr uint64_t COLUMNS_PER_PARTIAL = 32, LEAST_COLUMNS = 64, MOST_COLUMNS = 1920, MANY_GROUPS = 256;
// So many threadgroups' columns are worth a few idle threads in the last one: a leaf that has them begins a
// threadgroup, and no tile of its noise falls to two.
constexpr uint64_t LARGE = 4;
// Samples so short would leave most of a GPU idle, were their columns all that it shares among its cores.
constexpr uint64_t SHORT_COLUMNS = 3072, LEAST_ROWS = 8, SHORT_GROUPS = 128;

uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }
uint64_t round_up(uint64_t a, uint64_t b) { return ceil_div(a, b) * b; }

// clip.metal names what these hold.
struct Leaf {
  uint32_t size, type, input;
  uint32_t at = 0, quad = 0, tile = 0, output = 0, start = 0;
};
struct Sizes {
  uint32_t leaves, batch, columns = 0, chunk = 0, partials = 0, width = 1, quads = 0;
};

uint32_t group_count(uint64_t groups) {
  if (groups > std::numeric_limits<uint32_t>::max()) throw std::runtime_error("[bulwark] too many samples for Metal");
  return uint32_t(groups);
}

// The leaves of an op, and how they are cut.
struct Tree {
  std::vector<Leaf> leaves;
  Sizes sizes;
  uint32_t sum_groups = 0;

  Tree(const Arrays& in, size_t count, uint32_t batch, bool flat) : sizes{uint32_t(count), batch} {
    uint64_t columns = 0, tiles = 0;
    for (uint32_t i = 0; i < count; i++) {
      const auto& g = in[i];
      uint64_t size = 1;
      for (size_t d = 1; d < g.ndim(); d++) size *= g.shape(d);
      const uint32_t type = g.dtype() == mx::float32 ? 0 : g.dtype() == mx::float16 ? 1 : 2;
      leaves.push_back({uint32_t(size), type, i});
      auto& l = leaves.back();
      l.tile = tiles, l.output = flat ? 0 : i, l.start = flat ? columns : 0;
      tiles += ceil_div(size, NORMALS_PER_TILE);
      if ((columns += size) > std::numeric_limits<int32_t>::max())
        throw std::runtime_error("[bulwark] on Metal a sample must hold less than 2^31 values");
    }
    sizes.columns = columns;
    is_short() ? number(0) : cut();
  }

  bool is_short() const { return sizes.columns && sizes.columns <= SHORT_COLUMNS; }

 private:
  void cut() {
    const uint64_t columns = sizes.columns;
    sizes.chunk = std::max(LEAST_CHUNK, round_up(ceil_div(columns, MOST_CHUNKS), 1024));
    sizes.partials = ceil_div(columns, sizes.chunk);
    while (sizes.width < sizes.partials && sizes.width < 32) sizes.width *= 2;
    uint64_t wanted = std::max({COLUMNS_PER_PARTIAL * sizes.partials, columns / MANY_GROUPS, LEAST_COLUMNS});
    wanted = wanted > 256 ? round_up(wanted, NORMALS_PER_TILE) : round_up(wanted, LEAST_COLUMNS);
    wanted = std::min(wanted, MOST_COLUMNS);
    sizes.quads = wanted / 4;
    number(std::stable_partition(leaves.begin(), leaves.end(), [&](auto& l) { return l.size >= LARGE * wanted; }) -
           leaves.begin());
  }

  // Columns and quads one leaf after another, but that the first ones begin with a threadgroup.
  void number(size_t large) {
    uint64_t at = 0, quad = 0;
    for (size_t i = 0; i < leaves.size(); i++) {
      if (i <= large && sizes.quads) quad = round_up(quad, sizes.quads);
      leaves[i].at = at, leaves[i].quad = quad;
      at += leaves[i].size;
      quad += ceil_div(leaves[i].size, 4);
    }
    sizes.quads = std::min<uint64_t>(sizes.quads, std::max<uint64_t>(quad, 1));
    if (sizes.quads) sum_groups = ceil_div(quad, sizes.quads);
  }
};

// The first arguments of a call: leaves 0, 1, ... 7, or the addresses of more; what is said of them.
void add_leaves(KernelCall& c, const Arrays& in, const Tree& tree) {
  const size_t count = tree.leaves.size();
  const bool many = count > BUFFERS;
  for (size_t i = 0; i < BUFFERS; i++) i < count && !many ? c.in(in[i]) : c.unused();
  many ? c.addresses({in.begin(), in.begin() + count}) : c.unused();
  c.bytes(tree.leaves).bytes(tree.sizes).constant(5, many);
}
void add_sums(KernelCall& c, const Arrays& out, size_t count) {
  for (size_t i = 0; i < BUFFERS; i++) i < count ? c.out(out[i]) : c.unused();
}

// Dispatches the partial norms, [batch, partials]; `norms` takes them where there is one a sample.
mx::array partial_norms(const mx::Stream& s, const Arrays& in, const Tree& tree, const mx::array* norms) {
  const auto batch = tree.sizes.batch, partials = tree.sizes.partials;
  const auto partial = norms && partials == 1 ? *norms : temporary(s, {int(batch), int(partials)}, mx::float32);
  if (!partial.size()) return partial;
  KernelCall c{clip_source, "sq_norms", group_count(uint64_t(batch) * partials), NORM_THREADS};
  add_leaves(c, in, tree);
  launch(s, c.out(partial));
  return partial;
}

// Where the sums take their factors from: the caller, or norms.
struct Factors {
  const mx::array* given = nullptr;
  const mx::array *max_grad_norm = nullptr, *mask = nullptr;
  bool automatic = false;
  const mx::array* found = nullptr;  // norms, factors, num_refused

  void add(KernelCall& c) const {
    max_grad_norm ? c.in(*max_grad_norm) : c.unused();
    mask ? c.in(*mask) : c.unused();
  }
  void add_constants(KernelCall& c, const mx::array* noise) const {
    c.constant(0, found).constant(1, noise).constant(2, mask).constant(3, automatic);
  }
};

void add_noise(KernelCall& c, const mx::array* noise) {
  for (int i = 0; i < 3; i++) noise ? c.in(noise[i]) : c.unused();
}

void sums(const mx::Stream& s, const Arrays& in, const Tree& tree, const Factors& factors, const Arrays& out,
          size_t num_sums, const mx::array* noise) {
  std::optional<mx::array> partial;
  if (factors.found) partial = partial_norms(s, in, tree, nullptr);
  if (!tree.sum_groups && !factors.found) return;
  KernelCall c{clip_source, "clipped_sum", std::max(1u, tree.sum_groups), SUM_THREADS};
  add_leaves(c, in, tree);
  add_sums(c, out, num_sums);
  c.in(partial ? *partial : *factors.given);
  factors.add(c);
  for (int i = 0; i < 3; i++) factors.found ? c.out(factors.found[i]) : c.unused();
  add_noise(c, noise);
  factors.add_constants(c, noise);
  launch(s, c);
}

// Samples of which a threadgroup holds several: norms, and with `out` factors and sums, in one reading.
void short_samples(const mx::Stream& s, const Arrays& in, Tree& tree, const Factors& factors, const Arrays* out,
                   size_t num_sums, const mx::array* noise) {
  const uint32_t columns = tree.sizes.columns, batch = tree.sizes.batch, tile = std::min(MOST_HELD, HELD / columns);
  const uint32_t rows = round_up(std::max(LEAST_ROWS, ceil_div(batch, SHORT_GROUPS)), tile);
  const uint32_t groups = ceil_div(batch, rows);
  while (4 * tree.sizes.width < columns && tree.sizes.width < 32) tree.sizes.width *= 2;
  const auto partial = temporary(s, {out ? int(groups) : 0, int(columns)}, mx::float32);
  const auto refused = temporary(s, {out && factors.found ? int(groups) : 0}, mx::int32);
  if (batch) {
    KernelCall c{clip_source, "clip_short", groups, SHORT_THREADS};
    add_leaves(c, in, tree);
    c.bytes(rows).bytes(tile);
    factors.given ? c.in(*factors.given) : c.unused();
    factors.add(c);
    factors.found ? c.out(factors.found[0]) : c.unused();
    out&& factors.found ? c.out(factors.found[1]).out(refused) : c.unused().unused();
    out ? c.out(partial) : c.unused();
    factors.add_constants(c, nullptr);
    launch(s, c.constant(4, out));
  }
  if (!out) return;
  KernelCall c{clip_source, "finish_short", uint32_t(ceil_div(columns, 32)), SHORT_THREADS};
  c.in(partial);
  add_sums(c, *out, num_sums);
  c.bytes(tree.leaves).bytes(tree.sizes).bytes(groups);
  factors.found ? c.in(refused).out(factors.found[2]) : c.unused().unused();
  add_noise(c, noise);
  launch(s, c.constant(0, factors.found).constant(1, noise));
}

void clip(const mx::Stream& s, const Arrays& in, Tree& tree, const Factors& factors, const Arrays& out, size_t num_sums,
          const mx::array* noise) {
  tree.is_short() ? short_samples(s, in, tree, factors, &out, num_sums, noise)
                  : sums(s, in, tree, factors, out, num_sums, noise);
}

const mx::array* noise_of(const Arrays& in, bool noisy) { return noisy ? &in[in.size() - 3] : nullptr; }

void allocate_all(const mx::Stream& s, Arrays& out) {
  for (auto& x : out) allocate(s, x);
}
}  // namespace

void SampleSqNorms::metal(const Arrays& in, Arrays& out) {
  allocate(stream(), out[0]);
  const uint32_t batch = out[0].size();
  Tree tree(in, in.size(), batch, false);
  if (tree.is_short()) return short_samples(stream(), in, tree, {.found = &out[0]}, nullptr, 0, nullptr);
  const auto partial = partial_norms(stream(), in, tree, &out[0]);
  const auto partials = tree.sizes.partials, width = tree.sizes.width;
  if (!batch || partials == 1) return;
  KernelCall c{clip_source, "finish_sq_norms", group_count(ceil_div(uint64_t(batch) * width, 256)), 256};
  launch(stream(), c.in(partial).out(out[0]).bytes(batch).bytes(partials).bytes(width));
}

void ClippedSum::metal(const Arrays& in, Arrays& out) {
  allocate_all(stream(), out);
  const Factors factors{.given = &in[leaves_]};
  Tree tree(in, leaves_, in[leaves_].size(), flat_);
  clip(stream(), in, tree, factors, out, num_sums(), noise_of(in, noisy_));
}

void ClipAndSum::metal(const Arrays& in, Arrays& out) {
  allocate_all(stream(), out);
  const Factors factors{.max_grad_norm = &in[leaves_],
                        .mask = masked_ ? &in[leaves_ + 1] : nullptr,
                        .automatic = automatic_,
                        .found = &out[out.size() - 3]};
  Tree tree(in, leaves_, in[0].shape(0), flat_);
  clip(stream(), in, tree, factors, out, num_sums(), noise_of(in, noisy_));
}
}  // namespace bulwark
