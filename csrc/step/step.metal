#include <metal_stdlib>
using namespace metal;

constant bool is_l1 [[function_constant(0)]];
constant bool is_held [[function_constant(1)]];  // a sample fits into the registers of a threadgroup

constant uint THREADS = 512u, EACH = 16u;  // step_metal.cpp has these too
constant uint EPS = 0u, ALPHA = 1u;        // which of the values of a sample differ from sample to sample
constant uint LOW = 0u, HIGH = 1u;

inline float nearest(float v, float origin, device float* y) { return v; }

// The value as it is rounded, but no further from the origin than v is.
inline ushort towards(float near, ushort bits, float v, float origin) {
  if (near == 0.0f || abs(near - origin) <= abs(v - origin)) return bits;
  return (near > origin) == (near > 0.0f) ? ushort(bits - 1) : ushort(bits + 1);
}
inline half nearest(float v, float origin, device half* y) {
  half near = half(v);
  return as_type<half>(towards(float(near), as_type<ushort>(near), v, origin));
}
inline bfloat nearest(float v, float origin, device bfloat* y) {
  bfloat near = bfloat(v);
  return as_type<bfloat>(towards(float(near), as_type<ushort>(near), v, origin));
}

// What is not finite in a gradient moves nothing.
inline float usable(float g) { return (as_type<uint>(g) & 0x7fffffffu) < 0x7f800000u ? g : 0.0f; }
inline bool is_nan(float x) { return (as_type<uint>(x) & 0x7fffffffu) > 0x7f800000u; }
inline float clipped(float v, float low, float high) { return is_nan(v) ? v : v < low ? low : v > high ? high : v; }

// A thread has one value.
template <typename T>
[[kernel]] void step_linf(
    device const T* x [[buffer(0)]], device const T* grad [[buffer(1)]], device const T* origins [[buffer(2)]],
    constant float* eps [[buffer(3)]], constant float* alpha [[buffer(4)]], device T* y [[buffer(5)]],
    constant uint& size [[buffer(6)]], constant uint* by_sample [[buffer(7)]], constant float* bounds [[buffer(8)]],
    constant ulong& n [[buffer(9)]], uint group [[threadgroup_position_in_grid]],
    uint t [[thread_index_in_threadgroup]]) {
  ulong i = ulong(group) * THREADS + t;
  if (i >= n) return;
  ulong row = i / size;
  float g = usable(float(grad[i])), origin = float(origins[i]);
  float radius = eps[by_sample[EPS] != 0u ? row : 0u], step = alpha[by_sample[ALPHA] != 0u ? row : 0u];
  uint bits = as_type<uint>(g);
  if ((bits & 0x7fffffffu) == 0u) step = 0.0f;
  else if ((bits & 0x80000000u) != 0u) step = -step;
  float v = clipped(clipped(float(x[i]) + step, origin - radius, origin + radius), bounds[LOW], bounds[HIGH]);
  y[i] = nearest(v, origin, y);
}

inline float sum_of(float v, threadgroup float* shared, uint lane, uint sg) {
  v = simd_sum(v);
  if (lane == 0u) shared[sg] = v;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  v = simd_sum(lane < THREADS / 32u ? shared[lane] : 0.0f);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return v;
}

inline float max_of(float v, threadgroup float* shared, uint lane, uint sg) {
  v = simd_max(v);
  if (lane == 0u) shared[sg] = v;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  v = simd_max(lane < THREADS / 32u ? shared[lane] : 0.0f);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return v;
}

inline float shrunk(float moved, float origin, float threshold, constant float* bounds) {
  float room = max(moved < 0.0f ? origin - bounds[LOW] : bounds[HIGH] - origin, 0.0f);
  return min(max(abs(moved) - threshold, 0.0f), room);
}

// Whether value i of a sample is there; what of it is wanted is read.
template <typename T>
inline bool reload(
    device const T* x, device const T* grad, device const T* origins, ulong start, uint i, uint size, bool gradient,
    bool others, thread float& d, thread float& g, thread float& o) {
  if (i >= size) return false;
  if (gradient) g = usable(float(grad[start + i]));
  if (others) {
    o = float(origins[start + i]);
    d = float(x[start + i]) - o;
  }
  return true;
}

