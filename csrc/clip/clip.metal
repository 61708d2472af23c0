#include <metal_stdlib>
using namespace metal;
#include "normals.metal"

constant bool has_norms [[function_constant(0)]];  // factors come from norms, not from the host
constant bool has_noise [[function_constant(1)]];
constant bool has_mask [[function_constant(2)]];
constant bool automatic [[function_constant(3)]];
constant bool has_sums [[function_constant(4)]];
constant bool many_leaves [[function_constant(5)]];  // more than there are buffers for: their addresses are `inputs`

// What the host says of leaf i stands at leaves[8 i]. A column is a value of a sample, counted over all leaves.
constant uint SIZE = 0u;    // columns
constant uint TYPE = 1u;    // 0 float32, 1 float16, 2 bfloat16
constant uint INPUT = 2u;   // number of the array that holds it
constant uint AT = 3u;      // first column
constant uint QUAD = 4u;    // sums: first of its quads of columns, counted over all leaves
constant uint TILE = 5u;    // sums: first tile of its noise
constant uint OUTPUT = 6u;  // sums: number of the array that takes them
constant uint START = 7u;   // sums: where in that array they begin

struct Sizes {
  uint leaves, batch, columns;
  uint chunk, partials, width;  // columns of a partial norm; partial norms of a sample; so many lanes add them
  uint quads;                   // of columns that a threadgroup of the sums has
};
struct Input {
  device const uchar* x;
};

constant uint NORM_THREADS = 512u;
constant uint SUM_THREADS = 480u;
constant uint SHORT_THREADS = 512u;
constant uint EACH = 6u;          // columns of short samples that a thread adds
constant uint HELD = 6144u;       // values of short samples that a threadgroup holds
constant uint MOST_HELD = 1024u;  // samples that it holds

inline device const uchar* data_of(
    constant uint* what, constant Input* inputs, device const uchar* g0, device const uchar* g1,
    device const uchar* g2, device const uchar* g3, device const uchar* g4, device const uchar* g5,
    device const uchar* g6, device const uchar* g7) {
  uint input = what[INPUT];
  if (many_leaves) return inputs[input].x;
  return input == 0u ? g0 : input == 1u ? g1 : input == 2u ? g2 : input == 3u ? g3 : input == 4u ? g4
       : input == 5u ? g5 : input == 6u ? g6 : g7;
}

inline device float* sum_of(
    constant uint* what, device float* y0, device float* y1, device float* y2, device float* y3, device float* y4,
    device float* y5, device float* y6, device float* y7) {
  uint output = what[OUTPUT];
  device float* y = output == 0u ? y0 : output == 1u ? y1 : output == 2u ? y2 : output == 3u ? y3 : output == 4u ? y4
                  : output == 5u ? y5 : output == 6u ? y6 : y7;
  return y + what[START];
}

// Four values with one load: rows of odd length are aligned to no more than a value.
inline float4 quad(device const float* x) { return float4(*(device const packed_float4*)x); }
inline float4 quad(device const half* x) { return float4(half4(*(device const packed_half4*)x)); }
inline float4 quad(device const bfloat* x) { return float4(bfloat4(*(device const packed_bfloat4*)x)); }

// The last leaf that begins at `where` or before, by its AT or its QUAD.
inline uint leaf_at(constant uint* leaves, uint count, uint field, uint where) {
  uint first = 0u;
  for (uint end = count; end - first > 1u;) {
    uint middle = (first + end) / 2u;
    if (leaves[8u * middle + field] <= where) first = middle;
    else end = middle;
  }
  return first;
}

// Leaves with few values fall to different threads: the first value is that of the thread whose number among the
// threads is `offset`.
inline uint rotated(uint t, uint offset, uint threads) { return (t + threads - offset % threads) % threads; }

// ---- Norms

// Sum of squares over several threads. Runs of 16 values are added to a sum that keeps what rounding cuts off, so that
// the error does not grow with the length.
struct Sum {
  float value, lost;
};
inline void add(thread Sum& sum, float x) {
  float total = sum.value + x, kept = total - sum.value;
  sum.lost += (sum.value - (total - kept)) + (x - kept);
  sum.value = total;
}
inline float total(Sum sum) {  // lost is NaN after an overflow
  return (as_type<uint>(sum.value) & 0x7f800000u) == 0x7f800000u ? sum.value : sum.value + sum.lost;
}

