#pragma once
#include "common/primitive.h"
#include "mlx/utils.h"

namespace bulwark {
// [B, ...] leaves -> [B] float32
mx::array sample_sq_norms(const Arrays& grads, mx::StreamOrDevice);

class SampleSqNorms : public Op {
 public:
  using Op::Op;
  const char* name() const override { return "sample_sq_norms"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {{in[0].shape(0)}}; }

 protected:
  void cpu(const Arrays&, Arrays&) override;
};
}  // namespace bulwark
