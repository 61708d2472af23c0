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
constexpr uint32_t LEAVES = 8, NORM_THREADS = 512, SUM_THREADS = 480, SHORT_THREADS = 512, SMALL = 1024;
constexpr uint64_t HELD = 6144, MOST_HELD = 1024;
// How a sample is cut depends on its size alone, so that its norm does not depend on the batch around it: into enough
// chunks to keep a large GPU busy with one sample.
constexpr uint64_t MOST_CHUNKS = 64, LEAST_CHUNK = 4096;
// Every threadgroup of the sums reads all partial norms, which so many columns make up for, also where they are of 16
// bits. Else it has few columns, so that there are many threadgroups.
constexpr uint64_t COLUMNS_PER_PARTIAL = 32, LEAST_COLUMNS = 64, MOST_COLUMNS = 1920, MANY_GROUPS = 256;
// Samples so short would leave most of a GPU idle, were their columns all that it shares among its cores.
constexpr uint64_t SHORT_COLUMNS = 3072, LEAST_ROWS = 8, SHORT_GROUPS = 128;

uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }
uint64_t round_up(uint64_t a, uint64_t b) { return ceil_div(a, b) * b; }

// clip.metal names these at its top.
struct Leaf {
  uint32_t size, type, first_group = 0;
  uint32_t chunk_or_quads = 1, chunks_or_slices = 1, partial_or_tile = 0;
  uint32_t output = 0, at = 0;
};
using Leaves = std::vector<Leaf>;
using Table = std::array<Leaf, LEAVES>;

Leaf leaf_of(const mx::array& g) {
  uint64_t size = 1;
  for (size_t d = 1; d < g.ndim(); d++) size *= g.shape(d);
  if (size > std::numeric_limits<int32_t>::max())
    throw std::runtime_error("[bulwark] on Metal a leaf must hold less than 2^31 values a sample but holds " +
                             std::to_string(size_t(size)));
  return {uint32_t(size), g.dtype() == mx::float32 ? 0u : g.dtype() == mx::float16 ? 1u : 2u};
}

Leaves leaves_of(const Arrays& in, size_t count) {
  Leaves leaves;
  for (size_t i = 0; i < count; i++) leaves.push_back(leaf_of(in[i]));
  return leaves;
}

uint64_t columns_of(const Leaves& leaves) {
  uint64_t columns = 0;
  for (auto& l : leaves) columns += l.size;
  return columns;
}

uint32_t group_count(uint64_t groups) {
  if (groups > std::numeric_limits<uint32_t>::max()) throw std::runtime_error("[bulwark] too many samples for Metal");
  return uint32_t(groups);
}

// The arguments of a call that stand for leaf 0, 1, ... 7 of it: inputs, or outputs.
void add_leaves(KernelCall& c, const Arrays& in, size_t from, size_t to) {
  for (size_t i = from; i < from + LEAVES; i++) i < to ? c.in(in[i]) : c.unused();
}
void add_sums(KernelCall& c, const Arrays& out, size_t from, size_t to, bool flat) {
  if (flat) c.part(out[0]);
  for (size_t i = from + flat; i < from + LEAVES; i++) i < to && !flat ? c.out(out[i]) : c.unused();
}

// Some of the leaves, as many as a call takes: those from `from` up to `to`.
struct Part {
  size_t from, to;
  Table table{};
  uint64_t groups = 0;
};

// How leaves are cut for the norms and for the sums.
struct Cut {
  uint64_t chunk;
  uint32_t partials = 0, width = 1;  // partial norms of a sample; so many lanes add them
  uint64_t columns;                  // of a threadgroup of the sums

  explicit Cut(const Leaves& leaves) {
    const uint64_t all = columns_of(leaves);
    chunk = std::max(LEAST_CHUNK, round_up(ceil_div(all, MOST_CHUNKS), 1024));
    for (auto& l : leaves) partials += chunks(l);
    while (width < partials && width < 32) width *= 2;
    columns = std::max({COLUMNS_PER_PARTIAL * partials, all / MANY_GROUPS, LEAST_COLUMNS});
    columns = columns > 256 ? round_up(columns, NORMALS_PER_TILE) : round_up(columns, LEAST_COLUMNS);
    columns = std::min(columns, MOST_COLUMNS);
  }
  uint32_t chunks(const Leaf& l) const { return ceil_div(l.size, chunk); }

