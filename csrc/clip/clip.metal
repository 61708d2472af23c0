#include <metal_stdlib>
using namespace metal;
#include "normals.metal"

constant bool has_norms [[function_constant(0)]];  // factors come from partial norms, not from the host
constant bool has_noise [[function_constant(1)]];
constant bool has_mask [[function_constant(2)]];
constant bool automatic [[function_constant(3)]];

// Up to 8 leaves a call. What the host says of leaf i stands at leaves[8 i]:
constant uint SIZE = 0u;         // values of one sample
constant uint TYPE = 1u;         // 0 float32, 1 float16, 2 bfloat16; + 4 where four values may be loaded at once
constant uint FIRST_GROUP = 2u;  // of the threadgroups that are this leaf's
constant uint CHUNK = 3u;        // norms: values in a chunk
constant uint CHUNKS = 4u;       // norms: chunks of one sample
constant uint PARTIAL = 5u;      // norms: number of the first chunk among those of all leaves
constant uint COLUMNS = 3u;      // sums: quads of columns of a threadgroup
constant uint SLICES = 4u;       // sums: so many threads share the samples of a column
constant uint TILE = 5u;         // sums: first tile of its noise
constant uint OUTPUT = 6u;       // sums: number of the array that takes them
constant uint AT = 7u;           // sums: where in that array they begin

constant uint NORM_THREADS = 512u;
constant uint SUM_THREADS = 480u;
constant uint SMALL = 1024u;  // a chunk of so many values is one simdgroup's

inline uint leaf_of(constant uint* leaves, uint count, uint group) {
  uint leaf = 0u;
  for (uint i = 1u; i < count; i++)
    if (group >= leaves[8u * i + FIRST_GROUP]) leaf = i;
  return leaf;
}

// ---- Norms

// Sum of squares of x[start .. end) over `threads` threads. Runs of 16 values are added to a sum that keeps what rounding
// cuts off, so that the error does not grow with the length.
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
inline float sum_of_squares(device const T* x, uint n, bool wide, uint t, uint threads) {
  Sum sum;
  sum.value = 0.0f;
  sum.lost = 0.0f;
  uint i = t;
  if (wide) {
    device const vec<T, 4>* quads = (device const vec<T, 4>*)x;
    uint count = n / 4u;
    for (; i + 3u * threads < count; i += 4u * threads) {
      float4 a = float4(quads[i]), b = float4(quads[i + threads]);
      float4 c = float4(quads[i + 2u * threads]), d = float4(quads[i + 3u * threads]);
      float4 s = fma(a, a, b * b) + fma(c, c, d * d);
      add(sum, (s.x + s.y) + (s.z + s.w));
    }
    for (; i < count; i += threads) {
      float4 a = float4(quads[i]);
      float4 s = a * a;
      add(sum, (s.x + s.y) + (s.z + s.w));
    }
  } else {
    for (; i + 3u * threads < n; i += 4u * threads) {
      float a = float(x[i]), b = float(x[i + threads]), c = float(x[i + 2u * threads]), d = float(x[i + 3u * threads]);
      add(sum, fma(a, a, b * b) + fma(c, c, d * d));
    }
    for (; i < n; i += threads) {
      float a = float(x[i]);
      add(sum, a * a);
    }
  }
  return total(sum);
}

inline float sum_of_squares(device const uchar* x, uint type, ulong start, uint n, uint t, uint threads) {
  bool wide = type >= 4u;
  switch (type & 3u) {
    case 0u: return sum_of_squares((device const float*)x + start, n, wide, t, threads);
    case 1u: return sum_of_squares((device const half*)x + start, n, wide, t, threads);
    default: return sum_of_squares((device const bfloat*)x + start, n, wide, t, threads);
  }
}

