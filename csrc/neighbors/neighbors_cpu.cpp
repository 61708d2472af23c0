#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "common/blas.h"
#include "common/cpu.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "ghost/ghost_simd.h"
#include "mlx/backend/cpu/encoder.h"
#include "neighbors/neighbors.h"
#include "neighbors/neighbors_simd.h"

namespace bulwark {
// A pair's *key* is half its squared distance less what is the same for the whole row of x, or the product negated.
// Keys come from products of rows in float32, near 1 and centred, with a bound of their error: `low` and `high`. A row
// keeps every pair whose key may be among the k smallest, and its neighbours are chosen from these by exact distances.
// So they do not depend on the order in which pairs are seen, nor on how the work is cut.
static constexpr size_t BLOCK = 512, LEAST_BLOCK = 64;     // rows of a tile
static constexpr size_t ROWS_OF_CENTER = 1024;             // as many rows as are averaged
static constexpr size_t PREPARED_ROWS = 256;               // of a task
static constexpr size_t TASKS = 16, LEAST_SEGMENT = 4096;  // of few rows of x against many of y
static constexpr size_t LIST_BYTES = 64 << 20;             // what lists of candidates may take in any case
static constexpr float LARGEST = std::numeric_limits<float>::max();
static constexpr float INFINITE = std::numeric_limits<float>::infinity();
static constexpr double UNIT = 0x1p-24;  // rounding of float32, relative

struct Problem {
  const char *x, *y;
  const int32_t* exclude;  // or null
  int type;                // 0: float32, 1: float16, 2: bfloat16
  size_t item, n, m, d, k;
  Metric metric;
  bool self;
  float* distances;
  int32_t* indices;

  bool products() const { return metric == Metric::inner_product; }
  int32_t excluded(size_t row) const { return self ? int32_t(row) : exclude ? exclude[row] : -1; }
};

// A row in float32, where it lies or in `scratch`.
static const float* widened(const Problem& p, const char* rows, size_t i, float* scratch) {
  const char* row = rows + i * p.d * p.item;
  if (p.type == 0) return reinterpret_cast<const float*>(row);
  BULWARK_PICK(ghost_kernels).scale(p.type, row, 1, scratch, p.d);
  return scratch;
}

// Rows of x or y, ready for products.
struct Side {
  std::vector<float> rows;       // [count, d]: times `factor`, less the centre; zeros where a row is not finite
  std::vector<double> factor;    // brings a row near 1; to the length 1 for the cosine
  std::vector<double> constant;  // half the squared length of such a row, or its product with the centre
  std::vector<float> length;     // not less than that of the row
  std::vector<float> offset;     // not more than what a key of this row of y has beside the product; infinite: nobody's
  std::vector<char> finite, zero;
};

struct Work {
  Problem p;
  Side x, y;  // x is empty where rows are compared with themselves
  std::vector<double> center;
  double scale = 1;  // of all rows, a power of two
  double error = 0;  // of a product of rows, over their lengths
  double tiny = 0;   // what may vanish in a product

