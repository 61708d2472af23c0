#include <algorithm>
#include <cstring>
#include <optional>
#include <string>

#include "common/blas.h"
#include "common/cpu.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "ghost/convolve.h"
#include "ghost/ghost.h"
#include "ghost/ghost_simd.h"
#include "mlx/backend/cpu/encoder.h"

namespace bulwark {
// Work is cut into tasks by sizes alone, and tasks are combined in their order: results do not depend on threads.
static constexpr size_t GRAM_ROWS = 128, GRAM_COLUMNS = 256;
static constexpr size_t DEPTH = 512;                               // rows that a product takes at once
static constexpr size_t TILE_COLUMNS = 512, TILE_VALUES = 65536;   // of D^T U: it stays in a core's cache
static constexpr size_t LEAST_SUM_ROWS = 64, MOST_SUM_ROWS = 256;  // of a task of the clipped sum
static constexpr size_t SUM_COLUMNS = 2048, LEAST_SUM_TASKS = 4;
static constexpr size_t EMBEDDING_COLUMNS = 1024;
static constexpr size_t LEAST_CONVOLVED_ROWS = 64, MOST_CONVOLVED_ROWS = 1024;  // a tile of U stays in the cache
static constexpr double PACKING = 12;  // multiplications in whose time one value is gathered

static int type_of(const mx::array& x) { return x.dtype() == mx::float32 ? 0 : x.dtype() == mx::float16 ? 1 : 2; }

static double dot(const float* a, const float* b, float add, size_t n) {
  return BULWARK_PICK(ghost_kernels).dot(a, b, add, n);
}

// x or dy of one call, [B * rows, width] in memory. A group's row is `columns` long, as U or D has it.
struct Side {
  const char* data = nullptr;
  int type = 0;
  size_t item = 4, rows = 0, width = 0, columns = 0;

  Side(const mx::array& a, int groups)
      : data(a.size() ? a.data<char>() : nullptr), type(type_of(a)), item(a.itemsize()) {
    width = a.shape(-1);
    columns = width / groups;
    rows = 1;
    for (size_t i = 1; i + 1 < a.ndim(); i++) rows *= a.shape(i);
  }
  const char* at(size_t row, size_t column) const { return data + (row * width + column) * item; }
};

struct Call {
  Side x, dy;
  const bool* mask = nullptr;
  std::array<int, 3> space{1, 1, 1}, out{1, 1, 1};  // of x and dy, where x is unfolded
};

// Rows of a call that lie one behind the other in memory: [first, first + count) of all its samples' rows.
struct Span {
  size_t call, first, count, start;  // start: rows of the unit before
};

struct Unit {
  std::vector<Span> spans;
  size_t rows = 0;

  void append(size_t call, size_t first, size_t count) {
    if (!count) return;
    if (!spans.empty() && spans.back().call == call && spans.back().first + spans.back().count == first)
      spans.back().count += count;
    else
      spans.push_back({call, first, count, rows});
    rows += count;
  }
  const Span& span(size_t row) const {
    auto after = std::upper_bound(spans.begin(), spans.end(), row, [](size_t r, const Span& s) { return r < s.start; });
    return *(after - 1);
  }
};

struct Panel {
  const float* data;
  size_t ld;
};

struct Scratch {
  Buffer u, d, v, e, s, t;
};

struct Work {
  std::vector<Call> calls;
  size_t batch = 0, groups = 1, d = 0, p = 0;  // d, p: columns of U and D
  bool bias = false;
  std::optional<Window> window{};
  const int32_t* segments = nullptr;
  size_t units = 0;

  Work(const Arrays& in, const Ghost& g, bool segmented) : batch(in[0].shape(0)), groups(g.groups), bias(g.bias) {
    if (!g.window.empty()) window = g.window[0];
    for (int i = 0; i < g.calls; i++) {
      Call c{Side(in[i], g.groups), Side(in[g.calls + i], g.groups)};
      if (g.masked) c.mask = in[2 * g.calls + i].data<bool>();
      if (window) unfold(c, in[i], in[g.calls + i]);
      calls.push_back(c);
    }
    d = calls[0].x.columns, p = calls[0].dy.columns;
    if (segmented) segments = in[g.calls * (g.masked ? 3 : 2)].data<int32_t>();
    units = segmented ? g.units : batch;
  }

  void unfold(Call& c, const mx::array& x, const mx::array& dy) const {
    int axes = x.ndim() - 2;
    for (int i = 0; i < axes; i++) {
      c.space[3 - axes + i] = x.shape(1 + i);
      c.out[3 - axes + i] = dy.shape(1 + i);
    }
    c.x.rows = c.dy.rows;
    c.x.columns *= size_t(window->kernel[0]) * window->kernel[1] * window->kernel[2];
  }

  void add_rows(Unit& u, size_t call, size_t b) const {
    auto& c = calls[call];
    size_t rows = c.dy.rows, at = b * rows;
    if (!c.mask) return u.append(call, at, rows);
    for (size_t r = at, from = at; r <= at + rows; r++) {
      if (r < at + rows && c.mask[r]) continue;
      u.append(call, from, r - from);
      from = r + 1;
    }
  }

