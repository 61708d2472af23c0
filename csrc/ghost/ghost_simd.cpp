#include "ghost/ghost_simd.h"

#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
  #include <immintrin.h>
#elif defined(__aarch64__)
  #include <arm_neon.h>
#endif

#include "common/lanes.h"

namespace bulwark::BULWARK_ISA {
static double total(Doubles sums) {
  double s = 0;
  for (int k = 0; k < LANES / 2; k++) s += sums[k];
  return s;
}

static void add_to(Doubles& sums, const Vec& v) {
  HalfVec low, high;
  memcpy(&low, &v, sizeof low);
  memcpy(&high, (const char*)&v + sizeof low, sizeof high);
  sums += __builtin_convertvector(low, Doubles);
  sums += __builtin_convertvector(high, Doubles);
}

static double dot(const float* a, const float* b, float add, size_t n) {
  constexpr size_t SUMS = 4, RUN = 4 * SUMS * LANES;  // a lane adds four products in float
  Doubles sums{};
  size_t i = 0;
  for (; i + RUN <= n; i += RUN) {
    Vec s[SUMS] = {};
    for (size_t at = i; at < i + RUN; at += SUMS * LANES)
      for (size_t k = 0; k < SUMS; k++) s[k] += (load(a + at + k * LANES) + add) * load(b + at + k * LANES);
    for (size_t k = 0; k < SUMS; k++) add_to(sums, s[k]);
  }
  for (; i + LANES <= n; i += LANES) add_to(sums, (load(a + i) + add) * load(b + i));
  double rest = total(sums);
  for (; i < n; i++) rest += double(a[i] + add) * b[i];
  return rest;
}

// Scaling by 2^112 moves the exponent's bias and makes subnormals normal; infinities and NaN come out at 2^16 and
// above, and get the largest exponent.
static float from_half(uint16_t h) {
  uint32_t magnitude = uint32_t(h & 0x7fff) << 13, sign = uint32_t(h & 0x8000) << 16, bits;
  float scaled;
  memcpy(&scaled, &magnitude, sizeof scaled);
  scaled *= 0x1p112f;
  memcpy(&bits, &scaled, sizeof bits);
  bits |= sign | (magnitude >= 0x0f800000 ? 0x7f800000u : 0u);
  memcpy(&scaled, &bits, sizeof scaled);
  return scaled;
}

static void scale(int type, const void* from, float f, float* y, size_t n) {
  auto* x = (const float*)from;
  auto* h = (const uint16_t*)from;
  size_t i = 0;
  if (type == 0)
    for (; i < n; i++) y[i] = f * x[i];
  if (type == 2)
    for (; i < n; i++) {
      uint32_t bits = uint32_t(h[i]) << 16;
      float v;
      memcpy(&v, &bits, sizeof v);
      y[i] = f * v;
    }
#if defined(__AVX2__)
  for (; i + 8 <= n; i += 8) {
    __m256 v = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(h + i)));
    _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_set1_ps(f), v));
  }
#elif defined(__aarch64__)
  for (; i + 4 <= n; i += 4) vst1q_f32(y + i, vmulq_n_f32(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(h + i))), f));
#endif
  for (; i < n; i++) y[i] = f * from_half(h[i]);
}

static void add(const float* x, float* y, size_t n) {
  for (size_t i = 0; i < n; i++) y[i] += x[i];
}

constexpr size_t PANEL = 2 * LANES, DEPTH = 256, ROWS = 4;

// C [rows, columns] += A [rows, k] panel; the panel [k, PANEL] holds zeros beyond the columns.
template <size_t N>
static void multiply_panel(const float* a, size_t row, size_t step, const float* panel, size_t k, size_t columns,
                           float* c, size_t ldc) {
  Vec s[N][2] = {};
  for (size_t i = 0; i < k; i++) {
    Vec b0 = load(panel + i * PANEL), b1 = load(panel + i * PANEL + LANES);
    for (size_t r = 0; r < N; r++) {
      float v = a[r * row + i * step];
      s[r][0] += v * b0;
      s[r][1] += v * b1;
    }
  }
  for (size_t r = 0; r < N; r++) {
    float sums[PANEL];
    memcpy(sums, s[r], sizeof sums);
    for (size_t j = 0; j < columns; j++) c[r * ldc + j] += sums[j];
  }
}

static void sgemm(bool ta, bool tb, size_t m, size_t n, size_t k, const float* a, size_t lda, const float* b,
                  size_t ldb, float beta, float* c, size_t ldc) {
  for (size_t i = 0; i < m; i++)
    for (size_t j = 0; j < n; j++) c[i * ldc + j] = beta == 0 ? 0 : beta * c[i * ldc + j];
  size_t row = ta ? 1 : lda, step = ta ? lda : 1;
  float panel[DEPTH * PANEL];
  for (size_t k0 = 0; k0 < k; k0 += DEPTH)
    for (size_t j0 = 0; j0 < n; j0 += PANEL) {
      size_t depth = k - k0 < DEPTH ? k - k0 : DEPTH, columns = n - j0 < PANEL ? n - j0 : PANEL, i = 0;
      if (columns < PANEL) memset(panel, 0, sizeof panel);
      for (size_t l = 0; l < depth; l++)
        for (size_t j = 0; j < columns; j++)
          panel[l * PANEL + j] = tb ? b[(j0 + j) * ldb + k0 + l] : b[(k0 + l) * ldb + j0 + j];
      const float* from = a + k0 * step;
      for (; i + ROWS <= m; i += ROWS)
        multiply_panel<ROWS>(from + i * row, row, step, panel, depth, columns, c + i * ldc + j0, ldc);
      for (; i < m; i++) multiply_panel<1>(from + i * row, row, step, panel, depth, columns, c + i * ldc + j0, ldc);
    }
}

const GhostKernels ghost_kernels{dot, scale, add, sgemm};
}  // namespace bulwark::BULWARK_ISA
