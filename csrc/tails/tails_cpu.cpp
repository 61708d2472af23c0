#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <tuple>
#include <utility>

#include "common/cpu.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "mlx/backend/cpu/encoder.h"
#include "tails/tails.h"
#include "tails/tails_simd.h"

namespace bulwark {
namespace {
// How work is split depends on shapes alone, so that results do not depend on the number of threads.
constexpr size_t GROUP = 16;          // columns that are taken out of rows at once: a line of float32
constexpr size_t CHUNK_ROWS = 65536;  // rows for which a column's table is fetched into the cache
constexpr size_t BLOCK_ROWS = 512;    // of statistics, with one shift
constexpr size_t TILE_COLUMNS = 128;
constexpr size_t CHUNK_VALUES = 1 << 20;
constexpr size_t BIN_ROWS = 2048;  // for which histograms are looked up: a quarter of the second cache
constexpr size_t FEW_BINS = 48;    // which are compared with one after the other
constexpr size_t FEW = 256;        // values that are sorted without counting
constexpr size_t FEWEST_BLOCKS = 64, ROWS_FOR_CELLS = 8;  // cells cost more than they save below, and with fewer rows

const TailsKernels& kernels() { return BULWARK_PICK(tails_kernels); }

// The rows of x, with no hold on the array.
struct Rows {
  const char* x;
  size_t n, d, item;
  int type;

  explicit Rows(const mx::array& a)
      : x(a.size() ? a.data<char>() : nullptr),
        n(a.shape(0)),
        d(a.shape(1)),
        item(a.itemsize()),
        type(a.dtype() == mx::float32   ? 0
             : a.dtype() == mx::float16 ? 1
                                        : 2) {}

  const char* at(size_t row, size_t column) const { return x + (row * d + column) * item; }
  // Columns of some rows, one behind the other.
  void columns(size_t row, size_t rows, size_t column, size_t count, float* y, size_t apart) const {
    kernels().columns[type](at(row, column), d, rows, count, y, apart);
  }
};

template <class T>
T* data(mx::array& a) {
  return a.size() ? a.data<T>() : nullptr;
}
template <class T>
const T* data(const mx::array& a) {
  return a.size() ? a.data<T>() : nullptr;
}

// ---- column_stats

struct Moments {
  double count = 0, mean = 0, m2 = 0;
  float minimum = std::numeric_limits<float>::infinity(), maximum = -std::numeric_limits<float>::infinity();
  int64_t nans = 0, infs = 0;