  std::vector<Unit> all_units() const {
    std::vector<Unit> r(units);
    for (size_t b = 0; b < batch; b++) {
      size_t unit = segments ? size_t(int64_t(segments[b])) : b;
      for (size_t c = 0; unit < units && c < calls.size(); c++) add_rows(r[unit], c, b);
    }
    return r;
  }

  // Rows of all samples whose factor is not 0.
  Unit one_unit(const float* factors) const {
    Unit r;
    for (size_t c = 0; c < calls.size(); c++)
      for (size_t b = 0; b < batch; b++)
        if (factors[b] != 0) add_rows(r, c, b);
    return r;
  }

  size_t row_size() const { return d + p; }
  bool gathers() const { return window || calls[0].x.type || calls[0].dy.type; }
};

// Images of few channels make runs of few values, for which a call takes longer than the copy.
static constexpr size_t SHORT_RUN = 16;

static void copy_run(const float* x, size_t n, float* y) {
  if (n > SHORT_RUN)
    std::memcpy(y, x, n * sizeof(float));
  else
    for (size_t i = 0; i < n; i++) y[i] = x[i];
}

static void zero_run(size_t n, float* y) {
  for (size_t i = 0; i < n; i++) y[i] = 0;
}

// One row of U where x is unfolded: every kernel offset that lies inside the image, zeros for the others.
static void unfold_row(const Work& w, const Call& c, size_t group, size_t row, float* y) {
  auto& win = *w.window;
  size_t b = row / c.x.rows, t = row % c.x.rows, n = c.x.width / w.groups;
  const auto& k = win.kernel;
  int at[3] = {int(t / (size_t(c.out[1]) * c.out[2])), int(t / c.out[2] % c.out[1]), int(t % c.out[2])}, from[3];
  for (int i = 0; i < 3; i++) from[i] = at[i] * win.stride[i] - win.padding[i];
  const bool runs = w.groups == 1 && win.dilation[2] == 1;
  auto& kernels = BULWARK_PICK(ghost_kernels);
  for (int kz = 0; kz < k[0]; kz++)
    for (int ky = 0; ky < k[1]; ky++, y += k[2] * n) {
      int z = from[0] + kz * win.dilation[0], v = from[1] + ky * win.dilation[1];
      if (z < 0 || z >= c.space[0] || v < 0 || v >= c.space[1]) {
        zero_run(k[2] * n, y);
        continue;
      }
      size_t line = ((b * c.space[0] + z) * c.space[1] + v) * c.space[2];
      if (runs) {
        int before = std::clamp(-from[2], 0, k[2]), end = std::clamp(c.space[2] - from[2], before, k[2]);
        zero_run(before * n, y);
        if (end > before) {
          const char* x = c.x.at(line + from[2] + before, 0);
          size_t count = (end - before) * n;
          if (c.x.type)
            kernels.scale(c.x.type, x, 1, y + before * n, count);
          else
            copy_run(reinterpret_cast<const float*>(x), count, y + before * n);
        }
        zero_run((k[2] - end) * n, y + end * n);
        continue;
      }
      for (int kx = 0; kx < k[2]; kx++) {
        int u = from[2] + kx * win.dilation[2];
        if (u < 0 || u >= c.space[2])
          std::fill_n(y + kx * n, n, 0.0f);
        else
          kernels.scale(c.x.type, c.x.at(line + u, group * n), 1, y + kx * n, n);
      }
    }
}

// Rows [from, to) of U: from memory where they lie there as floats, else gathered.
static Panel rows_of_u(const Work& w, const Unit& u, size_t group, size_t from, size_t to, Buffer& scratch) {
  auto& span = u.span(from);
  auto& x = w.calls[span.call].x;
  if (!w.window && x.type == 0 && to <= span.start + span.count)
    return {reinterpret_cast<const float*>(x.at(span.first + from - span.start, group * w.d)), x.width};
  float* y = room(scratch, (to - from) * w.d);
  for (const Span* s = &span; from < to; s++)
    for (; from < std::min(to, s->start + s->count); from++, y += w.d) {
      auto& c = w.calls[s->call];
      size_t row = s->first + from - s->start;
      if (w.window)
        unfold_row(w, c, group, row, y);
      else
        BULWARK_PICK(ghost_kernels).scale(c.x.type, c.x.at(row, group * w.d), 1, y, w.d);
    }
  return {scratch.data(), w.d};
}

// Columns [c0, c1) of the rows [from, to) of D, times the factors of their samples where there are factors.
static Panel rows_of_d(const Work& w, const Unit& u, size_t group, size_t from, size_t to, size_t c0, size_t c1,
                       const float* factors, Buffer& scratch) {
  auto& span = u.span(from);
  auto& dy = w.calls[span.call].dy;
  if (!factors && dy.type == 0 && to <= span.start + span.count)
    return {reinterpret_cast<const float*>(dy.at(span.first + from - span.start, group * w.p + c0)), dy.width};
  size_t n = c1 - c0;
  float* y = room(scratch, (to - from) * n);
  for (const Span* s = &span; from < to; s++)
    for (; from < std::min(to, s->start + s->count); from++, y += n) {
      auto& side = w.calls[s->call].dy;
      size_t row = s->first + from - s->start;
      float f = factors ? factors[row / side.rows] : 1;
      BULWARK_PICK(ghost_kernels).scale(side.type, side.at(row, group * w.p + c0), f, y, n);
    }
  return {scratch.data(), n};
}

struct Tile {
  size_t p0, p1, d0, d1;
};

// How a group's D^T U is cut.
struct Tiles {
  size_t p, d, rows, columns;
  Tiles(size_t p, size_t d, size_t rows, size_t columns) : p(p), d(d), rows(rows), columns(columns) {}
  size_t count() const { return ceil_div(p, rows) * std::max<size_t>(1, ceil_div(d, columns)); }
  Tile operator[](size_t i) const {
    size_t across = std::max<size_t>(1, ceil_div(d, columns)), a = i / across * rows, b = i % across * columns;
    return {a, std::min(p, a + rows), b, std::min(d, b + columns)};
  }
};

static Tiles cached_tiles(const Work& w) {
  size_t columns = std::clamp<size_t>(w.d, 1, TILE_COLUMNS);
  if (w.window && w.p * w.d <= TILE_VALUES) columns = std::max<size_t>(1, w.d);  // unfolded once
  return {w.p, w.d, std::max<size_t>(1, TILE_VALUES / columns), columns};
}

struct Rows {
  size_t from, to;
};

// A tile of D^T U over rows of a unit, and of the sum of D's rows where `bias` is given.
static void multiply(const Work& w, const Unit& u, Rows rows, size_t group, const Tile& t, const float* factors,
                     float* c, size_t ldc, float* bias, Scratch& s) {
  size_t p = t.p1 - t.p0, d = t.d1 - t.d0;
  if (rows.from == rows.to)
    for (size_t i = 0; i < p; i++) std::fill_n(c + i * ldc, d, 0.0f);
  if (bias) std::fill_n(bias, p, 0.0f);
  for (size_t from = rows.from; from < rows.to; from += DEPTH) {
    size_t to = std::min(rows.to, from + DEPTH);
    Panel e = rows_of_d(w, u, group, from, to, t.p0, t.p1, factors, s.d);
    if (d) {
      Panel v = rows_of_u(w, u, group, from, to, s.u);
      sgemm(true, false, p, d, to - from, e.data, e.ld, v.data + t.d0, v.ld, from > rows.from, c, ldc);
    }
    if (!bias) continue;
    float* part = room(s.v, p);
    std::fill_n(part, p, 0.0f);
    for (size_t r = 0; r < to - from; r++) BULWARK_PICK(ghost_kernels).add(e.data + r * e.ld, part, p);
    BULWARK_PICK(ghost_kernels).add(part, bias, p);
  }
}

static double direct(const Work& w, const Unit& u, size_t group, const Tile& t, Scratch& s) {
  size_t p = t.p1 - t.p0, d = t.d1 - t.d0;
  float *c = room(s.s, p * d), *bias = w.bias && t.d0 == 0 ? room(s.t, p) : nullptr;
  multiply(w, u, {0, u.rows}, group, t, nullptr, c, d, bias, s);
  return dot(c, c, 0, p * d) + (bias ? dot(bias, bias, 0, p) : 0);
}

// Both Gram matrices of the rows [from, to): the diagonal, and twice what is below it.
static double gram_triangle(const Work& w, const Panel& u, const Panel& d, size_t n, Scratch& s) {
  float *a = room(s.s, n * n), *b = room(s.t, n * n);
  ssyrk(n, w.d, u.data, u.ld, a, n);
  ssyrk(n, w.p, d.data, d.ld, b, n);
  double sum = 0, diagonal = 0;
  for (size_t i = 0; i < n; i++) {
    sum += dot(a + i * n, b + i * n, w.bias, i);
    diagonal += (double(a[i * n + i]) + w.bias) * b[i * n + i];
  }
  return 2 * sum + diagonal;
}

// The rows [from, to) of both Gram matrices, up to the diagonal: what is left of it counts twice.
static double gram(const Work& w, const Unit& u, size_t group, size_t from, size_t to, Scratch& s) {
  Panel ui = rows_of_u(w, u, group, from, to, s.u), di = rows_of_d(w, u, group, from, to, 0, w.p, nullptr, s.d);
  size_t m = to - from;
  double sum = gram_triangle(w, ui, di, m, s);
  for (size_t j = 0; j < from; j += GRAM_COLUMNS) {
    size_t end = std::min(from, j + GRAM_COLUMNS), n = end - j;
    Panel uj = rows_of_u(w, u, group, j, end, s.v), dj = rows_of_d(w, u, group, j, end, 0, w.p, nullptr, s.e);
    float *a = room(s.s, m * n), *b = room(s.t, m * n);
    sgemm(false, true, m, n, w.d, ui.data, ui.ld, uj.data, uj.ld, 0, a, n);
    sgemm(false, true, m, n, w.p, di.data, di.ld, dj.data, dj.ld, 0, b, n);
    sum += 2 * dot(a, b, w.bias, m * n);
  }
  return sum;
}

static double outer(const Work& w, const Unit& u, size_t group, Scratch& s) {
  const float* x = rows_of_u(w, u, group, 0, 1, s.u).data;
  const float* d = rows_of_d(w, u, group, 0, 1, 0, w.p, nullptr, s.d).data;
  return (dot(x, x, 0, w.d) + w.bias) * dot(d, d, 0, w.p);
}

static bool prefers_gram(const Work& w, size_t rows, Ghost::Method method) {
  if (method != Ghost::automatic || rows == 1) return method != Ghost::direct;
  double r = rows, d = w.d, p = w.p;
  double gram = r * (r + GRAM_ROWS) * (d + p), direct = 2 * r * d * p + 4 * d * p;
  if (w.gathers()) {
    gram += r * (r / GRAM_ROWS + 2) / 2 * (d + p) * PACKING;
    direct += r * (d + p) * PACKING;
  }
  return gram < direct;
}

struct Task {
  size_t unit, group, part;
  bool gram;
};

static Scratch& scratch() {
  thread_local Scratch s;
  return s;
}

static void sq_norms(const Work& w, Ghost::Method method, float* out) {
  auto units = w.all_units();
  auto tiles = cached_tiles(w);
  std::vector<Task> tasks;
  for (size_t i = 0; i < units.size(); i++) {
    if (!units[i].rows) continue;
    bool g = prefers_gram(w, units[i].rows, method);
    size_t parts = g ? ceil_div(units[i].rows, GRAM_ROWS) : tiles.count();
    for (size_t group = 0; group < w.groups; group++)
      for (size_t part = 0; part < parts; part++) tasks.push_back({i, group, part, g});
  }
  std::vector<double> found(tasks.size()), sums(units.size());
  parallel_for(tasks.size(), [&](size_t i) {
    auto& t = tasks[i];
    auto& u = units[t.unit];
    size_t from = t.part * GRAM_ROWS;
    found[i] = !t.gram       ? direct(w, u, t.group, tiles[t.part], scratch())
               : u.rows == 1 ? outer(w, u, t.group, scratch())
                             : gram(w, u, t.group, from, std::min(u.rows, from + GRAM_ROWS), scratch());
  });
  for (size_t i = 0; i < tasks.size(); i++) sums[tasks[i].unit] += found[i];
  // A sum of products of both signs can end below 0; NaN stays NaN.
  for (size_t i = 0; i < units.size(); i++) out[i] = float(sums[i] < 0 ? 0 : sums[i]);
}

static void grads(const Work& w, float* out, float* bias) {
  auto units = w.all_units();
  auto tiles = cached_tiles(w);
  size_t parts = tiles.count();
  parallel_for(units.size() * w.groups * parts, [&](size_t i) {
    size_t unit = i / parts / w.groups, group = i / parts % w.groups, row = unit * w.groups + group;
    Tile t = tiles[i % parts];
    float* b = bias && t.d0 == 0 ? bias + row * w.p + t.p0 : nullptr;
    multiply(w, units[unit], {0, units[unit].rows}, group, t, nullptr, out + (row * w.p + t.p0) * w.d + t.d0, w.d, b,
             scratch());
  });
}

// Rows of D^T U in a task of the clipped sum: some tasks for many cores, none so small that its product gets slow.
static size_t sum_rows(size_t p) { return std::clamp(ceil_div(p, 2), LEAST_SUM_ROWS, MOST_SUM_ROWS); }

static void clipped_sum(const Work& w, const float* factors, float* out, float* bias) {
  Unit u = w.one_unit(factors);
  Tiles tiles(w.p, w.d, sum_rows(w.p), w.window ? std::max<size_t>(1, w.d) : SUM_COLUMNS);
  size_t parts = tiles.count() * w.groups, values = w.groups * w.p * w.d, sums = w.groups * w.p;
  // A small product of many rows is cut along the rows: each part has a sum of its own, and they are added in order.
  size_t cuts =
      std::clamp<size_t>(std::min(LEAST_SUM_TASKS / std::max<size_t>(parts, 1), u.rows / DEPTH), 1, LEAST_SUM_TASKS);
  size_t step = ceil_div(u.rows, cuts);
  std::vector<float> others((cuts - 1) * values), other_sums(bias ? (cuts - 1) * sums : 0);
  parallel_for(parts * cuts, [&](size_t i) {
    size_t cut = i / parts, group = i % parts / tiles.count();
    Tile t = tiles[i % tiles.count()];
    float* c = (cut ? &others[(cut - 1) * values] : out) + (group * w.p + t.p0) * w.d + t.d0;
    float* b = !bias || t.d0 ? nullptr : (cut ? &other_sums[(cut - 1) * sums] : bias) + group * w.p + t.p0;
    Rows rows{std::min(u.rows, cut * step), std::min(u.rows, (cut + 1) * step)};
    multiply(w, u, rows, group, t, factors, c, w.d, b, scratch());
  });
  for (size_t cut = 0; cut + 1 < cuts; cut++) {
    BULWARK_PICK(ghost_kernels).add(others.data() + cut * values, out, values);
    if (bias) BULWARK_PICK(ghost_kernels).add(other_sums.data() + cut * sums, bias, sums);
  }
}

static Arrays inputs(std::initializer_list<Arrays> lists, mx::Stream s) {
  Arrays r;
  for (auto& l : lists) r.insert(r.end(), l.begin(), l.end());
  return contiguous(r, s);
}

static Ghost ghost_of(const Arrays& x, bool masked, int units, bool bias, int groups, const std::vector<int>& window,
                      const std::string& method = "auto") {
  Ghost g;
  g.method = method == "gram" ? Ghost::gram : method == "direct" ? Ghost::direct : Ghost::automatic;
  g.calls = int(x.size()), g.units = units, g.masked = masked, g.bias = bias, g.groups = groups;
  if (window.empty()) return g;
  auto& w = g.window.emplace_back();
  auto from = window.begin();
  for (auto* part : {&w.kernel, &w.stride, &w.padding, &w.dilation}) {
    std::copy_n(from, 3, part->begin());
    from += 3;
  }
  return g;
}

mx::array ghost_sq_norms(const Arrays& x, const Arrays& dy, const Arrays& mask, const Arrays& segments, int units,
                         bool bias, int groups, const std::vector<int>& window, const std::string& method,
                         mx::StreamOrDevice sd) {
  auto s = mx::to_stream(sd);
  auto g = ghost_of(x, !mask.empty(), units, bias, groups, window, method);
  auto op = std::make_shared<GhostSqNorms>(s, g, !segments.empty());
  auto in = inputs({x, dy, mask, segments}, s);
  return mx::array(op->output_shapes(in)[0], mx::float32, op, in);
}

void GhostSqNorms::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  mx::cpu::get_command_encoder(stream()).dispatch(
      [w = Work(in, ghost_, segmented_), method = ghost_.method, y = out[0].data<float>()] { sq_norms(w, method, y); });
}

