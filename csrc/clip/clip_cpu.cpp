#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>

#include "clip/clip.h"
#include "clip/clip_simd.h"
#include "common/cpu.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "mlx/backend/cpu/encoder.h"
#include "noise/normals.h"

namespace bulwark {
namespace {
// Columns are the values of one sample over all leaves. How work is split depends on shapes alone, so that results do
// not depend on the number of threads.
constexpr size_t LEAST_TASK_COLUMNS = 16 * NORMALS_PER_TILE;
constexpr size_t MOST_TASK_COLUMNS = 256 * NORMALS_PER_TILE;  // long runs: memory delivers them faster
constexpr size_t WANTED_TASKS = 8;
constexpr size_t FEW_COLUMNS = 65536;  // below it the batch is split too, in chunks of at least
constexpr size_t CHUNK_ROWS = 32;
constexpr size_t CHUNK_COLUMNS = 32768;  // times rows
constexpr size_t UNIT_BYTES = 1 << 20;
constexpr size_t GROUP_BYTES = 8 << 20;  // of rows that stay in the last-level cache from norm to sum

constexpr size_t MOST_OUTPUTS = 8;  // of one primitive; see SumOp. Metal kernels have buffers for no more

// What the sums get on top after the last row; nothing where sigma is null.
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
    if (!sigma) return;
    NoiseStream s{.key = {}, .counter = counter[0] + (uint64_t(counter[1]) << 32) + first_block, .domain = {1, 0}};
    std::copy(key, key + 8, s.key);
    add_normals(s, *sigma, first_tile, y, y, n);
  }
};

size_t size_of(const mx::Shape& shape) {
  size_t n = 1;
  for (auto d : shape) n *= d;
  return n;
}

size_t columns_of(const mx::array& leaf) { return size_of(mx::Shape(leaf.shape().begin() + 1, leaf.shape().end())); }

size_t columns_of(const Arrays& in, size_t leaves) {
  size_t n = 0;
  for (size_t i = 0; i < leaves; i++) n += columns_of(in[i]);
  return n;
}

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
    uint64_t blocks = 0;
    for (size_t i = 0; i < leaves_in; i++) {
      auto& g = in[i];
      size_t n = columns_of(g);
      int type = g.dtype() == mx::float32 ? 0 : g.dtype() == mx::float16 ? 1 : 2;
      leaves.push_back({g.size() ? g.data<char>() : nullptr, nullptr, n, g.itemsize(), type, blocks});
      blocks += ceil_div(n, NORMALS_PER_TILE) * BLOCKS_PER_TILE;
      columns += n;
      row_bytes += n * g.itemsize();
    }
    size_t most =
        std::clamp(columns / WANTED_TASKS / NORMALS_PER_TILE * NORMALS_PER_TILE, LEAST_TASK_COLUMNS, MOST_TASK_COLUMNS);
    size_t before = 0, held = 0;
    for (size_t i = 0; i < leaves_in; i++) {
      for (size_t at = 0; at < leaves[i].columns; at += most) {
        size_t n = std::min(most, leaves[i].columns - at);
        if (held && held + n > most) {
          task.push_back(pieces.size());
          held = 0;
        }
        pieces.push_back({i, at, n, before + at});
        held += n;
      }
      before += leaves[i].columns;
    }
    if (held) task.push_back(pieces.size());
  }

  // Sums go to one array a leaf, or one behind the other to the first array.
  void sums_to(Arrays& out, bool flat) {
    size_t before = 0;
    for (size_t i = 0; i < leaves.size(); i++) {
      leaves[i].y = flat ? out[0].data<float>() + before : out[i].data<float>();
      before += leaves[i].columns;
    }
  }

  size_t tasks() const { return task.size() - 1; }
  size_t chunk() const { return std::max(CHUNK_ROWS, CHUNK_COLUMNS / std::max<size_t>(columns, 1)); }
  bool chunked() const { return columns < FEW_COLUMNS && batch > chunk(); }
};

// Adds the part of a task's columns to the squared norms of `rows` rows; parts is [batch, tasks].
void measure(const Work& w, size_t t, size_t from, size_t rows, std::vector<double>& parts) {
  for (size_t p = w.task[t]; p < w.task[t + 1]; p++) {
    auto& piece = w.pieces[p];
    auto& leaf = w.leaves[piece.leaf];
    BULWARK_PICK(clip_kernels)
        .add_sq_norms[leaf.type](leaf.x + (from * leaf.columns + piece.at) * leaf.item, leaf.columns, rows, piece.n,
                                 &parts[from * w.tasks() + t], w.tasks());
  }
}

