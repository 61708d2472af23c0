#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

constant bool excludes [[function_constant(0)]];
constant bool by_product [[function_constant(1)]];   // the metric: the inner product,
constant bool by_cosine [[function_constant(2)]];    // the cosine distance,
constant bool by_root [[function_constant(3)]];      // the Euclidean distance, or else its square

constant uint THREADS = 128u;  // four simdgroups
constant uint TILE = 64u;      // rows of x, and of y
constant uint DEPTH = 32u;     // columns that a product takes at once
constant uint STEP = DEPTH / 4u + 1u;
constant uint ROWS = TILE / 4u;          // of a simdgroup
constant uint SORTED = 2048u;            // neighbours that are sorted at once
constant float FAR = 3.0e38f;            // keys are below, those of nobody above
constant uint NOBODY = 0xffffffffu;

struct Sizes {
  uint n, m, d, k;
  uint kept;      // candidates of a row that are chosen from
  uint room;      // of a list
  uint segments;  // parts of y, each with a list a row
  uint columns;   // rows of y a part
};

#include "matrix.metal"

// Floats as integers of the same order.
inline uint sortable(float x) {
  uint bits = as_type<uint>(x);
  return bits ^ ((bits >> 31) != 0u ? 0xffffffffu : 0x80000000u);
}
inline float unsorted(uint bits) { return as_type<float>(bits ^ ((bits >> 31) != 0u ? 0x80000000u : 0xffffffffu)); }

inline float4 quad(device const float* x) { return float4(*(device const packed_float4*)x); }

// Columns [column, column + DEPTH) of the rows [first, first + TILE) of x, zeros where there are none.
inline void load_tile(
    threadgroup float4* to, device const float* x, uint first, uint rows, uint width, uint column, uint t) {
  for (uint i = t; i < TILE * (DEPTH / 4u); i += THREADS) {
    uint r = first + i / (DEPTH / 4u), c = column + i % (DEPTH / 4u) * 4u;
    float4 v = float4(0.0f);
    if (r < rows) {
      device const float* from = x + ulong(r) * width;
      if (c + 4u <= width)
        v = quad(from + c);
      else
        for (uint e = 0u; c + e < width; e++) v[e] = from[c + e];
    }
    to[i / (DEPTH / 4u) * STEP + i % (DEPTH / 4u)] = v;
  }
}

constant uint HELD = 8u;  // keys of a list that a lane has in registers: lists of small k are read once

inline uint count_below(thread const uint* keys, device const float* low, uint size, uint most, uint lane) {
  uint count = 0u;
  for (uint i = 0u; i < HELD; i++) count += keys[i] < most ? 1u : 0u;
  for (uint i = HELD * 32u + lane; i < size; i += 32u) count += sortable(low[i]) < most ? 1u : 0u;
  return simd_sum(count);
}

// The `kept` smallest of a list stay, in their order; the largest of them is returned. A simdgroup works alone.
inline float shrink(device float* low, device uint* index, uint size, uint kept, uint lane) {
  simdgroup_barrier(mem_flags::mem_device);
  uint keys[HELD];
  for (uint i = 0u; i < HELD; i++) keys[i] = i * 32u + lane < size ? sortable(low[i * 32u + lane]) : NOBODY;
  uint last = 0u;  // the `kept`-th smallest, bit by bit
  for (uint bit = 0x80000000u; bit != 0u; bit >>= 1)
    if (count_below(keys, low, size, last | bit, lane) < kept) last |= bit;
  uint equal = kept - count_below(keys, low, size, last, lane), to = 0u;  // so many of the equal ones stay
  for (uint at = 0u; at < size; at += 32u) {
    bool exists = at + lane < size;
    float value = exists ? low[at + lane] : FAR;
    uint which = exists ? index[at + lane] : 0u, key = sortable(value);
    uint ties = exists && key == last ? 1u : 0u, ties_before = simd_prefix_exclusive_sum(ties);
    bool stays = exists && (key < last || (ties != 0u && ties_before < equal));
    uint before = simd_prefix_exclusive_sum(stays ? 1u : 0u);
    simdgroup_barrier(mem_flags::mem_device);
    if (stays) {
      low[to + before] = value;
      index[to + before] = which;
    }
    to += simd_sum(stays ? 1u : 0u);
    equal -= min(equal, simd_sum(ties));
  }
  return unsorted(last);
}

