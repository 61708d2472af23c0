// What a Mac refuses, each behind its own name. `// refused: name` marks the line where the check must say so.
#include <metal_stdlib>
using namespace metal;

struct Params {
  uint n;
  float scale;
};

constant float table[2] = {1.0f, 2.0f};

template <typename T>
T doubled(T x, thread const T* more = nullptr) {
  return more == nullptr ? x * T(2) : x + *more;
}

#ifdef ADDRESS_SPACE
float first(thread const float* v) { return v[0]; }
kernel void k(device float* y [[buffer(0)]]) { y[1] = first(y); }  // refused: ADDRESS_SPACE
#endif

#ifdef WRITE_TO_CONSTANT
kernel void k(constant float* x [[buffer(0)]]) { x[0] = 1.0f; }  // refused: WRITE_TO_CONSTANT
#endif

#ifdef DOUBLE
kernel void k(device float* y [[buffer(0)]]) { y[0] = float(double(y[0]) * 2); }  // refused: DOUBLE
#endif

#ifdef RECURSION
uint factorial(uint n) { return n == 0 ? 1 : n * factorial(n - 1); }  // refused: RECURSION
kernel void k(device uint* y [[buffer(0)]]) { y[0] = factorial(y[0]); }
#endif

#ifdef MUTUAL_RECURSION
uint odd(uint n);
uint even(uint n) { return n == 0 ? 1 : odd(n - 1); }  // refused: MUTUAL_RECURSION
uint odd(uint n) { return n == 0 ? 0 : even(n - 1); }
kernel void k(device uint* y [[buffer(0)]]) { y[0] = even(y[0]); }
#endif

#ifdef UNQUALIFIED_POINTER
float first(const float* v) { return v[0]; }  // refused: UNQUALIFIED_POINTER
kernel void k(device float* y [[buffer(0)]]) {
  float v[2] = {y[0], y[1]};
  y[0] = first(v);
}
#endif

#ifdef UNQUALIFIED_REFERENCE
void add(thread float& to, const Params& p) { to += p.scale; }  // refused: UNQUALIFIED_REFERENCE
kernel void k(device float* y [[buffer(0)]]) {
  Params p = {1, 2.0f};
  float v = y[0];
  add(v, p);
  y[0] = v;
}
#endif

#ifdef UNQUALIFIED_VECTOR_REFERENCE
void clear(vec<float, 4>& v) { v = float4(0.0f); }  // refused: UNQUALIFIED_VECTOR_REFERENCE
kernel void k(device float* y [[buffer(0)]]) {
  float4 v;
  clear(v);
  y[0] = v.x;
}
#endif

#ifdef UNQUALIFIED_ARRAY_REFERENCE
void clear(float (&v)[2]) { v[0] = v[1] = 0.0f; }  // refused: UNQUALIFIED_ARRAY_REFERENCE
kernel void k(device float* y [[buffer(0)]]) {
  float v[2];
  clear(v);
  y[0] = v[0];
}
#endif

#ifdef UNQUALIFIED_ARRAY
float sum(float x, const float v[2]) { return x + v[0] + v[1]; }  // refused: UNQUALIFIED_ARRAY
kernel void k(device float* y [[buffer(0)]]) {
  float v[2] = {1.0f, 2.0f};
  y[0] = sum(y[0], v);
}
#endif

#ifdef UNQUALIFIED_CAST
kernel void k(device float* y [[buffer(0)]]) {
  uint bits = 1;
  y[0] = *(float*)&bits;  // refused: UNQUALIFIED_CAST
}
#endif

#ifdef UNQUALIFIED_IN_A_MACRO
#define FIRST(T) \
  T first(const T* v) { return v[0]; }
FIRST(float)  // refused: UNQUALIFIED_IN_A_MACRO
kernel void k(device float* y [[buffer(0)]]) {
  float v[2] = {y[0], y[1]};
  y[0] = first(v);
}
#endif

#ifdef VECTOR_OF_32_BYTES
kernel void k(device ulong4* y [[buffer(0)]]) { y[0] = y[1]; }  // refused: VECTOR_OF_32_BYTES
#endif

