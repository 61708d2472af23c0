#pragma once
#include "common/primitive.h"
#include "mlx/utils.h"

namespace bulwark {
extern const Source clip_source;

// Leaves are [B, ...] in float32, float16 or bfloat16; sums are float32. `noise` holds nothing, or sigma [] float32,
// key [8] uint32 and counter [2] uint32 (low word first).

// [B] float32
mx::array sample_sq_norms(const Arrays& grads, mx::StreamOrDevice);
// factors [B] float32 -> one [...] a leaf
Arrays clipped_sum(const Arrays& grads, const mx::array& factors, const Arrays& noise, mx::StreamOrDevice);
// `mask` holds nothing or a [B] bool -> one [...] a leaf, then sq_norms [B], factors [B], num_refused [] int32
Arrays clip_and_sum(const Arrays& grads, const mx::array& max_grad_norm, const std::string& mode, const Arrays& mask,
                    const Arrays& noise, mx::StreamOrDevice);

class SampleSqNorms : public Op {
 public:
  using Op::Op;
  const char* name() const override { return "sample_sq_norms"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {{in[0].shape(0)}}; }

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
};

// Base of the two sums. Their first inputs are the leaves, their last ones the noise.
//
// Every output of a primitive holds every input, which costs the square of the number of leaves. Where there are many,
// the sums are one flat output, and a second primitive takes it apart.
class SumOp : public Op {
 public:
  SumOp(mx::Stream s, const char* op, const std::string& suffix, const Arrays& leaves, bool noisy);
  const char* name() const override { return name_.c_str(); }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override;
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& in, const std::vector<int>& axes) override;
  size_t num_sums() const { return flat_ ? 1 : leaves_; }

 protected:
  Arrays reference(const Arrays& in) override;
  bool same(const Op& o) const override;
  virtual std::vector<mx::Shape> other_shapes(const Arrays&) { return {}; }

  const size_t leaves_;
  const bool noisy_, flat_;

 private:
  const std::string op_, name_;
};

// Inputs: leaves, factors, noise.
class ClippedSum : public SumOp {
 public:
  ClippedSum(mx::Stream s, const Arrays& leaves, bool noisy) : SumOp(s, "clipped_sum", "", leaves, noisy) {}

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
};

// Inputs: leaves, max_grad_norm, mask, noise.
class ClipAndSum : public SumOp {
 public:
  ClipAndSum(mx::Stream s, const std::string& mode, bool masked, const Arrays& leaves, bool noisy)
      : SumOp(s, "clip_and_sum", "_" + mode + (masked ? "_masked" : ""), leaves, noisy),
        automatic_(mode == "automatic"),
        masked_(masked) {}

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
  std::vector<mx::Shape> other_shapes(const Arrays& in) override { return {{in[0].shape(0)}, {in[0].shape(0)}, {}}; }

 private:
  const bool automatic_, masked_;
};

// Takes a flat array apart, without a copy.
class Pieces : public Op {
 public:
  Pieces(mx::Stream s, std::vector<mx::Shape> shapes) : Op(s), shapes_(std::move(shapes)) {}
  const char* name() const override { return "pieces"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override;

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays& in, Arrays& out) override { cpu(in, out); }
  Arrays reference(const Arrays& in) override;
  bool same(const Op& o) const override { return shapes_ == static_cast<const Pieces&>(o).shapes_; }

 private:
  const std::vector<mx::Shape> shapes_;
};
}  // namespace bulwark