// A threadgroup takes 64 rows of x and a part of y. Each row's list gets the rows of y whose keys may be the smallest: a
// key is half the squared distance less what is the same for the whole row of x, or the product negated, less the most
// that its rounding can be. All that is not in the list has a key of at least bound[list].
[[kernel]] [[max_total_threads_per_threadgroup(128)]] void find_candidates(
    device const float* x [[buffer(0)]], device const float* y [[buffer(1)]],
    device const float* x_error [[buffer(2)]], device const float* y_length [[buffer(3)]],
    device const float* y_low [[buffer(4)]], device const int* exclude [[buffer(5)]], device float* low [[buffer(6)]],
    device uint* index [[buffer(7)]], device uint* filled [[buffer(8)]], device float* bound [[buffer(9)]],
    constant Sizes& sizes [[buffer(10)]], uint group [[threadgroup_position_in_grid]],
    uint t [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint sg [[simdgroup_index_in_threadgroup]]) {
  threadgroup float4 held[2u * TILE * STEP];  // rows of x and of y, then their products
  threadgroup float* products = (threadgroup float*)held;
  uint first = group / sizes.segments * TILE, segment = group % sizes.segments;
  uint begin = segment * sizes.columns, end = min(sizes.m, begin + sizes.columns);
  uint size[ROWS];
  float most[ROWS];
  for (uint r = 0u; r < ROWS; r++) {
    size[r] = 0u;
    most[r] = FAR;
  }
  uint mine = first + sg * ROWS + lane;  // a lane has the bound of a row, for all
  bool has_row = lane < ROWS && mine < sizes.n;
  float error = has_row ? x_error[mine] : 0.0f;
  int barred = excludes && has_row ? exclude[mine] : -1;
  uint row = sg / 2u * 32u, column = sg % 2u * 32u;
  for (uint j = begin; j < end; j += TILE) {
    Block<4> c;
    clear(c);
    for (uint k = 0u; k < sizes.d; k += DEPTH) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      load_tile(held, x, first, sizes.n, sizes.d, k, t);
      load_tile(held + TILE * STEP, y, j, end, sizes.d, k, t);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      threadgroup const float* left = (threadgroup const float*)held + row * (4u * STEP);
      threadgroup const float* right = (threadgroup const float*)held + (TILE + column) * (4u * STEP);
      if (first + row < sizes.n && j + column < end)
        multiply(c, left, 4u * STEP, 1u, right, 1u, 4u * STEP, min(DEPTH, sizes.d - k), lane);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint m = 0u; m < 4u; m++)
      for (uint n = 0u; n < 4u; n++) {
        uint at = (row + 8u * m + row_in_matrix(lane)) * (TILE + 1u) + column + 8u * n + column_in_matrix(lane);
        products[at] = elements(c.part[m][n]).x;
        products[at + 1u] = elements(c.part[m][n]).y;
      }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint part = 0u; part < TILE; part += 32u) {
      uint other = j + part + lane;
      float least = other < end ? y_low[other] : FAR, length = other < end ? y_length[other] : 0.0f;
      for (uint r = 0u; r < ROWS; r++) {
        uint i = first + sg * ROWS + r;
        if (i >= sizes.n) break;
        ulong list = (ulong(i) * sizes.segments + segment) * sizes.room;
        float product = products[(sg * ROWS + r) * (TILE + 1u) + part + lane];
        float key = least - product - simd_shuffle(error, ushort(r)) * length;
        if (excludes && simd_shuffle(barred, ushort(r)) == int(other)) key = FAR;
        uint joins = other < end && key < most[r] ? 1u : 0u;
        if (size[r] + simd_sum(joins) > sizes.room) {
          most[r] = shrink(low + list, index + list, size[r], sizes.kept, lane);
          size[r] = sizes.kept;
          joins = other < end && key < most[r] ? 1u : 0u;
        }
        uint to = size[r] + simd_prefix_exclusive_sum(joins);
        if (joins != 0u) {
          low[list + to] = key;
          index[list + to] = other;
        }
        size[r] += simd_sum(joins);
      }
    }
  }
  for (uint r = 0u; r < ROWS; r++) {
    uint i = first + sg * ROWS + r;
    if (i >= sizes.n) break;
    ulong list = ulong(i) * sizes.segments + segment;
    if (size[r] > sizes.kept) {
      most[r] = shrink(low + list * sizes.room, index + list * sizes.room, size[r], sizes.kept, lane);
      size[r] = sizes.kept;
    }
    if (lane == 0u) {
      filled[list] = size[r];
      bound[list] = most[r];
    }
  }
}

