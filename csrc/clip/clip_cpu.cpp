#include <cmath>
#include <cstring>

#include "clip/clip.h"
#include "clip/clip_simd.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "noise/normals.h"

namespace bulwark {
// Columns are the values of one sample over all leaves. How work is split depends on shapes alone, so that results do
// not depend on the number of threads.
static constexpr size_t TASK_COLUMNS = 16 * NORMALS_PER_TILE;
static constexpr size_t FEW_COLUMNS = 65536;  // below it the batch is split too, in chunks of at least
static constexpr size_t CHUNK_ROWS = 32;
static constexpr size_t UNIT_BYTES = 128 << 10;
static constexpr size_t GROUP_BYTES = 8 << 20;  // of rows that stay in the last-level cache from norm to sum

static size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

// What the last rows' sums get on top; nothing where sigma is null.
struct Noise {
  const float* sigma = nullptr;
  const uint32_t* key = nullptr;
  const uint32_t* counter = nullptr;

  // From inputs that end with sigma, key and counter.
  Noise(const Arrays& in, bool noisy) {
    if (!noisy) return;
    auto* at = &in[in.size() - 3];
    sigma = at[0].data<float>(), key = at[1].data<uint32_t>(), counter = at[2].data<uint32_t>();
  }

  void add(uint64_t first_block, size_t first_tile, float* y, size_t n) const {
    NoiseStream s{.key = {}, .counter = counter[0] + (uint64_t(counter[1]) << 32) + first_block, .domain = {1, 0}};
    std::copy(key, key + 8, s.key);
    add_normals(s, *sigma, first_tile, y, y, n);
  }
};

struct Leaf {
  const char* x;
  float* y;
  size_t columns, item;
  int type;
  uint64_t first_block;  // of its noise, counted from that of the first leaf
};

// A run of columns inside one leaf; `scratch` is the number of columns in the leaves and pieces before.
struct Piece {
  size_t leaf, at, n, scratch;
};

struct Work {
  std::vector<Leaf> leaves;
  std::vector<Piece> pieces;
  std::vector<size_t> task{0};  // task t holds the pieces from task[t] up to task[t + 1]
  size_t batch = 0, columns = 0, row_bytes = 0;

  Work(const Arrays& in, size_t leaves_in, size_t batch) : batch(batch) {
    size_t held = 0;
    uint64_t blocks = 0;
    for (size_t i = 0; i < leaves_in; i++) {
      auto& g = in[i];
      size_t n = 1;
      for (size_t d = 1; d < g.ndim(); d++) n *= g.shape(d);
      int type = g.dtype() == mx::float32 ? 0 : g.dtype() == mx::float16 ? 1 : 2;
      leaves.push_back({g.size() ? g.data<char>() : nullptr, nullptr, n, g.itemsize(), type, blocks});
      blocks += ceil_div(n, NORMALS_PER_TILE) * BLOCKS_PER_TILE;
      for (size_t at = 0; at < n; at += TASK_COLUMNS) {
        size_t m = std::min(TASK_COLUMNS, n - at);
        if (held && held + m > TASK_COLUMNS) {
          task.push_back(pieces.size());
          held = 0;
        }
        pieces.push_back({i, at, m, columns + at});
        held += m;
      }
      columns += n;
      row_bytes += n * g.itemsize();
    }
    if (held) task.push_back(pieces.size());
  }

