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

// Sums of the kernel 2^(-rate |a - b|^2 / 2), added over the rates, over pairs of different rows [N, d] float32: over
// the first n rows, between these and the others, and over the others; then of each permutation, whose rows are told by
// a bit of the words [N, permutations / 32] uint32, over its rows, and between these and all
// -> [2, 3 + 2 permutations] float32, sums and what their rounding lost.
mx::array mmd(const mx::array& rows, const mx::array& words, int n, int permutations, const std::vector<float>& rates,
              mx::StreamOrDevice);

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

class Mmd : public Op {
 public:
  Mmd(mx::Stream s, int n, int permutations, std::vector<float> rates)
      : Op(s), n_(n), permutations_(permutations), rates_(std::move(rates)) {}
  const char* name() const override { return "mmd"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {{2, 3 + 2 * permutations_}}; }

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
  Arrays reference(const Arrays& in) override;
  bool same(const Op& o) const override {
    auto& other = static_cast<const Mmd&>(o);
    return n_ == other.n_ && permutations_ == other.permutations_ && rates_ == other.rates_;
  }

 private:
  const int n_, permutations_;
  const std::vector<float> rates_;  // ascending
};
}  // namespace bulwark