  void add(const Moments& b) {
    const double both = count + b.count;
    if (b.count > 0) {
      const double delta = b.mean - mean, weight = b.count / both;
      mean += delta * weight;
      m2 += b.m2 + delta * delta * count * weight;
    }
    count = both;
    minimum = std::min(minimum, b.minimum);
    maximum = std::max(maximum, b.maximum);
    nans += b.nans;
    infs += b.infs;
  }
};

// Where differences or squares left float32.
void in_double(const float* x, size_t stride, size_t rows, Moments& m) {
  double sum = 0, squares = 0;
  for (size_t r = 0; r < rows; r++)
    if (std::isfinite(x[r * stride])) sum += x[r * stride];
  m.mean = sum / m.count;
  for (size_t r = 0; r < rows; r++)
    if (std::isfinite(x[r * stride])) squares += (x[r * stride] - m.mean) * (x[r * stride] - m.mean);
  m.m2 = squares;
}

struct Block {
  float shift[TILE_COLUMNS], minimum[TILE_COLUMNS], maximum[TILE_COLUMNS];
  double sum[TILE_COLUMNS], squares[TILE_COLUMNS];
  int32_t count[TILE_COLUMNS], nans[TILE_COLUMNS];
  BlockStats stats() { return {shift, minimum, maximum, sum, squares, count, nans}; }
};

// Adds the values of `rows` rows and `cols` columns, `width` values apart, to their moments.
void add_block(const float* x, size_t width, size_t rows, size_t cols, Block& b, Moments* out) {
  kernels().block_stats(x, width, rows, cols, b.stats());
  for (size_t c = 0; c < cols; c++) {
    Moments m;
    m.count = b.count[c], m.minimum = b.minimum[c], m.maximum = b.maximum[c], m.nans = b.nans[c];
    m.infs = int64_t(rows) - b.count[c] - b.nans[c];
    if (b.count[c]) {
      const double sum = b.sum[c], off = sum / b.count[c];
      m.mean = b.shift[c] + off;
      m.m2 = std::max(0.0, b.squares[c] - sum * off);
      if (!std::isfinite(b.squares[c])) in_double(x + c, width, rows, m);
      if (m.minimum == m.maximum) m.mean = m.minimum, m.m2 = 0;
    }
    out[c].add(m);
  }
}

// Moments of rows [from, to) of a matrix of `width` columns that begins at x. Of few columns, several rows are one.
void add_rows(const Rows& x, size_t width, size_t offset, size_t from, size_t to, size_t column, size_t cols,
              Moments* out) {
  std::vector<float> wide(x.type ? std::min(BLOCK_ROWS, to - from) * cols : 0);
  Block b;
  for (size_t r = from; r < to; r += BLOCK_ROWS) {
    const size_t rows = std::min(BLOCK_ROWS, to - r);
    const char* at = x.x + (offset + r * width + column) * x.item;
    if (x.type == 0) {
      add_block(reinterpret_cast<const float*>(at), width, rows, cols, b, out);
      continue;
    }
    for (size_t i = 0; i < rows; i++) kernels().widen[x.type](at + i * width * x.item, &wide[i * cols], cols);
    add_block(wide.data(), cols, rows, cols, b, out);
  }
}

std::vector<Moments> moments(const Rows& x) {
  const size_t together = x.d && x.d < TILE_COLUMNS / 2 ? TILE_COLUMNS / x.d : 1, width = together * x.d;
  const size_t long_rows = x.n / together, chunk = std::max<size_t>(1, CHUNK_VALUES / std::max<size_t>(width, 1));
  const size_t chunks = ceil_div(long_rows, chunk), tiles = ceil_div(width, TILE_COLUMNS);
  std::vector<Moments> parts((chunks + 1) * width);
  parallel_for(chunks * tiles, [&](size_t unit) {
    const size_t k = unit / tiles, column = unit % tiles * TILE_COLUMNS;
    add_rows(x, width, 0, k * chunk, std::min(long_rows, (k + 1) * chunk), column,
             std::min(TILE_COLUMNS, width - column), &parts[k * width + column]);
  });
  const size_t rest = long_rows * together;
  for (size_t column = 0; column < x.d && rest < x.n; column += TILE_COLUMNS)
    add_rows(x, x.d, rest * x.d, 0, x.n - rest, column, std::min(TILE_COLUMNS, x.d - column),
             &parts[chunks * width + column]);
  std::vector<Moments> out(x.d);
  for (size_t i = 0; i < parts.size(); i++) out[i % x.d].add(parts[i]);
  return out;
}

// ---- quantile_table

uint32_t key_of(float x) {
  if (std::isnan(x)) return ~uint32_t(0);
  x += 0.0f;  // -0 is 0
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

float value_of(uint32_t key) {
  uint32_t bits = key & 0x80000000 ? key ^ 0x80000000 : ~key;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Sorts the floats of a column in place, NaN last: three passes over 11 bits each, without those that all have alike.
void sort_column(float* x, size_t n, std::vector<uint32_t>& scratch) {
  constexpr size_t DIGITS = 3, BINS = 2048;
  if (scratch.size() < 2 * n) scratch.resize(2 * n);
  uint32_t *from = scratch.data(), *to = from + n;
  std::vector<uint32_t> counts(DIGITS * BINS);
  for (size_t i = 0; i < n; i++) {
    const uint32_t key = from[i] = key_of(x[i]);
    counts[key & 2047]++;
    counts[BINS + (key >> 11 & 2047)]++;
    counts[2 * BINS + (key >> 22)]++;
  }
  if (n <= FEW) {
    // Not by the default order, whose code newer headers expect in a library that macOS 14 has without it.
    std::sort(from, from + n, [](uint32_t a, uint32_t b) { return a < b; });
  } else {
    for (size_t digit = 0; digit < DIGITS; digit++) {
      uint32_t* count = &counts[digit * BINS];
      const int shift = 11 * digit;
      if (count[from[0] >> shift & 2047] == n) continue;
      uint32_t start = 0;
      for (size_t b = 0; b < BINS; b++) start += std::exchange(count[b], start);
      for (size_t i = 0; i < n; i++) to[count[from[i] >> shift & 2047]++] = from[i];
      std::swap(from, to);
    }
  }
  for (size_t i = 0; i < n; i++) x[i] = value_of(from[i]);
}

// Sums over eight lanes, so that they need not wait for each other.
template <class F>
double sum_of(const float* x, size_t n, F f) {
  constexpr size_t LANES = 8;
  double sums[LANES] = {}, total = 0;
  size_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (size_t k = 0; k < LANES; k++) sums[k] += f(x[i + k]);
  for (; i < n; i++) total += f(x[i]);
  for (double s : sums) total += s;
  return total;
}

// Of the finite values of a sorted column.
float skewness_of(const float* x, size_t n) {
  const float inf = std::numeric_limits<float>::infinity();
  const float* end = std::lower_bound(x, x + n, inf);
  x = std::upper_bound(x, end, -inf);
  n = end - x;
  if (n == 0 || x[0] == x[n - 1]) return 0;
  const double mean = sum_of(x, n, [](double v) { return v; }) / n;
  const double m2 = sum_of(x, n, [=](double v) { return (v - mean) * (v - mean); }) / n;
  const double m3 = sum_of(x, n, [=](double v) { return (v - mean) * (v - mean) * (v - mean); }) / n;
  return float(m3 / (m2 * std::sqrt(m2)));
}

// ---- Rows against tables

// Runs f(first row, rows, first column, columns, their values column by column) for all parts of x, and returns when
// all are done. Parts are the same for any number of threads.
template <class F>
void for_parts(const Rows& x, size_t most, F f) {
  const size_t groups = ceil_div(x.d, GROUP), chunks = ceil_div(x.n, most);
  parallel_for(groups * chunks, [&](size_t unit) {
    const size_t row = unit / groups * most, column = unit % groups * GROUP;
    const size_t rows = std::min(most, x.n - row), count = std::min(GROUP, x.d - column);
    static thread_local std::vector<float> values;  // kept: fresh memory costs more than the work on it
    if (values.size() < rows * count) values.resize(rows * count);
    x.columns(row, rows, column, count, values.data(), rows);
    f(row, rows, column, count, values.data());
  });
}

// out[r] = sum of parts[g * n + r] over the groups.
void add_groups(const std::vector<float>& parts, size_t groups, size_t n, float* out) {
  for (size_t r = 0; r < n; r++) {
    double sum = 0;
    for (size_t g = 0; g < groups; g++) sum += parts[g * n + r];
    out[r] = float(sum);
  }
}

struct Table {
  const float *values, *skewness;
  const int32_t *counts, *ranks;
  size_t n;
  std::vector<float> coarse{};
  size_t held = 0;  // coarse values of a column
  int levels = 0;
  size_t level[8] = {};
  std::vector<int32_t> cells{};
  std::vector<std::pair<float, float>> frames{};  // low and per_value of the columns that have cells
  size_t number = 0;                              // of cells of a column

  void prepare(size_t d, size_t rows) {
    size_t size = n;
    do {
      size = ceil_div(size, COARSE);
      level[levels++] = held;
      held += ceil_div(size, COARSE) * COARSE + (levels == 1 ? COARSE : 0);  // a search may begin at any value of it
    } while (size > COARSE);
    coarse.assign(d * held, std::numeric_limits<float>::quiet_NaN());
    parallel_for(d, [&](size_t c) {
      const float* from = values + c * n;
      size_t left = n;
      for (int l = 0; l < levels; l++) {
        float* to = &coarse[c * held + level[l]];
        left = ceil_div(left, COARSE);
        for (size_t b = 0; b < left; b++) to[b] = from[b * COARSE];
        from = to;
      }
    });
    const size_t blocks = ceil_div(n, COARSE);
    if (blocks < FEWEST_BLOCKS || rows < n / ROWS_FOR_CELLS) return;
    number = 2 * blocks;
    cells.assign(d * (number + 1), 0);
    frames.assign(d, {0, 0});
    parallel_for(d, [&](size_t c) { count_cells(c); });
  }

  // Cells of equal width take a value near to its place at once, where no more than a few hold too many.
  void count_cells(size_t c) {
    const float *sorted = values + c * n, *first = &coarse[c * held], low = sorted[0];
    const float range = counts[c] > 0 ? sorted[counts[c] - 1] - low : 0, per_value = number / range;
    if (!(std::isfinite(range) && std::isfinite(per_value))) return;
    const struct {
      float low, per_value;
    } frame{low, per_value};
    int32_t* cell = &cells[c * (number + 1)];
    const size_t blocks = ceil_div(counts[c], COARSE);
    for (size_t b = 0; b < blocks; b++) cell[std::min(number - 1, size_t(cell_of(first[b], frame))) + 1]++;
    size_t crowded = 0;
    for (size_t k = 1; k <= number; k++) {
      if (size_t(cell[k]) >= COARSE) crowded += cell[k];
      cell[k] += cell[k - 1];
    }
    if (crowded <= blocks / 512) frames[c] = {low, per_value};
  }
  Column column(size_t c) const {
    Column r{values + c * n,
             coarse.data() + c * held,
             ranks ? ranks + c * n : nullptr,
             n,
             counts[c],
             skewness[c],
             levels,
             {},
             nullptr,
             int32_t(number),
             0,
             0};
    std::copy(level, level + 8, r.level);
    if (number && frames[c].second > 0) {
      r.grid = &cells[c * (number + 1)];
      std::tie(r.low, r.per_value) = frames[c];
    }
    return r;
  }
};

void scores(const Rows& x, const Table& table, Tails kind, float* out) {
  const size_t sums = kind == Tails::paper ? 3 : 1, groups = ceil_div(x.d, GROUP);
  std::vector<float> parts(sums * groups * x.n);
  for_parts(x, CHUNK_ROWS, [&](size_t row, size_t rows, size_t column, size_t count, const float* values) {
    float* to[3];
    for (size_t k = 0; k < sums; k++) to[k] = &parts[(k * groups + column / GROUP) * x.n + row];
    for (size_t c = 0; c < count; c++) kernels().tails(table.column(column + c), kind, values + c * rows, rows, to);
  });
  if (kind != Tails::paper) return add_groups(parts, groups, x.n, out);
  std::vector<float> sum(x.n);
  for (size_t k = 0; k < sums; k++) {
    std::vector<float> part(parts.begin() + k * groups * x.n, parts.begin() + (k + 1) * groups * x.n);
    add_groups(part, groups, x.n, sum.data());
    for (size_t r = 0; r < x.n; r++) out[r] = k == 0 || sum[r] > out[r] || std::isnan(sum[r]) ? sum[r] : out[r];
  }
}

void sides(const Rows& x, const Table& table, float* left, float* right) {
  for_parts(x, CHUNK_ROWS, [&](size_t row, size_t rows, size_t column, size_t count, const float* values) {
    std::vector<float> both(2 * rows);
    float* to[2] = {both.data(), both.data() + rows};
    for (size_t c = 0; c < count; c++) {
      kernels().tails(table.column(column + c), Tails::sides, values + c * rows, rows, to);
      for (size_t r = 0; r < rows; r++) {
        left[(row + r) * x.d + column + c] = to[0][r];
        right[(row + r) * x.d + column + c] = to[1][r];
      }
    }
  });
}

// ---- Histograms

// The bins of a column: a guess from equal widths, put right by the edges.
struct Bins {
  const float* edges;
  int32_t bins;
  float low, per_value;

  Bins(const float* edges, size_t bins)
      : edges(edges), bins(bins), low(edges[0]), per_value(float(bins / (double(edges[bins]) - edges[0]))) {}

  int32_t guess(float x) const {
    const float t = (x - low) * per_value;
    return t > 0 ? t < float(bins - 1) ? int32_t(t) : bins - 1 : 0;
  }
  // The bin that holds x with its left edge, for x within the edges.
  int32_t left_closed(float x) const {
    int32_t k = guess(x);
    while (k + 1 < bins && x >= edges[k + 1]) k++;
    while (k > 0 && x < edges[k]) k--;
    return k;
  }
  int32_t right_closed(float x) const {
    int32_t k = guess(x);
    while (k + 1 < bins && x > edges[k + 1]) k++;
    while (k > 0 && x <= edges[k]) k--;
    return k;
  }
};

void count_bins(const Rows& x, const float* edges, size_t bins, int32_t* out) {
  std::memset(out, 0, x.d * bins * sizeof(int32_t));
  parallel_for(ceil_div(x.d, GROUP), [&](size_t group) {
    const size_t column = group * GROUP, count = std::min(GROUP, x.d - column);
    std::vector<float> values(count * std::min(BIN_ROWS, x.n));
    for (size_t row = 0; row < x.n; row += BIN_ROWS) {
      const size_t rows = std::min(BIN_ROWS, x.n - row);
      x.columns(row, rows, column, count, values.data(), rows);
      for (size_t c = 0; c < count; c++) {
        const float* edge = edges + (column + c) * (bins + 1);
        int32_t* counts = out + (column + c) * bins;
        if (bins <= FEW_BINS) {
          kernels().count_bins(edge, bins, &values[c * rows], rows, counts);
          continue;
        }
        const Bins b(edge, bins);
        for (size_t r = 0; r < rows; r++) {
          const float v = values[c * rows + r];
          if (v >= b.low && v <= b.edges[bins]) counts[b.left_closed(v)]++;
        }
      }
    }
  });
}

void histogram(const Rows& x, const float* edges, const float* scores, const float* reach, size_t bins, bool per_column,
               float* out) {
  const size_t groups = ceil_div(x.d, GROUP);
  std::vector<float> parts(per_column ? 0 : groups * x.n);
  for_parts(x, BIN_ROWS, [&](size_t row, size_t rows, size_t column, size_t count, const float* values) {
    const auto found = std::make_unique_for_overwrite<float[]>(rows);
    for (size_t c = 0; c < count; c++) {
      const size_t at = column + c;
      const Bins b(edges + at * (bins + 1), bins);
      const float *score = scores + at * bins, worst = *std::max_element(score, score + bins), far = reach[at];
      const float *v = values + c * rows, high = b.edges[bins];
      if (bins <= FEW_BINS) {
        kernels().score_bins(b.edges, score, bins, far, worst, v, rows, found.get());
      } else {
        for (size_t r = 0; r < rows; r++) {
          found[r] = std::isnan(v[r]) ? v[r] : score[b.right_closed(v[r])];
          if (b.low - v[r] > far || v[r] - high > far) found[r] = worst;
        }
      }
      if (per_column) {
        for (size_t r = 0; r < rows; r++) out[(row + r) * x.d + at] = found[r];
      } else {
        float* sum = &parts[column / GROUP * x.n + row];
        for (size_t r = 0; r < rows; r++) sum[r] += found[r];
      }
    }
  });
  if (!per_column) add_groups(parts, groups, x.n, out);
}
}  // namespace

Arrays column_stats(const mx::array& x, mx::StreamOrDevice sd) {
  auto op = std::make_shared<ColumnStats>(mx::to_stream(sd));
  std::vector<mx::Dtype> types(8, mx::float32);
  types[0] = types[5] = types[6] = mx::int32;
  return mx::array::make_arrays(op->output_shapes({x}), types, op, contiguous({x}, op->stream()));
}

void ColumnStats::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  std::vector<void*> to;
  for (auto& a : out) to.push_back(data<char>(a));
  mx::cpu::get_command_encoder(stream()).dispatch([x = Rows(in[0]), to] {
    if (!x.d) return;
    auto found = moments(x);
    auto floats = [&](size_t i) { return static_cast<float*>(to[i]); };
    auto ints = [&](size_t i) { return static_cast<int32_t*>(to[i]); };
    for (size_t c = 0; c < x.d; c++) {
      auto& m = found[c];
      ints(0)[c] = m.count;
      floats(1)[c] = m.mean;
      floats(2)[c] = m.m2;
      floats(3)[c] = m.minimum;
      floats(4)[c] = m.maximum;
      ints(5)[c] = m.nans;
      ints(6)[c] = m.infs;
      floats(7)[c] = m.mean - float(m.mean);
    }
  });
}

Arrays quantile_table(const mx::array& x, mx::StreamOrDevice sd) {
  auto op = std::make_shared<QuantileTable>(mx::to_stream(sd));
  return mx::array::make_arrays(op->output_shapes({x}), {mx::float32, mx::int32, mx::float32}, op,
                                contiguous({x}, op->stream()));
}

void QuantileTable::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  mx::cpu::get_command_encoder(stream()).dispatch(
      [x = Rows(in[0]), values = data<float>(out[0]), counts = data<int32_t>(out[1]), skewness = data<float>(out[2])] {
        const size_t groups = ceil_div(x.d, GROUP), chunks = ceil_div(x.n, CHUNK_ROWS);
        parallel_for(groups * chunks, [&](size_t unit) {
          const size_t row = unit / groups * CHUNK_ROWS, column = unit % groups * GROUP;
          x.columns(row, std::min(CHUNK_ROWS, x.n - row), column, std::min(GROUP, x.d - column),
                    values + column * x.n + row, x.n);
        });
        parallel_for(x.d, [&](size_t c) {
          static thread_local std::vector<uint32_t> scratch;  // kept: fresh memory costs more than the work on it
          float *column = values + c * x.n, *end = column + x.n;
          sort_column(column, x.n, scratch);
          while (end > column && std::isnan(end[-1])) end--;
          counts[c] = end - column;
          skewness[c] = skewness_of(column, end - column);
        });
      });
}

Arrays tail_scores(const mx::array& x, const mx::array& values, const mx::array& counts, const mx::array& skewness,
                   const Arrays& ranks, int kind, mx::StreamOrDevice sd) {
  auto op = std::make_shared<TailScores>(mx::to_stream(sd), Tails(kind));
  Arrays in{x, values, counts, skewness};
  in.insert(in.end(), ranks.begin(), ranks.end());
  auto shapes = op->output_shapes(in);
  return mx::array::make_arrays(shapes, std::vector<mx::Dtype>(shapes.size(), mx::float32), op,
                                contiguous(in, op->stream()));
}

void TailScores::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  Table table{data<float>(in[1]), data<float>(in[3]), data<int32_t>(in[2]),
              in.size() > 4 ? data<int32_t>(in[4]) : nullptr, size_t(in[1].shape(1))};
  float* to[2] = {data<float>(out[0]), data<float>(out.back())};
  mx::cpu::get_command_encoder(stream()).dispatch(
      [x = Rows(in[0]), table = std::move(table), kind = kind_, left = to[0], right = to[1]]() mutable {
        if (!x.n) return;
        table.prepare(x.d, x.n);
        kind == Tails::sides ? sides(x, table, left, right) : scores(x, table, kind, left);
      });
}

