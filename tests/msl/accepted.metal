// What the checks must not refuse.
#include <metal_simdgroup>
#include <metal_stdlib>
using namespace metal;

constant constexpr uint width = 4;
constant bool scaled [[function_constant(0)]];
static constant constexpr float factors[2] = {0.5f, 2.0f};

struct Params {
  uint n;
  float scale;
};

template <typename T, int N>
struct Tile {
  static constant constexpr int size = N;
  T values[N];
  thread T& operator[](int i) thread { return values[i]; }
  T operator()(int i, T other = T(0)) const thread { return i < N && i >= 0 ? values[i] : other; }
  bool operator==(const thread Tile<T, N>& o) const thread { return values[0] == o.values[0]; }
};

template <typename T>
METAL_FUNC vec<T, 4> load(device const vec<T, 4>* x, uint i, constant Params& p) {
  return i * width < p.n ? x[i] : vec<T, 4>(T(0));
}

inline void add(thread float4& to, float4 v) { to = to * 1.0f + v; }
inline float first(thread float (&v)[2], thread const float w[2]) { return v[0] + w[int(v[1])]; }
inline float product(uint a, float b) { return a * b; }

template <typename T>
[[kernel]] void scale(
    device const vec<T, 4>* x [[buffer(0)]], device vec<T, 4>* y [[buffer(1)]], constant Params& p [[buffer(2)]],
    device atomic_uint* count [[buffer(3)]], threadgroup float4* shared [[threadgroup(0)]],
    uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]]) {
  threadgroup uint sums[32];
  Tile<float, 2> tile;
  for (int k = 0; k < Tile<float, 2>::size; k++) tile[k] = factors[k];
  float4 v = float4(load(x, i, p));
  shared[t] = v * (scaled ? p.scale : tile(1));
  sums[t & 31] = 0u;
  threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
  threadgroup const float4* from = shared + t;
  float4 sum = float4(0.0f);
  float pair[2] = {1.0f, 0.0f}, other[2] = {pair[1], pair[0]};
  pair[0] = first(pair, other);
  add(sum, *from);
  thread float* first = (thread float*)&sum;
  if (i * width < p.n && (t & 1u) == (i & 1u)) y[i] = vec<T, 4>(sum * product(2u, 0.5f) + first[0] * 0.0f);
  if (simd_sum(t) > 0u && t == 0u) atomic_fetch_add_explicit(count, 1u, memory_order_relaxed);
}

#define INSTANTIATE(name, type) \
  template [[host_name("scale_" #name)]] [[kernel]] decltype(scale<type>) scale<type>;
INSTANTIATE(float32, float)
INSTANTIATE(float16, half)
INSTANTIATE(bfloat16, bfloat)