  const Side& queries() const { return p.self && !p.products() ? y : x; }
};

static void survey(const Problem& p, const char* rows, size_t count, Side& s, std::vector<double>& largest) {
  s.factor.assign(count, 1), s.constant.assign(count, 0), s.length.assign(count, 0), s.offset.assign(count, INFINITE);
  s.finite.assign(count, 0), s.zero.assign(count, 0);
  largest.assign(ceil_div(count, PREPARED_ROWS), 0);
  parallel_for(largest.size(), [&](size_t task) {
    std::vector<float> scratch(p.d);
    for (size_t i = task * PREPARED_ROWS, end = std::min(count, i + PREPARED_ROWS); i < end; i++) {
      const float* row = widened(p, rows, i, scratch.data());
      float most = 0, bad = 0;
      for (size_t c = 0; c < p.d; c++) most = std::max(most, std::fabs(row[c])), bad += row[c] - row[c];
      s.finite[i] = bad == 0;
      if (!s.finite[i]) continue;
      largest[task] = std::max<double>(largest[task], most);
      s.zero[i] = p.metric == Metric::cosine && most == 0;
      if (p.metric != Metric::cosine || s.zero[i]) continue;
      s.factor[i] = 1 / std::sqrt(BULWARK_PICK(neighbors_kernels).product(row, row, p.d));
    }
  });
}

static double power_of_two(const std::vector<double>& x, const std::vector<double>& y) {
  double largest = 0;
  for (auto* v : {&x, &y})
    for (double one : *v) largest = std::max(largest, one);
  return largest > 0 ? std::ldexp(1.0, -std::ilogb(largest)) : 1;
}

static void find_center(Work& w) {
  auto& p = w.p;
  w.center.assign(p.d, 0);
  std::vector<float> scratch(p.d);
  size_t step = std::max<size_t>(1, p.m / ROWS_OF_CENTER), count = 0;
  for (size_t i = 0; i < p.m; i += step) {
    if (!w.y.finite[i]) continue;
    const float* row = widened(p, p.y, i, scratch.data());
    double f = w.y.factor[i];
    for (size_t c = 0; c < p.d; c++) w.center[c] += f * row[c];
    count++;
  }
  for (auto& c : w.center) c /= double(std::max<size_t>(count, 1));
}

// `centered`: rows of y, and those of x where distances are asked for.
static void prepare(Work& w, const char* rows, size_t count, Side& s, bool centered, bool candidates) {
  auto& p = w.p;
  s.rows.resize(count * p.d);
  parallel_for(ceil_div(count, PREPARED_ROWS), [&](size_t task) {
    std::vector<float> scratch(p.d);
    for (size_t i = task * PREPARED_ROWS, end = std::min(count, i + PREPARED_ROWS); i < end; i++) {
      float* to = s.rows.data() + i * p.d;
      if (!s.finite[i]) {
        std::fill_n(to, p.d, 0.0f);
        continue;
      }
      const float* row = widened(p, rows, i, scratch.data());
      const double f = s.factor[i];
      double squares = 0, across = 0;
      for (size_t c = 0; c < p.d; c++) {
        const double value = f * row[c], kept = centered ? value - w.center[c] : value;
        to[c] = float(kept);
        squares += kept * kept;
        across += value * w.center[c];
      }
      const double half = (squares + s.zero[i]) / 2;
      s.constant[i] = p.products() ? -across : half;
      s.length[i] = float(std::sqrt(squares) * (1 + 4 * UNIT));
      if (candidates) s.offset[i] = p.products() ? float(-w.tiny) : float(half * (1 - 8 * UNIT) - w.tiny);
    }
  });
}

static void prepare(Work& w) {
  auto& p = w.p;
  std::vector<double> in_x, in_y;
  survey(p, p.y, p.m, w.y, in_y);
  const bool one_side = p.self && !p.products();
  if (!one_side) survey(p, p.x, p.n, w.x, in_x);
  if (p.metric != Metric::cosine) {
    w.scale = power_of_two(in_x, in_y);
    for (auto* s : {&w.x, &w.y}) std::fill(s->factor.begin(), s->factor.end(), w.scale);
  }
  const double roundings = (p.d + 8) * UNIT;
  w.error = roundings < 0.5 ? roundings / (1 - roundings) : INFINITE;
  w.tiny = (p.d + 8) * 0x1p-123;
  find_center(w);
  prepare(w, p.y, p.m, w.y, true, true);
  if (!one_side) prepare(w, p.x, p.n, w.x, !p.products(), false);
}

// The distance that is returned, exact up to its rounding to float32.
static float distance(const Work& w, const float* x, double fx, bool zero_x, const float* y, double fy, bool zero_y) {
  auto& p = w.p;
  auto& kernels = BULWARK_PICK(neighbors_kernels);
  if (p.products()) return float(kernels.product(x, y, p.d));
  if (p.metric == Metric::cosine)
    return float((kernels.sq_distance(x, zero_x ? 0 : fx, y, zero_y ? 0 : fy, p.d) + zero_x + zero_y) / 2);
  double squares = kernels.sq_distance(x, 1, y, 1, p.d);
  return float(p.metric == Metric::euclidean ? std::sqrt(squares) : squares);
}

struct Pair {
  float low, high;
  int32_t index;
};

struct Found {
  float value;  // smaller is nearer
  int32_t index;
  bool operator<(const Found& o) const { return value < o.value || (value == o.value && index < o.index); }
};

struct Scratch {
  std::vector<float> tile, highs, x, y, negated;
  std::vector<uint32_t> hits;
  std::vector<Found> found;
};

static Scratch& scratch() {
  thread_local Scratch s;
  return s;
}

template <class T>
static T* room(std::vector<T>& v, size_t n) {
  if (v.size() < n) v.resize(n);
  return v.data();
}

// Candidates of rows [first, first + count) of x.
struct Lists {
  const Work* w;
  size_t first, capacity;
  std::vector<Pair> pairs;
  std::vector<uint32_t> sizes;
  std::vector<float>
      bounds;  // of a row: no key above is among the k smallest, nor equal in float32 to the last of them

