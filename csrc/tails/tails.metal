#include <metal_stdlib>
using namespace metal;

constant uint ZSCORE_THREADS = 256u;  // tails_metal.cpp has these too

// y = (x - center) / scale, 0 where both are 0. Of few columns several rows are one long row, so that lanes have work.
template <typename T>
[[kernel]] void robust_zscore(
    device const T* x [[buffer(0)]], device const float* center [[buffer(1)]], device const float* scale [[buffer(2)]],
    device float* y [[buffer(3)]], constant ulong& size [[buffer(4)]], constant uint& columns [[buffer(5)]],
    constant uint& width [[buffer(6)]], constant uint& rows_each [[buffer(7)]], constant uint& tiles [[buffer(8)]],
    uint group [[threadgroup_position_in_grid]], uint t [[thread_index_in_threadgroup]]) {
  uint column = group % tiles * ZSCORE_THREADS + t;
  if (column >= width) return;
  float c = center[column % columns], s = scale[column % columns];
  ulong from = ulong(group / tiles) * rows_each * width + column;
  ulong to = min(from + ulong(rows_each) * width, size);
  for (ulong at = from; at < to; at += width) {
    float off = float(x[at]) - c;
    y[at] = off == 0.0f && s == 0.0f ? 0.0f : precise::divide(off, s);
  }
}

inline bool is_nan(float x) { return (as_type<uint>(x) & 0x7fffffffu) > 0x7f800000u; }
inline bool is_finite(float x) { return (as_type<uint>(x) & 0x7f800000u) != 0x7f800000u; }

// Sum over `width` neighbouring lanes, a power of two. All lanes must come here.
inline float sum_of(float x, uint width) {
  for (uint step = width / 2u; step > 0u; step /= 2u) x += simd_shuffle_xor(x, ushort(step));
  return x;
}

// How many of the n values, which ascend and have NaN last, are below x; or at most x.
inline uint position(device const float* values, uint n, float x, bool equal) {
  uint from = 0u, to = n;
  while (from < to) {
    uint middle = (from + to) / 2u;
    float v = values[middle];
    if (v < x || (equal && v == x))
      from = middle + 1u;
    else
      to = middle;
  }
  return from;
}

// Where the values begin that are equal to x and end before `end`: most are few, so that steps grow from there.
inline uint first_equal(device const float* values, uint end, float x) {
  uint step = 1u;
  while (end >= step && values[end - step] == x) {
    end -= step;
    if (end > 0u && values[end - 1u] != x) return end;
    step *= 2u;
  }
  uint from = end - min(end, step);
  return step == 1u ? end : from + position(values + from, end - from, x, false);
}

// ---- Tails. `width` lanes share the columns of a row.

constant bool is_copod [[function_constant(0)]];
constant bool is_paper [[function_constant(1)]];
constant bool is_sides [[function_constant(2)]];
constant bool has_ranks [[function_constant(3)]];

inline float tail(uint count, float total) { return -precise::log(precise::divide(float(max(count, 1u)), total)); }

template <typename T>
[[kernel]] void tail_scores(
    device const T* x [[buffer(0)]], device const float* values [[buffer(1)]], device const int* counts [[buffer(2)]],
    device const float* skewness [[buffer(3)]], device const int* ranks [[buffer(4)]], device float* out [[buffer(5)]],
    device float* other [[buffer(6)]], constant uint& rows [[buffer(7)]], constant uint& columns [[buffer(8)]],
    constant uint& size [[buffer(9)]], constant uint& width [[buffer(10)]], uint i [[thread_position_in_grid]]) {
  uint row = i / width;
  float3 sums = float3(0.0f);
  bool holed = false;
  for (uint c = i % width; c < columns && row < rows; c += width) {
    ulong at = ulong(row) * columns + c;
    float v = float(x[at]), left = v, right = v;
    if (is_nan(v)) {
      holed = true;
    } else {
      device const float* column = values + ulong(c) * size;
      uint n = uint(counts[c]), up_to = position(column, size, v, true), below = first_equal(column, up_to, v);
      if (has_ranks) {
        up_to = up_to > 0u ? uint(ranks[ulong(c) * size + up_to - 1u]) + 1u : 0u;
        below = below > 0u ? uint(ranks[ulong(c) * size + below - 1u]) + 1u : 0u;
      }
      float total = float(max(n, 1u));
      left = tail(up_to, total);
      right = tail(n - below, total);
    }
    if (is_sides) {
      out[at] = left;
      other[at] = right;
    } else {
      float s = skewness[c], both = left + right;
      float chosen = s < 0.0f ? left : s > 0.0f || is_paper ? right : both;
      if (is_paper)
        sums += float3(left, right, chosen);
      else if (is_copod)
        sums.x += max(chosen, 0.5f * both);
      else
        sums.x += s < 0.0f || s > 0.0f ? max(left, right) : both;
    }
  }
  if (is_sides) return;
  float score = sum_of(sums.x, width);
  if (is_paper) score = max(max(score, sum_of(sums.y, width)), sum_of(sums.z, width));
  holed = sum_of(holed ? 1.0f : 0.0f, width) > 0.0f;
  if (row < rows && i % width == 0u) out[row] = holed ? as_type<float>(0x7fc00000u) : score;
}

