#include "neighbors/neighbors_simd.h"

#include <string.h>
#if defined(__AVX2__)
  #include <immintrin.h>
#endif

#include "common/lanes.h"

namespace bulwark::BULWARK_ISA {
typedef int32_t Mask __attribute__((vector_size(4 * LANES)));

static Doubles load_doubles(const float* p) {
  HalfVec v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Doubles);
}

// A bit for each lane that is set.
static uint32_t bits_of(const Mask& m) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)m);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps((__m256)m));
#else
  uint64_t any[2];
  memcpy(any, &m, sizeof any);
  if (!(any[0] | any[1])) return 0;
  uint32_t bits = 0;
  for (int k = 0; k < LANES; k++) bits |= uint32_t(m[k] & 1) << k;
  return bits;
#endif
}

static size_t scan(const float* a, float b, const float* s, float f, const float* c, size_t n, uint32_t* hits) {
  size_t count = 0, j = 0;
  for (; j + LANES <= n; j += LANES) {
    Mask within = load(a + j) - b <= load(s + j) + f * load(c + j);
    for (uint32_t bits = bits_of(within); bits; bits &= bits - 1) hits[count++] = uint32_t(j) + __builtin_ctz(bits);
  }
  for (; j < n; j++)
    if (a[j] - b <= s[j] + f * c[j]) hits[count++] = uint32_t(j);
  return count;
}

template <class Term>
static double sum(size_t n, Term term) {
  constexpr size_t STEP = LANES / 2;
  Doubles sums[2] = {};
  size_t i = 0;
  for (; i + 2 * STEP <= n; i += 2 * STEP) {
    sums[0] += term(i);
    sums[1] += term(i + STEP);
  }
  sums[0] += sums[1];
  double total = 0;
  for (size_t k = 0; k < STEP; k++) total += sums[0][k];
  return total;
}

static double sq_distance(const float* x, double fx, const float* y, double fy, size_t n) {
  double total = sum(n, [=](size_t i) {
    Doubles difference = fx * load_doubles(x + i) - fy * load_doubles(y + i);
    return difference * difference;
  });
  for (size_t i = n / LANES * LANES; i < n; i++) {
    double difference = fx * x[i] - fy * y[i];
    total += difference * difference;
  }
  return total;
}

static double product(const float* x, const float* y, size_t n) {
  double total = sum(n, [=](size_t i) { return load_doubles(x + i) * load_doubles(y + i); });
  for (size_t i = n / LANES * LANES; i < n; i++) total += double(x[i]) * y[i];
  return total;
}

// 2^t for t <= 0, to some 1e-7 of it; 0 below the smallest normal number.
static Vec power(Vec t) {
  constexpr float ROUND = 0x1.8p23f, LEAST = -125;
  const Vec clipped = t > LEAST ? t : Vec{} + LEAST;                 // the exponent below must not overflow
  const Vec whole = clipped + ROUND, f = clipped - (whole - ROUND);  // to the nearest integer
  Vec v = f * 0x1.444004p-13f + 0x1.5f0896p-10f;  // of 2^f on [-1/2, 1/2], interpolated at Chebyshev's points
  v = v * f + 0x1.3b2a1cp-7f;
  v = v * f + 0x1.c6af6cp-5f;
  v = v * f + 0x1.ebfbep-3f;
  v = v * f + 0x1.62e43p-1f;
  v = v * f + 1.0f;
  const Vec scaled = (Vec)((Mask)v + ((Mask)whole << 23));
  return t > LEAST ? scaled : Vec{};
}

static double gaussian(float* products, float x, const float* y, const float* rates, size_t num_rates, size_t n) {
  Vec sums{};
  for (size_t j = 0; j < n; j += LANES) {
    const size_t some = n - j < size_t(LANES) ? n - j : LANES;
    Vec exponent{}, half{}, values{};
    if (some == size_t(LANES)) {
      exponent = load(products + j), half = load(y + j);
    } else {
      memcpy(&exponent, products + j, some * sizeof(float));
      memcpy(&half, y + j, some * sizeof(float));
    }
    exponent = exponent - x - half;
    exponent = exponent < 0.0f ? exponent : Vec{};
    for (size_t r = 0; r < num_rates; r++) values += power(exponent * rates[r]);
    if (some < size_t(LANES))
      for (int k = int(some); k < LANES; k++) values[k] = 0;
    memcpy(products + j, &values, some * sizeof(float));
    sums += values;
  }
  double total = 0;
  for (int k = 0; k < LANES; k++) total += sums[k];
  return total;
}

static void unpack(const uint32_t* words, float* y, size_t n) {
  Mask lane;
  for (int k = 0; k < LANES; k++) lane[k] = k;
  for (size_t i = 0; i < n; i += LANES) {
    const Mask bits = (Mask{} + int32_t(words[i / 32])) >> (lane + int32_t(i % 32)) & 1;
    const Vec v = __builtin_convertvector(bits, Vec);
    memcpy(y + i, &v, sizeof v);
  }
}

static void add_products(const float* a, const float* x, float* inside, float* across, size_t n) {
  for (size_t i = 0; i < n; i += LANES) {
    const Vec v = load(x + i), in = load(inside + i) + load(a + i) * v, all = load(across + i) + v;
    memcpy(inside + i, &in, sizeof in);
    memcpy(across + i, &all, sizeof all);
  }
}

const NeighborsKernels neighbors_kernels{scan, sq_distance, product, gaussian, unpack, add_products};
}  // namespace bulwark::BULWARK_ISA