  Lists(const Work& work, size_t first, size_t count)
      : w(&work),
        first(first),
        capacity(capacity_for(work.p.k)),
        pairs(count * capacity),
        sizes(count),
        bounds(count, INFINITE) {
    for (size_t i = 0; i < count; i++)
      if (!work.queries().finite[first + i]) bounds[i] = -INFINITE;
  }
  static size_t capacity_for(size_t k) { return 3 * k + 32; }

  Pair* list(size_t row) { return pairs.data() + (row - first) * capacity; }

  void add(size_t row, Pair pair) {
    auto& size = sizes[row - first];
    list(row)[size++] = pair;
    if (size == capacity) shrink(row);
  }

  // What the k-th smallest upper bound of a key says of the keys of others.
  float bound(size_t row, double high) const {
    auto& p = w->p;
    const double constant = w->queries().constant[row], back = 1 / (w->scale * w->scale);
    double value = high + constant, squared = p.metric == Metric::cosine ? value : 2 * value * back;
    if (p.products()) squared = value * back;
    if (p.metric == Metric::euclidean) {
      const double root = std::sqrt(std::max(squared, 0.0)) * (1 + 8 * UNIT) + 0x1p-148;
      squared = root * root;
    } else {
      squared += 8 * UNIT * std::fabs(squared) + 0x1p-148;
      if (squared > LARGEST) return INFINITE;
      if (squared < -LARGEST) squared = -LARGEST;
    }
    value = p.metric == Metric::cosine ? squared : p.products() ? squared / back : squared / (2 * back);
    const double key = value - constant;
    return float(key + 4 * UNIT * std::fabs(key) + 0x1p-48 * std::fabs(constant) + w->tiny);
  }

  void drop(size_t row) {
    Pair* of = list(row);
    auto& size = sizes[row - first];
    const float most = bounds[row - first];
    size = uint32_t(std::remove_if(of, of + size, [=](const Pair& c) { return !(c.low <= most); }) - of);
  }

  void shrink(size_t row) {
    auto& size = sizes[row - first];
    const size_t k = w->p.k;
    if (size < k) return;
    Pair* of = list(row);
    float* highs = room(scratch().highs, size);
    for (size_t i = 0; i < size; i++) highs[i] = of[i].high;
    std::nth_element(highs, highs + k - 1, highs + size);
    bounds[row - first] = std::min(bounds[row - first], bound(row, highs[k - 1]));
    drop(row);
    if (size > capacity / 4 * 3) settle(row);
  }