// partial[sample, chunk] = sum of squares of one chunk of one sample.
[[kernel]] void sq_norms(
    device const uchar* g0 [[buffer(0)]], device const uchar* g1 [[buffer(1)]], device const uchar* g2 [[buffer(2)]],
    device const uchar* g3 [[buffer(3)]], device const uchar* g4 [[buffer(4)]], device const uchar* g5 [[buffer(5)]],
    device const uchar* g6 [[buffer(6)]], device const uchar* g7 [[buffer(7)]], device float* partial [[buffer(8)]],
    constant uint* leaves [[buffer(9)]], constant uint& count [[buffer(10)]], constant uint& batch [[buffer(11)]],
    constant uint& partials [[buffer(12)]], uint group [[threadgroup_position_in_grid]],
    uint t [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint sg [[simdgroup_index_in_threadgroup]]) {
  threadgroup float scratch[NORM_THREADS / 32u];
  uint leaf = leaf_of(leaves, count, group);
  constant uint* what = leaves + 8u * leaf;
  uint chunk_size = what[CHUNK], chunks = what[CHUNKS], size = what[SIZE], unit = group - what[FIRST_GROUP];
  bool small = size <= SMALL;
  if (small) unit = unit * (NORM_THREADS / 32u) + sg;  // there is one chunk, and each simdgroup has a sample
  uint sample = unit / chunks, chunk = unit % chunks, begin = chunk * chunk_size;
  uint n = sample < batch ? min(chunk_size, size - begin) : 0u;
  device const uchar* g = leaf == 0u ? g0 : leaf == 1u ? g1 : leaf == 2u ? g2 : leaf == 3u ? g3 : leaf == 4u ? g4
                        : leaf == 5u ? g5 : leaf == 6u ? g6 : g7;
  float sum = sum_of_squares(
      g, what[TYPE], ulong(sample) * size + begin, n, small ? lane : t, small ? 32u : NORM_THREADS);
  sum = simd_sum(sum);
  if (!small) {
    if (lane == 0u) scratch[sg] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sum = simd_sum(lane < NORM_THREADS / 32u ? scratch[lane] : 0.0f);
  }
  if (sample < batch && (small ? lane : t) == 0u) partial[ulong(sample) * partials + what[PARTIAL] + chunk] = sum;
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
    float4 sum, device const T* x, uint size, uint column, uint step, bool wide, threadgroup const float* factors,
    uint first, uint slices, uint samples) {
  if (wide && column < size) {
    for (uint i = first; i < samples; i += slices) {
      float f = factors[i];
      if (f != 0.0f) sum = fma(float4(f), float4(*(device const vec<T, 4>*)(x + ulong(i) * size + column)), sum);
    }
  } else if (!wide) {
    for (uint i = first; i < samples; i += slices) {
      float f = factors[i];
      if (f == 0.0f) continue;  // a refused sample may hold NaN
      device const T* row = x + ulong(i) * size;
      for (uint k = 0u; k < 4u; k++)
        if (column + k * step < size) sum[k] = fma(f, float(row[column + k * step]), sum[k]);
    }
  }
  return sum;
}

inline float4 add_samples(
    float4 sum, device const uchar* x, uint type, ulong start, uint size, uint column, uint step,
    threadgroup const float* factors, uint first, uint slices, uint samples) {
  bool wide = type >= 4u;
  switch (type & 3u) {
    case 0u:
      return add_samples(
          sum, (device const float*)x + start, size, column, step, wide, factors, first, slices, samples);
    case 1u:
      return add_samples(
          sum, (device const half*)x + start, size, column, step, wide, factors, first, slices, samples);
    default:
      return add_samples(
          sum, (device const bfloat*)x + start, size, column, step, wide, factors, first, slices, samples);
  }
}

// out[column] = sum over samples of factor x value (+ noise). A threadgroup has some columns of one leaf; its threads
// share their samples in slices. The first threadgroup of a call with has_norms also stores norms, factors and how many
// samples are refused.
[[kernel]] [[max_total_threads_per_threadgroup(480)]] void clipped_sum(
    device const uchar* g0 [[buffer(0)]], device const uchar* g1 [[buffer(1)]], device const uchar* g2 [[buffer(2)]],
    device const uchar* g3 [[buffer(3)]], device const uchar* g4 [[buffer(4)]], device const uchar* g5 [[buffer(5)]],
    device const uchar* g6 [[buffer(6)]], device const uchar* g7 [[buffer(7)]], device float* y0 [[buffer(8)]],
    device float* y1 [[buffer(9)]], device float* y2 [[buffer(10)]], device float* y3 [[buffer(11)]],
    device float* y4 [[buffer(12)]], device float* y5 [[buffer(13)]], device float* y6 [[buffer(14)]],
    device float* y7 [[buffer(15)]], constant uint* leaves [[buffer(16)]], constant uint& count [[buffer(17)]],
    constant uint& batch [[buffer(18)]], device const float* given [[buffer(19)]],
    constant uint& partials [[buffer(20)]], constant uint& width [[buffer(21)]],
    constant float& max_grad_norm [[buffer(22)]], device const uchar* mask [[buffer(23)]],
    device float* norms [[buffer(24)]], device float* factors [[buffer(25)]], device int* num_refused [[buffer(26)]],
    constant float& sigma_given [[buffer(27)]], constant uint* key [[buffer(28)]],
    constant uint* counter [[buffer(29)]], uint group [[threadgroup_position_in_grid]],
    uint t [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint sg [[simdgroup_index_in_threadgroup]]) {
  threadgroup float scratch[4u * SUM_THREADS];  // factors of a block of samples, then the slices' sums
  threadgroup int refused[SUM_THREADS / 32u];
  uint leaf = leaf_of(leaves, count, group);
  constant uint* what = leaves + 8u * leaf;
  uint size = what[SIZE], columns = what[COLUMNS], slices = what[SLICES], type = what[TYPE];
  bool wide = type >= 4u;
  device const uchar* g = leaf == 0u ? g0 : leaf == 1u ? g1 : leaf == 2u ? g2 : leaf == 3u ? g3 : leaf == 4u ? g4
                        : leaf == 5u ? g5 : leaf == 6u ? g6 : g7;
  uint output = what[OUTPUT];
  device float* y = output == 0u ? y0 : output == 1u ? y1 : output == 2u ? y2 : output == 3u ? y3 : output == 4u ? y4
                  : output == 5u ? y5 : output == 6u ? y6 : y7;
  y += what[AT];
  uint slice = t / columns, quad = t % columns, step = wide ? 1u : columns;
  uint offset = wide ? 4u * quad : quad;  // this thread's columns: offset + k * step, counted from first
  uint first = (group - what[FIRST_GROUP]) * 4u * columns;
  int bad = 0;
  float4 sum = float4(0.0f);
  for (uint block = 0u; block < batch; block += SUM_THREADS) {
    uint samples = min(SUM_THREADS, batch - block);
    if (has_norms) {
      for (uint at = 0u; at < samples; at += SUM_THREADS / width) {
        uint i = at + t / width;
        bool valid = i < samples;
        float norm = sq_norm(given, partials, block + i, valid, lane, width);
        if (!valid || t % width != 0u) continue;
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
    if (slice < slices)
      sum = add_samples(sum, g, type, ulong(block) * size, size, first + offset, step, scratch, slice, slices, samples);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (has_norms && group == 0u) {
    bad = simd_sum(bad);
    if (lane == 0u) refused[sg] = bad;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    bad = simd_sum(lane < SUM_THREADS / 32u ? refused[lane] : 0);
    if (t == 0u) num_refused[0] = bad;
  }
  uint row = 4u * columns;
  if (slice < slices)
    for (uint k = 0u; k < 4u; k++) scratch[slice * row + offset + k * step] = sum[k];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint held = slices; held > 1u;) {
    uint kept = (held + 1u) / 2u;
    for (uint i = t; i < (held - kept) * row; i += SUM_THREADS) scratch[i] += scratch[kept * row + i];
    held = kept;
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (!has_noise) {
    for (uint i = t; i < row; i += SUM_THREADS)
      if (first + i < size) y[first + i] = scratch[i];
    return;
  }
  uint tile = first / NORMALS_PER_TILE + sg, at = sg * NORMALS_PER_TILE + lane;
  if (sg * NORMALS_PER_TILE >= row || first + sg * NORMALS_PER_TILE >= size) return;
  float sigma = valid_sigma(sigma_given);
  float z[10];
  block_normals(key, counter, uint2(1u, 0u), (ulong(what[TILE]) + tile) * 32u + lane, z);
  for (uint j = 0u; j < 10u; j++, at += 32u)
    if (first + at < size && at < row) y[first + at] = is_zero(sigma) ? scratch[at] : fma(sigma, z[j], scratch[at]);
}