void finish(const Work& w, size_t from, size_t to, const std::vector<double>& parts, float* out) {
  for (size_t r = from; r < to; r++) {
    double sum = 0;
    for (size_t t = 0; t < w.tasks(); t++) sum += parts[r * w.tasks() + t];
    out[r] = float(sum);
  }
}

// Squared norms of the rows [from, to).
void sq_norms(const Work& w, size_t from, size_t to, std::vector<double>& parts, float* out) {
  size_t rows = to - from, tasks = w.tasks();
  size_t step = std::max<size_t>(1, UNIT_BYTES * std::max<size_t>(tasks, 1) / std::max<size_t>(w.row_bytes, 1));
  parallel_for(ceil_div(rows, step) * tasks, [&](size_t unit) {
    size_t r = unit / tasks * step;
    measure(w, unit % tasks, from + r, std::min(step, rows - r), parts);
  });
  finish(w, from, to, parts, out);
}

void add_rows(const Work& w, const Piece& piece, size_t from, size_t to, const float* factors, float* y) {
  if (from == to) return;  // an empty batch has no data to point into
  auto& leaf = w.leaves[piece.leaf];
  BULWARK_PICK(clip_kernels)
      .add_rows[leaf.type](leaf.x + (from * leaf.columns + piece.at) * leaf.item, leaf.columns, to - from,
                           factors + from, y, piece.n);
}

// Adds a task's columns of the rows [from, to), one after another, to what the rows before have left in the leaves' y.
void add_task(const Work& w, size_t t, size_t from, size_t to, const float* factors, const Noise& noise) {
  for (size_t p = w.task[t]; p < w.task[t + 1]; p++) {
    auto& piece = w.pieces[p];
    auto& leaf = w.leaves[piece.leaf];
    float* y = leaf.y + piece.at;
    if (from == 0) std::memset(y, 0, piece.n * sizeof(float));
    add_rows(w, piece, from, to, factors, y);
    if (to == w.batch) noise.add(leaf.first_block, piece.at / NORMALS_PER_TILE, y, piece.n);
  }
}

// The same for whole chunks, whose sums are added one after another.
void add_chunks(const Work& w, size_t from, size_t to, const float* factors, std::vector<float>& scratch,
                const Noise& noise) {
  size_t tasks = w.tasks(), chunks = ceil_div(to - from, w.chunk());
  scratch.assign(chunks * w.columns, 0.0f);
  parallel_for(chunks * tasks, [&](size_t unit) {
    size_t c = unit / tasks, t = unit % tasks, r = from + c * w.chunk();
    for (size_t p = w.task[t]; p < w.task[t + 1]; p++)
      add_rows(w, w.pieces[p], r, std::min(to, r + w.chunk()), factors, &scratch[c * w.columns + w.pieces[p].scratch]);
  });
  parallel_for(tasks, [&](size_t t) {
    for (size_t p = w.task[t]; p < w.task[t + 1]; p++) {
      auto& piece = w.pieces[p];
      auto& leaf = w.leaves[piece.leaf];
      float* y = leaf.y + piece.at;
      if (from == 0) std::memset(y, 0, piece.n * sizeof(float));
      for (size_t c = 0; c < chunks; c++)
        for (size_t i = 0; i < piece.n; i++) y[i] += scratch[c * w.columns + piece.scratch + i];
      if (to == w.batch) noise.add(leaf.first_block, piece.at / NORMALS_PER_TILE, y, piece.n);
    }
  });
}

void add_to_sums(const Work& w, size_t from, size_t to, const float* factors, std::vector<float>& scratch,
                 const Noise& noise) {
  if (w.chunked()) return add_chunks(w, from, to, factors, scratch, noise);
  parallel_for(w.tasks(), [&](size_t t) { add_task(w, t, from, to, factors, noise); });
}

}  // namespace

mx::array sample_sq_norms(const Arrays& grads, mx::StreamOrDevice sd) {
  auto s = mx::to_stream(sd);
  return mx::array({grads[0].shape(0)}, mx::float32, std::make_shared<SampleSqNorms>(s), contiguous(grads, s));
}

void SampleSqNorms::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  size_t batch = out[0].size();
  mx::cpu::get_command_encoder(stream()).dispatch([w = Work(in, in.size(), batch), y = out[0].data<float>()] {
    std::vector<double> parts(w.batch * w.tasks());
    sq_norms(w, 0, w.batch, parts, y);
  });
}

static bool many(const Arrays& leaves) {
  return leaves.size() > MOST_OUTPUTS && columns_of(leaves, leaves.size()) <= size_t(std::numeric_limits<int>::max());
}

SumOp::SumOp(mx::Stream s, const char* op, const std::string& suffix, const Arrays& leaves, bool noisy)
    : Op(s),
      leaves_(leaves.size()),
      noisy_(noisy),
      flat_(many(leaves)),
      op_(op),
      name_(op + suffix + (noisy ? "_noisy" : "")) {}

