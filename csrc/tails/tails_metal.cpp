// Host side of tails.metal: shapes, grid, order of buffers. Compiled on every platform.
#include <algorithm>
#include <limits>
#include <stdexcept>

#include "tails/tails.h"

namespace bulwark {
namespace {
// These stand in tails.metal too.
constexpr uint32_t ZSCORE_THREADS = 256;
constexpr uint64_t MANY_GROUPS = 512;

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
  if (!out[0].size()) return;
  const uint64_t rows = in[0].shape(0), columns = in[0].shape(1), across = ceil_div(columns, ZSCORE_THREADS);
  const uint64_t each = std::max<uint64_t>(1, rows * across / MANY_GROUPS);
  KernelCall call{tails_source, std::string("robust_zscore") + suffix(in[0].dtype()),
                  group_count(across * ceil_div(rows, each)), ZSCORE_THREADS};
  call.in(in[0]).in(in[1]).in(in[2]).out(out[0]).bytes(uint32_t(columns)).bytes(uint32_t(each)).bytes(uint32_t(rows));
  launch(stream(), call.bytes(uint32_t(across)));
}

void ColumnStats::metal(const Arrays&, Arrays&) { none(); }
void QuantileTable::metal(const Arrays&, Arrays&) { none(); }
void TailScores::metal(const Arrays&, Arrays&) { none(); }
void HistogramCounts::metal(const Arrays&, Arrays&) { none(); }
void HistogramScores::metal(const Arrays&, Arrays&) { none(); }
void Mahalanobis::metal(const Arrays&, Arrays&) { none(); }
}  // namespace bulwark
