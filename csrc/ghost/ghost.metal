#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

constant bool segmented [[function_constant(0)]];  // a unit is all samples of an id, not one
constant bool masked [[function_constant(1)]];
constant bool has_bias [[function_constant(2)]];
constant bool by_token [[function_constant(3)]];  // there is no x: two rows of equal tokens have the product 1, others 0

constant uint THREADS = 128u;  // four simdgroups, each with a quarter of a tile
constant uint DEPTH = 32u;     // columns, or rows, that a product takes at once
constant uint NOWHERE = 0xffffffffu;

struct Sizes {
  uint batch, rows, units;  // rows: of a sample
  uint d, p;                // columns of x and dy
  uint tiles;               // Gram: of a sample's rows; direct: of a gradient
  uint across;              // direct: of a gradient's columns
};

// ---- Units

// order: the samples of unit 0, of unit 1, ...; start[u]: where those of unit u begin. A thread finds one unit.
[[kernel]] void order_units(
    device const int* segments [[buffer(0)]], device uint* order [[buffer(1)]], device uint* start [[buffer(2)]],
    constant Sizes& sizes [[buffer(3)]], uint unit [[thread_position_in_grid]]) {
  if (unit > sizes.units) return;
  uint at = 0u;
  for (uint b = 0u; b < sizes.batch; b++) at += uint(segments[b]) < unit ? 1u : 0u;
  start[unit] = at;
  if (unit == sizes.units) return;
  for (uint b = 0u; b < sizes.batch; b++)
    if (uint(segments[b]) == unit) order[at++] = b;
}

// Where row r of the unit that starts at `first` stands in memory, or NOWHERE.
inline uint row_of(
    uint first, uint r, uint rows, device const uint* order, device const uchar* mask, device const int* tokens,
    constant Sizes& sizes) {
  if (r >= rows) return NOWHERE;
  uint sample = segmented ? order[first + r / sizes.rows] : first, row = sample * sizes.rows + r % sizes.rows;
  if (masked && mask[row] == 0u) return NOWHERE;
  if (by_token && tokens[row] < 0) return NOWHERE;
  return row;
}

#include "matrix.metal"

// ---- Loads into threadgroup memory

inline float4 quad(device const float* x) { return float4(*(device const packed_float4*)x); }
inline half4 quad(device const half* x) { return half4(*(device const packed_half4*)x); }
inline bfloat4 quad(device const bfloat* x) { return bfloat4(*(device const packed_bfloat4*)x); }

// Columns column .. column + 3 of a row, zeros where there are none.
template <typename T>
inline vec<T, 4> four(device const T* x, uint width, uint row, uint column) {
  vec<T, 4> v = vec<T, 4>(T(0.0f));
  if (row == NOWHERE) return v;
  x += ulong(row) * width;
  if (column + 4u <= width) return quad(x + column);
  for (uint k = 0u; column + k < width; k++) v[k] = x[column + k];
  return v;
}

// to[i] = columns [column, column + `columns`) of row from[i].
template <typename T>
inline void load_rows(
    threadgroup vec<T, 4>* to, uint step, device const T* x, uint width, threadgroup const uint* from, uint count,
    uint column, uint columns, bool ones, uint t) {
  uint quads = columns / 4u;
  for (uint i = t; i < count * quads; i += THREADS) {
    uint r = i / quads, c = column + i % quads * 4u;
    vec<T, 4> v = four(x, width, from[r], c);
    if (ones && from[r] != NOWHERE && c <= width && width < c + 4u) v[width - c] = T(1.0f);
    to[r * step + i % quads] = v;
  }
}

// The sum over the threads of a threadgroup, for the first of them.
inline float sum_of_threads(float sum, threadgroup float* scratch, uint t, uint lane, uint sg) {
  sum = simd_sum(sum);
  if (lane == 0u) scratch[sg] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return t == 0u ? (scratch[0] + scratch[1]) + (scratch[2] + scratch[3]) : 0.0f;
}

// ---- Norms from Gram matrices