bool SumOp::same(const Op& o) const {
  auto& other = static_cast<const SumOp&>(o);
  return name_ == other.name_ && leaves_ == other.leaves_ && flat_ == other.flat_;
}

std::vector<mx::Shape> SumOp::output_shapes(const Arrays& in) {
  std::vector<mx::Shape> r;
  if (flat_) r.push_back({int(columns_of(in, leaves_))});
  for (size_t i = 0; i < leaves_ && !flat_; i++) r.emplace_back(in[i].shape().begin() + 1, in[i].shape().end());
  for (auto& shape : other_shapes(in)) r.push_back(shape);
  return r;
}

std::pair<Arrays, std::vector<int>> SumOp::vmap(const Arrays& in, const std::vector<int>& axes) {
  if (noisy_ && axes.back() < 0)
    throw std::invalid_argument("[" + op_ + "] counter must be batched under vmap, or every copy gets the same noise");
  return Op::vmap(in, axes);
}

Arrays SumOp::reference(const Arrays& in) {
  auto out = Op::reference(in);
  if (!flat_) return out;
  Arrays flat;
  for (size_t i = 0; i < leaves_; i++) flat.push_back(mx::reshape(out[i], {int(out[i].size())}, stream()));
  Arrays r{mx::concatenate(std::move(flat), 0, stream())};
  r.insert(r.end(), out.begin() + leaves_, out.end());
  return r;
}

std::vector<mx::Shape> Pieces::output_shapes(const Arrays& in) {
  size_t n = 0;
  for (auto& shape : shapes_) n += size_of(shape);
  if (n != in[0].size())
    throw std::invalid_argument("[clip] grads must keep their shapes but for the batch in a shapeless compile");
  return shapes_;
}

void Pieces::cpu(const Arrays& in, Arrays& out) {
  size_t before = 0;
  for (auto& x : out) {
    mx::Strides strides(x.ndim());
    int64_t step = 1;
    size_t longest = 1;
    for (size_t d = x.ndim(); d-- > 0;) {
      strides[d] = step;
      step *= x.shape(d);
      longest = std::max<size_t>(longest, x.shape(d));
    }
    mx::array::Flags flags{.contiguous = true, .row_contiguous = true, .col_contiguous = longest == x.size()};
    x.copy_shared_buffer(in[0], strides, flags, x.size(), before);
    before += x.size();
  }
}

Arrays Pieces::reference(const Arrays& in) {
  mx::Shape ends;
  int end = 0;
  for (auto& shape : shapes_) ends.push_back(end += size_of(shape));
  ends.pop_back();
  auto r = mx::split(in[0], ends, 0, stream());
  for (size_t i = 0; i < r.size(); i++) r[i] = mx::reshape(r[i], shapes_[i], stream());
  return r;
}

static Arrays build(const std::shared_ptr<SumOp>& op, const Arrays& in, const Arrays& leaves,
                    const std::vector<mx::Dtype>& others) {
  auto s = op->stream();
  std::vector<mx::Dtype> types(op->num_sums(), mx::float32);
  types.insert(types.end(), others.begin(), others.end());
  auto out = mx::array::make_arrays(op->output_shapes(in), types, op, contiguous(in, s));
  if (op->num_sums() == leaves.size()) return out;
  std::vector<mx::Shape> shapes;
  for (auto& g : leaves) shapes.emplace_back(g.shape().begin() + 1, g.shape().end());
  auto r = mx::array::make_arrays(shapes, std::vector<mx::Dtype>(leaves.size(), mx::float32),
                                  std::make_shared<Pieces>(s, shapes), {out[0]});
  r.insert(r.end(), out.begin() + 1, out.end());
  return r;
}

Arrays clipped_sum(const Arrays& grads, const mx::array& factors, const Arrays& noise, mx::StreamOrDevice sd) {
  Arrays in = grads;
  in.push_back(factors);
  in.insert(in.end(), noise.begin(), noise.end());
  return build(std::make_shared<ClippedSum>(mx::to_stream(sd), grads, !noise.empty()), in, grads, {});
}

void ClippedSum::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  auto& factors = in[leaves_];
  Work w(in, leaves_, factors.size());
  w.sums_to(out, flat_);
  mx::cpu::get_command_encoder(stream()).dispatch(
      [w = std::move(w), noise = Noise(in, noisy_), f = factors.data<float>()] {
        std::vector<float> scratch;
        add_to_sums(w, 0, w.batch, f, scratch, noise);
      });
}

