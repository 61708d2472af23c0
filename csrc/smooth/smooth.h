#pragma once
#include "noise/noise.h"
#include "smooth/smooth_simd.h"

namespace bulwark {
extern const Source smooth_source;

// What noisy_copies does besides its arrays. `bounds` holds nothing, or low and high as the dtype of x holds them.
struct Copies {
  Copies(int n, bool uniform, const std::vector<float>& bounds, int levels);

  int n;
  Distribution distribution;
  Limits limits;
  int levels;
};

// x: any shape, float32, float16 or bfloat16; sigma: float32 scalar; key: uint32[8]; counter: uint32[2], low word first
// -> [n, ...]
mx::array noisy_copies(const mx::array& x, int n, const mx::array& sigma, const mx::array& key,
                       const mx::array& counter, bool uniform, const std::vector<float>& bounds, int levels,
                       mx::StreamOrDevice);
// logits [m, c], counts [c + 1] int32 -> [c + 1] int32
mx::array count_votes(const mx::array& logits, const mx::array& counts, mx::StreamOrDevice);

// Inputs: x, sigma, key, counter.
class NoisyCopies : public NoiseOp {
 public:
  NoisyCopies(mx::Stream s, const Copies& copies) : NoiseOp(s, {3, 0}), copies_(copies) {}
  const char* name() const override { return "noisy_copies"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override;
  Arrays vjp(const Arrays& in, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays& out) override;

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
  std::vector<int64_t> parameters() const override;

 private:
  const Copies copies_;
};

class CountVotes : public Op {
 public:
  using Op::Op;
  const char* name() const override { return "count_votes"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {in[1].shape()}; }

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
};
}  // namespace bulwark
