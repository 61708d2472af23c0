#include <metal_stdlib>
using namespace metal;

constant uint ZSCORE_THREADS = 256u;  // tails_metal.cpp has these too

// y = (x - center) / scale, 0 where both are 0.
template <typename T>
[[kernel]] void robust_zscore(
    device const T* x [[buffer(0)]], device const float* center [[buffer(1)]], device const float* scale [[buffer(2)]],
    device float* y [[buffer(3)]], constant uint& columns [[buffer(4)]], constant uint& rows_each [[buffer(5)]],
    constant uint& rows [[buffer(6)]], constant uint& groups_across [[buffer(7)]],
    uint group [[threadgroup_position_in_grid]], uint t [[thread_index_in_threadgroup]]) {
  uint column = group % groups_across * ZSCORE_THREADS + t;
  if (column >= columns) return;
  float c = center[column], s = scale[column];
  uint from = group / groups_across * rows_each, to = min(from + rows_each, rows);
  for (uint r = from; r < to; r++) {
    ulong at = ulong(r) * columns + column;
    float off = float(x[at]) - c;
    y[at] = off == 0.0f && s == 0.0f ? 0.0f : precise::divide(off, s);
  }
}

#define INSTANTIATE(name, type) \
  template [[host_name("robust_zscore_" #name)]] [[kernel]] decltype(robust_zscore<type>) robust_zscore<type>;
INSTANTIATE(float32, float)
INSTANTIATE(float16, half)
INSTANTIATE(bfloat16, bfloat)
