#pragma once
#include "common/primitive.h"
#include "mlx/utils.h"

namespace bulwark {
extern const Source neighbors_source;

enum class Metric { euclidean, sqeuclidean, cosine, inner_product };

// The k nearest rows of y [m, d] of every row of x [n, d]: distances [n, k] float32 and indices [n, k] int32, ordered
// by the distance in float32 and then by the index; -1 and NaN where there is no neighbour. Inputs are {x}, whose rows
// are then no neighbours of themselves, {x, y}, or {x, y, exclude [n] int32}; float32, float16 or bfloat16.
// `prepared` is what the Metal path reads in their place.
Arrays knn(const Arrays& in, const Arrays& prepared, int k, const std::string& metric, mx::StreamOrDevice);

class Knn : public Op {
 public:
  Knn(mx::Stream s, int inputs, int k, Metric metric) : Op(s), inputs_(inputs), k_(k), metric_(metric) {}
  const char* name() const override { return "knn"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override {
    return {{in[0].shape(0), k_}, {in[0].shape(0), k_}};
  }

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
  Arrays reference(const Arrays& in) override;
  bool same(const Op& o) const override {
    auto& other = static_cast<const Knn&>(o);
    return inputs_ == other.inputs_ && k_ == other.k_ && metric_ == other.metric_;
  }

 private:
  const int inputs_, k_;
  const Metric metric_;
};
}  // namespace bulwark
