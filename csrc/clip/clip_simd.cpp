#include "clip/clip_simd.h"

#include "common/readers.h"

namespace bulwark::BULWARK_ISA {
typedef float HalfVec __attribute__((vector_size(2 * LANES)));
typedef double Doubles __attribute__((vector_size(4 * LANES)));  // one for each lane of a HalfVec

// Four sums at once, of four runs where there is enough: that keeps more of the memory busy than one run. Squares are
// added in float over short blocks, so that a lane takes 16 of them, and blocks in double.
template <class F>
static double sum_of_squares(const typename F::Value* x, size_t n) {
  constexpr size_t SUMS = 4, BLOCK = 16, LONG_RUN = 4096;
  size_t steps = n / (SUMS * LANES), i = SUMS * LANES * steps;
  bool runs = steps * LANES >= LONG_RUN;
  size_t apart = runs ? steps * LANES : LANES, stride = runs ? LANES : SUMS * LANES;
  Doubles sums{};
  for (size_t at = 0; at < steps;) {
    size_t end = at + BLOCK < steps ? at + BLOCK : steps;
    Vec s[SUMS] = {};
    for (; at < end; at++)
      for (size_t k = 0; k < SUMS; k++) {
        Vec v = F::vector(x + at * stride + k * apart);
        s[k] += v * v;
      }
    Vec block = (s[0] + s[1]) + (s[2] + s[3]);
    sums += __builtin_convertvector(load<HalfVec>(&block), Doubles);
    sums += __builtin_convertvector(load<HalfVec>((const char*)&block + sizeof(HalfVec)), Doubles);
  }
  double total = 0;
  if (steps)
    for (size_t k = 0; k < LANES / 2; k++) total += sums[k];
  for (; i < n; i++) {
    float v = F::scalar(x[i]);
    total += v * v;
  }
  return total;
}

template <class F>
static void add_sq_norms(const void* x, size_t stride, size_t rows, size_t n, double* out, size_t out_stride) {
  for (size_t r = 0; r < rows; r++)
    out[r * out_stride] += sum_of_squares<F>((const typename F::Value*)x + r * stride, n);
}

template <class F, int ROWS>
static void add_some(const typename F::Value* const* x, const float* f, float* y, size_t n) {
  constexpr size_t LINE = 64 / sizeof(typename F::Value), AHEAD = 16 * LINE;
  size_t i = 0;
  for (; i + LINE <= n; i += LINE) {
    // This is the last time that rows are read: they need not go back to the caches that they come from.
    for (int r = 0; r < ROWS; r++) __builtin_prefetch(x[r] + i + AHEAD, 0, 0);
    for (size_t k = i; k < i + LINE; k += LANES) {
      Vec v = load<Vec>(y + k);
      for (int r = 0; r < ROWS; r++) v += f[r] * F::vector(x[r] + k);
      memcpy(y + k, &v, sizeof v);
    }
  }
  for (; i < n; i++) {
    float v = y[i];
    for (int r = 0; r < ROWS; r++) v += f[r] * F::scalar(x[r][i]);
    y[i] = v;
  }
}

template <class F>
static void add_rows(const void* x, size_t stride, size_t rows, const float* factors, float* y, size_t n) {
  const typename F::Value* at[4];
  float f[4];
  int held = 0;
  for (size_t r = 0; r < rows; r++) {
    if (factors[r] != 0) {
      at[held] = (const typename F::Value*)x + r * stride;
      f[held++] = factors[r];
    }
    if (held < 4 && r + 1 < rows) continue;
    if (held == 4) add_some<F, 4>(at, f, y, n);
    if (held == 3) add_some<F, 3>(at, f, y, n);
    if (held == 2) add_some<F, 2>(at, f, y, n);
    if (held == 1) add_some<F, 1>(at, f, y, n);
    held = 0;
  }
}

const ClipKernels clip_kernels{{add_sq_norms<F32>, add_sq_norms<F16>, add_sq_norms<BF16>},
                               {add_rows<F32>, add_rows<F16>, add_rows<BF16>}};
}  // namespace bulwark::BULWARK_ISA
