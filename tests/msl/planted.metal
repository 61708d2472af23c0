// One bug a kernel; with FIXED, none. `// bug: name` marks the lines where the simulator must report it.
#include <metal_stdlib>
using namespace metal;

#ifdef FIXED
constant constexpr int off = 0;
#define BARRIER_UNLESS_PLANTED(...) threadgroup_barrier(__VA_ARGS__)
#else
constant constexpr int off = 1;
#define BARRIER_UNLESS_PLANTED(...)
#endif
constant uint chosen [[function_constant(0)]];
constant bool flagged [[function_constant(1)]];

#define IN device const float* x [[buffer(0)]]
#define OUT device float* y [[buffer(1)]]
#define POSITION uint t [[thread_position_in_grid]]
#define PLACE uint t [[thread_position_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]

kernel void read_past_the_end(IN, OUT, POSITION) {
  y[t] = x[t + off];  // bug: read_past_the_end
}

kernel void read_before_the_start(IN, OUT, POSITION) {
  y[t] = x[int(t) - off];  // bug: read_before_the_start
}

kernel void write_past_the_end(IN, OUT, POSITION) {
  y[t + off] = x[t];  // bug: write_past_the_end
}

kernel void straddle_the_end(IN, OUT, POSITION) {
  device const packed_float2* pairs = (device const packed_float2*)x;
  float2 v = t < 32 ? float2(pairs[t]) : float2(0.0f);
  y[t] = v.x + v.y + (t == 63 ? *(device const float*)((device const uchar*)x + 252 + 4 * off) : 0.0f);  // bug: straddle_the_end
}

kernel void threadgroup_past_the_end(IN, OUT, PLACE, threadgroup float* shared [[threadgroup(0)]]) {
  shared[t + off] = x[t];  // bug: threadgroup_past_the_end
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[t] = lane + (t > 0 ? shared[t] : 0.0f);
}

kernel void array_past_the_end(IN, OUT, POSITION) {
  float v[4] = {x[t], 1.0f, 2.0f, 3.0f};
  y[t] = v[t % (4 + off)];  // bug: array_past_the_end
}

float third(thread const float* v, uint i) {
  return v[2 + i];  // bug: array_past_the_end_through_a_pointer
}

kernel void array_past_the_end_through_a_pointer(IN, OUT, POSITION) {
  float v[3] = {x[t], 1.0f, 2.0f};
  y[t] = third(v, off * (t % 2));
}

kernel void wild_pointer(IN, OUT, POSITION) {
  y[t] = x[ulong(t) + (ulong(off) << 58)];  // bug: wild_pointer
}

__attribute__((noinline)) float last_of(device const float* x, uint n) {
  float v[off ? 80000 : 8];
  for (uint i = 0; i < n; i++) v[i] = x[i % 64];  // bug: too_much_private_memory
  return v[uint(x[n % 8])];
}

kernel void too_much_private_memory(IN, OUT, POSITION) {
  y[t] = t == 0 ? last_of(x, off ? 80000 : 8) : x[t];
}

kernel void read_never_written_output(IN, OUT, POSITION) {
  if (off == 0) y[t] = 0.0f;
  y[t] += x[t];  // bug: read_never_written_output
}

kernel void read_never_written_threadgroup(IN, OUT, PLACE) {
  threadgroup float shared[64];
  if (t >= uint(off)) shared[t] = x[t];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[t] = shared[t] + lane;  // bug: read_never_written_threadgroup
}

kernel void no_barrier_before_read(IN, OUT, PLACE) {
  threadgroup float shared[64];
  shared[t] = x[t] + lane;  // bug: no_barrier_before_read
  BARRIER_UNLESS_PLANTED(mem_flags::mem_threadgroup);
  y[t] = shared[63 - t];  // bug: no_barrier_before_read
}

kernel void no_barrier_before_write(IN, OUT, PLACE) {
  threadgroup float shared[64];
  shared[t] = x[t] + lane;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[t] = shared[63 - t];  // bug: no_barrier_before_write
  BARRIER_UNLESS_PLANTED(mem_flags::mem_threadgroup);
  shared[t] = 0.0f;  // bug: no_barrier_before_write
}

kernel void no_barrier_inside_a_simdgroup(IN, OUT, PLACE) {
  threadgroup float shared[64];
  shared[t] = x[t] + lane;  // bug: no_barrier_inside_a_simdgroup
  if (off == 0) simdgroup_barrier(mem_flags::mem_threadgroup);
  y[t] = shared[t ^ 1];  // bug: no_barrier_inside_a_simdgroup
}

kernel void simdgroup_barrier_across_simdgroups(IN, OUT, PLACE) {
  threadgroup float shared[64];
  shared[t] = x[t] + lane;  // bug: simdgroup_barrier_across_simdgroups
  simdgroup_barrier(mem_flags::mem_threadgroup);
  BARRIER_UNLESS_PLANTED(mem_flags::mem_threadgroup);
  y[t] = shared[63 - t];  // bug: simdgroup_barrier_across_simdgroups
}

kernel void barrier_for_other_memory(IN, OUT, PLACE) {
  threadgroup float shared[64];
  shared[t] = x[t] + lane;  // bug: barrier_for_other_memory
  threadgroup_barrier(off ? mem_flags::mem_device : mem_flags::mem_threadgroup);
  y[t] = shared[63 - t];  // bug: barrier_for_other_memory
}

kernel void barrier_for_no_memory(IN, OUT, PLACE) {
  y[t] = x[t] + lane;  // bug: barrier_for_no_memory
  threadgroup_barrier(off ? mem_flags::mem_none : mem_flags::mem_device);
  if (t % 2 == 0) y[t] += y[t + 1];  // bug: barrier_for_no_memory
}