// Columns of a group's row of U.
static int columns_of(const Arrays& in, const Ghost& g) {
  int n = in[0].shape(-1) / g.groups;
  for (auto& w : g.window) n *= w.kernel[0] * w.kernel[1] * w.kernel[2];
  return n;
}

std::vector<mx::Shape> GhostGrads::output_shapes(const Arrays& in) {
  int p = in[ghost_.calls].shape(-1);
  std::vector<mx::Shape> r{{units(in), p, columns_of(in, ghost_)}};
  if (ghost_.bias) r.push_back({units(in), p});
  return r;
}

Arrays ghost_grads(const Arrays& x, const Arrays& dy, const Arrays& mask, const Arrays& segments, int units, bool bias,
                   int groups, const std::vector<int>& window, mx::StreamOrDevice sd) {
  auto s = mx::to_stream(sd);
  auto g = ghost_of(x, !mask.empty(), units, bias, groups, window);
  auto op = std::make_shared<GhostGrads>(s, g, !segments.empty());
  auto in = inputs({x, dy, mask, segments}, s);
  return mx::array::make_arrays(op->output_shapes(in), std::vector<mx::Dtype>(1 + g.bias, mx::float32), op, in);
}

void GhostGrads::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  mx::cpu::get_command_encoder(stream()).dispatch(
      [w = Work(in, ghost_, segmented_), y = out[0].data<float>(),
       bias = ghost_.bias ? out[1].data<float>() : nullptr] { grads(w, y, bias); });
}