mx::array histogram_counts(const mx::array& x, const mx::array& edges, mx::StreamOrDevice sd) {
  auto op = std::make_shared<HistogramCounts>(mx::to_stream(sd));
  return mx::array(op->output_shapes({x, edges})[0], mx::int32, op, contiguous({x, edges}, op->stream()));
}

void HistogramCounts::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  mx::cpu::get_command_encoder(stream()).dispatch(
      [x = Rows(in[0]), edges = data<float>(in[1]), bins = size_t(in[1].shape(1) - 1), counts = data<int32_t>(out[0])] {
        if (x.d) count_bins(x, edges, bins, counts);
      });
}

mx::array histogram_scores(const mx::array& x, const mx::array& edges, const mx::array& scores, const mx::array& reach,
                           bool per_column, mx::StreamOrDevice sd) {
  auto op = std::make_shared<HistogramScores>(mx::to_stream(sd), per_column);
  return mx::array(op->output_shapes({x})[0], mx::float32, op, contiguous({x, edges, scores, reach}, op->stream()));
}

void HistogramScores::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  mx::cpu::get_command_encoder(stream()).dispatch(
      [x = Rows(in[0]), edges = data<float>(in[1]), scores = data<float>(in[2]), reach = data<float>(in[3]),
       bins = size_t(in[2].shape(1)), per_column = per_column_,
       to = data<float>(out[0])] { histogram(x, edges, scores, reach, bins, per_column, to); });
}