  std::vector<Part> norms(const Leaves& leaves, uint32_t batch) const {
    uint32_t partial = 0;
    return parts(leaves, [&](Leaf& l, Part& p, size_t) {
      l.chunk_or_quads = std::min<uint64_t>(chunk, std::numeric_limits<int32_t>::max());
      l.chunks_or_slices = std::max(1u, chunks(l));
      l.partial_or_tile = partial;
      partial += chunks(l);
      if (l.size) p.groups += l.size <= SMALL ? ceil_div(batch, NORM_THREADS / 32) : uint64_t(batch) * chunks(l);
    });
  }

  std::vector<Part> sums(const Leaves& leaves, bool flat) const {
    uint64_t tile = 0, at = 0;
    return parts(leaves, [&](Leaf& l, Part& p, size_t i) {
      l.chunk_or_quads = std::clamp<uint64_t>(ceil_div(l.size, 4), 1, columns / 4);
      l.chunks_or_slices = SUM_THREADS / l.chunk_or_quads;
      l.partial_or_tile = tile;
      l.output = flat ? 0 : i;
      l.at = flat ? at : 0;
      at += l.size;
      tile += ceil_div(l.size, NORMALS_PER_TILE);
      p.groups += ceil_div(l.size, 4 * l.chunk_or_quads);
    });
  }

 private:
  template <class Fill>
  static std::vector<Part> parts(const Leaves& leaves, Fill fill) {
    std::vector<Part> parts;
    for (size_t from = 0; from < leaves.size(); from += LEAVES) {
      auto& p = parts.emplace_back(Part{from, std::min(leaves.size(), from + LEAVES)});
      for (size_t i = from; i < p.to; i++) {
        auto& l = p.table[i - from] = leaves[i];
        l.first_group = group_count(p.groups);
        fill(l, p, i - from);
      }
    }
    return parts;
  }
};