std::vector<mx::Shape> GhostClippedSum::output_shapes(const Arrays& in) {
  int p = in[ghost_.calls].shape(-1);
  std::vector<mx::Shape> r{{p, columns_of(in, ghost_)}};
  if (ghost_.bias) r.push_back({p});
  return r;
}

Arrays ghost_clipped_sum(const Arrays& x, const Arrays& dy, const Arrays& mask, const mx::array& factors, bool bias,
                         int groups, const std::vector<int>& window, mx::StreamOrDevice sd) {
  auto s = mx::to_stream(sd);
  auto g = ghost_of(x, !mask.empty(), -1, bias, groups, window);
  auto op = std::make_shared<GhostClippedSum>(s, g);
  auto in = inputs({x, dy, mask, {factors}}, s);
  return mx::array::make_arrays(op->output_shapes(in), std::vector<mx::Dtype>(1 + g.bias, mx::float32), op, in);
}

void GhostClippedSum::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  mx::cpu::get_command_encoder(stream()).dispatch(
      [w = Work(in, ghost_, false), f = in.back().data<float>(), y = out[0].data<float>(),
       bias = ghost_.bias ? out[1].data<float>() : nullptr] { clipped_sum(w, f, y, bias); });
}

std::vector<mx::Shape> Convolved::output_shapes(const Arrays& in) {
  auto& w = ghost_.window[0];
  auto shape = in[0].shape();
  const int axes = int(shape.size()) - 2;
  for (int i = 0, k = 3 - axes; i < axes; i++, k++)
    shape[1 + i] = (shape[1 + i] + 2 * w.padding[k] - w.dilation[k] * (w.kernel[k] - 1) - 1) / w.stride[k] + 1;
  shape.back() = in[1].shape(0);
  return {shape};
}

