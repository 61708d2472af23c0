#pragma once
#include <stddef.h>
#include <stdint.h>

namespace bulwark {
// Statistics of a block of rows, an array of each; sums are over the finite values.
struct BlockStats {
  float *shift, *minimum, *maximum;
  double *sum, *squares;  // of x - shift
  int32_t *count, *nans;
};

// A column of a frozen table.
struct Column {
  const float* values;   // [n], ascending, NaN last
  const float* coarse;   // every COARSE-th value, every COARSE-th of those, and so on, each filled up with NaN
  const int32_t* ranks;  // of the values in the whole column, or null
  size_t n;
  int32_t count;
  float skewness;
  int levels;
  size_t level[8];  // where the levels begin in `coarse`, the finest first; the last one holds COARSE values
  // How many values of the finest level lie in cells before each of equally wide ones, [cells + 1], or null.
  const int32_t* grid;
  int32_t cells;
  float low, per_value;
};
constexpr size_t COARSE = 16;

// Rounding keeps order, so what lies in a cell before is smaller, for scalars and vectors alike.
template <class F, class G>
F cell_of(F x, const G& column) {
  return (x - column.low) * column.per_value;
}
enum class Tails { ecod, copod, paper, sides };

struct TailsKernels {
  // One function a dtype (float32, float16, bfloat16). y[c * apart + r] = x[r * stride + c]
  void (*columns[3])(const void* x, size_t stride, size_t rows, size_t cols, float* y, size_t apart);
  // y[i] = x[i]
  void (*widen[3])(const void* x, float* y, size_t n);
  // The shift is the mean of the first rows, so rows should be few hundred.
  void (*block_stats)(const float* x, size_t stride, size_t rows, size_t cols, const BlockStats& out);
  // Adds a column's part of n scores to out[0]; the sums of left, right and chosen tails to out[0 .. 2] for the
  // paper's; sides are not added but stored, left in out[0] and right in out[1].
  void (*tails)(const Column& column, Tails kind, const float* x, size_t n, float* const* out);
  // Bins of a column by comparing with every edge, for few bins. counts[k] += values from edges[k] up to edges[k + 1]
  void (*count_bins)(const float* edges, size_t bins, const float* x, size_t n, int32_t* counts);
  // out[i] = the score of the bin that holds x[i]; `worst` where x[i] is farther outside than `reach`
  void (*score_bins)(const float* edges, const float* scores, size_t bins, float reach, float worst, const float* x,
                     size_t n, float* out);
  // scratch [d, 64] holds the columns of 64 rows; out[r] = |lower^-1 (scratch[:, r] - mean)|^2
  void (*substitute)(const float* lower, const float* mean, size_t d, float* scratch, float* out);
  // y = (x - center) / scale, 0 where both are 0
  void (*zscore)(const float* x, const float* center, const float* scale, float* y, size_t d);
};
constexpr size_t SUBSTITUTED = 64;
namespace base {
extern const TailsKernels tails_kernels;
}
namespace avx2 {
extern const TailsKernels tails_kernels;
}
namespace avx512 {
extern const TailsKernels tails_kernels;
}
}  // namespace bulwark