mx::array robust_zscore(const mx::array& x, const mx::array& center, const mx::array& scale, mx::StreamOrDevice sd) {
  auto op = std::make_shared<RobustZscore>(mx::to_stream(sd));
  return mx::array(x.shape(), mx::float32, op, contiguous({x, center, scale}, op->stream()));
}

void RobustZscore::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  mx::cpu::get_command_encoder(stream()).dispatch(
      [x = Rows(in[0]), center = data<float>(in[1]), scale = data<float>(in[2]), to = data<float>(out[0])] {
        const size_t step = std::max<size_t>(1, 65536 / std::max<size_t>(x.d, 1));
        parallel_for(ceil_div(x.n, step), [&](size_t k) {
          for (size_t r = k * step; r < std::min(x.n, (k + 1) * step); r++) {
            float* y = to + r * x.d;
            kernels().widen[x.type](x.at(r, 0), y, x.d);
            kernels().zscore(y, center, scale, y, x.d);
          }
        });
      });
}

mx::array mahalanobis(const mx::array& x, const mx::array& mean, const mx::array& cholesky, mx::StreamOrDevice sd) {
  auto op = std::make_shared<Mahalanobis>(mx::to_stream(sd));
  return mx::array({x.shape(0)}, mx::float32, op, contiguous({x, mean, cholesky}, op->stream()));
}

void Mahalanobis::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  mx::cpu::get_command_encoder(stream()).dispatch(
      [x = Rows(in[0]), mean = data<float>(in[1]), lower = data<float>(in[2]), to = data<float>(out[0])] {
        constexpr size_t TILES = 8;
        parallel_for(ceil_div(x.n, TILES * SUBSTITUTED), [&](size_t k) {
          std::vector<float> scratch(x.d * SUBSTITUTED);
          float norms[SUBSTITUTED];
          const size_t end = std::min(x.n, (k + 1) * TILES * SUBSTITUTED);
          for (size_t r = k * TILES * SUBSTITUTED; r < end; r += SUBSTITUTED) {
            const size_t rows = std::min(SUBSTITUTED, end - r);
            x.columns(r, rows, 0, x.d, scratch.data(), SUBSTITUTED);
            kernels().substitute(lower, mean, x.d, scratch.data(), norms);
            std::copy(norms, norms + rows, to + r);
          }
        });
      });
}
}  // namespace bulwark