mx::array convolved(const mx::array& x, const mx::array& weight, const Arrays& bias, int groups,
                    const std::vector<int>& window, mx::StreamOrDevice sd) {
  auto s = mx::to_stream(sd);
  auto op = std::make_shared<Convolved>(s, ghost_of({x}, false, -1, !bias.empty(), groups, window));
  auto in = inputs({{x, weight}, bias}, s);
  return mx::array(op->output_shapes(in)[0], mx::float32, op, in);
}

// Rows [from, to) of all outputs of a group.
static void convolve(const Work& w, const Unit& u, size_t group, size_t from, size_t to, const float* weight,
                     const float* bias, float* out, Scratch& s) {
  const size_t width = w.calls[0].dy.width, first = group * w.p;
  float* y = out + from * width + first;
  for (size_t r = 0; bias && r < to - from; r++) std::copy_n(bias + first, w.p, y + r * width);
  Panel v = rows_of_u(w, u, group, from, to, s.u);
  sgemm(false, true, to - from, w.p, w.d, v.data, v.ld, weight + first * w.d, w.d, bias ? 1 : 0, y, width);
}

static void convolve_unfolded(const Work& w, size_t first, size_t count, const float* weight, const float* bias,
                              float* y) {
  Unit u;
  u.append(0, first * w.calls[0].dy.rows, count * w.calls[0].dy.rows);
  const size_t rows = std::clamp(TILE_VALUES / std::max(w.d, w.p), LEAST_CONVOLVED_ROWS, MOST_CONVOLVED_ROWS);
  const size_t parts = ceil_div(u.rows, rows);
  float* out = y + first * w.calls[0].dy.rows * w.calls[0].dy.width;
  parallel_for(parts * w.groups, [&](size_t i) {
    const size_t from = i % parts * rows;
    convolve(w, u, i / parts, from, std::min(u.rows, from + rows), weight, bias, out, scratch());
  });
}

