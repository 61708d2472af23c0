// ---- Products of 8x8 matrices, by four simdgroups. A simdgroup has a block of 8N x 8N of a tile of 16N x 16N.

template <uint N>
struct Block {
  simdgroup_float8x8 part[N][N];
};

template <uint N>
inline void clear(thread Block<N>& c) {
  for (uint i = 0u; i < N; i++)
    for (uint j = 0u; j < N; j++) c.part[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
}

// A lane has two elements of a matrix that stand side by side: these are the row and column of the first.
inline uint row_in_matrix(uint lane) { return ((lane >> 2) & 4u) | ((lane >> 1) & 3u); }
inline uint column_in_matrix(uint lane) { return ((lane >> 1) & 4u) | ((lane & 1u) << 1); }
inline thread float2& elements(thread simdgroup_float8x8& m) {
  return reinterpret_cast<thread float2&>(m.thread_elements());
}

template <typename T>
inline void load(thread simdgroup_float8x8& m, threadgroup const T* x, uint row_step, uint column_step, uint lane) {
  x += row_in_matrix(lane) * row_step + column_in_matrix(lane) * column_step;
  elements(m) = float2(float(x[0]), float(x[column_step]));
}

// c += a b, over `depth` columns of a, which are rows of b.
template <typename T, typename U, uint N>
inline void multiply(
    thread Block<N>& c, threadgroup const T* a, uint a_row, uint a_column, threadgroup const U* b, uint b_row,
    uint b_column, uint depth, uint lane) {
  for (uint k = 0u; k < depth; k += 8u) {
    simdgroup_float8x8 left[N], right[N];
    for (uint i = 0u; i < N; i++) load(left[i], a + 8u * i * a_row + k * a_column, a_row, a_column, lane);
    for (uint j = 0u; j < N; j++) load(right[j], b + k * b_row + 8u * j * b_column, b_row, b_column, lane);
    for (uint i = 0u; i < N; i++)
      for (uint j = 0u; j < N; j++) simdgroup_multiply_accumulate(c.part[i][j], left[i], right[j], c.part[i][j]);
  }
}