  // Distances of all candidates, the nearest k of them in front.
  std::vector<Found>& rank(size_t row) {
    auto& s = scratch();
    auto& p = w->p;
    auto &mine = w->queries(), &others = w->y;
    const float* x = widened(p, p.x, row, room(s.x, p.d));
    s.found.clear();
    for (size_t i = 0; i < sizes[row - first]; i++) {
      const int32_t j = list(row)[i].index;
      const float* y = widened(p, p.y, j, room(s.y, p.d));
      float value = distance(*w, x, mine.factor[row], mine.zero[row], y, others.factor[j], others.zero[j]);
      s.found.push_back({p.products() ? -value : value, j});
    }
    const size_t k = std::min(p.k, s.found.size());
    std::partial_sort(s.found.begin(), s.found.begin() + k, s.found.end());
    s.found.resize(k);
    return s.found;
  }

  // Too many are as near as the bounds can tell: of these the nearest k stay, whose keys are then known.
  void settle(size_t row) {
    auto& p = w->p;
    auto& found = rank(row);
    Pair* of = list(row);
    sizes[row - first] = uint32_t(found.size());
    const double constant = w->queries().constant[row];
    for (size_t i = 0; i < found.size(); i++) {
      double value = found[i].value, key;
      if (p.products())
        key = value * w->scale * w->scale;
      else if (p.metric == Metric::cosine)
        key = value;
      else
        key = (p.metric == Metric::euclidean ? value * value : value) * w->scale * w->scale / 2;
      double around = 8 * UNIT * std::fabs(key) + 0x1p-48 * std::fabs(constant) + w->tiny;
      around += 0x1p-148 * std::max(1.0, value) * w->scale * w->scale;  // what is lost where a distance underflows
      key -= constant;
      around += 4 * UNIT * std::fabs(key);
      const bool known = std::isfinite(key);  // or it overflows
      of[i] = {known ? float(key - around) : -INFINITE, known ? float(key + around) : INFINITE, found[i].index};
    }
    bounds[row - first] = std::min(bounds[row - first], bound(row, of[found.size() - 1].high));
  }