// What is one image wide in the first of three axes, and has one group.
static std::optional<Images> images_of(const Work& w, const float* weight, const float* bias, float* y) {
  auto& c = w.calls[0];
  auto& win = *w.window;
  if (w.groups != 1 || win.kernel[0] != 1 || c.space[0] != 1 || c.out[0] != 1 || win.padding[0] != 0) return {};
  auto two = [](const std::array<int, 3>& a) { return std::array<size_t, 2>{size_t(a[1]), size_t(a[2])}; };
  return Images{reinterpret_cast<const float*>(c.x.data),
                weight,
                bias,
                y,
                w.batch,
                c.x.width,
                w.p,
                two(c.space),
                two(c.out),
                two(win.kernel),
                two(win.stride),
                two(win.padding),
                two(win.dilation)};
}

void Convolved::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  if (out[0].size() == 0) return;
  mx::cpu::get_command_encoder(stream()).dispatch([w = Work({in[0], out[0]}, ghost_, false),
                                                   weight = in[1].data<float>(), y = out[0].data<float>(),
                                                   bias = ghost_.bias ? in[2].data<float>() : nullptr] {
    auto images = images_of(w, weight, bias, y);
    const Way way = images ? way_of(*images) : Way::unfolded;
    if (way == Way::unfolded) return convolve_unfolded(w, 0, w.batch, weight, bias, y);
    for (size_t image : convolve_images(*images, way)) convolve_unfolded(w, image, 1, weight, bias, y);
  });
}

// What the embedding's ops work on.
struct Tokens {
  struct Call {
    const int32_t* tokens;
    Side dy;
  };
  std::vector<Call> calls;
  size_t batch = 0, p = 0, units = 0;
  const int32_t* segments = nullptr;

  Tokens(const Arrays& in, int count) {
    for (int i = 0; i < count; i++) calls.push_back({in[i].data<int32_t>(), Side(in[count + i], 1)});
    batch = in[0].shape(0), p = calls[0].dy.width, units = batch;
  }

  struct Row {
    int32_t token;
    uint32_t call;
    size_t row;
  };

  std::vector<std::vector<Row>> all_units() const {
    std::vector<std::vector<Row>> r(units);
    for (size_t b = 0; b < batch; b++) {
      size_t unit = segments ? size_t(int64_t(segments[b])) : b;
      if (unit < units)
        for (uint32_t c = 0; c < calls.size(); c++) add_rows(r[unit], c, b);
    }
    return r;
  }

  void add_rows(std::vector<Row>& rows, uint32_t call, size_t b) const {
    auto& c = calls[call];
    for (size_t r = b * c.dy.rows; r < (b + 1) * c.dy.rows; r++)
      if (c.tokens[r] >= 0) rows.push_back({c.tokens[r], call, r});
  }