constant uint GROUP = 4u;  // rows of y that a simdgroup takes at once

struct Rows {
  device const float* row[GROUP];
};

// What is returned of x and each of the rows, computed by a simdgroup; smaller is nearer.
inline void distances_of(
    thread float* values, device const float* x, thread const Rows& y, uint d, float unit, uint lane) {
  float sum[GROUP], squares[GROUP], x_squares = 0.0f;
  for (uint q = 0u; q < GROUP; q++) {
    sum[q] = 0.0f;
    squares[q] = 0.0f;
  }
  for (uint c = lane; c < d; c += 32u) {
    float a = x[c];
    if (by_cosine) x_squares = fma(a, a, x_squares);
    for (uint q = 0u; q < GROUP; q++) {
      float b = y.row[q][c], difference = a - b;
      sum[q] = by_product ? fma(a, b, sum[q]) : fma(difference, difference, sum[q]);
      if (by_cosine) squares[q] = fma(b, b, squares[q]);
    }
  }
  x_squares = by_cosine ? simd_sum(x_squares) : 0.0f;
  for (uint q = 0u; q < GROUP; q++) {
    float total = simd_sum(sum[q]), others = by_cosine ? simd_sum(squares[q]) : 0.0f;
    float zeros = (x_squares == 0.0f ? 1.0f : 0.0f) + (others == 0.0f ? 1.0f : 0.0f);
    if (by_product)
      values[q] = 0.0f - total * unit * unit;
    else if (by_cosine)
      values[q] = 0.5f * (total + zeros);
    else
      values[q] = by_root ? sqrt(total) * unit : total * unit * unit;
  }
}

// Whether no row whose key is `bound` or more can be as near as `value`: `constant_part` of a row of x is what keys lack.
inline bool is_beyond(float bound, float value, float constant_part, float unit, float rounding) {
  if (bound >= FAR) return true;
  if ((as_type<uint>(value) & 0x7f800000u) == 0x7f800000u) return false;
  float half_square = value, lost = 1.2e-38f / unit;  // what vanishes in a distance that is returned
  if (by_root) {
    half_square = value / unit + lost;
    half_square *= 0.5f * half_square;
  } else if (!by_cosine) {
    half_square = by_product ? value / unit / unit : 0.5f * (value / unit / unit);
    half_square += min(lost / unit, FAR);
  }
  float slack = 2.0e-6f * fabs(half_square) + rounding * fabs(constant_part) + 1.0e-30f;
  return half_square - constant_part + slack < bound;
}

// The smallest in front, equal ones by their index.
inline void sort(threadgroup uint* key, threadgroup uint* index, uint size, uint t) {
  uint count = 2u;
  while (count < size) count *= 2u;
  for (uint e = size + t; e < count; e += THREADS) {
    key[e] = NOBODY;
    index[e] = NOBODY;
  }
  for (uint run = 2u; run <= count; run *= 2u)
    for (uint stride = run / 2u; stride > 0u; stride /= 2u) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (uint p = t; p < count / 2u; p += THREADS) {
        uint a = 2u * p - (p & (stride - 1u)), b = a + stride;
        uint a_key = key[a], b_key = key[b], a_index = index[a], b_index = index[b];
        bool swaps = a_key > b_key || (a_key == b_key && a_index > b_index);
        if (swaps == ((a & run) == 0u)) {
          key[a] = b_key;
          key[b] = a_key;
          index[a] = b_index;
          index[b] = a_index;
        }
      }
    }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// A threadgroup takes a row of x: its candidates' distances, in subtracted form; where those may not hold all of the
