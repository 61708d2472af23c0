#pragma once
#include "common/primitive.h"
#include "mlx/utils.h"

namespace bulwark {
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
};

// Inputs: leaves, factors, noise.
class ClippedSum : public Op {
 public:
  ClippedSum(mx::Stream s, bool noisy) : Op(s), noisy_(noisy) {}
  const char* name() const override { return noisy_ ? "clipped_sum_noisy" : "clipped_sum"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override;
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& in, const std::vector<int>& axes) override;

 protected:
  void cpu(const Arrays&, Arrays&) override;
  bool same(const Op& o) const override { return noisy_ == static_cast<const ClippedSum&>(o).noisy_; }

 private:
  size_t leaves(const Arrays& in) const { return in.size() - 1 - 3 * noisy_; }
  bool noisy_;
};

// Inputs: leaves, max_grad_norm, mask, noise.
class ClipAndSum : public Op {
 public:
  ClipAndSum(mx::Stream s, const std::string& mode, bool masked, bool noisy);
  const char* name() const override { return name_.c_str(); }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override;
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& in, const std::vector<int>& axes) override;

 protected:
  void cpu(const Arrays&, Arrays&) override;
  bool same(const Op& o) const override { return name_ == static_cast<const ClipAndSum&>(o).name_; }

 private:
  size_t leaves(const Arrays& in) const { return in.size() - 1 - masked_ - 3 * noisy_; }
  std::string name_;
  bool automatic_, masked_, noisy_;
};
}  // namespace bulwark