// A threadgroup has one sample. What it cannot hold it reads in each pass.
template <typename T>
[[kernel]] [[max_total_threads_per_threadgroup(512)]] void step_ball(
    device const T* x [[buffer(0)]], device const T* grad [[buffer(1)]], device const T* origins [[buffer(2)]],
    constant float* eps [[buffer(3)]], constant float* alpha [[buffer(4)]], device T* y [[buffer(5)]],
    constant uint& size [[buffer(6)]], constant uint* by_sample [[buffer(7)]], constant float* bounds [[buffer(8)]],
    uint row [[threadgroup_position_in_grid]], uint t [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint sg [[simdgroup_index_in_threadgroup]]) {
  threadgroup float shared[THREADS / 32u];
  float radius = eps[by_sample[EPS] != 0u ? row : 0u], length = alpha[by_sample[ALPHA] != 0u ? row : 0u];
  ulong start = ulong(row) * size;
  float d[EACH], g[EACH], o[EACH];  // x - origin, gradient, origin
  float largest = 0.0f, sum = 0.0f;

#define FOR_VALUES(gradient, others)                                     \
  for (uint first = 0u; first < size; first += EACH * THREADS)           \
    for (uint k = 0u, i = first + t; k < EACH; k++, i += THREADS)        \
      if (reload(x, grad, origins, start, i, size, gradient, others, d[k], g[k], o[k]))

  FOR_VALUES(true, is_held) largest = max(largest, abs(g[k]));
  largest = max_of(largest, shared, lane, sg);
  if (largest == 0.0f) largest = 1.0f;
  FOR_VALUES(!is_held, false) sum += is_l1 ? abs(g[k] / largest) : (g[k] / largest) * (g[k] / largest);
  sum = sum_of(sum, shared, lane, sg);
  float factor = sum == 0.0f ? 0.0f : length / (is_l1 ? sum : precise::sqrt(sum));

#define MOVED (d[k] + g[k] / largest * factor)
  float most = 0.0f;
  sum = 0.0f;
  FOR_VALUES(!is_held, !is_held) {
    sum += is_l1 ? shrunk(MOVED, o[k], 0.0f, bounds) : MOVED * MOVED;
    most = max(most, abs(MOVED));
  }
  sum = sum_of(sum, shared, lane, sg);
  float threshold = 0.0f, scale = 1.0f;
  if (!is_l1) {
    float far = precise::sqrt(sum);
    if (far > radius) scale = radius / far;
  } else if (sum > radius) {
    // The root of a falling function of straight pieces, by Newton's steps inside a bracket.
    float low = 0.0f, high = max_of(most, shared, lane, sg), at = 0.0f;
    for (uint pass = 0u; pass < 64u; pass++) {
      float left = 0.0f, falling = 0.0f;
      FOR_VALUES(!is_held, !is_held) {
        float rest = shrunk(MOVED, o[k], at, bounds);
        left += rest;
        if (rest > 0.0f && rest == abs(MOVED) - at) falling += 1.0f;
      }
      left = sum_of(left, shared, lane, sg);
      falling = sum_of(falling, shared, lane, sg);
      float excess = left - radius;
      if (excess > 0.0f) low = at;
      else high = at;
      if (excess <= 0.0f && excess >= -2e-7f * radius) break;
      float next = falling > 0.0f ? at + excess / falling : low;
      if (!(next > low && next < high)) next = low + (high - low) * 0.5f;
      if (!(next > low && next < high)) break;
      at = next;
    }
    threshold = high;
  }
  FOR_VALUES(!is_held, !is_held) {
    float v = MOVED * scale;
    if (is_l1 && !is_nan(v)) {
      float rest = shrunk(v, o[k], threshold, bounds);
      v = v < 0.0f ? -rest : rest;
    }
    y[start + i] = nearest(clipped(o[k] + v, bounds[LOW], bounds[HIGH]), o[k], y);
  }
}

#define INSTANTIATE(name, type)                                                                      \
  template [[host_name("step_linf_" #name)]] [[kernel]] decltype(step_linf<type>) step_linf<type>;   \
  template [[host_name("step_ball_" #name)]] [[kernel]] decltype(step_ball<type>) step_ball<type>;
INSTANTIATE(float32, float)
INSTANTIATE(float16, half)
INSTANTIATE(bfloat16, bfloat)