template <typename T>
inline void add_squares(thread Sum& sum, device const T* x, uint n, uint t, uint threads) {
  uint i = t, quads = n / 4u;
  for (; i + 3u * threads < quads; i += 4u * threads) {
    float4 a = quad(x + 4u * i), b = quad(x + 4u * (i + threads));
    float4 c = quad(x + 4u * (i + 2u * threads)), d = quad(x + 4u * (i + 3u * threads));
    float4 s = fma(a, a, b * b) + fma(c, c, d * d);
    add(sum, (s.x + s.y) + (s.z + s.w));
  }
  for (; i < quads; i += threads) {
    float4 a = quad(x + 4u * i);
    float4 s = a * a;
    add(sum, (s.x + s.y) + (s.z + s.w));
  }
  if (4u * quads + t < n) {
    float a = float(x[4u * quads + t]);
    add(sum, a * a);
  }
}

inline void add_squares(
    thread Sum& sum, device const uchar* x, uint type, ulong start, uint n, uint t, uint threads) {
  switch (type) {
    case 0u: return add_squares(sum, (device const float*)x + start, n, t, threads);
    case 1u: return add_squares(sum, (device const half*)x + start, n, t, threads);
    default: return add_squares(sum, (device const bfloat*)x + start, n, t, threads);
  }
}

