#include "tails/tails_simd.h"

#include "common/readers.h"

namespace bulwark::BULWARK_ISA {
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
constexpr float INF = __builtin_inff(), NAN_ = __builtin_nanf("");

template <class V>
static void store(void* p, V v) {
  memcpy(p, &v, sizeof v);
}
static Vec choose(Ints mask, Vec a, Vec b) { return (Vec)((mask & (Ints)a) | (~mask & (Ints)b)); }
static Vec larger(Vec a, Vec b) { return choose(a > b, a, b); }

template <class F>
static void widen(const void* from, float* y, size_t n) {
  auto* x = (const typename F::Value*)from;
  size_t i = 0;
  for (; i + LANES <= n; i += LANES) store(y + i, F::vector(x + i));
  for (; i < n; i++) y[i] = F::scalar(x[i]);
}

template <class F>
static void columns(const void* from, size_t stride, size_t rows, size_t cols, float* y, size_t apart) {
  constexpr size_t STEP = 16;  // rows whose lines stay in the first cache while columns are taken out of them
  auto* x = (const typename F::Value*)from;
  for (size_t at = 0; at < rows; at += STEP) {
    size_t end = at + STEP < rows ? at + STEP : rows;
    for (size_t r = end; r < end + STEP && r < rows; r++) __builtin_prefetch(x + r * stride);
    for (size_t c = 0; c < cols; c++)
      for (size_t r = at; r < end; r++) y[c * apart + r] = F::scalar(x[r * stride + c]);
  }
}

// ---- Statistics of a block

#if defined(__AVX512F__)
typedef float Wide __attribute__((vector_size(64)));
typedef int32_t WideInts __attribute__((vector_size(64)));
// Masked by nothing: of the plain forms GCC 12 warns that they use what is not initialized.
static Wide least(Wide a, Wide b) { return (Wide)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b); }
static Wide most(Wide a, Wide b) { return (Wide)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
#else
typedef Vec Wide;
typedef Ints WideInts;
  #if defined(__AVX2__)
static Wide least(Wide a, Wide b) { return (Wide)_mm256_min_ps((__m256)a, (__m256)b); }
static Wide most(Wide a, Wide b) { return (Wide)_mm256_max_ps((__m256)a, (__m256)b); }
  #else
static Wide least(Wide a, Wide b) { return choose(a < b, a, b); }
static Wide most(Wide a, Wide b) { return choose(a > b, a, b); }
  #endif
#endif
typedef float One __attribute__((vector_size(4)));
typedef int32_t OneInt __attribute__((vector_size(4)));
static One least(One a, One b) { return a[0] < b[0] ? a : b; }
static One most(One a, One b) { return a[0] > b[0] ? a : b; }

constexpr size_t RUN = 32;  // values that a lane adds in float32

// K vectors side by side, whose chains of sums overlap. Says whether all values are finite; where they are not and no
// holes are expected, what it stores is not right.
template <class V, class I, size_t K, bool HOLES>
static bool stats_of(const float* x, size_t stride, size_t rows, const BlockStats& out, size_t at) {
  constexpr size_t EACH = sizeof(V) / sizeof(float);
  const V inf = V{} + INF;
  V shift[K] = {}, low[K], high[K];
  I count[K] = {}, nans[K] = {};
  const size_t first = HOLES || rows < RUN ? rows : RUN;
  const float share = 1 / float(first);
  auto finite = [](V v) { return ((I)v & 0x7fffffff) < 0x7f800000; };
  for (size_t k = 0; k < K; k++) low[k] = inf, high[k] = -inf;
  for (size_t r = 0; r < first; r++)
    for (size_t k = 0; k < K; k++) {
      V v = load<V>(x + r * stride + k * EACH);
      if (HOLES) v = (V)(finite(v) & (I)v), count[k] -= finite(load<V>(x + r * stride + k * EACH));
      shift[k] += v * share;  // of values near the largest float, a sum would overflow
    }
  for (size_t k = 0; k < K; k++) {
    if (HOLES) shift[k] *= (V)((count[k] > 0) & (I)(float(first) / __builtin_convertvector(count[k], V)));
    count[k] = I{};
    memcpy(out.shift + at + k * EACH, &shift[k], sizeof(V));
  }
  for (size_t c = 0; c < K * EACH; c++) out.sum[at + c] = out.squares[at + c] = 0;
  for (size_t r = 0; r < rows;) {
    const size_t end = r + RUN < rows ? r + RUN : rows;
    V sum[K] = {}, squares[K] = {};
    for (; r < end; r++)
      for (size_t k = 0; k < K; k++) {
        V v = load<V>(x + r * stride + k * EACH), d = v - shift[k];
        if (HOLES) {
          const I good = finite(v);
          count[k] -= good;
          nans[k] -= ((I)v & 0x7fffffff) > 0x7f800000;
          d = (V)(good & (I)d);
          low[k] = least(low[k], (V)((good & (I)v) | (~good & (I)inf)));
          high[k] = most(high[k], (V)((good & (I)v) | (~good & (I)-inf)));
        } else {
          low[k] = least(low[k], v);
          high[k] = most(high[k], v);
        }
        sum[k] += d;
        squares[k] += d * d;
      }
    for (size_t k = 0; k < K; k++)
      for (size_t c = 0; c < EACH; c++) {
        out.sum[at + k * EACH + c] += sum[k][c];
        out.squares[at + k * EACH + c] += squares[k][c];
      }
  }
  bool all = true;
  for (size_t k = 0; k < K; k++) {
    memcpy(out.minimum + at + k * EACH, &low[k], sizeof(V));
    memcpy(out.maximum + at + k * EACH, &high[k], sizeof(V));
    if (!HOLES) count[k] = I{} + int32_t(rows);
    memcpy(out.count + at + k * EACH, &count[k], sizeof(V));
    memcpy(out.nans + at + k * EACH, &nans[k], sizeof(V));
    for (size_t c = 0; c < EACH; c++) all &= out.squares[at + k * EACH + c] < double(INF);
  }
  return all;
}

template <class V, class I, size_t K>
static size_t stats_from(size_t c, const float* x, size_t stride, size_t rows, size_t cols, const BlockStats& out) {
  constexpr size_t STEP = K * sizeof(V) / sizeof(float);
  for (; c + STEP <= cols; c += STEP)
    if (!stats_of<V, I, K, false>(x + c, stride, rows, out, c)) stats_of<V, I, K, true>(x + c, stride, rows, out, c);
  return c;
}

static void block_stats(const float* x, size_t stride, size_t rows, size_t cols, const BlockStats& out) {
  size_t c = stats_from<Wide, WideInts, 4>(0, x, stride, rows, cols, out);
  c = stats_from<Wide, WideInts, 1>(c, x, stride, rows, cols, out);
  stats_from<One, OneInt, 1>(c, x, stride, rows, cols, out);
}

// ---- Histograms

static void count_bins(const float* edges, size_t bins, const float* x, size_t n, int32_t* counts) {
  int32_t before = 0;
  for (size_t k = 0; k <= bins; k++) {  // from the last edge to the first, each counts what stands at or above it
    const size_t at = bins - k;
    const float edge = edges[at];
    Ints from = {};
    size_t i = 0;
    if (k == 0) {
      for (; i + LANES <= n; i += LANES) from -= load<Vec>(x + i) > edge;
    } else {
      for (; i + LANES <= n; i += LANES) from -= load<Vec>(x + i) >= edge;
    }
    int32_t found = 0;
    for (size_t c = 0; c < LANES; c++) found += from[c];
    for (; i < n; i++) found += k == 0 ? x[i] > edge : x[i] >= edge;
    if (k > 0) counts[at] += found - before;
    before = found;
  }
}

template <class V>
static V bin_scores(const float* edges, const float* scores, size_t bins, float reach, float worst, V x) {
  V s = V{} + scores[0];
  for (size_t k = 1; k < bins; k++) s = x > edges[k] ? V{} + scores[k] : s;
  s = edges[0] - x > reach ? V{} + worst : s;
  s = x - edges[bins] > reach ? V{} + worst : s;
  return x == x ? s : x;
}

static void score_bins(const float* edges, const float* scores, size_t bins, float reach, float worst, const float* x,
                       size_t n, float* out) {
  size_t i = 0;
  for (; i + LANES <= n; i += LANES) store(out + i, bin_scores(edges, scores, bins, reach, worst, load<Vec>(x + i)));
  for (; i < n; i++) {
    One one = {x[i]};
    out[i] = bin_scores(edges, scores, bins, reach, worst, one)[0];
  }
}

// ---- Tails

// How many of COARSE values are below x, or at most x.
template <bool EQUAL>
static int32_t count_of(const float* v, float x) {
#if defined(__AVX512F__)
  return __builtin_popcount(_mm512_cmp_ps_mask(_mm512_loadu_ps(v), _mm512_set1_ps(x), EQUAL ? _CMP_LE_OQ : _CMP_LT_OQ));
#elif defined(__AVX2__)
  const __m256 query = _mm256_set1_ps(x);
  const __m256 a = _mm256_cmp_ps(_mm256_loadu_ps(v), query, EQUAL ? _CMP_LE_OQ : _CMP_LT_OQ);
  const __m256 b = _mm256_cmp_ps(_mm256_loadu_ps(v + 8), query, EQUAL ? _CMP_LE_OQ : _CMP_LT_OQ);
  return __builtin_popcount(_mm256_movemask_ps(a) | _mm256_movemask_ps(b) << 8);
#else
  Ints found = {};
  for (size_t i = 0; i < COARSE; i += LANES) found -= EQUAL ? load<Vec>(v + i) <= x : load<Vec>(v + i) < x;
  int32_t total = 0;
  for (size_t k = 0; k < LANES; k++) total += found[k];
  return total;
#endif
}

// The block whose first value is the last that is at most (or below) x; 0 where there is none. A level is done for all
// queries before the next one, so that their loads overlap.
constexpr size_t QUERIES = 32;
template <bool EQUAL>
static bool find_by_cells(const Column& column, const float* x, int32_t* at) {
  int32_t cell[QUERIES], most = 0;
  for (size_t q = 0; q < QUERIES; q += LANES) {
    Vec place = cell_of(load<Vec>(x + q), column), last = Vec{} + float(column.cells - 1);
    place = choose(place > 0, place, Vec{});  // NaN is in the first
    store(cell + q, __builtin_convertvector(choose(place < last, place, last), Ints));
  }
  for (size_t q = 0; q < QUERIES; q++) {
    const int32_t from = column.grid[cell[q]], held = column.grid[cell[q] + 1] - from;
    at[q] = from ? from - 1 : 0;
    most = held > most ? held : most;
  }
  if (most >= int32_t(COARSE)) return false;
  for (size_t q = 0; q < QUERIES; q++) {
    const int32_t found = count_of<EQUAL>(column.coarse + at[q], x[q]);
    at[q] += found ? found - 1 : 0;
  }
  return true;
}

template <bool EQUAL>
static void find_blocks(const Column& column, const float* x, int32_t* at) {
  if (column.grid && find_by_cells<EQUAL>(column, x, at)) return;
  for (size_t q = 0; q < QUERIES; q++) at[q] = 0;
  for (int l = column.levels; l-- > 0;) {
    const float* level = column.coarse + column.level[l];
    for (size_t q = 0; q < QUERIES; q++) {
      const int32_t found = count_of<EQUAL>(level + at[q] * COARSE, x[q]);
      at[q] = at[q] * int32_t(COARSE) + (found ? found - 1 : 0);
    }
  }
}

// How many of the values of a block are below x, and at most x.
static void count_in_block(const Column& column, size_t block, float x, int32_t& below, int32_t& up_to) {
  const float* v = column.values + block * COARSE;
  float padded[COARSE];
  if (block * COARSE + COARSE > column.n) {
    for (size_t i = 0; i < COARSE; i++) padded[i] = block * COARSE + i < column.n ? v[i] : NAN_;
    v = padded;
  }
  below = count_of<false>(v, x);
  up_to = count_of<true>(v, x);
}

// Queries whose blocks are on their way from memory while those before them are counted.
struct Batch {
  float query[QUERIES];
  int32_t block[QUERIES];

  void find(const Column& column, const float* x, size_t held) {
    for (size_t q = held; q < QUERIES; q++) query[q] = 0;
    memcpy(query, x, held * sizeof(float));
    if (!column.n) return;
    find_blocks<true>(column, query, block);
    for (size_t q = 0; q < QUERIES; q++) __builtin_prefetch(column.values + block[q] * COARSE);
  }

  void count(const Column& column, int32_t* below, int32_t* up_to) {
    if (!column.n) {
      memset(below, 0, QUERIES * sizeof(int32_t)), memset(up_to, 0, QUERIES * sizeof(int32_t));
      return;
    }
    bool ties = false;
    for (size_t q = 0; q < QUERIES; q++) {
      count_in_block(column, block[q], query[q], below[q], up_to[q]);
      ties |= below[q] == 0 && block[q] > 0 && column.values[block[q] * COARSE - 1] == query[q];
      below[q] += block[q] * COARSE;
      up_to[q] += block[q] * COARSE;
    }
    if (!ties) return;  // equal values may begin in a block before
    find_blocks<false>(column, query, block);
    for (size_t q = 0; q < QUERIES; q++) {
      int32_t unused;
      count_in_block(column, block[q], query[q], below[q], unused);
      below[q] += block[q] * COARSE;
    }
  }
};

// Natural logarithm of normal floats, good to an ulp or two (the polynomial of Cephes).
static Vec log_of(Vec x) {
  Ints bits = (Ints)x, exponent = (bits >> 23) - 126;
  Vec m = (Vec)((bits & 0x007fffff) | 0x3f000000);  // [0.5, 1)
  Ints low = m < 0.707106781186547524f;
  exponent += low;
  m += (Vec)(low & (Ints)m);
  m -= 1.0f;
  Vec e = __builtin_convertvector(exponent, Vec), z = m * m, y = {};
  constexpr float terms[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                             -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                             2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  for (float c : terms) y = y * m + c;
  y = y * m * z + e * -2.12194440e-4f - 0.5f * z;
  return m + y + e * 0.693359375f;
}

static void tails(const Column& column, Tails kind, const float* x, size_t n, float* const* out) {
  const float total = column.count > 1 ? column.count : 1;
  const float s = column.skewness;
  const bool lefts = s < 0, rights = s > 0;
  Batch batches[2];
  batches[0].find(column, x, n < QUERIES ? n : QUERIES);
  for (size_t at = 0; at < n; at += QUERIES) {
    const size_t held = n - at < QUERIES ? n - at : QUERIES, next = at + QUERIES;
    Batch& batch = batches[at / QUERIES % 2];
    if (next < n) batches[next / QUERIES % 2].find(column, x + next, n - next < QUERIES ? n - next : QUERIES);
    const float* query = batch.query;
    float both[2][QUERIES];
    int32_t below[QUERIES], up_to[QUERIES];
    batch.count(column, below, up_to);
    if (column.ranks)
      for (size_t q = 0; q < QUERIES; q++) {
        below[q] = below[q] ? column.ranks[below[q] - 1] + 1 : 0;
        up_to[q] = up_to[q] ? column.ranks[up_to[q] - 1] + 1 : 0;
      }
    float parts[3][QUERIES];
    for (size_t q = 0; q < QUERIES; q += LANES) {
      Ints one = Ints{} + 1, a = load<Ints>(up_to + q), b = column.count - load<Ints>(below + q);
      a = (a > one) ? a : one;
      b = (b > one) ? b : one;
      Vec v = load<Vec>(query + q), nan = Vec{} + NAN_;
      Vec left = -log_of(__builtin_convertvector(a, Vec) / total);
      Vec right = -log_of(__builtin_convertvector(b, Vec) / total);
      left = choose(v == v, left, nan);
      right = choose(v == v, right, nan);
      store(both[0] + q, left);
      store(both[1] + q, right);
      Vec part;
      if (kind == Tails::ecod) {
        part = lefts || rights ? larger(left, right) : left + right;
      } else {
        part = larger(lefts ? left : rights ? right : left + right, 0.5f * (left + right));
      }
      store(parts[0] + q, choose(v == v, part, nan));
    }
    if (kind == Tails::sides) {
      memcpy(out[0] + at, both[0], held * sizeof(float));
      memcpy(out[1] + at, both[1], held * sizeof(float));
    } else if (kind == Tails::paper) {
      const float* chosen = lefts ? both[0] : both[1];
      for (size_t q = 0; q < held; q++) {
        out[0][at + q] += both[0][q];
        out[1][at + q] += both[1][q];
        out[2][at + q] += chosen[q];
      }
    } else {
      for (size_t q = 0; q < held; q++) out[0][at + q] += parts[0][q];
    }
  }
}

// ---- Forward substitution for 64 rows at once

static void substitute(const float* lower, const float* mean, size_t d, float* y, float* out) {
  constexpr size_t VECTORS = 8, WIDTH = VECTORS * LANES;
  for (size_t at = 0; at < SUBSTITUTED; at += WIDTH) {
    Vec norm[VECTORS] = {};
    for (size_t i = 0; i < d; i++) {
      const float* row = lower + i * d;
      Vec left[VECTORS];
      for (size_t k = 0; k < VECTORS; k++) left[k] = load<Vec>(y + i * SUBSTITUTED + at + k * LANES) - mean[i];
      for (size_t j = 0; j < i; j++)
        for (size_t k = 0; k < VECTORS; k++) left[k] -= row[j] * load<Vec>(y + j * SUBSTITUTED + at + k * LANES);
      for (size_t k = 0; k < VECTORS; k++) {
        left[k] /= row[i];
        norm[k] += left[k] * left[k];
        store(y + i * SUBSTITUTED + at + k * LANES, left[k]);
      }
    }
    for (size_t k = 0; k < VECTORS; k++) store(out + at + k * LANES, norm[k]);
  }
}

static void zscore(const float* x, const float* center, const float* scale, float* y, size_t d) {
  size_t i = 0;
  for (; i + LANES <= d; i += LANES) {
    Vec off = load<Vec>(x + i) - load<Vec>(center + i), by = load<Vec>(scale + i);
    store(y + i, choose((off == 0.0f) & (by == 0.0f), Vec{}, off / by));
  }
  for (; i < d; i++) {
    float off = x[i] - center[i];
    y[i] = off == 0 && scale[i] == 0 ? 0 : off / scale[i];
  }
}

const TailsKernels tails_kernels{{columns<F32>, columns<F16>, columns<BF16>},
                                 {widen<F32>, widen<F16>, widen<BF16>},
                                 block_stats,
                                 tails,
                                 count_bins,
                                 score_bins,
                                 substitute,
                                 zscore};
}  // namespace bulwark::BULWARK_ISA