  void write(size_t row) {
    auto& p = w->p;
    shrink(row);
    auto& found = rank(row);
    float* distances = p.distances + row * p.k;
    int32_t* indices = p.indices + row * p.k;
    for (size_t i = 0; i < p.k; i++) {
      const bool is = i < found.size();
      distances[i] = !is ? std::numeric_limits<float>::quiet_NaN() : p.products() ? 0 - found[i].value : found[i].value;
      indices[i] = is ? found[i].index : -1;
    }
  }
};

struct Range {
  size_t from, to;
  size_t size() const { return to - from; }
};

// Products of rows of x with rows of y, and what they tell the rows of x; and those of y where `mirror` has their
// lists.
static void visit(const Work& w, Range rows, Range columns, Lists& lists, Lists* mirror) {
  auto& x = w.queries();
  auto& y = w.y;
  auto& p = w.p;
  auto& s = scratch();
  auto& kernels = BULWARK_PICK(neighbors_kernels);
  const size_t n = columns.size();
  float* tile = room(s.tile, rows.size() * n);
  uint32_t* hits = room(s.hits, n);
  if (p.d)
    sgemm(false, true, rows.size(), n, p.d, x.rows.data() + rows.from * p.d, p.d, y.rows.data() + columns.from * p.d,
          p.d, 0, tile, n);
  else
    std::fill_n(tile, rows.size() * n, 0.0f);
  const float* lengths = y.length.data() + columns.from;
  float* negated = mirror ? room(s.negated, n) : nullptr;
  for (size_t j = 0; mirror && j < n; j++) negated[j] = -mirror->bounds[columns.from + j - mirror->first];
  auto add = [&](Lists& to, size_t row, size_t other, float offset, double product, double lengths) {
    const double error = w.error * lengths, low = offset - product - error;
    if (!(low <= to.bounds[row - to.first]) || int32_t(other) == p.excluded(row)) return;
    const double high = low + 2 * error + 32 * UNIT * std::fabs(offset) + 4 * UNIT * std::fabs(low) + 4 * w.tiny;
    to.add(row, {float(low - 2 * UNIT * std::fabs(low)), float(high), int32_t(other)});
  };
  for (size_t i = rows.from; i < rows.to; i++, tile += n) {
    const float f = float(w.error * x.length[i] * (1 + 8 * UNIT));
    const float bound = lists.bounds[i - lists.first];
    size_t count =
        bound == -INFINITE ? 0 : kernels.scan(y.offset.data() + columns.from, bound, tile, f, lengths, n, hits);
    for (size_t h = 0; h < count; h++) {
      const size_t j = columns.from + hits[h];
      add(lists, i, j, y.offset[j], tile[hits[h]], double(x.length[i]) * y.length[j]);
    }
    if (!mirror || !x.finite[i]) continue;
    count = kernels.scan(negated, -y.offset[i], tile, f, lengths, n, hits);
    for (size_t h = 0; h < count; h++) {
      const size_t j = columns.from + hits[h];
      add(*mirror, j, i, y.offset[i], tile[hits[h]], double(x.length[i]) * y.length[j]);
      negated[hits[h]] = -mirror->bounds[j - mirror->first];
    }
  }
}

static size_t block_for(size_t rows) { return std::clamp<size_t>(ceil_div(rows, TASKS) / 16 * 16, LEAST_BLOCK, BLOCK); }

// Rows against themselves: every tile is computed once. In a round of a tournament no two tasks have a row in common.
static void against_themselves(const Work& w) {
  const size_t n = w.p.n, block = block_for(n), blocks = ceil_div(n, block), players = blocks + blocks % 2;
  Lists lists(w, 0, n);
  auto range = [=](size_t b) { return Range{b * block, std::min(n, (b + 1) * block)}; };
  parallel_for(blocks, [&](size_t b) { visit(w, range(b), range(b), lists, nullptr); });
  for (size_t round = 0; round + 1 < players; round++)
    parallel_for(players / 2, [&](size_t i) {
      const size_t ring = players - 1;
      size_t a = i == 0 ? ring : (round + i) % ring, b = (round + ring - i) % ring;
      if (a < blocks && b < blocks) visit(w, range(std::min(a, b)), range(std::max(a, b)), lists, &lists);
    });
  parallel_for(ceil_div(n, LEAST_BLOCK), [&](size_t t) {
    for (size_t i = t * LEAST_BLOCK; i < std::min(n, (t + 1) * LEAST_BLOCK); i++) lists.write(i);
  });
}

// Rows of x against rows of y, a block of x a task; of few rows of x, a part of y a task.
static void against_others(const Work& w) {
  auto& p = w.p;
  const size_t block = block_for(p.n), blocks = ceil_div(p.n, block);
  const size_t of_rows = sizeof(Pair) * Lists::capacity_for(p.k) * p.n;
  const size_t segments =
      std::max<size_t>(1, std::min({TASKS / blocks, p.m / LEAST_SEGMENT, LIST_BYTES / std::max<size_t>(1, of_rows)}));
  const size_t segment = ceil_div(ceil_div(p.m, segments), BLOCK) * BLOCK;
  auto rows = [&](size_t b) { return Range{b * block, std::min(p.n, (b + 1) * block)}; };
  std::vector<Lists> parts;
  for (size_t i = 0; segments > 1 && i < blocks * segments; i++)
    parts.emplace_back(w, rows(i % blocks).from, rows(i % blocks).size());
  parallel_for(blocks * segments, [&](size_t task) {
    const Range mine = rows(task % blocks);
    const size_t from = task / blocks * segment, to = std::min(p.m, from + segment);
    auto run = [&](Lists& lists) {
      for (size_t j = from; j < to; j += BLOCK) visit(w, mine, {j, std::min(to, j + BLOCK)}, lists, nullptr);
    };
    if (segments > 1) return run(parts[task]);
    Lists lists(w, mine.from, mine.size());
    run(lists);
    for (size_t i = mine.from; i < mine.to; i++) lists.write(i);
  });
  if (segments == 1) return;
  parallel_for(blocks, [&](size_t b) {
    for (size_t s = 1; s < segments; s++)
      for (size_t i = rows(b).from; i < rows(b).to; i++) {
        auto& from = parts[s * blocks + b];
        for (size_t c = 0; c < from.sizes[i - from.first]; c++)
          if (from.list(i)[c].low <= parts[b].bounds[i - from.first]) parts[b].add(i, from.list(i)[c]);
      }
    for (size_t i = rows(b).from; i < rows(b).to; i++) parts[b].write(i);
  });
}

static void run(const Problem& p) {
  if (!p.n) return;
  Work w{p, {}, {}, {}};
  prepare(w);
  // all rows' lists are in memory at once: worth it where they are small beside what a matrix would take
  const size_t each = sizeof(Pair) * Lists::capacity_for(p.k);
  const bool small = 20 * each <= p.m * sizeof(float) || each * p.n <= LIST_BYTES;
  p.self && !p.products() && small ? against_themselves(w) : against_others(w);
}

static constexpr const char* METRICS[] = {"euclidean", "sqeuclidean", "cosine", "inner_product"};

Arrays knn(const Arrays& in, const Arrays& prepared, int k, const std::string& metric, mx::StreamOrDevice sd) {
  auto s = mx::to_stream(sd);
  const auto found = std::find(std::begin(METRICS), std::end(METRICS), metric);
  if (found == std::end(METRICS)) throw std::invalid_argument("[knn] metric is not known: " + metric);
  Arrays arrays = in;
  if (in.size() > 1 && in[0].dtype() != in[1].dtype())
    for (int i : {0, 1}) arrays[i] = mx::astype(arrays[i], mx::float32, s);
  auto op = std::make_shared<Knn>(s, int(in.size()), k, Metric(found - std::begin(METRICS)));
  arrays.insert(arrays.end(), prepared.begin(), prepared.end());
  auto inputs = contiguous(arrays, s);
  return mx::array::make_arrays(op->output_shapes(inputs), {mx::float32, mx::int32}, op, inputs);
}

void Knn::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  auto &x = in[0], &y = in[inputs_ > 1 ? 1 : 0];
  auto data = [](const mx::array& a) { return a.size() ? a.data<char>() : nullptr; };
  Problem p{data(x),
            data(y),
            inputs_ > 2 && in[2].size() ? in[2].data<int32_t>() : nullptr,
            x.dtype() == mx::float32   ? 0
            : x.dtype() == mx::float16 ? 1
                                       : 2,
            x.itemsize(),
            size_t(x.shape(0)),
            size_t(y.shape(0)),
            size_t(x.shape(1)),
            size_t(k_),
            metric_,
            inputs_ == 1,
            x.shape(0) ? out[0].data<float>() : nullptr,
            x.shape(0) ? out[1].data<int32_t>() : nullptr};
  mx::cpu::get_command_encoder(stream()).dispatch([p] { run(p); });
}