// partial[sample, chunk] = sum of squares of a run of a sample's columns, from one leaf or several.
[[kernel]] void sq_norms(
    device const uchar* g0 [[buffer(0)]], device const uchar* g1 [[buffer(1)]], device const uchar* g2 [[buffer(2)]],
    device const uchar* g3 [[buffer(3)]], device const uchar* g4 [[buffer(4)]], device const uchar* g5 [[buffer(5)]],
    device const uchar* g6 [[buffer(6)]], device const uchar* g7 [[buffer(7)]], constant Input* inputs [[buffer(8)]],
    constant uint* leaves [[buffer(9)]], constant Sizes& sizes [[buffer(10)]], device float* partial [[buffer(11)]],
    uint group [[threadgroup_position_in_grid]], uint t [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint sg [[simdgroup_index_in_threadgroup]]) {
  threadgroup float scratch[NORM_THREADS / 32u];
  uint sample = group / sizes.partials, begin = group % sizes.partials * sizes.chunk;
  uint end = min(begin + sizes.chunk, sizes.columns);
  Sum sum;
  sum.value = 0.0f;
  sum.lost = 0.0f;
  for (uint leaf = leaf_at(leaves, sizes.leaves, AT, begin); leaf < sizes.leaves; leaf++) {
    constant uint* what = leaves + 8u * leaf;
    uint at = what[AT], size = what[SIZE];
    if (at >= end) break;
    uint first = max(begin, at) - at, n = min(end - at, size) - first;
    add_squares(
        sum, data_of(what, inputs, g0, g1, g2, g3, g4, g5, g6, g7), what[TYPE], ulong(sample) * size + first, n,
        rotated(t, (at + first - begin) / 4u, NORM_THREADS), NORM_THREADS);
  }
  float value = simd_sum(total(sum));
  if (lane == 0u) scratch[sg] = value;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  value = simd_sum(lane < NORM_THREADS / 32u ? scratch[lane] : 0.0f);
  if (t == 0u) partial[group] = value;
}

// Sum of the partial norms of a sample, in `width` neighbouring lanes (a power of two). All lanes must come here.
inline float sq_norm(
    device const float* partial, uint partials, uint sample, bool valid, uint lane, uint width) {
  float sum = 0.0f;
  if (valid)
    for (uint i = lane % width; i < partials; i += width) sum += partial[ulong(sample) * partials + i];
  for (uint step = width / 2u; step > 0u; step /= 2u) sum += simd_shuffle_xor(sum, ushort(step));
  return sum;
}

// out[sample] = its squared norm.
[[kernel]] void finish_sq_norms(
    device const float* partial [[buffer(0)]], device float* out [[buffer(1)]], constant uint& batch [[buffer(2)]],
    constant uint& partials [[buffer(3)]], constant uint& width [[buffer(4)]], uint i [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  uint sample = i / width;
  float norm = sq_norm(partial, partials, sample, sample < batch, lane, width);
  if (sample < batch && i % width == 0u) out[sample] = norm;
}

// ---- Factors and sums

inline bool is_finite(float x) { return (as_type<uint>(x) & 0x7f800000u) != 0x7f800000u; }

// The formula of clip_factors in ops/clip.py.
inline float clip_factor(float sq_norm, float max_grad_norm) {
  float n = precise::sqrt(sq_norm);
  if (automatic) return precise::divide(max_grad_norm, n + 0.01f);
  n += 1e-6f;
  return max_grad_norm >= n ? 1.0f : precise::divide(max_grad_norm, n);
}

// Adds the samples first, first + slices, ... of a block times their factors to four columns.
template <typename T>
inline float4 add_samples(
    float4 sum, device const T* x, uint size, uint column, threadgroup const float* factors, uint first, uint slices,
    uint samples) {
  if (column + 4u <= size) {
    for (uint i = first; i < samples; i += slices) {
      float f = factors[i];
      if (f != 0.0f) sum = fma(float4(f), quad(x + ulong(i) * size + column), sum);  // a refused sample may hold NaN
    }
  } else {
    for (uint i = first; i < samples; i += slices) {
      float f = factors[i];
      if (f == 0.0f) continue;
      for (uint k = 0u; column + k < size; k++) sum[k] = fma(f, float(x[ulong(i) * size + column + k]), sum[k]);
    }
  }
  return sum;
}

inline float4 add_samples(
    float4 sum, device const uchar* x, uint type, ulong start, uint size, uint column, threadgroup const float* factors,
    uint first, uint slices, uint samples) {
  switch (type) {
    case 0u:
      return add_samples(sum, (device const float*)x + start, size, column, factors, first, slices, samples);
    case 1u:
      return add_samples(sum, (device const half*)x + start, size, column, factors, first, slices, samples);
    default:
      return add_samples(sum, (device const bfloat*)x + start, size, column, factors, first, slices, samples);
  }
}

// scratch[i] = sum of scratch[i], scratch[row + i], ... over the slices.
inline void add_slices(threadgroup float* scratch, uint row, uint slices, uint t, uint threads) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint held = slices; held > 1u;) {
    uint kept = (held + 1u) / 2u;
    for (uint i = t; i < (held - kept) * row; i += threads) scratch[i] += scratch[kept * row + i];
    held = kept;
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// out[column] = sum over samples of factor x value (+ noise). A threadgroup has some quads of columns, from one leaf or
// several; its threads share their samples in slices. The first threadgroup also stores norms, factors and how many
// samples are refused.
[[kernel]] [[max_total_threads_per_threadgroup(480)]] void clipped_sum(
    device const uchar* g0 [[buffer(0)]], device const uchar* g1 [[buffer(1)]], device const uchar* g2 [[buffer(2)]],
    device const uchar* g3 [[buffer(3)]], device const uchar* g4 [[buffer(4)]], device const uchar* g5 [[buffer(5)]],
    device const uchar* g6 [[buffer(6)]], device const uchar* g7 [[buffer(7)]], constant Input* inputs [[buffer(8)]],
    constant uint* leaves [[buffer(9)]], constant Sizes& sizes [[buffer(10)]], device float* y0 [[buffer(11)]],
    device float* y1 [[buffer(12)]], device float* y2 [[buffer(13)]], device float* y3 [[buffer(14)]],
    device float* y4 [[buffer(15)]], device float* y5 [[buffer(16)]], device float* y6 [[buffer(17)]],
    device float* y7 [[buffer(18)]], device const float* given [[buffer(19)]],
    constant float& max_grad_norm [[buffer(20)]], device const uchar* mask [[buffer(21)]],
    device float* norms [[buffer(22)]], device float* factors [[buffer(23)]], device int* num_refused [[buffer(24)]],
    constant float& sigma_given [[buffer(25)]], constant uint* key [[buffer(26)]],
    constant uint* counter [[buffer(27)]], uint group [[threadgroup_position_in_grid]],
    uint t [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint sg [[simdgroup_index_in_threadgroup]]) {
  threadgroup float scratch[4u * SUM_THREADS];  // factors of a block of samples, then the slices' sums
  threadgroup int refused[SUM_THREADS / 32u];
  uint batch = sizes.batch, quads = sizes.quads, slices = SUM_THREADS / quads, row = 4u * quads;
  uint slice = t / quads, unit = group * quads + t % quads;
  constant uint* what = leaves + 8u * leaf_at(leaves, sizes.leaves, QUAD, unit);
  uint size = what[SIZE], column = 4u * (unit - what[QUAD]);
  device const uchar* g = data_of(what, inputs, g0, g1, g2, g3, g4, g5, g6, g7);
  int bad = 0;
  float4 sum = float4(0.0f);
  for (uint block = 0u; block < batch; block += SUM_THREADS) {
    uint samples = min(SUM_THREADS, batch - block);
    if (has_norms) {
      for (uint at = 0u; at < samples; at += SUM_THREADS / sizes.width) {
        uint i = at + t / sizes.width;
        bool valid = i < samples;
        float norm = sq_norm(given, sizes.partials, block + i, valid, lane, sizes.width);
        if (!valid || t % sizes.width != 0u) continue;
        bool counts = !has_mask || mask[block + i] != 0u;
        float f = counts && is_finite(norm) ? clip_factor(norm, max_grad_norm) : 0.0f;
        scratch[i] = f;
        if (group == 0u) {
          norms[block + i] = norm;
          factors[block + i] = f;
          bad += counts && !is_finite(norm) ? 1 : 0;
        }
      }
    } else if (t < samples) {
      scratch[t] = given[block + t];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (slice < slices && column < size)
      sum = add_samples(sum, g, what[TYPE], ulong(block) * size, size, column, scratch, slice, slices, samples);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (has_norms && group == 0u) {
    bad = simd_sum(bad);
    if (lane == 0u) refused[sg] = bad;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    bad = simd_sum(lane < SUM_THREADS / 32u ? refused[lane] : 0);
    if (t == 0u) num_refused[0] = bad;
  }
  if (slice < slices)
    for (uint k = 0u; k < 4u; k++) scratch[slice * row + unit % quads * 4u + k] = sum[k];
  add_slices(scratch, row, slices, t, SUM_THREADS);
  float sigma = has_noise ? valid_sigma(sigma_given) : 0.0f;
  uint begin = group * quads, tiles = 0u;  // tiles of the leaves before, which simdgroups take in turn
  for (uint leaf = leaf_at(leaves, sizes.leaves, QUAD, begin); leaf < sizes.leaves; leaf++) {
    what = leaves + 8u * leaf;
    if (what[QUAD] >= begin + quads) break;
    uint skipped = max(begin, what[QUAD]) - what[QUAD];  // quads of threadgroups before
    uint first = 4u * skipped, end = min(4u * (begin + quads - what[QUAD]), what[SIZE]);
    if (first >= end) continue;
    device float* y = sum_of(what, y0, y1, y2, y3, y4, y5, y6, y7);
    uint before = 4u * (what[QUAD] + skipped - begin);
    threadgroup const float* sums = scratch + before;
    for (uint i = first + rotated(t, before, SUM_THREADS); !has_noise && i < end; i += SUM_THREADS)
      y[i] = sums[i - first];
    if (!has_noise) continue;
    uint tile = first / NORMALS_PER_TILE, last = (end - 1u) / NORMALS_PER_TILE, number = SUM_THREADS / 32u;
    for (uint i = tile + rotated(sg, tiles, number); i <= last; i += number) {
      float z[10];
      block_normals(key, counter, uint2(1u, 0u), (ulong(what[TILE]) + i) * 32u + lane, z);
      uint at = i * NORMALS_PER_TILE + lane;
      for (uint j = 0u; j < 10u; j++, at += 32u)
        if (at >= first && at < end) {
          float value = sums[at - first];
          y[at] = is_zero(sigma) ? value : fma(sigma, z[j], value);
        }
    }
    tiles += last + 1u - tile;
  }
}

// ---- Short samples: all leaves of a sample fit into threadgroup memory, so that gradients are read once

template <typename T>
inline void hold(device const T* x, uint n, threadgroup float* to, uint t) {
  for (uint i = t; i < n / 4u; i += SHORT_THREADS) {
    float4 values = quad(x + 4u * i);
    for (uint k = 0u; k < 4u; k++) to[4u * i + k] = values[k];
  }
  uint i = n / 4u * 4u + t;
  if (i < n) to[i] = float(x[i]);
}

inline void hold(device const uchar* x, uint type, ulong start, uint n, threadgroup float* to, uint t) {
  switch (type) {
    case 0u: return hold((device const float*)x + start, n, to, t);
    case 1u: return hold((device const half*)x + start, n, to, t);
    default: return hold((device const bfloat*)x + start, n, to, t);
  }
}

// Norms, factors and, in partial[group], the clipped sum of a threadgroup's `rows` samples. It holds `tile` samples at a
// time, leaf by leaf.
[[kernel]] [[max_total_threads_per_threadgroup(512)]] void clip_short(
    device const uchar* g0 [[buffer(0)]], device const uchar* g1 [[buffer(1)]], device const uchar* g2 [[buffer(2)]],
    device const uchar* g3 [[buffer(3)]], device const uchar* g4 [[buffer(4)]], device const uchar* g5 [[buffer(5)]],
    device const uchar* g6 [[buffer(6)]], device const uchar* g7 [[buffer(7)]], constant Input* inputs [[buffer(8)]],
    constant uint* leaves [[buffer(9)]], constant Sizes& sizes [[buffer(10)]], constant uint& rows [[buffer(11)]],
    constant uint& tile [[buffer(12)]], device const float* given [[buffer(13)]],
    constant float& max_grad_norm [[buffer(14)]], device const uchar* mask [[buffer(15)]],
    device float* norms [[buffer(16)]], device float* factors [[buffer(17)]], device int* refused [[buffer(18)]],
    device float* partial [[buffer(19)]],
    uint group [[threadgroup_position_in_grid]], uint t [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint sg [[simdgroup_index_in_threadgroup]]) {
  threadgroup float held[HELD];
  threadgroup float scale[MOST_HELD];
  threadgroup int bad_of[SHORT_THREADS / 32u];
  uint count = sizes.leaves, columns = sizes.columns, width = sizes.width;
  uint slices = max(SHORT_THREADS / columns, 1u), slice = columns < SHORT_THREADS ? t / columns : 0u;
  uint first = columns < SHORT_THREADS ? t % columns : t;  // this thread's columns: first + k * SHORT_THREADS
  uint at[EACH], step[EACH];
  for (uint k = 0u; k < EACH; k++) {
    uint column = first + k * SHORT_THREADS;
    if (column >= columns) continue;
    constant uint* what = leaves + 8u * leaf_at(leaves, count, AT, column);
    at[k] = tile * what[AT] + column - what[AT];
    step[k] = what[SIZE];
  }
  int bad = 0;
  float sum[EACH];
  for (uint k = 0u; k < EACH; k++) sum[k] = 0.0f;
  uint end = min(sizes.batch, (group + 1u) * rows);
  for (uint block = group * rows; block < end; block += tile) {
    uint samples = min(tile, end - block);
    for (uint leaf = 0u; leaf < count; leaf++) {
      constant uint* what = leaves + 8u * leaf;
      hold(data_of(what, inputs, g0, g1, g2, g3, g4, g5, g6, g7), what[TYPE], ulong(block) * what[SIZE],
           samples * what[SIZE], held + tile * what[AT], rotated(t, samples * what[AT] / 4u, SHORT_THREADS));
    }
    if (!has_norms)
      for (uint i = t; i < samples; i += SHORT_THREADS) scale[i] = given[block + i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint start = 0u; has_norms && start < samples; start += SHORT_THREADS / width) {
      uint i = start + t / width;
      float norm = 0.0f;
      for (uint leaf = 0u; i < samples && leaf < count; leaf++) {
        constant uint* what = leaves + 8u * leaf;
        threadgroup const float* row = held + tile * what[AT] + i * what[SIZE];
        for (uint c = t % width; c < what[SIZE]; c += width) norm = fma(row[c], row[c], norm);
      }
      for (uint distance = width / 2u; distance > 0u; distance /= 2u) norm += simd_shuffle_xor(norm, ushort(distance));
      if (i >= samples || t % width != 0u) continue;
      norms[block + i] = norm;
      if (!has_sums) continue;
      bool counts = !has_mask || mask[block + i] != 0u;
      float f = counts && is_finite(norm) ? clip_factor(norm, max_grad_norm) : 0.0f;
      factors[block + i] = scale[i] = f;
      bad += counts && !is_finite(norm) ? 1 : 0;
    }
    if (has_norms && has_sums) threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = slice; has_sums && slice < slices && i < samples; i += slices) {
      float f = scale[i];
      if (f == 0.0f) continue;
      for (uint k = 0u; k < EACH; k++)
        if (first + k * SHORT_THREADS < columns) sum[k] = fma(f, held[at[k] + i * step[k]], sum[k]);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (!has_sums) return;
  if (slice < slices)
    for (uint k = 0u; k < EACH; k++)
      if (first + k * SHORT_THREADS < columns) held[slice * columns + first + k * SHORT_THREADS] = sum[k];
  bad = simd_sum(bad);
  if (lane == 0u) bad_of[sg] = bad;
  add_slices(held, columns, slices, t, SHORT_THREADS);
  for (uint column = t; column < columns; column += SHORT_THREADS)
    partial[ulong(group) * columns + column] = held[column];
  if (!has_norms) return;
  bad = simd_sum(lane < SHORT_THREADS / 32u ? bad_of[lane] : 0);
  if (t == 0u) refused[group] = bad;
}

// Normal n of those that begin with a tile.
inline float one_normal(constant uint* key, constant uint* counter, uint2 domain, uint tile, uint n) {
  float z[10];
  block_normals(key, counter, domain, (ulong(tile) + n / NORMALS_PER_TILE) * 32u + n % 32u, z);
  float value = z[0];
  for (uint j = 1u; j < 10u; j++)
    if (n % NORMALS_PER_TILE / 32u == j) value = z[j];
  return value;
}

// out[column] = sum of partial[group, column] over the groups (+ noise). A threadgroup has 32 columns.
[[kernel]] void finish_short(
    device const float* partial [[buffer(0)]], device float* y0 [[buffer(1)]], device float* y1 [[buffer(2)]],
    device float* y2 [[buffer(3)]], device float* y3 [[buffer(4)]], device float* y4 [[buffer(5)]],
    device float* y5 [[buffer(6)]], device float* y6 [[buffer(7)]], device float* y7 [[buffer(8)]],
    constant uint* leaves [[buffer(9)]], constant Sizes& sizes [[buffer(10)]], constant uint& groups [[buffer(11)]],
    device const int* refused [[buffer(12)]], device int* num_refused [[buffer(13)]],
    constant float& sigma_given [[buffer(14)]], constant uint* key [[buffer(15)]],
    constant uint* counter [[buffer(16)]],
    uint group [[threadgroup_position_in_grid]], uint t [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint sg [[simdgroup_index_in_threadgroup]]) {
  threadgroup float scratch[SHORT_THREADS];
  uint columns = sizes.columns, column = group * 32u + lane;
  float sum = 0.0f;
  for (uint i = sg; column < columns && i < groups; i += SHORT_THREADS / 32u)
    sum += partial[ulong(i) * columns + column];
  scratch[t] = sum;
  add_slices(scratch, 32u, SHORT_THREADS / 32u, t, SHORT_THREADS);
  if (sg != 0u) return;
  if (has_norms && group == 0u) {
    int bad = 0;
    for (uint i = lane; i < groups; i += 32u) bad += refused[i];
    bad = simd_sum(bad);
    if (lane == 0u) num_refused[0] = bad;
  }
  if (column >= columns) return;
  constant uint* what = leaves + 8u * leaf_at(leaves, sizes.leaves, AT, column);
  device float* y = sum_of(what, y0, y1, y2, y3, y4, y5, y6, y7);
  column -= what[AT];
  float value = scratch[lane], sigma = has_noise ? valid_sigma(sigma_given) : 0.0f;
  if (!is_zero(sigma)) value = fma(sigma, one_normal(key, counter, uint2(1u, 0u), what[TILE], column), value);
  y[column] = value;
}
