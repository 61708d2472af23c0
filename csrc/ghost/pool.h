#pragma once
#include <array>

#include "common/primitive.h"

namespace bulwark {
// The largest of each window, NaN before all; windows lie side by side from the first position of each axis on, and
// what no whole window holds is left out. x [B, *space, c] float32, a size in kernel for each axis of space -> [B,
// *windows, c]. Host only.
mx::array max_pool(const mx::array& x, const std::vector<int>& kernel, mx::StreamOrDevice);
// Its gradient: dy [B, *windows, c] shared by those of a window that are largest, [B, *space, c]. Host only.
mx::array max_pool_gradient(const mx::array& x, const mx::array& dy, const std::vector<int>& kernel,
                            mx::StreamOrDevice);

class PoolOp : public Op {
 public:
  PoolOp(mx::Stream s, std::vector<int> kernel) : Op(s), kernel_(std::move(kernel)) {}

 protected:
  bool same(const Op& o) const override { return kernel_ == static_cast<const PoolOp&>(o).kernel_; }
  Arrays reference(const Arrays& in) override;

  const std::vector<int> kernel_;
};

class MaxPool : public PoolOp {
 public:
  using PoolOp::PoolOp;
  const char* name() const override { return "max_pool"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override;

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
};

// Inputs: x, dy.
class MaxPoolGradient : public PoolOp {
 public:
  using PoolOp::PoolOp;
  const char* name() const override { return "max_pool_gradient"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {in[0].shape()}; }

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
};
}  // namespace bulwark