Arrays Knn::reference(const Arrays& in) {
  std::string name = "knn{\"inputs\": " + std::to_string(inputs_) + ", \"k\": " + std::to_string(k_);
  name += std::string(", \"metric\": \"") + METRICS[int(metric_)] + "\"}";
  return call_reference(name.c_str(), in, stream());
}

namespace {
constexpr size_t MMD_BLOCK = 256, MMD_LEAST_BLOCK = 64;  // rows of a tile of the kernel
constexpr size_t DEALT = 256;                            // permutations at once
constexpr size_t SUMMED = 64;                            // rows whose sums are in float32
constexpr float LOSS = 0x1p-10f;  // of a binary logarithm: above, distances of near rows are computed again
constexpr float NOTHING = -40;    // binary logarithms below are of values that add nothing

struct Samples {
  const float* rows;
  const uint32_t* words;
  size_t count, d, n, permutations;
  std::vector<float> rates;

  size_t words_of_row() const { return ceil_div(permutations, 32); }
};

struct MmdScratch {
  std::vector<float> tile, mine, theirs, dealt, inside, across, zeros;
  std::vector<uint32_t> hits;
};

MmdScratch& mmd_scratch() {
  thread_local MmdScratch s;
  return s;
}

// Sums of a block of rows and all that stand behind it.
struct BlockSums {
  double groups[3] = {};  // over pairs of the first n rows, one of them, none
  std::vector<double> inside, across;
};

class Discrepancy {
 public:
  explicit Discrepancy(const Samples& s) : s_(s), half_(s.count), largest_half_(0) {
    for (size_t i = 0; i < s.count; i++) {
      const float* row = s.rows + i * s.d;
      half_[i] = float(BULWARK_PICK(neighbors_kernels).product(row, row, s.d) / 2);
      largest_half_ = std::max(largest_half_, half_[i]);
    }
    const size_t block = std::clamp<size_t>(ceil_div(s.count, TASKS) / 16 * 16, MMD_LEAST_BLOCK, MMD_BLOCK);
    for (const Range& part : {Range{0, s.n}, Range{s.n, s.count}})
      for (size_t i = part.from; i < part.to; i += block) blocks_.push_back({i, std::min(part.to, i + block)});
  }

