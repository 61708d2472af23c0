#include <metal_stdlib>
using namespace metal;
#include "normals.metal"

constant bool is_uniform [[function_constant(0)]];
constant bool has_bounds [[function_constant(1)]];
constant bool has_grid [[function_constant(2)]];

constant uint COPY_THREADS = 512u, HELD = 4096u;  // smooth_metal.cpp has these too
constant uint VOTE_THREADS = 256u, SLOTS = 4096u;
constant uint LOW = 0u, HIGH = 1u, SCALE = 2u, WIDTH = 3u, STEPS = 4u, INVERSE = 5u;  // of the limits

inline bool is_nan(float x) { return (as_type<uint>(x) & 0x7fffffffu) > 0x7f800000u; }

// place / steps as a division rounds it: of two corrections the first leaves less than a unit in the last place.
inline float divided(float place, float steps, float inverse) {
  float q = place * inverse;
  q = fma(fma(-q, steps, place), inverse, q);
  return fma(fma(-q, steps, place), inverse, q);
}

inline float limited(float v, constant float* limits) {
  if (!has_bounds || is_nan(v)) return v;
  v = v < limits[LOW] ? limits[LOW] : v > limits[HIGH] ? limits[HIGH] : v;
  if (!has_grid) return v;
  float place = rint((v - limits[LOW]) * limits[SCALE]);
  return divided(place * limits[WIDTH], limits[STEPS], limits[INVERSE]) + limits[LOW];
}

// The ten uniforms of a block, in the order of the normals: odd multiples of sqrt(3) 2^-24.
inline void block_uniforms(constant uint* key, constant uint* counter, uint2 domain, ulong block, thread float* z) {
  uint x[16];
  chacha20(key, counter, domain, block, x);
  for (uint j = 0u; j < 10u; j++) z[j] = float((int(x[j]) >> 8) * 2 + 1) * 1.03238271e-7f;
}

// y[copy, i] = x[i] + noise. A threadgroup holds `width` values of x and writes them in `copies_each` copies; a
// simdgroup draws a tile. Where one threadgroup holds all of x its copies are one run of values that follow each other,
// else each copy has a run of its own, whose first and last tile the neighbours draw too.
template <typename T>
[[kernel]] [[max_total_threads_per_threadgroup(512)]] void noisy_copies(
    device const T* x [[buffer(0)]], device T* y [[buffer(1)]], constant float& sigma_given [[buffer(2)]],
    constant uint* key [[buffer(3)]], constant uint* counter [[buffer(4)]], constant float* limits [[buffer(5)]],
    constant ulong& size [[buffer(6)]], constant uint& copies [[buffer(7)]], constant uint& copies_each [[buffer(8)]],
    constant uint& width [[buffer(9)]], uint group [[threadgroup_position_in_grid]],
    uint t [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint sg [[simdgroup_index_in_threadgroup]]) {
  threadgroup float held[HELD];
  uint ranges = uint((size + width - 1u) / width);
  ulong first = ulong(group % ranges) * width;
  uint n = uint(min(ulong(width), size - first));
  for (uint i = t; i < n; i += COPY_THREADS) held[i] = float(x[first + i]);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float sigma = valid_sigma(sigma_given);
  uint copy = group / ranges * copies_each, count = min(copies_each, copies - copy);
  uint runs = ranges == 1u ? 1u : count, length = ranges == 1u ? count * n : n;
  uint tiles = length / NORMALS_PER_TILE + 2u;  // of a run, at most
  uint turn = 32u % n, before = (NORMALS_PER_TILE / n + 1u) * n;
  for (uint k = sg; k < runs * tiles; k += COPY_THREADS / 32u) {
    ulong from = (ulong(copy) + k / tiles) * size + first, to = from + length;
    ulong tile = from / NORMALS_PER_TILE + k % tiles, at = tile * NORMALS_PER_TILE + lane;
    if (tile * NORMALS_PER_TILE >= to) continue;
    float z[10];
    if (is_zero(sigma))
      for (uint j = 0u; j < 10u; j++) z[j] = 0.0f;
    else if (is_uniform)
      block_uniforms(key, counter, uint2(3u, 0u), tile * 32u + lane, z);
    else
      block_normals(key, counter, uint2(3u, 0u), tile * 32u + lane, z);
    uint i = uint(at + before - from) % n;
    for (uint j = 0u; j < 10u; j++, at += 32u) {
      if (at >= from && at < to) y[at] = T(limited(fma(sigma, z[j], held[i]), limits));
      i += turn;
      if (i >= n) i -= n;
    }
  }
}

// Numbers in the order of the floats, NaN above all: comparisons of floats would not see it, nor subnormal numbers.
inline uint order_of(float x) {
  if (is_nan(x)) return 0xffffffffu;
  uint bits = as_type<uint>(x);
  if (bits == 0x80000000u) bits = 0u;
  return (bits & 0x80000000u) != 0u ? ~bits : bits | 0x80000000u;
}

// winners[row] = the first of its largest logits, or `classes` where it holds NaN. `width` lanes share a row.
template <typename T>
[[kernel]] void find_winners(
    device const T* logits [[buffer(0)]], device uint* winners [[buffer(1)]], constant uint& rows [[buffer(2)]],
    constant uint& classes [[buffer(3)]], constant uint& width [[buffer(4)]],
    uint thread_index [[thread_position_in_grid]]) {
  uint row = thread_index / width, part = thread_index % width, best = 0u, winner = 0u;
  for (uint i = part; row < rows && i < classes; i += width) {
    uint order = order_of(float(logits[ulong(row) * classes + i]));
    if (order > best) {
      best = order;
      winner = i;
    }
  }
  for (uint distance = width / 2u; distance > 0u; distance /= 2u) {
    uint other = simd_shuffle_xor(best, ushort(distance)), index = simd_shuffle_xor(winner, ushort(distance));
    if (other > best || (other == best && index < winner)) {
      best = other;
      winner = index;
    }
  }
  if (part == 0u && row < rows) winners[row] = best == 0xffffffffu ? classes : winner;
}

// after = before + how often each slot has won. A threadgroup has some of the slots.
[[kernel]] void add_votes(
    device const uint* winners [[buffer(0)]], device const int* before [[buffer(1)]], device int* after [[buffer(2)]],
    constant uint& rows [[buffer(3)]], constant uint& slots [[buffer(4)]],
    uint group [[threadgroup_position_in_grid]], uint t [[thread_index_in_threadgroup]]) {
  threadgroup int votes[SLOTS];
  uint first = group * SLOTS, n = min(SLOTS, slots - first);
  for (uint i = t; i < n; i += VOTE_THREADS) votes[i] = 0;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = t; i < rows; i += VOTE_THREADS) {
    uint slot = winners[i] - first;
    if (slot < n) atomic_fetch_add_explicit((threadgroup atomic_int*)&votes[slot], 1, memory_order_relaxed);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = t; i < n; i += VOTE_THREADS) after[first + i] = before[first + i] + votes[i];
}

#define INSTANTIATE(name, type)                                                                               \
  template [[host_name("noisy_copies_" #name)]] [[kernel]] decltype(noisy_copies<type>) noisy_copies<type>;   \
  template [[host_name("find_winners_" #name)]] [[kernel]] decltype(find_winners<type>) find_winners<type>;
INSTANTIATE(float32, float)
INSTANTIATE(float16, half)
INSTANTIATE(bfloat16, bfloat)