// nearest, because more are equally near than the rounding of a product can tell, the distances of all rows of y.
[[kernel]] [[max_total_threads_per_threadgroup(128)]] void choose_nearest(
    device const float* x [[buffer(0)]], device const float* y [[buffer(1)]],
    device const float* x_constant [[buffer(2)]], device const float* y_low [[buffer(3)]],
    device const int* exclude [[buffer(4)]], device const float* low [[buffer(5)]],
    device const uint* candidates [[buffer(6)]], device const uint* filled [[buffer(7)]],
    device const float* bound [[buffer(8)]], device const float* unit [[buffer(9)]],
    device float* distances [[buffer(10)]], device int* indices [[buffer(11)]], constant Sizes& sizes [[buffer(12)]],
    constant float& rounding [[buffer(13)]],
    uint i [[threadgroup_position_in_grid]], uint t [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint sg [[simdgroup_index_in_threadgroup]]) {
  threadgroup uint key[SORTED];
  threadgroup uint index[SORTED];
  bool works = x_constant[i] < FAR;  // or the row is not finite
  uint total = 0u, have = 0u;
  float least = FAR, scale = unit[0];
  for (uint s = 0u; works && s < sizes.segments; s++) {
    ulong list = ulong(i) * sizes.segments + s;
    uint size = filled[list];
    for (uint e = t; e < size; e += THREADS) {
      key[total + e] = sortable(low[list * sizes.room + e]);
      index[total + e] = candidates[list * sizes.room + e];
    }
    total += size;
    least = min(least, bound[list]);
  }
  if (total > sizes.kept) {  // of several parts: the best of all
    sort(key, index, total, t);
    least = min(least, unsorted(key[sizes.kept]));
    total = sizes.kept;
  }
  bool all = false;
  for (uint at = 0u; at < total;) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint taken = min(SORTED - have, total - at);
    for (uint e = sg * GROUP; e < taken; e += GROUP * (THREADS / 32u)) {
      Rows rows;
      uint j[GROUP];
      float values[GROUP];
      for (uint q = 0u; q < GROUP; q++) {
        uint last = min(e + q, taken - 1u);
        j[q] = all ? at + last : index[last];
        rows.row[q] = y + ulong(j[q]) * sizes.d;
      }
      distances_of(values, x + ulong(i) * sizes.d, rows, sizes.d, scale, lane);
      for (uint q = 0u; q < GROUP && e + q < taken; q++) {
        bool counts = !all || (y_low[j[q]] < FAR && !(excludes && exclude[i] == int(j[q])));
        if (lane == 0u) {
          key[have + e + q] = counts ? sortable(values[q]) : NOBODY;
          if (all) index[have + e + q] = counts ? j[q] : NOBODY;
        }
      }
    }
    sort(key, index, have + taken, t);
    at += taken;
    have = min(sizes.k, have + taken);
    if (!all && least < FAR) {
      all = !is_beyond(least, unsorted(key[sizes.k - 1u]), x_constant[i], scale, rounding);
      if (all) {
        at = 0u;
        have = 0u;
        total = sizes.m;
      }
    }
  }
  for (uint e = t; e < sizes.k; e += THREADS) {
    bool is = e < have && index[e] != NOBODY;
    float value = is ? unsorted(key[e]) : as_type<float>(0x7fc00000u);
    distances[ulong(i) * sizes.k + e] = by_product && is ? 0.0f - value : value;
    indices[ulong(i) * sizes.k + e] = is ? int(index[e]) : -1;
  }
}

// ---- Sums of a Gaussian kernel over all pairs of rows, and over those of each permutation

constant uint DEALT = TILE + 2u;      // of a row of `dealt`, in 16 bits: another bank for each row
constant float LOSS = 0x1p-10f;       // of a binary logarithm: above, distances of near rows are computed again
constant float NOTHING = -40.0f;      // binary logarithms below are of values that add nothing

struct Samples {
  uint count, d, n, permutations, words;
  uint num_rates;
  uint tiles;  // of a threadgroup
};

// A sum and what its rounding lost, and one value more.
inline float2 add(float2 sum, float x) {
  float high = sum.x + x, part = high - sum.x;
  return float2(high, sum.y + ((sum.x - (high - part)) + (x - part)));
}

// A simdgroup takes a row.
[[kernel]] [[max_total_threads_per_threadgroup(128)]] void half_squares(
    device const float* rows [[buffer(0)]], device float* half_square [[buffer(1)]],
    constant Samples& samples [[buffer(2)]], uint group [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]], uint sg [[simdgroup_index_in_threadgroup]]) {
  uint i = group * (THREADS / 32u) + sg;
  if (i >= samples.count) return;
  device const float* row = rows + ulong(i) * samples.d;
  float sum = 0.0f;
  for (uint c = lane; c < samples.d; c += 32u) sum = fma(row[c], row[c], sum);
  sum = simd_sum(sum);
  if (lane == 0u) half_square[i] = 0.5f * sum;
}