// partial[group] = sum of (x_r . x_s + bias) (dy_r . dy_s) over a tile of rows r and one of rows s of a unit, none of
// them above the diagonal: those below count twice. Where there are segments, over all tiles of rows s up to r's.
template <typename T, uint N>
[[kernel]] [[max_total_threads_per_threadgroup(128)]] void gram(
    device const T* x [[buffer(0)]], device const T* dy [[buffer(1)]], device const uchar* mask [[buffer(2)]],
    device const int* tokens [[buffer(3)]], device const int* segments [[buffer(4)]],
    device const uint* order [[buffer(5)]], device const uint* start [[buffer(6)]],
    device float* partial [[buffer(7)]], constant Sizes& sizes [[buffer(8)]],
    uint group [[threadgroup_position_in_grid]], uint t [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint sg [[simdgroup_index_in_threadgroup]]) {
  constexpr uint TILE = 16u * N, STEP = DEPTH / 4u + 1u;
  threadgroup vec<T, 4> held[2u * TILE * STEP];
  threadgroup uint from[2u * TILE];
  threadgroup int token[2u * TILE];
  threadgroup float scratch[THREADS / 32u];
  threadgroup bool found[THREADS / 32u];
  uint first, rows = sizes.rows, i, begin, end;  // the tile of rows r, and those of rows s
  if (segmented) {
    uint position = group / sizes.tiles;
    bool exists = position < start[sizes.units];
    uint unit = exists ? uint(segments[order[position]]) : 0u;
    first = start[unit];
    uint base = (position - first) * sizes.rows;  // a threadgroup has the tiles that begin in its sample
    i = (base + TILE - 1u) / TILE + group % sizes.tiles;
    rows *= start[unit + 1u] - first;
    begin = 0u;
    end = exists && i * TILE < base + sizes.rows ? i + 1u : 0u;
  } else {
    uint pairs = sizes.tiles * (sizes.tiles + 1u) / 2u, pair = group % pairs;
    first = group / pairs;
    i = 0u;
    while ((i + 1u) * (i + 2u) / 2u <= pair) i++;
    begin = pair - i * (i + 1u) / 2u;
    end = begin + 1u;
  }
  uint row = sg / 2u * (8u * N), column = sg % 2u * (8u * N);
  float sum = 0.0f;
  for (uint j = begin; j < end; j++) {
    if (by_token && j > begin) threadgroup_barrier(mem_flags::mem_threadgroup);
    uint held_rows = i == j ? TILE : 2u * TILE, other = held_rows - TILE;
    for (uint r = t; r < held_rows; r += THREADS) {
      uint at = row_of(first, r < TILE ? i * TILE + r : j * TILE + r - TILE, rows, order, mask, tokens, sizes);
      from[r] = at;
      if (by_token) token[r] = at == NOWHERE ? -1 : tokens[at];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (by_token) {
      bool equal = false;
      for (uint k = t; k < TILE * TILE; k += THREADS)
        equal = equal || (token[k / TILE] >= 0 && token[k / TILE] == token[other + k % TILE]);
      equal = simd_any(equal);
      if (lane == 0u) found[sg] = equal;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (!(found[0] || found[1] || found[2] || found[3])) continue;
    }
    bool works = i * TILE + row < rows && j * TILE + column < rows && !(i == j && row < column);
    threadgroup const T* left = (threadgroup const T*)held + row * (4u * STEP);
    threadgroup const T* right = (threadgroup const T*)held + (other + column) * (4u * STEP);
    Block<N> a, b;
    clear(a);
    clear(b);
    for (uint k = 0u; !by_token && k < sizes.d; k += DEPTH) {
      load_rows(held, STEP, x, sizes.d, from, held_rows, k, DEPTH, false, t);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (works) multiply(a, left, 4u * STEP, 1u, right, 1u, 4u * STEP, min(DEPTH, sizes.d - k), lane);
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    for (uint k = 0u; k < sizes.p; k += DEPTH) {
      load_rows(held, STEP, dy, sizes.p, from, held_rows, k, DEPTH, false, t);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (works) multiply(b, left, 4u * STEP, 1u, right, 1u, 4u * STEP, min(DEPTH, sizes.p - k), lane);
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (!works) continue;
    float weight = i == j && row == column ? 1.0f : 2.0f;
    for (uint m = 0u; m < N; m++)
      for (uint n = 0u; n < N; n++) {
        float2 u = elements(a.part[m][n]) + float(has_bias), v = elements(b.part[m][n]);
        if (by_token) {
          uint r = row + 8u * m + row_in_matrix(lane), s = other + column + 8u * n + column_in_matrix(lane);
          u = float2(token[r] == token[s] ? 1.0f : 0.0f, token[r] == token[s + 1u] ? 1.0f : 0.0f);
        }
        sum = fma(weight, fma(u.x, v.x, u.y * v.y), sum);
      }
  }
  sum = sum_of_threads(sum, scratch, t, lane, sg);
  if (t == 0u) partial[group] = sum;
}

// ---- Norms of gradients

// partial[group] = sum of squares of a tile of the gradient dy^T x of a unit; the column behind those of x is the bias's.
template <typename T, uint N>
[[kernel]] [[max_total_threads_per_threadgroup(128)]] void direct(
    device const T* x [[buffer(0)]], device const T* dy [[buffer(1)]], device const uchar* mask [[buffer(2)]],
    device const int* tokens [[buffer(3)]], device const int* segments [[buffer(4)]],
    device const uint* order [[buffer(5)]], device const uint* start [[buffer(6)]],
    device float* partial [[buffer(7)]], constant Sizes& sizes [[buffer(8)]],
    uint group [[threadgroup_position_in_grid]], uint t [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint sg [[simdgroup_index_in_threadgroup]]) {
  constexpr uint TILE = 16u * N, STEP = TILE / 4u + 1u;
  threadgroup vec<T, 4> held[2u * DEPTH * STEP];
  threadgroup uint from[DEPTH];
  threadgroup float scratch[THREADS / 32u];
  uint unit = group / sizes.tiles, tile = group % sizes.tiles, first = unit, rows = sizes.rows;
  uint down = tile / sizes.across * TILE, along = tile % sizes.across * TILE;
  if (segmented) {
    first = start[unit];
    rows *= start[unit + 1u] - first;
  }
  uint row = sg / 2u * (8u * N), column = sg % 2u * (8u * N);
  bool works = down + row < sizes.p && along + column < sizes.d + uint(has_bias);
  threadgroup const T* left = (threadgroup const T*)held + row;
  threadgroup const T* right = (threadgroup const T*)(held + DEPTH * STEP) + column;
  Block<N> c;
  clear(c);
  for (uint r = 0u; r < rows; r += DEPTH) {
    if (t < DEPTH) from[t] = row_of(first, r + t, rows, order, mask, tokens, sizes);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    load_rows(held, STEP, dy, sizes.p, from, DEPTH, down, TILE, false, t);
    load_rows(held + DEPTH * STEP, STEP, x, sizes.d, from, DEPTH, along, TILE, has_bias, t);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (works) multiply(c, left, 1u, 4u * STEP, right, 4u * STEP, 1u, min(DEPTH, rows - r), lane);
  }
  float sum = 0.0f;
  for (uint m = 0u; works && m < N; m++)
    for (uint n = 0u; n < N; n++) {
      float2 v = elements(c.part[m][n]);
      sum = fma(v.x, v.x, fma(v.y, v.y, sum));
    }
  sum = sum_of_threads(sum, scratch, t, lane, sg);
  if (t == 0u) partial[group] = sum;
}

// ---- Norms of samples of one row: a simdgroup has a sample

template <typename T>
inline float sum_of_squares(device const T* x, uint n, uint lane) {
  float sum = 0.0f;
  for (uint i = lane; i < n / 4u; i += 32u) {
    float4 v = float4(quad(x + 4u * i));
    v *= v;
    sum += (v.x + v.y) + (v.z + v.w);
  }
  uint i = n / 4u * 4u + lane;
  if (i < n) sum = fma(float(x[i]), float(x[i]), sum);
  return simd_sum(sum);
}

template <typename T>
[[kernel]] void outer(
    device const T* x [[buffer(0)]], device const T* dy [[buffer(1)]], device const uchar* mask [[buffer(2)]],
    device float* out [[buffer(3)]], constant Sizes& sizes [[buffer(4)]], uint i [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  uint sample = i / 32u;
  if (sample >= sizes.batch) return;
  float norm = 0.0f;
  if (!masked || mask[sample] != 0u)
    norm = (sum_of_squares(x + ulong(sample) * sizes.d, sizes.d, lane) + float(has_bias)) *
           sum_of_squares(dy + ulong(sample) * sizes.p, sizes.p, lane);
  if (lane == 0u) out[sample] = norm;
}

// ---- Sums of partial results

inline bool is_finite(float x) { return (as_type<uint>(x) & 0x7f800000u) != 0x7f800000u; }

// out[unit] = sum of the unit's partial results: `each` a unit, or a sample of it. A simdgroup has a unit.
[[kernel]] void add_partial(
    device const float* partial [[buffer(0)]], device float* out [[buffer(1)]],
    device const uint* start [[buffer(2)]], constant uint& units [[buffer(3)]], constant uint& each [[buffer(4)]],
    uint i [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  uint unit = i / 32u;
  if (unit >= units) return;
  ulong from = ulong(segmented ? start[unit] : unit) * each, to = ulong(segmented ? start[unit + 1u] : unit + 1u) * each;
  float sum = 0.0f, lost = 0.0f;
  for (ulong k = from + lane; k < to; k += 32u) {
    float x = partial[k], total = sum + x, kept = total - sum;
    lost += (sum - (total - kept)) + (x - kept);
    sum = total;
  }
  sum = simd_sum(is_finite(sum) ? sum + lost : sum);
  uint bits = as_type<uint>(sum);
  if (bits == 0xff800000u) bits = 0x7fc00000u;           // nothing is known of a sum of -infinity
  if (bits > 0x80000000u && bits < 0xff800000u) bits = 0u;  // products of both signs can end below 0
  if (lane == 0u) out[unit] = as_type<float>(bits);
}

#define INSTANTIATE(name, type) \
  template [[host_name("gram_32_" #name)]] [[kernel]] decltype(gram<type, 2>) gram<type, 2>; \
  template [[host_name("gram_64_" #name)]] [[kernel]] decltype(gram<type, 4>) gram<type, 4>; \
  template [[host_name("direct_32_" #name)]] [[kernel]] decltype(direct<type, 2>) direct<type, 2>; \
  template [[host_name("direct_64_" #name)]] [[kernel]] decltype(direct<type, 4>) direct<type, 4>; \
  template [[host_name("outer_" #name)]] [[kernel]] decltype(outer<type>) outer<type>;
INSTANTIATE(float32, float)
INSTANTIATE(float16, half)
INSTANTIATE(bfloat16, bfloat)