kernel void two_writers(IN, OUT, POSITION) {
  y[off ? t / 2 : t] = x[t];  // bug: two_writers
}

kernel void two_threadgroups(IN, OUT, uint t [[thread_position_in_threadgroup]], uint g [[threadgroup_position_in_grid]]) {
  y[off ? t : g * 32 + t] = x[t];  // bug: two_threadgroups
}

kernel void barrier_that_some_miss(IN, OUT, PLACE) {
  y[t] = x[t] + lane;
  if (t < 32 || off == 0) threadgroup_barrier(mem_flags::mem_threadgroup);  // bug: barrier_that_some_miss
}

kernel void two_barriers_at_once(IN, OUT, PLACE) {
  y[t] = x[t] + lane;
  if (t < 32 || off == 0)
    threadgroup_barrier(mem_flags::mem_threadgroup);  // bug: two_barriers_at_once
  else
    threadgroup_barrier(mem_flags::mem_threadgroup);  // bug: two_barriers_at_once
}

kernel void simdgroup_barrier_that_some_miss(IN, OUT, PLACE) {
  if (lane < 16 || off == 0) simdgroup_barrier(mem_flags::mem_threadgroup);  // bug: simdgroup_barrier_that_some_miss
  y[t] = simd_sum(x[t]);
}

kernel void shuffle_from_inactive_lane(IN, OUT, PLACE) {
  float v = x[t];
  if (lane < 16 || off == 0) v = simd_shuffle_xor(v, 16);  // bug: shuffle_from_inactive_lane
  y[t] = v;
}

kernel void shuffle_in_half_a_simdgroup(IN, OUT, PLACE) {
  float v = x[t];
  y[t] = simd_shuffle(v, off ? 31 : lane);  // bug: shuffle_in_half_a_simdgroup
}

kernel void matrix_with_inactive_lanes(IN, OUT, PLACE) {
  simdgroup_float8x8 m;
  if (lane < 16 || off == 0) simdgroup_load(m, x + t / 32 * 0, 8);  // bug: matrix_with_inactive_lanes
  y[t] = lane;
}

kernel void write_to_constant(constant float* x [[buffer(0)]], OUT, POSITION) {
  y[t] = x[t];
  device float* c = (device float*)ulong(off ? ulong(x) : ulong(y));
  c[t] = 1.0f;  // bug: write_to_constant
}

kernel void plain_read_beside_atomics(IN, device atomic_uint* counts [[buffer(1)]], POSITION) {
  atomic_fetch_add_explicit(&counts[t % 4], uint(x[t]), memory_order_relaxed);  // bug: plain_read_beside_atomics
  device const uint* plain = (device const uint*)counts;
  uint sum = off ? plain[t % 4] : 0u;  // bug: plain_read_beside_atomics
  atomic_fetch_add_explicit(&counts[t % 4], sum, memory_order_relaxed);  // bug: plain_read_beside_atomics
}

kernel void plain_write_beside_atomics(IN, device atomic_uint* counts [[buffer(1)]], PLACE) {
  device uint* plain = (device uint*)counts;
  if (t == 0) plain[0] = lane;  // bug: plain_write_beside_atomics
  BARRIER_UNLESS_PLANTED(mem_flags::mem_device);
  atomic_fetch_add_explicit(&counts[0], uint(x[t]), memory_order_relaxed);  // bug: plain_write_beside_atomics
}

kernel void too_much_threadgroup_memory(IN, OUT, PLACE) {
  threadgroup float some[4096];
  threadgroup float more[4096 + off];  // bug: too_much_threadgroup_memory
  some[t] = x[t];
  more[t] = lane;
  y[t] = some[t] + more[t];
}

kernel void too_much_threadgroup_memory_from_the_host(IN, OUT, PLACE, threadgroup float* shared [[threadgroup(0)]]) {  // bug: too_much_threadgroup_memory_from_the_host
  shared[t] = x[t] + lane;
  y[t] = shared[t];
}

kernel void too_many_threads(IN, OUT, POSITION) {  // bug: too_many_threads
  if (t < 64) y[t] = x[t];
}

[[kernel, max_total_threads_per_threadgroup(32)]] void more_threads_than_promised(IN, OUT, POSITION) {  // bug: more_threads_than_promised
  y[t] = x[t];
}

kernel void function_constant_not_set(IN, OUT, POSITION) {
  y[t] = x[t] * float(chosen);  // bug: function_constant_not_set
  if (flagged) y[t] += 1.0f;
}

kernel void signed_overflow(IN, OUT, POSITION) {
  int n = 0x7fffffff - int(x[t]) * 0;
  y[t] = n + (off ? int(t) : 0);  // bug: signed_overflow
}

kernel void shift_too_far(IN, OUT, POSITION) {
  y[t] = x[t] + (1u << (off ? t : 0u));  // bug: shift_too_far
}

kernel void divide_by_zero(IN, OUT, POSITION) {
  y[t] = x[t] + 64u / (t + 1u - off);  // bug: divide_by_zero
}

kernel void misaligned(IN, OUT, POSITION) {
  y[t] = t < 60 ? (*(device const float4*)(x + t / 4 * 4 + off)).x : 0.0f;  // bug: misaligned
}

kernel void cast_out_of_range(IN, OUT, POSITION) {
  y[t] = int(x[t] * (off ? 1e30f : 1.0f));  // bug: cast_out_of_range
}

kernel void spin(IN, device atomic_uint* flag [[buffer(1)]], POSITION) {
  while (atomic_load_explicit(flag, memory_order_relaxed) < uint(off)) {  // bug: spin
  }
  if (off == 0) atomic_fetch_add_explicit(flag, uint(x[t]), memory_order_relaxed);
}
