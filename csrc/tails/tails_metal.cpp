// Host side of tails.metal: shapes, grid, order of buffers. Compiled on every platform.
#include <algorithm>
#include <limits>
#include <stdexcept>

#include "tails/tails.h"

namespace bulwark {
namespace {
// These stand in tails.metal too.
constexpr uint32_t ZSCORE_THREADS = 256, STATS_SIMDGROUPS = 8, STATS_RUN = 16, FEW_SOLVED = 64, MOST_SOLVED = 224;
constexpr uint32_t ROW_THREADS = 256;
constexpr uint64_t MANY_GROUPS = 512, LEAST_SCALED = 32;

uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

uint32_t group_count(uint64_t groups) {
  if (groups > std::numeric_limits<uint32_t>::max()) throw std::runtime_error("[bulwark] too many rows for Metal");
  return uint32_t(groups);
}

[[noreturn]] void none() {
  throw std::runtime_error("[bulwark] this op has no Metal kernel: its reference runs there");
}
}  // namespace

void RobustZscore::metal(const Arrays& in, Arrays& out) {
  allocate(stream(), out[0]);
  const uint64_t size = out[0].size(), columns = in[0].shape(1);
  if (!size) return;
  const uint64_t width = columns < ZSCORE_THREADS ? ZSCORE_THREADS / columns * columns : columns;
  const uint64_t rows = ceil_div(size, width), tiles = ceil_div(width, ZSCORE_THREADS);
  const uint64_t each = std::max(LEAST_SCALED, rows * tiles / MANY_GROUPS);  // for one reading of center and scale
  KernelCall call{tails_source, std::string("robust_zscore") + suffix(in[0].dtype()),
                  group_count(tiles * ceil_div(rows, each)), ZSCORE_THREADS};
  call.in(in[0]).in(in[1]).in(in[2]).out(out[0]).bytes(size).bytes(uint32_t(columns)).bytes(uint32_t(width));
  launch(stream(), call.bytes(uint32_t(each)).bytes(uint32_t(tiles)));
}

namespace {
// Lanes that share a row.
uint32_t lanes_of(uint64_t columns) {
  uint32_t width = 1;
  while (width < columns && width < 32) width *= 2;
  return width;
}
}  // namespace

void TailScores::metal(const Arrays& in, Arrays& out) {
  for (auto& x : out) allocate(stream(), x);
  const uint64_t rows = in[0].shape(0), columns = in[0].shape(1), width = lanes_of(columns);
  if (!out[0].size()) return;
  KernelCall call{tails_source, std::string("tail_scores") + suffix(in[0].dtype()),
                  group_count(ceil_div(rows * width, ROW_THREADS)), ROW_THREADS};
  call.in(in[0]).in(in[1]).in(in[2]).in(in[3]);
  in.size() > 4 ? call.in(in[4]) : call.unused();
  call.out(out[0]);
  kind_ == Tails::sides ? call.out(out[1]) : call.unused();
  call.bytes(uint32_t(rows)).bytes(uint32_t(columns)).bytes(uint32_t(in[1].shape(1))).bytes(uint32_t(width));
  call.constant(0, kind_ == Tails::copod).constant(1, kind_ == Tails::paper).constant(2, kind_ == Tails::sides);
  launch(stream(), call.constant(3, in.size() > 4));
}

void HistogramScores::metal(const Arrays& in, Arrays& out) {
  allocate(stream(), out[0]);
  const uint64_t rows = in[0].shape(0), columns = in[0].shape(1), width = lanes_of(columns);
  if (!out[0].size()) return;
  KernelCall call{tails_source, std::string("histogram_scores") + suffix(in[0].dtype()),
                  group_count(ceil_div(rows * width, ROW_THREADS)), ROW_THREADS};
  call.in(in[0]).in(in[1]).in(in[2]).in(in[3]).out(out[0]);
  call.bytes(uint32_t(rows)).bytes(uint32_t(columns)).bytes(uint32_t(in[2].shape(1))).bytes(uint32_t(width));
  launch(stream(), call.constant(4, per_column_));
}

void Mahalanobis::metal(const Arrays& in, Arrays& out) {
  allocate(stream(), out[0]);
  const uint32_t rows = in[0].shape(0), columns = in[0].shape(1);
  if (!rows) return;
  if (columns > MOST_SOLVED) none();
  KernelCall call{tails_source,
                  std::string(columns <= FEW_SOLVED ? "mahalanobis_64" : "mahalanobis_224") + suffix(in[0].dtype()),
                  group_count(ceil_div(rows, 32)), 32};
  launch(stream(), call.in(in[0]).in(in[1]).in(in[2]).out(out[0]).bytes(rows).bytes(columns));
}

void ColumnStats::metal(const Arrays& in, Arrays& out) {
  for (auto& x : out) allocate(stream(), x);
  const uint64_t rows = in[0].shape(0), columns = in[0].shape(1), size = in[0].size();
  if (!columns) return;
  // Of few columns several rows are one long row, so that lanes have work.
  const uint64_t width = columns < 32 ? 32 / columns * columns : columns, tiles = ceil_div(width, 32);
  const uint64_t runs_in_all = ceil_div(ceil_div(size, width), STATS_SIMDGROUPS * STATS_RUN);
  const uint64_t runs = std::max<uint64_t>(1, runs_in_all * tiles / MANY_GROUPS), chunks = ceil_div(runs_in_all, runs);
  const auto partial = temporary(stream(), {int(chunks), 5, int(width)}, mx::float32);
  const auto counts = temporary(stream(), {int(chunks), 2, int(width)}, mx::uint32);
  if (chunks) {
    KernelCall call{tails_source, std::string("column_moments") + suffix(in[0].dtype()), group_count(chunks * tiles),
                    32 * STATS_SIMDGROUPS};
    call.in(in[0]).out(partial).out(counts).bytes(size).bytes(uint32_t(width)).bytes(uint32_t(runs));
    launch(stream(), call.bytes(uint32_t(tiles)));
  }
  KernelCall finish{tails_source, "finish_column_stats", group_count(ceil_div(columns, 32)), 32};
  finish.in(partial).in(counts);
  for (auto& x : out) finish.out(x);
  finish.bytes(uint32_t(rows)).bytes(uint32_t(columns)).bytes(uint32_t(width)).bytes(uint32_t(chunks));
  launch(stream(), finish);
}

void QuantileTable::metal(const Arrays&, Arrays&) { none(); }
void HistogramCounts::metal(const Arrays&, Arrays&) { none(); }
}  // namespace bulwark