inline float kernel_of(
    float exponent, float error, device const float* x, device const float* y, uint d, constant float* rates,
    uint num_rates) {
  for (uint r = 0u; r < num_rates; r++) {
    if (rates[r] * error <= LOSS) continue;
    if ((exponent + error) * rates[r] > NOTHING) {
      float sum = 0.0f;
      for (uint c = 0u; c < d; c++) sum = fma(x[c] - y[c], x[c] - y[c], sum);
      exponent = -0.5f * sum;
    }
    break;
  }
  exponent = min(exponent, 0.0f);
  float value = 0.0f;
  for (uint r = 0u; r < num_rates; r++) value += exp2(exponent * rates[r]);
  return value;
}

// Which of 32 permutations take a row.
inline uint word_of(device const uint* words, uint row, uint word, constant Samples& samples) {
  return row < samples.count && word < samples.words ? words[ulong(row) * samples.words + word] : 0u;
}
inline float bit_of(threadgroup const uint* chosen, uint row, uint p) {
  return float((chosen[2u * row + p / 32u] >> (p % 32u)) & 1u);
}

// Pairs of blocks of 64 rows, a block with itself and those behind it, a run of them a threadgroup: values of the kernel,
// which no other threadgroup computes, and what they are to the two samples and to each permutation.
[[kernel]] [[max_total_threads_per_threadgroup(128)]] void add_kernels(
    device const float* rows [[buffer(0)]], device const uint* words [[buffer(1)]],
    device const float* half_square [[buffer(2)]], device float2* parts [[buffer(3)]],
    constant float* rates [[buffer(4)]], constant Samples& samples [[buffer(5)]],
    uint group [[threadgroup_position_in_grid]], uint t [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint sg [[simdgroup_index_in_threadgroup]]) {
  threadgroup float4 held[2u * TILE * STEP];  // two blocks of rows, then their products, then kernels
  threadgroup half dealt[TILE * DEALT];       // zeros and ones: rows of a block, permutations
  threadgroup float by_row[THREADS];          // sums of halves of rows
  threadgroup float half_of[TILE];            // the second block's half squares
  threadgroup uint chosen[2u * TILE];         // permutations that take the rows of the first block
  threadgroup float inside[2u * TILE], across[2u * TILE];
  threadgroup float* kernels = (threadgroup float*)held;
  uint size = 3u + 2u * samples.permutations, blocks = (samples.count + TILE - 1u) / TILE;
  device float2* mine = parts + ulong(group) * size;
  for (uint p = t; t < TILE && p < samples.permutations; p += TILE) {
    mine[3u + p] = float2(0.0f);
    mine[3u + samples.permutations + p] = float2(0.0f);
  }
  float2 both = float2(0.0f), between = float2(0.0f), neither = float2(0.0f);
  uint a = 0u, b = group * samples.tiles;  // the group's first pair of blocks
  while (a < blocks && b >= blocks - a) {
    b -= blocks - a;
    a++;
  }
  b += a;
  uint row = sg / 2u * 32u, column = sg % 2u * 32u;
  for (uint tile = 0u; tile < samples.tiles && a < blocks; tile++) {
    uint first = a * TILE, other = b * TILE;
    Block<4> c;
    clear(c);
    for (uint k = 0u; k < samples.d; k += DEPTH) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      load_tile(held, rows, first, samples.count, samples.d, k, t);
      load_tile(held + TILE * STEP, rows, other, samples.count, samples.d, k, t);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      threadgroup const float* left = kernels + row * (4u * STEP);
      threadgroup const float* right = kernels + (TILE + column) * (4u * STEP);
      multiply(c, left, 4u * STEP, 1u, right, 1u, 4u * STEP, min(DEPTH, samples.d - k), lane);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint m = 0u; m < 4u; m++)
      for (uint n = 0u; n < 4u; n++) {
        uint at = (row + 8u * m + row_in_matrix(lane)) * (TILE + 1u) + column + 8u * n + column_in_matrix(lane);
        kernels[at] = elements(c.part[m][n]).x;
        kernels[at + 1u] = elements(c.part[m][n]).y;
      }
    if (t < TILE && other + t < samples.count) half_of[t] = half_square[other + t];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint i = first + t / 2u;
    float h = i < samples.count ? half_square[i] : 0.0f, sums[2] = {0.0f, 0.0f};
    float error_of_row = (sqrt(float(samples.d)) + 8.0f) * 0x1p-22f;
    for (uint e = t % 2u * 32u; e < t % 2u * 32u + 32u; e++) {
      uint j = other + e, at = t / 2u * (TILE + 1u) + e;
      float value = 0.0f;
      if (i < samples.count && j < samples.count && i != j) {
        float g = half_of[e];
        value = kernel_of(
            kernels[at] - h - g, error_of_row * sqrt(h * g), rows + ulong(i) * samples.d, rows + ulong(j) * samples.d,
            samples.d, rates, samples.num_rates);
      }
      kernels[at] = value;
      sums[j < samples.n ? 0u : 1u] += value;
    }
    by_row[t] = sums[0] + sums[1];
    float times = a == b ? 1.0f : 2.0f;
    if (i < samples.n) {
      both = add(both, times * sums[0]);
      between = add(between, sums[1]);
    } else {
      neither = add(neither, times * sums[1]);
    }
    for (uint p = 0u; p < samples.permutations; p += TILE) {
      uint theirs = word_of(words, other + t / 2u, p / 32u + t % 2u, samples);
      for (uint e = 0u; e < 32u; e++) dealt[t / 2u * DEALT + t % 2u * 32u + e] = half((theirs >> e) & 1u);
      chosen[t] = word_of(words, first + t / 2u, p / 32u + t % 2u, samples);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      clear(c);
      multiply(c, (threadgroup const float*)kernels + row * (TILE + 1u), TILE + 1u, 1u,
               (threadgroup const half*)dealt + column, DEALT, 1u, TILE, lane);
      for (uint n = 0u; n < 4u; n++) {
        uint at = column + 8u * n + column_in_matrix(lane);
        float2 in = float2(0.0f), all = float2(0.0f);
        for (uint m = 0u; m < 4u; m++) {
          uint r = row + 8u * m + row_in_matrix(lane);
          float2 v = elements(c.part[m][n]);
          in += v * float2(bit_of(chosen, r, at), bit_of(chosen, r, at + 1u));
          all += v;
        }
        for (uint step = 2u; step <= 16u; step += step == 4u ? 12u : step) {  // lanes of the same columns
          in += simd_shuffle_xor(in, ushort(step));
          all += simd_shuffle_xor(all, ushort(step));
        }
        if ((lane & 22u) == 0u) {
          uint to = sg / 2u * TILE + at;
          inside[to] = in.x;
          inside[to + 1u] = in.y;
          across[to] = all.x;
          across[to + 1u] = all.y;
        }
      }
      float of_rows = 0.0f;
      for (uint r = 0u; t < TILE && r < TILE; r++)
        of_rows += bit_of(chosen, r, t) * (by_row[2u * r] + by_row[2u * r + 1u]);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (t < TILE && p + t < samples.permutations) {
        device float2* within = mine + 3u + p + t;
        device float2* beyond = within + samples.permutations;
        *within = add(*within, times * (inside[t] + inside[TILE + t]));
        *beyond = add(*beyond, of_rows + (a == b ? 0.0f : across[t] + across[TILE + t]));
      }
    }
    b++;
    if (b == blocks) {
      a++;
      b = a;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  threadgroup float2* totals = (threadgroup float2*)held;
  totals[t] = both;
  totals[THREADS + t] = between;
  totals[2u * THREADS + t] = neither;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (t < 3u) {
    float2 total = float2(0.0f);
    for (uint e = 0u; e < THREADS; e++) {
      total = add(total, totals[t * THREADS + e].x);
      total.y += totals[t * THREADS + e].y;
    }
    mine[t] = total;
  }
}

// A thread takes a sum over all threadgroups.
[[kernel]] [[max_total_threads_per_threadgroup(128)]] void add_parts(
    device const float2* parts [[buffer(0)]], device float* out [[buffer(1)]], constant uint& groups [[buffer(2)]],
    constant uint& size [[buffer(3)]], uint k [[thread_position_in_grid]]) {
  if (k >= size) return;
  float2 total = float2(0.0f);
  for (uint g = 0u; g < groups; g++) {
    total = add(total, parts[ulong(g) * size + k].x);
    total.y += parts[ulong(g) * size + k].y;
  }
  out[k] = total.x;
  out[size + k] = total.y;
}
