#pragma once
#include <array>
#include <cstdint>

#include "common/primitive.h"
#include "mlx/utils.h"

namespace bulwark {
extern const Source noise_source;

using Domain = std::array<uint32_t, 2>;  // words 14 and 15 of the ChaCha20 state

// sigma: float32 scalar; key: uint32[8]; counter: uint32[2], low word first.
mx::array gaussian(std::vector<int> shape, const mx::array& sigma, const mx::array& key, const mx::array& counter,
                   mx::Dtype, Domain, mx::StreamOrDevice);
Arrays add_gaussian(const Arrays& leaves, const mx::array& sigma, const mx::array& key, const mx::array& counter,
                    Domain, mx::StreamOrDevice);
mx::array random_bits(std::vector<int> shape, const mx::array& key, const mx::array& counter, Domain,
                      mx::StreamOrDevice);
// [n, 3] words (radius high, radius low, angle) -> [n, 2] float32, by the kernels' own code. For the tests; runs at
// once.
mx::array normals_from_words(mx::array words);

// Base of the noise primitives. Their last input is the counter.
class NoiseOp : public Op {
 public:
  NoiseOp(mx::Stream s, Domain domain) : Op(s), domain(domain) {}
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& in, const std::vector<int>& axes) override;

 protected:
  Arrays reference(const Arrays& in) override;
  bool same(const Op& other) const override { return parameters() == static_cast<const NoiseOp&>(other).parameters(); }
  virtual std::vector<int64_t> parameters() const { return {domain[0], domain[1]}; }  // also told to the reference

  const Domain domain;
};

// Base of those whose output has a shape of its own.
class DrawOp : public NoiseOp {
 public:
  DrawOp(mx::Stream s, mx::Shape shape, Domain domain) : NoiseOp(s, domain), shape_(std::move(shape)) {}
  std::vector<mx::Shape> output_shapes(const Arrays&) override { return {shape_}; }

 protected:
  std::vector<int64_t> parameters() const override;

  const mx::Shape shape_;
};

class Gaussian : public DrawOp {
 public:
  Gaussian(mx::Stream s, mx::Shape shape, mx::Dtype dtype, Domain domain)
      : DrawOp(s, std::move(shape), domain), dtype_(dtype) {}
  const char* name() const override { return "gaussian"; }

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
  std::vector<int64_t> parameters() const override;

 private:
  const mx::Dtype dtype_;
};

// Inputs: leaves, sigma, key, counter. The leaves' noise starts at a tile of the stream that counter starts.
class AddGaussian : public NoiseOp {
 public:
  AddGaussian(mx::Stream s, Domain domain, size_t first_tile) : NoiseOp(s, domain), first_tile_(first_tile) {}
  const char* name() const override { return "add_gaussian"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override;

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
  std::vector<int64_t> parameters() const override;

 private:
  // So that is_donatable tells whether anybody but this op holds an input.
  static void let_go_of_inputs(const Arrays& in, Arrays& out);

  const size_t first_tile_;
};

class RandomBits : public DrawOp {
 public:
  using DrawOp::DrawOp;
  const char* name() const override { return "random_bits"; }

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
};
}  // namespace bulwark