  size_t tasks() const { return task.size() - 1; }
  size_t chunk() const { return std::max(CHUNK_ROWS, UNIT_BYTES / 4 / std::max<size_t>(columns, 1)); }
  bool chunked() const { return columns < FEW_COLUMNS && batch > chunk(); }
};

// Squared norms of the rows [from, to).
static void sq_norms(const Work& w, size_t from, size_t to, std::vector<double>& parts, float* out) {
  size_t rows = to - from, tasks = w.tasks();
  size_t step = std::max<size_t>(1, UNIT_BYTES * std::max<size_t>(tasks, 1) / std::max<size_t>(w.row_bytes, 1));
  parts.assign(rows * tasks, 0.0);
  parallel_for(ceil_div(rows, step) * tasks, [&](size_t unit) {
    size_t t = unit % tasks, r = unit / tasks * step, n = std::min(step, rows - r);
    for (size_t p = w.task[t]; p < w.task[t + 1]; p++) {
      auto& piece = w.pieces[p];
      auto& leaf = w.leaves[piece.leaf];
      BULWARK_PICK(clip_kernels)
          .add_sq_norms[leaf.type](leaf.x + ((from + r) * leaf.columns + piece.at) * leaf.item, leaf.columns, n,
                                   piece.n, &parts[r * tasks + t], tasks);
    }
  });
  for (size_t r = 0; r < rows; r++) {
    double sum = 0;
    for (size_t t = 0; t < tasks; t++) sum += parts[r * tasks + t];
    out[r] = float(sum);
  }
}

static void add_rows(const Work& w, const Piece& piece, size_t from, size_t to, const float* factors, float* y,
                     size_t ahead) {
  if (from == to) return;  // an empty batch has no data to point into
  auto& leaf = w.leaves[piece.leaf];
  BULWARK_PICK(clip_kernels)
      .add_rows[leaf.type](leaf.x + (from * leaf.columns + piece.at) * leaf.item, leaf.columns, to - from,
                           factors + from, y, piece.n, ahead, w.batch - from);
}

// Adds the rows [from, to) to what the rows before have left in the leaves' y: one after another, or, where the batch
// is split, in whole chunks whose sums are added one after another.
static void add_to_sums(const Work& w, size_t from, size_t to, const float* factors, std::vector<float>& scratch,
                        size_t ahead, const Noise& noise) {
  size_t tasks = w.tasks(), chunks = w.chunked() ? ceil_div(to - from, w.chunk()) : 0;
  scratch.assign(chunks * w.columns, 0.0f);
  parallel_for(chunks * tasks, [&](size_t unit) {
    size_t c = unit / tasks, t = unit % tasks, r = from + c * w.chunk();
    for (size_t p = w.task[t]; p < w.task[t + 1]; p++)
      add_rows(w, w.pieces[p], r, std::min(to, r + w.chunk()), factors, &scratch[c * w.columns + w.pieces[p].scratch],
               0);
  });
  parallel_for(tasks, [&](size_t t) {
    for (size_t p = w.task[t]; p < w.task[t + 1]; p++) {
      auto& piece = w.pieces[p];
      float* y = w.leaves[piece.leaf].y + piece.at;
      if (from == 0) std::memset(y, 0, piece.n * sizeof(float));
      if (!w.chunked()) add_rows(w, piece, from, to, factors, y, ahead);
      for (size_t c = 0; c < chunks; c++)
        for (size_t i = 0; i < piece.n; i++) y[i] += scratch[c * w.columns + piece.scratch + i];
      if (noise.sigma && to == w.batch)
        noise.add(w.leaves[piece.leaf].first_block, piece.at / NORMALS_PER_TILE, y, piece.n);
    }
  });
}

static void allocate(Arrays& out) {
  for (auto& x : out) x.set_data(mx::allocator::malloc(x.nbytes()));
}

static Arrays contiguous(const Arrays& in, mx::Stream s) {
  Arrays r;
  for (auto& x : in) r.push_back(mx::contiguous(x, false, s));
  return r;
}

static std::vector<mx::Shape> sum_shapes(const Arrays& in, size_t leaves) {
  std::vector<mx::Shape> r;
  for (size_t i = 0; i < leaves; i++) r.emplace_back(in[i].shape().begin() + 1, in[i].shape().end());
  return r;
}

mx::array sample_sq_norms(const Arrays& grads, mx::StreamOrDevice sd) {
  auto s = mx::to_stream(sd);
  return mx::array({grads[0].shape(0)}, mx::float32, std::make_shared<SampleSqNorms>(s), contiguous(grads, s));
}

void SampleSqNorms::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  size_t batch = out[0].size();
  mx::cpu::get_command_encoder(stream()).dispatch([w = Work(in, in.size(), batch), y = out[0].data<float>()] {
    std::vector<double> parts;
    sq_norms(w, 0, w.batch, parts, y);
  });
}

Arrays clipped_sum(const Arrays& grads, const mx::array& factors, const Arrays& noise, mx::StreamOrDevice sd) {
  auto s = mx::to_stream(sd);
  Arrays in = grads;
  in.push_back(factors);
  in.insert(in.end(), noise.begin(), noise.end());
  return mx::array::make_arrays(sum_shapes(grads, grads.size()), std::vector<mx::Dtype>(grads.size(), mx::float32),
                                std::make_shared<ClippedSum>(s, !noise.empty()), contiguous(in, s));
}

std::vector<mx::Shape> ClippedSum::output_shapes(const Arrays& in) { return sum_shapes(in, leaves(in)); }

static void refuse_repeated_noise(const char* op, bool noisy, const std::vector<int>& axes) {
  if (noisy && axes.back() < 0)
    throw std::invalid_argument(std::string("[") + op +
                                "] counter must be batched under vmap, or every copy gets the same noise");
}

