#include "step/step_simd.h"

#include <string.h>

#include "noise/normals_simd.h"

namespace bulwark::BULWARK_ISA {
namespace {
INLINE Floats magnitude(Floats v) { return (Floats)((Words)v & 0x7fffffffu); }
INLINE Floats usable(Floats g) { return magnitude(g) < __builtin_inff() ? g : Floats{}; }  // what is finite
INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
INLINE Floats clipped(Floats v, Floats low, Floats high) {
  v = v < low ? low : v;  // NaN stays
  return v > high ? high : v;
}

template <Float F, typename T = typename Stored<F>::type>
INLINE Floats load(const T* p, size_t n) {  // the first n lanes; zeros behind them
  if (n >= size_t(LANES)) return Stored<F>::load(p);
  T some[LANES] = {};
  memcpy(some, p, n * sizeof(T));
  return Stored<F>::load(some);
}

// Stores v as the dtype rounds it, but no further from the origin than v is.
template <Float F, typename T = typename Stored<F>::type>
INLINE void store(T* p, size_t n, Floats v, Floats origin) {
  T some[LANES];
  Stored<F>::store(some, v);
  if (F != Float::f32) {
    const Floats near = Stored<F>::load(some);
    const Ints beyond = (magnitude(near - origin) > magnitude(v - origin)) & (near != 0.0f);
    for (int k = 0; k < LANES; k++)
      if (beyond[k]) some[k] += (near[k] > origin[k]) == (near[k] > 0) ? -1 : 1;  // the magnitude's bits
  }
  memcpy(p, some, (n < size_t(LANES) ? n : LANES) * sizeof(T));
}

// A sum in float32 over short runs, and in double over these.
class Sum {
 public:
  INLINE void add(Floats v) {
    run_ += v;
    if (++length_ == 16) end();
  }
  double total() {
    end();
    return total_;
  }

