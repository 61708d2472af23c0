#include "ghost/convolve_simd.h"

#include <string.h>

#include "common/lanes.h"

namespace bulwark::BULWARK_ISA {
template <size_t N>
struct Floats {
  typedef float Type __attribute__((vector_size(4 * N)));
};

constexpr size_t COLUMNS = 2 * LANES, ROWS = 6;  // their sums and what they read fit into 16 registers

static void store(const Vec& v, float* p) { memcpy(p, &v, sizeof v); }

template <size_t N>
static float total(const typename Floats<N>::Type& v) {
  if constexpr (N == 2) {
    return v[0] + v[1];
  } else {
    typename Floats<N / 2>::Type low, high;
    memcpy(&low, &v, sizeof low);
    memcpy(&high, (const char*)&v + sizeof low, sizeof high);
    return total<N / 2>(low + high);
  }
}

template <size_t N>
static void wide_rows(const float* x, size_t step, const size_t* at, size_t depth, const float* panel,
                      const float* bias, size_t n, float* y, size_t width) {
  Vec s[N][2];
  for (size_t r = 0; r < N; r++) s[r][0] = load(bias), s[r][1] = load(bias + LANES);
  for (size_t k = 0; k < depth; k++) {
    const float* from = x + at[k];
    Vec b0 = load(panel + k * COLUMNS), b1 = load(panel + k * COLUMNS + LANES);
    for (size_t r = 0; r < N; r++) {
      float v = from[r * step];
      s[r][0] += v * b0;
      s[r][1] += v * b1;
    }
  }
  for (size_t r = 0; r < N; r++) {
    if (n == COLUMNS) {
      store(s[r][0], y + r * width);
      store(s[r][1], y + r * width + LANES);
    } else {
      memcpy(y + r * width, s[r], n * sizeof(float));
    }
  }
}

static void wide(const float* x, size_t step, const size_t* at, size_t depth, const float* panel, const float* bias,
                 size_t rows, size_t n, float* y, size_t width) {
  float start[COLUMNS] = {};
  if (bias) memcpy(start, bias, n * sizeof(float));
  size_t r = 0;
  for (; r + ROWS <= rows; r += ROWS)
    wide_rows<ROWS>(x + r * step, step, at, depth, panel, start, n, y + r * width, width);
  for (; r + 2 <= rows; r += 2) wide_rows<2>(x + r * step, step, at, depth, panel, start, n, y + r * width, width);
  for (; r < rows; r++) wide_rows<1>(x + r * step, step, at, depth, panel, start, n, y + r * width, width);
}

template <size_t N>
static void narrow_rows(const float* x, size_t step, const size_t* at, size_t taps, size_t run, const float* weight,
                        float bias, float* y, size_t width) {
  Vec s[N] = {};
  float rest[N] = {};
  for (size_t k = 0; k < taps; k++) {
    const float *from = x + at[k], *w = weight + k * run;
    size_t i = 0;
    for (; i + LANES <= run; i += LANES) {
      Vec v = load(w + i);
      for (size_t r = 0; r < N; r++) s[r] += load(from + r * step + i) * v;
    }
    for (; i < run; i++)
      for (size_t r = 0; r < N; r++) rest[r] += from[r * step + i] * w[i];
  }
  for (size_t r = 0; r < N; r++) y[r * width] = bias + (total<LANES>(s[r]) + rest[r]);
}

static void narrow(const float* x, size_t step, const size_t* at, size_t taps, size_t run, const float* weight,
                   float bias, size_t rows, float* y, size_t width) {
  size_t r = 0;
  for (; r + ROWS <= rows; r += ROWS)
    narrow_rows<ROWS>(x + r * step, step, at, taps, run, weight, bias, y + r * width, width);
  for (; r < rows; r++) narrow_rows<1>(x + r * step, step, at, taps, run, weight, bias, y + r * width, width);
}

// G g G^T of one column of three, G = [1 0 0; 1/2 1/2 1/2; 1/2 -1/2 1/2; 0 0 1]
static void spread(float a, float b, float c, float* to, size_t distance) {
  float even = 0.5f * (a + c), odd = 0.5f * b;
  to[0] = a, to[distance] = even + odd, to[2 * distance] = even - odd, to[3 * distance] = c;
}

static void weights(const float* kernels, size_t n, size_t c, float* u) {
  const size_t distance = c * COLUMNS;
  memset(u, 0, 16 * distance * sizeof(float));
  for (size_t j = 0; j < n; j++)
    for (size_t i = 0; i < c; i++) {
      const float* g = kernels + j * 9 * c + i;
      float* to = u + i * COLUMNS + j;
      float rows[4][3];
      for (size_t x = 0; x < 3; x++) spread(g[x * c], g[(3 + x) * c], g[(6 + x) * c], &rows[0][x], 3);
      for (size_t y = 0; y < 4; y++) spread(rows[y][0], rows[y][1], rows[y][2], to + 4 * y * distance, distance);
    }
}

// B^T d B, B^T = [1 0 -1 0; 0 1 1 0; 0 -1 1 0; 0 1 0 -1]
template <class V, class Read, class Write>
static void transform_tile(Read read, Write write) {
  V t[4][4];
  for (size_t x = 0; x < 4; x++) {
    V d0 = read(x), d1 = read(4 + x), d2 = read(8 + x), d3 = read(12 + x);
    t[0][x] = d0 - d2, t[1][x] = d1 + d2, t[2][x] = d2 - d1, t[3][x] = d1 - d3;
  }
  for (size_t y = 0; y < 4; y++) {
    write(4 * y, V(t[y][0] - t[y][2]));
    write(4 * y + 1, V(t[y][1] + t[y][2]));
    write(4 * y + 2, V(t[y][2] - t[y][1]));
    write(4 * y + 3, V(t[y][1] - t[y][3]));
  }
}

static void tile(const float* const* pixels, size_t c, float* v, size_t distance) {
  size_t i = 0;
  for (; i + LANES <= c; i += LANES)
    transform_tile<Vec>([&](size_t k) { return load(pixels[k] + i); },
                        [&](size_t k, const Vec& value) { store(value, v + k * distance + i); });
  for (; i < c; i++)
    transform_tile<float>([&](size_t k) { return pixels[k][i]; },
                          [&](size_t k, float value) { v[k * distance + i] = value; });
}

// A^T m A, A^T = [1 1 1 0; 0 1 -1 -1]
static bool outputs(const float* m, size_t distance, const float* bias, size_t n, float* const* y) {
  float start[COLUMNS] = {};
  if (bias) memcpy(start, bias, n * sizeof(float));
  Vec check{};
  for (size_t j = 0; j < n; j += LANES) {
    Vec t[2][4];
    for (size_t x = 0; x < 4; x++) {
      const float* from = m + x * distance + j;
      Vec m0 = load(from), m1 = load(from + 4 * distance), m2 = load(from + 8 * distance),
          m3 = load(from + 12 * distance);
      t[0][x] = m0 + m1 + m2, t[1][x] = m1 - m2 - m3;
    }
    size_t count = n - j < size_t(LANES) ? n - j : LANES;
    for (size_t q = 0; q < 4; q++) {
      Vec* s = t[q / 2];
      Vec found = (q % 2 ? s[1] - s[2] - s[3] : s[0] + s[1] + s[2]) + load(start + j);
      check += found * 0;
      if (y[q]) memcpy(y[q] + j, &found, count * sizeof(float));
    }
  }
  return total<LANES>(check) == 0;
}

const ConvolveKernels convolve_kernels{COLUMNS, wide, narrow, weights, tile, outputs};
}  // namespace bulwark::BULWARK_ISA