  // y += or = f * columns [c0, c0 + n) of a row of dy
  void take(const Row& r, size_t c0, size_t n, float f, float* y) const {
    auto& dy = calls[r.call].dy;
    BULWARK_PICK(ghost_kernels).scale(dy.type, dy.at(r.row, c0), f, y, n);
  }
};

// Rows of equal tokens are added up, one after another; their sum is one row of the gradient.
static double sum_of_runs(const Tokens& w, const std::vector<Tokens::Row>& rows, size_t c0, size_t n, Scratch& s) {
  constexpr size_t RUN = 64;  // rows that are added in one go; goes are added up
  float *sum = room(s.s, n), *part = room(s.t, n), *one = room(s.u, n);
  double norm = 0;
  for (size_t i = 0, end; i < rows.size(); i = end) {
    for (end = i + 1; end < rows.size() && rows[end].token == rows[i].token;) end++;
    w.take(rows[i], c0, n, 1, sum);
    for (size_t at = i + 1; at < end; at += RUN) {
      std::fill_n(part, n, 0.0f);
      for (size_t r = at; r < std::min(end, at + RUN); r++) {
        w.take(rows[r], c0, n, 1, one);
        BULWARK_PICK(ghost_kernels).add(one, part, n);
      }
      BULWARK_PICK(ghost_kernels).add(part, sum, n);
    }
    norm += dot(sum, sum, 0, n);
  }
  return norm;
}

static void embedding_norms(const Tokens& w, float* out) {
  auto units = w.all_units();
  parallel_for(units.size(), [&](size_t u) {
    std::stable_sort(units[u].begin(), units[u].end(), [](auto& a, auto& b) { return a.token < b.token; });
  });
  size_t parts = ceil_div(w.p, EMBEDDING_COLUMNS);
  std::vector<double> found(units.size() * parts);
  parallel_for(found.size(), [&](size_t i) {
    size_t c0 = i % parts * EMBEDDING_COLUMNS;
    found[i] = sum_of_runs(w, units[i / parts], c0, std::min(EMBEDDING_COLUMNS, w.p - c0), scratch());
  });
  for (size_t u = 0; u < units.size(); u++) {
    double sum = 0;
    for (size_t k = 0; k < parts; k++) sum += found[u * parts + k];
    out[u] = float(sum);
  }
}

static Ghost embedding_ghost(size_t calls, int units) {
  Ghost g;
  g.calls = int(calls), g.units = units;
  return g;
}

mx::array embedding_sq_norms(const Arrays& tokens, const Arrays& dy, const Arrays& segments, int units,
                             mx::StreamOrDevice sd) {
  auto s = mx::to_stream(sd);
  auto op = std::make_shared<EmbeddingSqNorms>(s, embedding_ghost(tokens.size(), units), !segments.empty());
  auto in = inputs({tokens, dy, segments}, s);
  return mx::array(op->output_shapes(in)[0], mx::float32, op, in);
}

void EmbeddingSqNorms::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  Tokens w(in, ghost_.calls);
  w.units = units(in);
  if (segmented_) w.segments = in.back().data<int32_t>();
  mx::cpu::get_command_encoder(stream()).dispatch([w, y = out[0].data<float>()] { embedding_norms(w, y); });
}

mx::array embedding_clipped_sum(const Arrays& tokens, const Arrays& dy, const mx::array& factors, int vocabulary,
                                mx::StreamOrDevice sd) {
  auto s = mx::to_stream(sd);
  auto op = std::make_shared<EmbeddingClippedSum>(s, embedding_ghost(tokens.size(), vocabulary));
  auto in = inputs({tokens, dy, {factors}}, s);
  return mx::array(op->output_shapes(in)[0], mx::float32, op, in);
}

// Tasks own ranges of the vocabulary: each row of the sum is added up in one task, in the order of the batch.
static void embedding_sum(const Tokens& w, const float* factors, size_t vocabulary, float* out) {
  std::vector<Tokens::Row> rows;
  for (uint32_t c = 0; c < w.calls.size(); c++)
    for (size_t b = 0; b < w.batch; b++)
      if (factors[b] != 0) w.add_rows(rows, c, b);
  std::stable_sort(rows.begin(), rows.end(), [](auto& a, auto& b) { return a.token < b.token; });
  size_t step = ceil_div(std::max<size_t>(vocabulary, 1), 64);
  parallel_for(ceil_div(vocabulary, step), [&](size_t i) {
    size_t from = i * step, to = std::min(vocabulary, from + step);
    std::fill_n(out + from * w.p, (to - from) * w.p, 0.0f);
    auto less = [](const Tokens::Row& r, size_t token) { return size_t(r.token) < token; };
    auto at = std::lower_bound(rows.begin(), rows.end(), from, less);
    auto end = std::lower_bound(at, rows.end(), to, less);
    float* one = room(scratch().u, w.p);
    for (; at != end; at++) {
      w.take(*at, 0, w.p, factors[at->row / w.calls[at->call].dy.rows], one);
      BULWARK_PICK(ghost_kernels).add(one, out + size_t(at->token) * w.p, w.p);
    }
  });
}

