// Host side of clip.metal: shapes, grid, order of buffers. Compiled on every platform.
#include <algorithm>
#include <limits>
#include <stdexcept>

#include "clip/clip.h"
#include "noise/normals.h"

namespace bulwark {
namespace {
// These stand in clip.metal too.
constexpr uint32_t LEAVES = 8, NORM_THREADS = 512, SUM_THREADS = 480, SMALL = 1024;
// How a sample is cut depends on its size alone, so that its norm does not depend on the batch around it. Few partial
// norms, since every threadgroup of the sums reads them all; many enough to keep a large GPU busy.
constexpr uint64_t WANTED_CHUNKS = 32, LEAST_CHUNK = 4096;
constexpr uint64_t WIDE_COLUMNS = 640, MANY_GROUPS = 256;

uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

// clip.metal names these at its top.
struct Leaf {
  uint32_t size, type, first_group = 0;
  uint32_t chunk_or_columns = 1, chunks_or_slices = 1, partial_or_tile = 0;
  uint32_t output = 0, at = 0;
};
using Leaves = std::array<Leaf, LEAVES>;

Leaf leaf_of(const mx::array& g) {
  uint64_t size = 1;
  for (size_t d = 1; d < g.ndim(); d++) size *= g.shape(d);
  if (size > std::numeric_limits<int32_t>::max())
    throw std::runtime_error("[bulwark] on Metal a leaf must hold less than 2^31 values a sample but holds " +
                             std::to_string(size_t(size)));
  const bool wide = size % 4 == 0 && g.size() && reinterpret_cast<uintptr_t>(g.data<char>()) % (4 * g.itemsize()) == 0;
  const uint32_t type = g.dtype() == mx::float32 ? 0 : g.dtype() == mx::float16 ? 1 : 2;
  return {uint32_t(size), type + 4 * wide};
}

std::vector<Leaf> leaves_of(const Arrays& in, size_t count) {
  std::vector<Leaf> leaves;
  for (size_t i = 0; i < count; i++) leaves.push_back(leaf_of(in[i]));
  return leaves;
}

void add_leaves(KernelCall& c, const Arrays& in, size_t from, size_t to) {
  for (size_t i = from; i < from + LEAVES; i++) i < to ? c.in(in[i]) : c.unused();
}

uint32_t group_count(uint64_t groups) {
  if (groups > std::numeric_limits<uint32_t>::max()) throw std::runtime_error("[bulwark] too many samples for Metal");
  return uint32_t(groups);
}

struct Partials {
  mx::array norms;  // [batch, count]
  uint32_t count, width;
};

// Dispatches the partial norms; `norms` takes them where there is one a sample.
Partials partial_norms(const mx::Stream& s, const Arrays& in, std::vector<Leaf> leaves, uint32_t batch,
                       const mx::array* norms) {
  uint64_t columns = 0;
  uint32_t count = 0, width = 1;
  for (auto& l : leaves) columns += l.size;
  const uint64_t chunk = std::max(LEAST_CHUNK, ceil_div(ceil_div(columns, WANTED_CHUNKS), 1024) * 1024);
  for (auto& l : leaves) {
    l.chunk_or_columns = std::min(chunk, uint64_t(std::numeric_limits<int32_t>::max()));
    l.chunks_or_slices = std::max<uint64_t>(1, ceil_div(l.size, chunk));
    l.partial_or_tile = count;
    count += l.size ? l.chunks_or_slices : 0;
  }
  while (width < count && width < 32) width *= 2;
  const auto partial = norms && count == 1 ? *norms : temporary(s, {int(batch), int(count)}, mx::float32);
  if (!batch) return {partial, count, width};
  for (size_t from = 0; from < leaves.size(); from += LEAVES) {
    const size_t to = std::min(leaves.size(), from + LEAVES);
    Leaves table{};
    uint64_t groups = 0;
    for (size_t i = from; i < to; i++) {
      auto& l = table[i - from] = leaves[i];
      l.first_group = group_count(groups);
      if (l.size) groups += l.size <= SMALL ? ceil_div(batch, NORM_THREADS / 32) : uint64_t(batch) * l.chunks_or_slices;
    }
    if (!groups) continue;
    KernelCall c{clip_source, "sq_norms", group_count(groups), NORM_THREADS};
    add_leaves(c, in, from, to);
    leaves.size() <= LEAVES ? c.out(partial) : c.part(partial);
    launch(s, c.bytes(table).bytes(uint32_t(to - from)).bytes(batch).bytes(count));
  }
  return {partial, count, width};
}

// Factors for the sums: given by the caller, or found from partial norms by the first dispatch.
struct Factors {
  mx::array from;
  const Partials* partials = nullptr;
  const mx::array *max_grad_norm = nullptr, *mask = nullptr;
  bool automatic = false;
  Arrays outputs{};  // norms, factors, num_refused
};

void sums(const mx::Stream& s, const Arrays& in, std::vector<Leaf> leaves, uint32_t batch, Factors factors,
          const Arrays& out, bool flat, const mx::array* noise) {
  uint64_t tile = 0, at = 0;
  for (size_t from = 0; from < leaves.size(); from += LEAVES) {
    const size_t to = std::min(leaves.size(), from + LEAVES);
    Leaves table{};
    uint64_t groups = 0;
    for (size_t i = from; i < to; i++) {
      auto& l = table[i - from] = leaves[i];
      const uint64_t most = l.size >= WIDE_COLUMNS * MANY_GROUPS ? WIDE_COLUMNS : NORMALS_PER_TILE;
      l.first_group = group_count(groups);
      l.chunk_or_columns = std::clamp<uint64_t>(ceil_div(l.size, 4), 1, most / 4);
      l.chunks_or_slices = SUM_THREADS / l.chunk_or_columns;
      l.partial_or_tile = tile;
      l.output = flat ? 0 : i - from;
      l.at = flat ? at : 0;
      at += l.size;
      groups += ceil_div(l.size, 4 * l.chunk_or_columns);
      tile += ceil_div(l.size, NORMALS_PER_TILE);
    }
    const Partials* partials = factors.partials;
    if (!groups && !partials) continue;
    KernelCall c{clip_source, "clipped_sum", std::max(1u, group_count(groups)), SUM_THREADS};
    add_leaves(c, in, from, to);
    for (size_t i = from; i < from + LEAVES; i++) {
      if (flat)
        i == from ? c.part(out[0]) : c.unused();
      else
        i < to ? c.out(out[i]) : c.unused();
    }
    c.bytes(table).bytes(uint32_t(to - from)).bytes(batch).in(factors.from);
    c.bytes(partials ? partials->count : 0u).bytes(partials ? partials->width : 1u);
    partials ? c.in(*factors.max_grad_norm) : c.unused();
    factors.mask ? c.in(*factors.mask) : c.unused();
    for (int i = 0; i < 3; i++) partials ? c.out(factors.outputs[i]) : c.unused();
    for (int i = 0; i < 3; i++) noise ? c.in(noise[i]) : c.unused();
    c.constant(0, partials).constant(1, noise).constant(2, factors.mask).constant(3, factors.automatic);
    launch(s, c);
    if (partials) factors = {factors.outputs[1]};  // the other leaves take what the first dispatch has found
  }
}

const mx::array* noise_of(const Arrays& in, bool noisy) { return noisy ? &in[in.size() - 3] : nullptr; }

void allocate_all(const mx::Stream& s, Arrays& out) {
  for (auto& x : out) allocate(s, x);
}
}  // namespace

void SampleSqNorms::metal(const Arrays& in, Arrays& out) {
  allocate(stream(), out[0]);
  const uint32_t batch = out[0].size();
  const auto p = partial_norms(stream(), in, leaves_of(in, in.size()), batch, &out[0]);
  if (!batch || p.count == 1) return;
  KernelCall c{clip_source, "finish_sq_norms", group_count(ceil_div(uint64_t(batch) * p.width, 256)), 256};
  launch(stream(), c.in(p.norms).out(out[0]).bytes(batch).bytes(p.count).bytes(p.width));
}

void ClippedSum::metal(const Arrays& in, Arrays& out) {
  allocate_all(stream(), out);
  const auto& factors = in[leaves_];
  sums(stream(), in, leaves_of(in, leaves_), factors.size(), {factors}, out, flat_, noise_of(in, noisy_));
}

void ClipAndSum::metal(const Arrays& in, Arrays& out) {
  allocate_all(stream(), out);
  const uint32_t batch = in[0].shape(0);
  const auto leaves = leaves_of(in, leaves_);
  const auto partials = partial_norms(stream(), in, leaves, batch, nullptr);
  Factors factors{partials.norms, &partials, &in[leaves_], masked_ ? &in[leaves_ + 1] : nullptr, automatic_};
  factors.outputs.assign(out.end() - 3, out.end());
  sums(stream(), in, leaves, batch, factors, out, flat_, noise_of(in, noisy_));
}
}  // namespace bulwark