  // float32 sums and what their rounding lost
  void run(float* out) const {
    std::vector<BlockSums> parts(blocks_.size());
    parallel_for(blocks_.size(), [&](size_t b) { parts[b] = of_block(b); });
    const size_t b = s_.permutations, size = 3 + 2 * b;
    std::vector<double> sums(size);
    for (auto& part : parts) {
      for (int g = 0; g < 3; g++) sums[g] += part.groups[g];
      for (size_t i = 0; i < b; i++) sums[3 + i] += part.inside[i], sums[3 + b + i] += part.across[i];
    }
    for (size_t i = 0; i < size; i++) out[i] = float(sums[i]), out[size + i] = float(sums[i] - out[i]);
  }

 private:
  BlockSums of_block(size_t mine) const {
    const Range rows = blocks_[mine];
    BlockSums sums{{}, std::vector<double>(s_.permutations), std::vector<double>(s_.permutations)};
    std::vector<double> by_row(rows.size());
    for (size_t b = mine; b < blocks_.size(); b++) {
      const Range columns = blocks_[b];
      float* tile = room(mmd_scratch().tile, rows.size() * columns.size());
      sgemm(false, true, rows.size(), columns.size(), s_.d, s_.rows + rows.from * s_.d, s_.d,
            s_.rows + columns.from * s_.d, s_.d, 0, tile, columns.size());
      double total = 0;
      for (size_t i = 0; i < rows.size(); i++) {
        const double sum = kernel_of(rows.from + i, columns, tile + i * columns.size());
        by_row[i] += sum;
        total += sum;
      }
      const int group = (rows.from >= s_.n) + (columns.from >= s_.n);
      sums.groups[group] += b == mine || group == 1 ? total : 2 * total;
      add_permutations(rows, columns, tile, b == mine, sums);
    }
    for (size_t i = 0; i < rows.size(); i++)
      for (size_t p = 0; p < s_.permutations; p++)
        if (s_.words[(rows.from + i) * s_.words_of_row() + p / 32] >> (p % 32) & 1) sums.across[p] += by_row[i];
    return sums;
  }

  // Products of a row become values of the kernel, 0 for itself; their sum.
  double kernel_of(size_t row, Range columns, float* products) const {
    auto& kernels = BULWARK_PICK(neighbors_kernels);
    const float* half = half_.data() + columns.from;
    auto values = [&](float h, const float* halves) {
      return kernels.gaussian(products, h, halves, s_.rates.data(), s_.rates.size(), columns.size());
    };
    const float error = 2 * std::sqrt(half_[row] * largest_half_) * (std::sqrt(float(s_.d)) + 8) * 0x1p-23f;
    const auto rate = std::find_if(s_.rates.begin(), s_.rates.end(), [=](float r) { return r * error > LOSS; });
    double sum = 0;
    if (rate == s_.rates.end()) {
      sum = values(half_[row], half);
    } else {
      auto& scratch = mmd_scratch();
      const float least = half_[row] + NOTHING / *rate - error;
      uint32_t* hits = room(scratch.hits, columns.size());
      const size_t count = kernels.scan(half, -least, products, 0, half, columns.size(), hits);
      for (size_t j = 0; j < columns.size(); j++) products[j] -= half_[row] + half[j];
      for (size_t h = 0; h < count; h++)
        products[hits[h]] = float(
            -0.5 * kernels.sq_distance(s_.rows + row * s_.d, 1, s_.rows + (columns.from + hits[h]) * s_.d, 1, s_.d));
      sum = values(0, room(scratch.zeros, columns.size()));
    }
    if (row < columns.from || row >= columns.to) return sum;
    float& itself = products[row - columns.from];
    sum -= itself;
    itself = 0;
    return sum;
  }

