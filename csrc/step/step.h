#pragma once
#include "common/primitive.h"
#include "mlx/utils.h"
#include "step/step_simd.h"

namespace bulwark {
extern const Source step_source;

// x, grad, origin: [B, ...] in one of float32, float16 and bfloat16; eps, alpha: float32, one value or B of them.
// low and high are infinite where there are no bounds.
mx::array projected_step(const mx::array& x, const mx::array& grad, const mx::array& origin, const mx::array& eps,
                         const mx::array& alpha, int norm, float low, float high, mx::StreamOrDevice);

// Inputs: x, grad, origin, eps, alpha.
class ProjectedStep : public Op {
 public:
  ProjectedStep(mx::Stream s, Norm norm, float low, float high) : Op(s), norm_(norm), low_(low), high_(high) {}
  const char* name() const override { return "projected_step"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {in[0].shape()}; }
  Arrays vjp(const Arrays& in, const Arrays&, const std::vector<int>& argnums, const Arrays&) override;

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
  Arrays reference(const Arrays& in) override;
  bool same(const Op& other) const override;

 private:
  const Norm norm_;
  const float low_, high_;
};
}  // namespace bulwark