// ---- Histograms

constant bool by_column [[function_constant(4)]];

template <typename T>
[[kernel]] void histogram_scores(
    device const T* x [[buffer(0)]], device const float* edges [[buffer(1)]], device const float* scores [[buffer(2)]],
    device const float* reach [[buffer(3)]], device float* out [[buffer(4)]], constant uint& rows [[buffer(5)]],
    constant uint& columns [[buffer(6)]], constant uint& bins [[buffer(7)]], constant uint& width [[buffer(8)]],
    uint i [[thread_position_in_grid]]) {
  uint row = i / width;
  float sum = 0.0f;
  bool holed = false;
  for (uint c = i % width; c < columns && row < rows; c += width) {
    ulong at = ulong(row) * columns + c;
    float v = float(x[at]), s = v;
    device const float* edge = edges + ulong(c) * (bins + 1u);
    device const float* score = scores + ulong(c) * bins;
    if (is_nan(v)) {
      holed = true;
    } else if (edge[0] - v > reach[c] || v - edge[bins] > reach[c]) {
      s = score[0];
      for (uint k = 1u; k < bins; k++) s = max(s, score[k]);
    } else {
      uint k = position(edge, bins + 1u, v, false);
      s = score[min(max(k, 1u), bins) - 1u];
    }
    if (by_column)
      out[at] = s;
    else
      sum += holed ? 0.0f : s;
  }
  if (by_column) return;
  sum = sum_of(sum, width);
  holed = sum_of(holed ? 1.0f : 0.0f, width) > 0.0f;
  if (row < rows && i % width == 0u) out[row] = holed ? as_type<float>(0x7fc00000u) : sum;
}

// ---- Mahalanobis: a lane has a row, whose solution stands in threadgroup memory; D columns at most.

template <typename T, uint D>
[[kernel]] [[max_total_threads_per_threadgroup(32)]] void mahalanobis(
    device const T* x [[buffer(0)]], device const float* mean [[buffer(1)]], device const float* lower [[buffer(2)]],
    device float* out [[buffer(3)]], constant uint& rows [[buffer(4)]], constant uint& columns [[buffer(5)]],
    uint group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_threadgroup]]) {
  threadgroup float solved[32u * D];
  uint first = group * 32u, held = min(32u, rows - first);
  for (uint k = lane; k < held * columns; k += 32u)  // by rows, as they lie in memory
    solved[k % columns * 32u + k / columns] = float(x[ulong(first) * columns + k]) - mean[k % columns];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane >= held) return;
  float norm = 0.0f;
  for (uint i = 0u; i < columns; i++) {
    device const float* row = lower + ulong(i) * columns;
    float left = solved[i * 32u + lane];
    for (uint j = 0u; j < i; j++) left = fma(-row[j], solved[j * 32u + lane], left);
    left = precise::divide(left, row[i]);
    solved[i * 32u + lane] = left;
    norm = fma(left, left, norm);
  }
  out[first + lane] = norm;
}

// ---- Statistics. The mean is kept in two floats.