  // Every permutation's part of a tile: the tile times the matrix of zeros and ones that tells which rows it takes.
  void add_permutations(Range rows, Range columns, const float* tile, bool diagonal, BlockSums& sums) const {
    auto& kernels = BULWARK_PICK(neighbors_kernels);
    auto& s = mmd_scratch();
    for (size_t first = 0; first < s_.permutations; first += DEALT) {
      const size_t count = std::min(DEALT, s_.permutations - first), wide = ceil_div(count, 32) * 32;
      float *mine = room(s.mine, rows.size() * wide), *theirs = room(s.theirs, columns.size() * wide);
      float *dealt = room(s.dealt, rows.size() * wide), *inside = room(s.inside, wide), *across = room(s.across, wide);
      auto unpack = [&](Range of, float* to) {
        for (size_t i = of.from; i < of.to; i++, to += wide)
          kernels.unpack(s_.words + i * s_.words_of_row() + first / 32, to, wide);
      };
      unpack(rows, mine);
      unpack(columns, theirs);
      sgemm(false, false, rows.size(), wide, columns.size(), tile, columns.size(), theirs, wide, 0, dealt, wide);
      for (size_t i = 0; i < rows.size();) {
        std::fill_n(inside, wide, 0.0f), std::fill_n(across, wide, 0.0f);
        for (const size_t end = std::min(rows.size(), i + SUMMED); i < end; i++)
          kernels.add_products(mine + i * wide, dealt + i * wide, inside, across, wide);
        for (size_t p = 0; p < count; p++) {
          sums.inside[first + p] += diagonal ? inside[p] : 2 * double(inside[p]);
          if (!diagonal) sums.across[first + p] += across[p];
        }
      }
    }
  }

  const Samples& s_;
  std::vector<float> half_;  // squares of rows
  float largest_half_;
  std::vector<Range> blocks_;
};
}  // namespace

mx::array mmd(const mx::array& rows, const mx::array& words, int n, int permutations, const std::vector<float>& rates,
              mx::StreamOrDevice sd) {
  auto s = mx::to_stream(sd);
  auto sorted = rates;
  // Not by the default order, whose code newer headers expect in a library that macOS 14 has without it.
  std::sort(sorted.begin(), sorted.end(), [](float a, float b) { return a < b; });
  auto op = std::make_shared<Mmd>(s, n, permutations, sorted);
  auto in = contiguous({rows, words}, s);
  auto shape = op->output_shapes(in)[0];
  return mx::array(shape, mx::float32, op, std::move(in));
}

void Mmd::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  Samples s{in[0].data<float>(),
            in[1].size() ? in[1].data<uint32_t>() : nullptr,
            size_t(in[0].shape(0)),
            size_t(in[0].shape(1)),
            size_t(n_),
            size_t(permutations_),
            rates_};
  mx::cpu::get_command_encoder(stream()).dispatch([s, to = out[0].data<float>()] { Discrepancy(s).run(to); });
}

Arrays Mmd::reference(const Arrays& in) {
  std::string name = "mmd{\"n\": " + std::to_string(n_) + ", \"permutations\": " + std::to_string(permutations_);
  name += ", \"rates\": [";
  for (size_t i = 0; i < rates_.size(); i++) {
    char text[32];
    std::snprintf(text, sizeof text, "%s%.9g", i ? ", " : "", double(rates_[i]));
    name += text;
  }
  return call_reference((name + "]}").c_str(), in, stream());
}
}  // namespace bulwark
