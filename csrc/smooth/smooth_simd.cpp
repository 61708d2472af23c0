#include "smooth/smooth_simd.h"

#include <float.h>
#include <string.h>

#include "noise/normals_simd.h"

namespace bulwark::BULWARK_ISA {
namespace {
// ---- Noisy copies

enum class Draw { none, gaussian, uniform };

// Multiples of sqrt(3) 2^-24 by odd numbers: symmetric, of variance 1, and never 0.
INLINE Floats uniform(Words w) { return to_float(((Ints)w >> 8) * 2 + 1) * 0x1.bb67aep-24f; }

INLINE Floats limited(const Limits& l, Floats v) {
  v = v < l.low ? Floats{} + l.low : v;  // NaN stays
  v = v > l.high ? Floats{} + l.high : v;
  if (l.steps == 0) return v;
  constexpr float ROUND = 0x1.8p23f;  // to the nearest integer, ties to even, below 2^22
  return ((v - l.low) * l.scale + ROUND - ROUND) * l.width / l.steps + l.low;
}

template <Float F, Draw D, bool BOUNDED, typename T = typename Stored<F>::type>
INLINE void add_tile(const Constants& s, float sigma, const Limits& l, uint64_t counter, const T* x, T* y) {
  for (int lane = 0; lane < int(BLOCKS_PER_TILE); lane += GROUPS * LANES) {
    Words w[GROUPS][16];
    if (D != Draw::none) chacha20(s, counter + lane, w);
#pragma GCC unroll 5
    for (int pair = 0; pair < 5; pair++) {
#pragma GCC unroll 2
      for (int g = 0; g < GROUPS; g++) {
        Floats z[2];
        if (D == Draw::gaussian) box_muller(w[g][3 * pair], w[g][3 * pair + 1], w[g][3 * pair + 2], z[0], z[1]);
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
          const int at = int(BLOCKS_PER_TILE) * (2 * pair + k) + lane + g * LANES;
          if (D == Draw::uniform) z[k] = uniform(w[g][2 * pair + k]);
          Floats v = Stored<F>::load(x + at);
          if (D != Draw::none) v += sigma * z[k];
          Stored<F>::store(y + at, BOUNDED ? limited(l, v) : v);
        }
      }
    }
  }
}

template <Float F, Draw D, bool BOUNDED, typename T = typename Stored<F>::type>
void add_tiles(const NoiseStream& s, float sigma, const Limits& l, size_t first_tile, const T* x, T* y, size_t n) {
  const Constants constants(s);
  uint64_t counter = s.counter + BLOCKS_PER_TILE * first_tile;
  size_t i = 0;
  for (; i + NORMALS_PER_TILE <= n; i += NORMALS_PER_TILE, counter += BLOCKS_PER_TILE)
    add_tile<F, D, BOUNDED>(constants, sigma, l, counter, x + i, y + i);
  if (i == n) return;
  T last[NORMALS_PER_TILE];
  add_tile<F, D, BOUNDED>(constants, sigma, l, counter, x + i, last);
  memcpy(y + i, last, (n - i) * sizeof(T));
}

template <Float F, typename T = typename Stored<F>::type>
void add_draws(const NoiseStream& s, Distribution distribution, float sigma, const Limits& l, size_t first_tile,
               const void* x, void* y, size_t n) {
  if (!(sigma >= 0 && sigma <= FLT_MAX)) sigma = __builtin_nanf("");
  auto add = sigma == 0 ? (l.bounded ? add_tiles<F, Draw::none, true> : add_tiles<F, Draw::none, false>)
             : distribution == Distribution::uniform
                 ? (l.bounded ? add_tiles<F, Draw::uniform, true> : add_tiles<F, Draw::uniform, false>)
                 : (l.bounded ? add_tiles<F, Draw::gaussian, true> : add_tiles<F, Draw::gaussian, false>);
  add(s, sigma, l, first_tile, static_cast<const T*>(x), static_cast<T*>(y), n);
}

// ---- Votes

struct Largest {
  float value = -__builtin_inff();
  int32_t index = 0;
  bool nan = false;

  // The values that follow those seen so far, the first of which is number `first`.
  void see(const float* x, int n, int32_t first) {
    float best = value;
    int i = 0;
    if (n >= 2 * LANES) {
      Floats v = load_bits<Floats>(x), bests = v;
      Ints bad = v != v;
      for (i = LANES; i + LANES <= n; i += LANES) {
        v = load_bits<Floats>(x + i);
        bad |= v != v;
        bests = v > bests ? v : bests;
      }
      for (int k = 0; k < LANES; k++) {
        nan |= bad[k] != 0;
        best = bests[k] > best ? bests[k] : best;
      }
    }
    for (; i < n; i++) {
      nan |= x[i] != x[i];
      best = x[i] > best ? x[i] : best;
    }
    if (!(best > value)) return;
    value = best;
    for (i = 0; i < n && x[i] != best; i++) {
    }
    index = first + i;
  }
};

constexpr int PIECE = 1024;  // values that are held as float32

template <Float F, typename T = typename Stored<F>::type>
void to_floats(const T* x, int n, float* y) {  // y has room for whole vectors
  int i = 0;
  for (; i + LANES <= n; i += LANES) Stored<Float::f32>::store(y + i, Stored<F>::load(x + i));
  if (i == n) return;
  T last[LANES] = {};
  memcpy(last, x + i, (n - i) * sizeof(T));
  Stored<Float::f32>::store(y + i, Stored<F>::load(last));
}

template <Float F, typename T = typename Stored<F>::type>
void winners(const void* from, size_t rows, size_t classes, int32_t* winners) {
  const T* x = static_cast<const T*>(from);
  float piece[PIECE];
  const size_t held = classes <= PIECE ? PIECE / classes : 0;  // rows
  for (size_t r = 0; r < rows; r++) {
    Largest largest;
    if (held) {
      const size_t k = r % held, some = rows - r < held ? rows - r : held;
      if (k == 0) to_floats<F>(x + r * classes, int(some * classes), piece);
      largest.see(piece + k * classes, int(classes), 0);
    }
    for (size_t at = 0; !held && at < classes; at += PIECE) {
      const int n = classes - at < PIECE ? int(classes - at) : PIECE;
      to_floats<F>(x + r * classes + at, n, piece);
      largest.see(piece, n, int32_t(at));
    }
    winners[r] = largest.nan ? int32_t(classes) : largest.index;
  }
}
}  // namespace

const SmoothKernels smooth_kernels{{add_draws<Float::f32>, add_draws<Float::f16>, add_draws<Float::bf16>},
                                   {winners<Float::f32>, winners<Float::f16>, winners<Float::bf16>}};
}  // namespace bulwark::BULWARK_ISA