// Dispatches the partial norms, [batch, cut.partials]; `norms` takes them where there is one a sample.
mx::array partial_norms(const mx::Stream& s, const Arrays& in, const Leaves& leaves, const Cut& cut, uint32_t batch,
                        const mx::array* norms) {
  const auto partial = norms && cut.partials == 1 ? *norms : temporary(s, {int(batch), int(cut.partials)}, mx::float32);
  for (auto& p : cut.norms(leaves, batch)) {
    if (!batch || !p.groups) continue;
    KernelCall c{clip_source, "sq_norms", group_count(p.groups), NORM_THREADS};
    add_leaves(c, in, p.from, p.to);
    leaves.size() <= LEAVES ? c.out(partial) : c.part(partial);
    launch(s, c.bytes(p.table).bytes(uint32_t(p.to - p.from)).bytes(batch).bytes(cut.partials));
  }
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

void sums(const mx::Stream& s, const Arrays& in, const Leaves& leaves, uint32_t batch, Factors factors,
          const Arrays& out, bool flat, const mx::array* noise) {
  const Cut cut(leaves);
  auto parts = cut.sums(leaves, flat);
  std::optional<mx::array> partial;
  if (factors.found) {
    partial = partial_norms(s, in, leaves, cut, batch, nullptr);
    // The first call finds the factors of all: let it be the one whose threadgroups read the least of partial norms.
    std::iter_swap(parts.begin(),
                   std::min_element(parts.begin(), parts.end(), [](auto& a, auto& b) { return a.groups < b.groups; }));
  }
  for (auto& p : parts) {
    if (!p.groups && !factors.found) continue;
    KernelCall c{clip_source, "clipped_sum", std::max(1u, group_count(p.groups)), SUM_THREADS};
    add_leaves(c, in, p.from, p.to);
    add_sums(c, out, p.from, p.to, flat);
    c.bytes(p.table).bytes(uint32_t(p.to - p.from)).bytes(batch).in(factors.found ? *partial : *factors.given);
    c.bytes(cut.partials).bytes(cut.width);
    factors.add(c);
    for (int i = 0; i < 3; i++) factors.found ? c.out(factors.found[i]) : c.unused();
    add_noise(c, noise);
    factors.add_constants(c, noise);
    launch(s, c);
    if (factors.found) factors = {&factors.found[1]};
  }
}

bool is_short(const Leaves& leaves) {
  const auto columns = columns_of(leaves);
  return leaves.size() <= LEAVES && columns && columns <= SHORT_COLUMNS;
}

// Samples of which a threadgroup holds several: norms, and with `out` factors and sums, in one reading.
void short_samples(const mx::Stream& s, const Arrays& in, const Leaves& leaves, uint32_t batch, const Factors& factors,
                   const Arrays* out, const mx::array* noise) {
  const uint32_t columns = columns_of(leaves), tile = std::min(MOST_HELD, HELD / columns);
  const uint32_t rows = round_up(std::max(LEAST_ROWS, ceil_div(batch, SHORT_GROUPS)), tile);
  const uint32_t groups = ceil_div(batch, rows), count = leaves.size();
  uint32_t width = 1;
  while (4 * width < columns && width < 32) width *= 2;
  Table table{};
  uint32_t at = 0, noise_tile = 0;
  for (uint32_t i = 0; i < count; i++) {
    table[i] = leaves[i];
    table[i].output = i, table[i].at = at, table[i].partial_or_tile = noise_tile;
    at += leaves[i].size;
    noise_tile += ceil_div(leaves[i].size, NORMALS_PER_TILE);
  }
  const auto partial = temporary(s, {out ? int(groups) : 0, int(columns)}, mx::float32);
  const auto refused = temporary(s, {out && factors.found ? int(groups) : 0}, mx::int32);
  if (batch) {
    KernelCall c{clip_source, "clip_short", groups, SHORT_THREADS};
    add_leaves(c, in, 0, count);
    c.bytes(table).bytes(count).bytes(batch).bytes(rows).bytes(tile).bytes(columns).bytes(width);
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
  add_sums(c, *out, 0, count, false);
  c.bytes(table).bytes(count).bytes(groups).bytes(columns);
  factors.found ? c.in(refused).out(factors.found[2]) : c.unused().unused();
  add_noise(c, noise);
  launch(s, c.constant(0, factors.found).constant(1, noise));
}

const mx::array* noise_of(const Arrays& in, bool noisy) { return noisy ? &in[in.size() - 3] : nullptr; }

void allocate_all(const mx::Stream& s, Arrays& out) {
  for (auto& x : out) allocate(s, x);
}
}  // namespace

void SampleSqNorms::metal(const Arrays& in, Arrays& out) {
  allocate(stream(), out[0]);
  const uint32_t batch = out[0].size();
  const auto leaves = leaves_of(in, in.size());
  if (is_short(leaves)) return short_samples(stream(), in, leaves, batch, {.found = &out[0]}, nullptr, nullptr);
  const Cut cut(leaves);
  const auto partial = partial_norms(stream(), in, leaves, cut, batch, &out[0]);
  if (!batch || cut.partials == 1) return;
  KernelCall c{clip_source, "finish_sq_norms", group_count(ceil_div(uint64_t(batch) * cut.width, 256)), 256};
  launch(stream(), c.in(partial).out(out[0]).bytes(batch).bytes(cut.partials).bytes(cut.width));
}

void ClippedSum::metal(const Arrays& in, Arrays& out) {
  allocate_all(stream(), out);
  const auto leaves = leaves_of(in, leaves_);
  const Factors factors{.given = &in[leaves_]};
  const uint32_t batch = in[leaves_].size();
  const auto* noise = noise_of(in, noisy_);
  is_short(leaves) ? short_samples(stream(), in, leaves, batch, factors, &out, noise)
                   : sums(stream(), in, leaves, batch, factors, out, flat_, noise);
}

void ClipAndSum::metal(const Arrays& in, Arrays& out) {
  allocate_all(stream(), out);
  const auto leaves = leaves_of(in, leaves_);
  const Factors factors{.max_grad_norm = &in[leaves_],
                        .mask = masked_ ? &in[leaves_ + 1] : nullptr,
                        .automatic = automatic_,
                        .found = &out[out.size() - 3]};
  const uint32_t batch = in[0].shape(0);
  const auto* noise = noise_of(in, noisy_);
  is_short(leaves) ? short_samples(stream(), in, leaves, batch, factors, &out, noise)
                   : sums(stream(), in, leaves, batch, factors, out, flat_, noise);
}
}  // namespace bulwark