Arrays clip_and_sum(const Arrays& grads, const mx::array& max_grad_norm, const std::string& mode, const Arrays& mask,
                    const Arrays& noise, mx::StreamOrDevice sd) {
  Arrays in = grads;
  in.push_back(max_grad_norm);
  in.insert(in.end(), mask.begin(), mask.end());
  in.insert(in.end(), noise.begin(), noise.end());
  auto op = std::make_shared<ClipAndSum>(mx::to_stream(sd), mode, !mask.empty(), grads, !noise.empty());
  return build(op, in, grads, {mx::float32, mx::float32, mx::int32});
}

namespace {
// Factors from norms, by the formula of clip_factors in ops/clip.py.
struct Clip {
  float max_grad_norm;
  bool automatic;
  const bool* mask;
  const float* sq_norms;
  float* factors;

  float factor(float sq_norm) const {
    float n = sq_norm > 0 ? std::sqrt(sq_norm) : 0;
    if (automatic) return max_grad_norm / (n + 0.01f);
    n += 1e-6f;
    return max_grad_norm >= n ? 1 : max_grad_norm / n;
  }

  // Returns how many of the rows [from, to) are refused.
  int run(size_t from, size_t to) const {
    int refused = 0;
    for (size_t b = from; b < to; b++) {
      bool counts = !mask || mask[b], finite = std::isfinite(sq_norms[b]);
      refused += counts && !finite;
      factors[b] = counts && finite ? factor(sq_norms[b]) : 0;
    }
    return refused;
  }
};

template <class Condition>
void wait_until(Condition holds) {
  for (size_t spins = 0; !holds(); spins++)
    if (spins > 1000) std::this_thread::yield();
}

// While the norms of a group of rows are found, the group before is summed from the cache. Tasks are handed out in
// order, and each waits only for tasks before it, so there is always one that can go on.
int clip_in_groups(const Work& w, const Clip& clip, float* norms, const Noise& noise) {
  size_t rows = std::max<size_t>(1, GROUP_BYTES / w.row_bytes), groups = ceil_div(w.batch, rows), tasks = w.tasks();
  std::vector<double> parts(w.batch * tasks);
  std::vector<std::atomic<size_t>> measured(groups), summed(groups);
  std::vector<std::atomic<bool>> ready(groups);
  std::atomic<int> refused = 0;
  parallel_for((groups + 1) * tasks * 2, [&](size_t unit) {
    size_t g = unit / (2 * tasks), t = unit / 2 % tasks;
    if (unit % 2 == 0 && g < groups) {
      size_t from = g * rows, to = std::min(w.batch, from + rows);
      measure(w, t, from, to - from, parts);
      if (++measured[g] < tasks) return;
      finish(w, from, to, parts, norms);
      refused += clip.run(from, to);
      ready[g] = true;
    } else if (unit % 2 == 1 && g > 0) {
      size_t from = --g * rows;
      wait_until([&] { return ready[g] && (g == 0 || summed[g - 1] == tasks); });
      add_task(w, t, from, std::min(w.batch, from + rows), clip.factors, noise);
      summed[g]++;
    }
  });
  return refused;
}

// The same for rows so short that the batch is split as well.
int clip_in_chunks(const Work& w, const Clip& clip, float* norms, const Noise& noise) {
  size_t rows = std::max<size_t>(1, GROUP_BYTES / std::max<size_t>(w.row_bytes, 1) / w.chunk()) * w.chunk(), from = 0;
  std::vector<double> parts(w.batch * w.tasks());
  std::vector<float> scratch;
  int refused = 0;
  do {  // an empty batch passes once: its sums are zeros
    size_t to = std::min(from + rows, w.batch);
    sq_norms(w, from, to, parts, norms);
    refused += clip.run(from, to);
    add_to_sums(w, from, to, clip.factors, scratch, noise);
    from = to;
  } while (from < w.batch);
  return refused;
}
}  // namespace

void ClipAndSum::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  Work w(in, leaves_, in[0].shape(0));
  w.sums_to(out, flat_);
  size_t sums = num_sums();
  auto *norms = out[sums].data<float>(), *factors = out[sums + 1].data<float>();
  Clip clip{0, automatic_, masked_ ? in[leaves_ + 1].data<bool>() : nullptr, norms, factors};
  mx::cpu::get_command_encoder(stream()).dispatch([w = std::move(w), clip, norms, noise = Noise(in, noisy_),
                                                   max_grad_norm = in[leaves_].data<float>(),
                                                   refused = out[sums + 2].data<int32_t>()]() mutable {
    clip.max_grad_norm = *max_grad_norm;
    auto run = w.batch && w.columns >= FEW_COLUMNS ? clip_in_groups : clip_in_chunks;
    *refused = run(w, clip, norms, noise);
  });
}
}  // namespace bulwark