constant uint STATS_SIMDGROUPS = 8u, STATS_RUN = 16u;  // tails_metal.cpp has these too

struct Moments {
  float mean, rest, m2, low, high;
  uint count, nans;
};

inline Moments no_moments() {
  Moments m;
  m.mean = m.rest = m.m2 = 0.0f;
  m.low = as_type<float>(0x7f800000u);
  m.high = as_type<float>(0xff800000u);
  m.count = m.nans = 0u;
  return m;
}

// As merge_column_stats of ops/tails.py.
inline void merge(thread Moments& a, Moments b) {
  a.nans += b.nans;
  if (b.count == 0u) return;
  uint nans = a.nans;
  if (a.count == 0u) {
    a = b;
    a.nans = nans;
    return;
  }
  float count = float(a.count + b.count), weight = precise::divide(float(b.count), count);
  bool far = abs(a.mean) > 1e38f;  // the difference of such means may overflow
  float half_delta = 0.5f * b.mean - 0.5f * a.mean, delta = (b.mean - a.mean) + (b.rest - a.rest);
  float spread = far ? 2.0f * half_delta : delta;
  a.m2 += b.m2 + spread * spread * (float(a.count) * weight);
  if (far) {
    a.mean = a.mean * (1.0f - weight) + b.mean * weight;
    a.rest = 0.0f;
  } else {
    float off = a.rest + weight * delta, mean = a.mean + off, kept = mean - a.mean;
    a.rest = (a.mean - (mean - kept)) + (off - kept);
    a.mean = mean;
  }
  a.count += b.count;
  a.low = min(a.low, b.low);
  a.high = max(a.high, b.high);
}

// Of the values of one run, which stand in registers.
inline Moments of_run(thread const float* v, uint n, float share) {
  Moments m = no_moments();
  float mean = 0.0f, left = 0.0f;
  for (uint r = 0u; r < n; r++) {
    m.nans += is_nan(v[r]) ? 1u : 0u;
    if (!is_finite(v[r])) continue;
    m.count++;
    mean += v[r] * share;
    m.low = min(m.low, v[r]);
    m.high = max(m.high, v[r]);
  }
  if (m.count == 0u) return m;
  mean *= precise::divide(1.0f, share * float(m.count));
  for (uint r = 0u; r < n; r++)
    if (is_finite(v[r])) left += 0.5f * v[r] - 0.5f * mean;
  float off = precise::divide(2.0f * left, float(m.count));
  m.mean = mean + off;
  m.rest = off - (m.mean - mean);
  for (uint r = 0u; r < n; r++) {
    if (!is_finite(v[r])) continue;
    float d = 2.0f * (0.5f * v[r] - 0.5f * m.mean) - m.rest;
    m.m2 = fma(d, d, m.m2);
  }
  return m;
}

// partial[chunk, field, column]: moments of a chunk of long rows, `width` values each, of which `size` are there in all.
// A lane has a column, a simdgroup some of the chunk's rows.
template <typename T>
[[kernel]] [[max_total_threads_per_threadgroup(256)]] void column_moments(
    device const T* x [[buffer(0)]], device float* partial [[buffer(1)]], device uint* counts [[buffer(2)]],
    constant ulong& size [[buffer(3)]], constant uint& width [[buffer(4)]], constant uint& runs [[buffer(5)]],
    constant uint& tiles [[buffer(6)]], uint group [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]], uint sg [[simdgroup_index_in_threadgroup]]) {
  threadgroup float floats[STATS_SIMDGROUPS * 5u * 32u];
  threadgroup uint uints[STATS_SIMDGROUPS * 2u * 32u];
  uint column = group % tiles * 32u + lane, chunk = group / tiles;
  Moments all = no_moments();
  for (uint k = 0u; k < runs && column < width; k++) {
    ulong row = ((ulong(chunk) * runs + k) * STATS_SIMDGROUPS + sg) * STATS_RUN;
    float v[STATS_RUN];
    uint n = 0u;
    for (uint r = 0u; r < STATS_RUN; r++) {
      ulong at = (row + r) * width + column;
      if (at < size) {
        v[r] = float(x[at]);
        n = r + 1u;
      }
    }
    if (n > 0u) merge(all, of_run(v, n, precise::divide(1.0f, float(n))));
  }
  uint at = sg * 160u + lane;
  floats[at] = all.mean;
  floats[at + 32u] = all.rest;
  floats[at + 64u] = all.m2;
  floats[at + 96u] = all.low;
  floats[at + 128u] = all.high;
  uints[sg * 64u + lane] = all.count;
  uints[sg * 64u + 32u + lane] = all.nans;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (sg > 0u || column >= width) return;
  for (uint other = 1u; other < STATS_SIMDGROUPS; other++) {
    Moments m;
    uint from = other * 160u + lane;
    m.mean = floats[from];
    m.rest = floats[from + 32u];
    m.m2 = floats[from + 64u];
    m.low = floats[from + 96u];
    m.high = floats[from + 128u];
    m.count = uints[other * 64u + lane];
    m.nans = uints[other * 64u + 32u + lane];
    merge(all, m);
  }
  ulong to = ulong(chunk) * 5u * width + column;
  partial[to] = all.mean;
  partial[to + width] = all.rest;
  partial[to + 2u * width] = all.m2;
  partial[to + 3u * width] = all.low;
  partial[to + 4u * width] = all.high;
  counts[ulong(chunk) * 2u * width + column] = all.count;
  counts[ulong(chunk) * 2u * width + width + column] = all.nans;
}