void EmbeddingClippedSum::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  mx::cpu::get_command_encoder(stream()).dispatch([w = Tokens(in, ghost_.calls), f = in.back().data<float>(),
                                                   v = size_t(ghost_.units),
                                                   y = out[0].data<float>()] { embedding_sum(w, f, v, y); });
}

mx::array embedding_linear_products(const Arrays& tokens, const Arrays& dy, const Arrays& x, const Arrays& dy_linear,
                                    const Arrays& segments, int units, mx::StreamOrDevice sd) {
  auto s = mx::to_stream(sd);
  auto op = std::make_shared<EmbeddingLinearProducts>(s, embedding_ghost(tokens.size(), units), int(x.size()),
                                                      !segments.empty());
  auto in = inputs({tokens, dy, x, dy_linear, segments}, s);
  return mx::array(op->output_shapes(in)[0], mx::float32, op, in);
}

static float value(const Side& s, size_t row, size_t column) {
  float y;
  BULWARK_PICK(ghost_kernels).scale(s.type, s.at(row, column), 1, &y, 1);
  return y;
}

// Rows [from, to) of an embedding's calls against all rows of the linear calls.
static double product(const Tokens& e, const std::vector<Tokens::Row>& rows, size_t from, size_t to, const Work& l,
                      const Unit& u, Scratch& s) {
  size_t m = to - from;
  float* d = room(s.d, m * e.p);
  for (size_t r = from; r < to; r++) e.take(rows[r], 0, e.p, 1, d + (r - from) * e.p);
  double sum = 0;
  for (size_t j = 0; j < u.rows; j += GRAM_COLUMNS) {
    size_t n = std::min(u.rows, j + GRAM_COLUMNS) - j;
    Panel x = rows_of_u(l, u, 0, j, j + n, s.u);
    float* a = room(s.s, m * n);
    sgemm(false, true, m, n, e.p, d, e.p, x.data, x.ld, 0, a, n);
    for (size_t k = 0; k < n; k++) {
      auto& span = u.span(j + k);
      auto& dy = l.calls[span.call].dy;
      for (size_t r = 0; r < m; r++)
        sum += double(a[r * n + k]) * value(dy, span.first + j + k - span.start, rows[from + r].token);
    }
  }
  return sum;
}

static void products(const Tokens& e, const Work& l, float* out) {
  auto tokens = e.all_units();
  auto units = l.all_units();
  std::vector<Task> tasks;
  for (size_t i = 0; i < units.size(); i++)
    for (size_t part = 0; units[i].rows && part < ceil_div(tokens[i].size(), GRAM_ROWS); part++)
      tasks.push_back({i, 0, part, true});
  std::vector<double> found(tasks.size()), sums(units.size());
  parallel_for(tasks.size(), [&](size_t i) {
    auto& t = tasks[i];
    size_t from = t.part * GRAM_ROWS, to = std::min(tokens[t.unit].size(), from + GRAM_ROWS);
    found[i] = product(e, tokens[t.unit], from, to, l, units[t.unit], scratch());
  });
  for (size_t i = 0; i < tasks.size(); i++) sums[tasks[i].unit] += found[i];
  std::copy(sums.begin(), sums.end(), out);
}

void EmbeddingLinearProducts::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  Tokens e(in, ghost_.calls);
  auto middle = in.begin() + 2 * ghost_.calls;
  Ghost linear = ghost_;
  linear.calls = linear_calls_;
  Work l(Arrays(middle, in.end()), linear, segmented_);
  e.units = l.units, e.segments = l.segments;
  mx::cpu::get_command_encoder(stream()).dispatch([e, l, y = out[0].data<float>()] { products(e, l, y); });
}

// What the reference must know beyond its inputs.
static std::string parameters(const Ghost& g, bool segmented, int linear_calls) {
  static const char* const METHODS[] = {"auto", "gram", "direct"};
  auto flag = [](bool b) { return b ? "true" : "false"; };
  std::string r = "{\"calls\": " + std::to_string(g.calls) + ", \"units\": " + std::to_string(g.units);
  r += std::string(", \"masked\": ") + flag(g.masked) + ", \"segmented\": " + flag(segmented);
  r += std::string(", \"bias\": ") + flag(g.bias) + ", \"groups\": " + std::to_string(g.groups);
  r += std::string(", \"method\": \"") + METHODS[g.method] + "\", \"linear_calls\": " + std::to_string(linear_calls);
  r += ", \"window\": [";
  for (auto& w : g.window)
    for (auto* part : {&w.kernel, &w.stride, &w.padding, &w.dilation})
      for (int v : *part) r += (r.back() == '[' ? "" : ", ") + std::to_string(v);
  return r + "]}";
}

Arrays GhostOp::reference(const Arrays& in) {
  return call_reference((std::string(name_) + parameters(ghost_, segmented_, linear_calls())).c_str(), in, stream());
}
}  // namespace bulwark