#ifdef VEC_OF_32_BYTES
kernel void k(device vec<long, 4>* y [[buffer(0)]]) { y[0] = y[1]; }  // refused: VEC_OF_32_BYTES
#endif

#ifdef LAMBDA
kernel void k(device float* y [[buffer(0)]]) {
  auto f = [](float x) { return x + 1.0f; };  // refused: LAMBDA
  y[0] = f(y[0]);
}
#endif

#ifdef IF_CONSTEXPR
template <typename T>
T half_of(T x) {
  if constexpr (sizeof(T) == 4) return x / 2;  // refused: IF_CONSTEXPR
  return x;
}
kernel void k(device float* y [[buffer(0)]]) { y[0] = half_of(y[0]); }
#endif

#ifdef STRUCTURED_BINDING
kernel void k(device float* y [[buffer(0)]]) {
  Params p = {1, 2.0f};
  auto [n, scale] = p;  // refused: STRUCTURED_BINDING
  y[0] = scale * n;
}
#endif

#ifdef FOLD
template <typename... T>
float sum(T... x) {
  return (x + ...);  // refused: FOLD
}
kernel void k(device float* y [[buffer(0)]]) { y[0] = sum(y[1], y[2]); }
#endif

#ifdef VIRTUAL
struct Base {
  virtual float f() { return 1.0f; }  // refused: VIRTUAL
};
kernel void k(device float* y [[buffer(0)]]) { y[0] = Base().f(); }
#endif

#ifdef NEW
kernel void k(device float* y [[buffer(0)]]) {
  thread float* v = new float[2];  // refused: NEW
  y[0] = v[0];
}
#endif

#ifdef GOTO
kernel void k(device float* y [[buffer(0)]]) {
again:
  y[0] += 1.0f;
  if (y[0] < 3.0f) goto again;  // refused: GOTO
}
#endif

#ifdef STANDARD_LIBRARY
kernel void k(device float* y [[buffer(0)]]) { y[0] = std::numeric_limits<float>::max(); }  // refused: STANDARD_LIBRARY
#endif

#ifdef STRING
kernel void k(device uint* y [[buffer(0)]]) { y[0] = "text"[y[0]]; }  // refused: STRING
#endif

#ifdef PROGRAM_VARIABLE
float limit = 3.0f;  // refused: PROGRAM_VARIABLE
kernel void k(device float* y [[buffer(0)]]) { y[0] = limit; }
#endif

#ifdef CONSTEXPR_PROGRAM_VARIABLE
namespace inner {
constexpr uint limits[2] = {3, 4};  // refused: CONSTEXPR_PROGRAM_VARIABLE
}
kernel void k(device uint* y [[buffer(0)]]) { y[0] = inner::limits[y[0]]; }
#endif

#ifdef STATIC_VARIABLE
kernel void k(device float* y [[buffer(0)]]) {
  static float calls = 0.0f;  // refused: STATIC_VARIABLE
  y[0] = calls += 1.0f;
}
#endif

#ifdef STATIC_MEMBER
struct Tile {
  static constexpr int width = 4;  // refused: STATIC_MEMBER
};
kernel void k(device float* y [[buffer(0)]]) { y[0] = Tile::width; }
#endif

#ifdef NARROWING
kernel void k(device bfloat* y [[buffer(0)]], constant float& x [[buffer(1)]]) { y[0] = x; }  // refused: NARROWING
#endif

#ifdef COMPILERS_OWN
kernel void k(device uint* y [[buffer(0)]]) { y[0] = __builtin_popcount(y[1]); }  // refused: COMPILERS_OWN
#endif

#ifdef UNKNOWN_ATTRIBUTE
kernel void k(device float* y [[buffer(0)]]) {
  if (y[0] > 0.0f) [[likely]]  // refused: UNKNOWN_ATTRIBUTE
    y[0] = 1.0f;
}
#endif

#ifdef LONG_DOUBLE
kernel void k(device float* y [[buffer(0)]]) { y[0] = 1.0l; }  // refused: LONG_DOUBLE
#endif