// The moments of a column: of its places in the long rows, chunk by chunk.
[[kernel]] void finish_column_stats(
    device const float* partial [[buffer(0)]], device const uint* counts [[buffer(1)]],
    device int* count [[buffer(2)]], device float* mean [[buffer(3)]], device float* m2 [[buffer(4)]],
    device float* low [[buffer(5)]], device float* high [[buffer(6)]], device int* nans [[buffer(7)]],
    device int* infs [[buffer(8)]], device float* rest [[buffer(9)]], constant uint& rows [[buffer(10)]],
    constant uint& columns [[buffer(11)]], constant uint& width [[buffer(12)]], constant uint& chunks [[buffer(13)]],
    uint c [[thread_position_in_grid]]) {
  if (c >= columns) return;
  Moments all = no_moments();
  for (uint chunk = 0u; chunk < chunks; chunk++)
    for (uint at = c; at < width; at += columns) {
      ulong from = ulong(chunk) * 5u * width + at;
      Moments m;
      m.mean = partial[from];
      m.rest = partial[from + width];
      m.m2 = partial[from + 2u * width];
      m.low = partial[from + 3u * width];
      m.high = partial[from + 4u * width];
      m.count = counts[ulong(chunk) * 2u * width + at];
      m.nans = counts[ulong(chunk) * 2u * width + width + at];
      merge(all, m);
    }
  bool equal = all.low == all.high;
  count[c] = int(all.count);
  mean[c] = equal ? all.low : all.mean;
  m2[c] = equal ? 0.0f : all.m2;
  low[c] = all.low;
  high[c] = all.high;
  nans[c] = int(all.nans);
  infs[c] = int(rows - all.count - all.nans);
  rest[c] = equal ? 0.0f : all.rest;
}

#define INSTANTIATE(name, type)                                                                                   \
  template [[host_name("robust_zscore_" #name)]] [[kernel]] decltype(robust_zscore<type>) robust_zscore<type>;    \
  template [[host_name("tail_scores_" #name)]] [[kernel]] decltype(tail_scores<type>) tail_scores<type>;          \
  template [[host_name("histogram_scores_" #name)]] [[kernel]] decltype(histogram_scores<type>)                   \
      histogram_scores<type>;                                                                                     \
  template [[host_name("column_moments_" #name)]] [[kernel]] decltype(column_moments<type>) column_moments<type>; \
  template [[host_name("mahalanobis_64_" #name)]] [[kernel]] decltype(mahalanobis<type, 64u>) mahalanobis<type, 64u>; \
  template [[host_name("mahalanobis_224_" #name)]] [[kernel]] decltype(mahalanobis<type, 224u>) mahalanobis<type, 224u>;
INSTANTIATE(float32, float)
INSTANTIATE(float16, half)
INSTANTIATE(bfloat16, bfloat)