 private:
  void end() {
    for (int k = 0; k < LANES; k++) total_ += run_[k];
    run_ = Floats{};
    length_ = 0;
  }
  Floats run_ = {};
  int length_ = 0;
  double total_ = 0;
};

template <Float F, typename T = typename Stored<F>::type>
void linf(const Step& s, const void* xs, const void* gs, const void* os, void* ys, size_t n, float*) {
  const T *x = (const T*)xs, *g = (const T*)gs, *o = (const T*)os;
  T* y = (T*)ys;
  const Floats low = Floats{} + s.low, high = Floats{} + s.high;
  for (size_t i = 0; i < n; i += LANES) {
    const Floats d = usable(load<F>(g + i, n - i)), origin = load<F>(o + i, n - i);
    const Words negative = (Words)d & 0x80000000u;
    const Floats step = d == 0.0f ? Floats{} : (Floats)((Words)(Floats{} + s.alpha) | negative);
    Floats v = load<F>(x + i, n - i) + step;
    v = clipped(clipped(v, origin - s.eps, origin + s.eps), low, high);
    store<F>(y + i, n - i, v, origin);
  }
}

// moved = x - o + alpha g / |g|, with the largest value of g taken out first: the squares of small gradients vanish.
template <Float F, Norm N, typename T = typename Stored<F>::type>
void move(const Step& s, const T* x, const T* g, const T* o, size_t n, float* moved) {
  Floats most{};
  for (size_t i = 0; i < n; i += LANES) most = larger(magnitude(usable(load<F>(g + i, n - i))), most);
  float largest = 0;
  for (int k = 0; k < LANES; k++) largest = most[k] > largest ? most[k] : largest;
  if (largest == 0) largest = 1;
  Sum sum;
  for (size_t i = 0; i < n; i += LANES) {
    const Floats d = usable(load<F>(g + i, n - i)) / largest;
    sum.add(N == Norm::l2 ? d * d : magnitude(d));
  }
  const double total = sum.total(), length = N == Norm::l2 ? __builtin_sqrt(total) : total;
  const float factor = length == 0 ? 0.0f : float(s.alpha / length);
  for (size_t i = 0; i < n; i += LANES) {
    const Floats step = usable(load<F>(g + i, n - i)) / largest * factor;
    const Floats d = load<F>(x + i, n - i) - load<F>(o + i, n - i) + step;
    memcpy(moved + i, &d, sizeof d);
  }
}

template <Float F, typename T = typename Stored<F>::type>
void l2(const Step& s, const void* x, const void* g, const void* os, void* ys, size_t n, float* moved) {
  const T* o = (const T*)os;
  T* y = (T*)ys;
  move<F, Norm::l2>(s, (const T*)x, (const T*)g, o, n, moved);
  Sum sum;
  for (size_t i = 0; i < n; i += LANES) {
    const Floats d = load_bits<Floats>(moved + i);
    sum.add(d * d);
  }
  const double length = __builtin_sqrt(sum.total());
  const float factor = length > s.eps ? float(s.eps / length) : 1.0f;
  const Floats low = Floats{} + s.low, high = Floats{} + s.high;
  for (size_t i = 0; i < n; i += LANES) {
    const Floats origin = load<F>(o + i, n - i);
    store<F>(y + i, n - i, clipped(origin + load_bits<Floats>(moved + i) * factor, low, high), origin);
  }
}

INLINE Floats shrunk(Floats moved, Floats origin, const Step& s, float threshold) {
  const Floats room = larger(moved < 0.0f ? origin - s.low : s.high - origin, Floats{});
  return smaller(larger(magnitude(moved) - threshold, Floats{}), room);
}

// The least threshold by which coordinates shrink until their sum is eps: the root of a falling function of straight
// pieces, by Newton's steps inside a bracket.
template <Float F, typename T = typename Stored<F>::type>
float threshold_of(const Step& s, const T* o, size_t n, const float* moved) {
  Floats most{};
  for (size_t i = 0; i < n; i += LANES) most = larger(magnitude(load_bits<Floats>(moved + i)), most);
  float low = 0, high = 0, at = 0;
  for (int k = 0; k < LANES; k++) high = most[k] > high ? most[k] : high;
  for (int pass = 0; pass < 64; pass++) {
    Sum sum;
    Ints falling{};
    for (size_t i = 0; i < n; i += LANES) {
      const Floats m = load_bits<Floats>(moved + i), left = shrunk(m, load<F>(o + i, n - i), s, at);
      sum.add(left);
      falling -= (left > 0.0f) & (left == magnitude(m) - at);
    }
    const double excess = sum.total() - s.eps;
    double count = 0;
    for (int k = 0; k < LANES; k++) count += falling[k];
    if (pass == 0 && !(excess > 0)) return 0;
    (excess > 0 ? low : high) = at;
    if (excess <= 0 && excess >= -1e-7 * s.eps) return at;
    float next = float(at + excess / count);
    if (!(next > low && next < high)) next = low + (high - low) / 2;
    if (!(next > low && next < high)) break;
    at = next;
  }
  return high;
}

template <Float F, typename T = typename Stored<F>::type>
void l1(const Step& s, const void* x, const void* g, const void* os, void* ys, size_t n, float* moved) {
  const T* o = (const T*)os;
  T* y = (T*)ys;
  move<F, Norm::l1>(s, (const T*)x, (const T*)g, o, n, moved);
  const float threshold = threshold_of<F>(s, o, n, moved);
  const Floats low = Floats{} + s.low, high = Floats{} + s.high;
  for (size_t i = 0; i < n; i += LANES) {
    const Floats m = load_bits<Floats>(moved + i), origin = load<F>(o + i, n - i);
    const Floats left = shrunk(m, origin, s, threshold);
    const Floats v = m == m ? origin + (m < 0.0f ? -left : left) : m;
    store<F>(y + i, n - i, clipped(v, low, high), origin);
  }
}
}  // namespace

const StepKernels step_kernels{{{linf<Float::f32>, linf<Float::f16>, linf<Float::bf16>},
                                {l2<Float::f32>, l2<Float::f16>, l2<Float::bf16>},
                                {l1<Float::f32>, l1<Float::f16>, l1<Float::bf16>}}};
}  // namespace bulwark::BULWARK_ISA