std::pair<Arrays, std::vector<int>> ClippedSum::vmap(const Arrays& in, const std::vector<int>& axes) {
  refuse_repeated_noise("clipped_sum", noisy_, axes);
  return Op::vmap(in, axes);
}

void ClippedSum::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  auto& factors = in[leaves(in)];
  Work w(in, leaves(in), factors.size());
  for (size_t i = 0; i < out.size(); i++) w.leaves[i].y = out[i].data<float>();
  mx::cpu::get_command_encoder(stream()).dispatch(
      [w = std::move(w), noise = Noise(in, noisy_), f = factors.data<float>()] {
        std::vector<float> scratch;
        add_to_sums(w, 0, w.batch, f, scratch, 4, noise);
      });
}

Arrays clip_and_sum(const Arrays& grads, const mx::array& max_grad_norm, const std::string& mode, const Arrays& mask,
                    const Arrays& noise, mx::StreamOrDevice sd) {
  auto s = mx::to_stream(sd);
  Arrays in = grads;
  in.push_back(max_grad_norm);
  in.insert(in.end(), mask.begin(), mask.end());
  in.insert(in.end(), noise.begin(), noise.end());
  auto op = std::make_shared<ClipAndSum>(s, mode, !mask.empty(), !noise.empty());
  std::vector<mx::Dtype> types(grads.size() + 2, mx::float32);
  types.push_back(mx::int32);
  return mx::array::make_arrays(op->output_shapes(in), types, op, contiguous(in, s));
}

ClipAndSum::ClipAndSum(mx::Stream s, const std::string& mode, bool masked, bool noisy)
    : Op(s),
      name_("clip_and_sum_" + mode + (masked ? "_masked" : "") + (noisy ? "_noisy" : "")),
      automatic_(mode == "automatic"),
      masked_(masked),
      noisy_(noisy) {}

std::vector<mx::Shape> ClipAndSum::output_shapes(const Arrays& in) {
  auto r = sum_shapes(in, leaves(in));
  r.insert(r.end(), {{in[0].shape(0)}, {in[0].shape(0)}, {}});
  return r;
}

std::pair<Arrays, std::vector<int>> ClipAndSum::vmap(const Arrays& in, const std::vector<int>& axes) {
  refuse_repeated_noise("clip_and_sum", noisy_, axes);
  return Op::vmap(in, axes);
}

// The formula of clip_factors in ops/clip.py; `finite` is false for a sample that is refused.
static float clip_factor(float sq_norm, float max_grad_norm, bool automatic, bool finite) {
  if (!finite) return 0;
  float n = sq_norm > 0 ? std::sqrt(sq_norm) : 0;
  if (automatic) return max_grad_norm / (n + 0.01f);
  n += 1e-6f;
  return max_grad_norm >= n ? 1 : max_grad_norm / n;
}

void ClipAndSum::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  size_t leaves = this->leaves(in);
  Work w(in, leaves, in[0].shape(0));
  for (size_t i = 0; i < leaves; i++) w.leaves[i].y = out[i].data<float>();
  const bool* mask = masked_ ? in[leaves + 1].data<bool>() : nullptr;
  mx::cpu::get_command_encoder(stream()).dispatch(
      [w = std::move(w), noise = Noise(in, noisy_), mask, automatic = automatic_,
       max_grad_norm = in[leaves].data<float>(), norms = out[leaves].data<float>(),
       factors = out[leaves + 1].data<float>(), refused = out[leaves + 2].data<int32_t>()] {
        std::vector<double> parts;
        std::vector<float> scratch;
        size_t group = std::max<size_t>(1, GROUP_BYTES / std::max<size_t>(w.row_bytes, 1));
        if (w.chunked()) group = std::max<size_t>(1, group / w.chunk()) * w.chunk();
        *refused = 0;
        size_t from = 0;
        do {  // an empty batch passes once: its sums are zeros
          size_t to = std::min(from + group, w.batch);
          sq_norms(w, from, to, parts, norms + from);
          for (size_t b = from; b < to; b++) {
            bool counts = !mask || mask[b], finite = std::isfinite(norms[b]);
            *refused += counts && !finite;
            factors[b] = counts ? clip_factor(norms[b], *max_grad_norm, automatic, finite) : 0;
          }
          add_to_sums(w, from, to, factors, scratch, group, noise);
          from = to;
        } while (from < w.batch);
      });
}
}  // namespace bulwark
