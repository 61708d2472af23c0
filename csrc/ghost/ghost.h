#pragma once
#include <array>

#include "common/primitive.h"
#include "mlx/utils.h"

namespace bulwark {
extern const Source ghost_source;

// Per-unit gradients of a layer's weight from the layer's inputs x and output gradients dy, without the gradients.
//
// A unit is a sample, or all samples that `segments` [B] int32 gives the same id in [0, units); other ids take no part.
// A layer that was called several times gives several x and as many dy, all with the same B. `mask` holds nothing, or a
// bool for each row of each x: rows where it is False take no part, whatever they hold. A row is x [b, t, :] beside
// dy [b, t, :]; U [R, d] and D [R, p] are the rows of a unit, of all its samples and calls, and its gradient is D^T U.
//
// x and dy are float32, float16 or bfloat16; what comes out is float32, NaN only in the units that hold NaN.

// The rows that a convolution makes of an image: the kernel's offsets around each output position, times the channels
// of a group. Up to three axes, filled up with ones in front.
struct Window {
  std::array<int, 3> kernel, stride, padding, dilation;
  bool operator==(const Window&) const = default;
};

struct Ghost {
  enum Method { automatic, gram, direct } method = automatic;
  int calls = 1;
  int units = -1;  // where there are segments
  bool masked = false;
  bool bias = false;             // U has one more column, of ones: the gradient is that of weight and bias
  int groups = 1;                // channels of x and dy come in groups, each with a product of its own
  std::vector<Window> window{};  // one where x is unfolded, [B, *space, c] -> [B, T, kernel * c]; none for x [B, T, d]
  bool operator==(const Ghost&) const = default;
};

// Inputs of all: x of each call, dy of each call, masks, segments (none, or one with `units`). `window` holds nothing,
// or the four triples of a Window one behind the other.

// [units] float32, of |D^T U|^2; `method` is auto, gram or direct
mx::array ghost_sq_norms(const Arrays& x, const Arrays& dy, const Arrays& mask, const Arrays& segments, int units,
                         bool bias, int groups, const std::vector<int>& window, const std::string& method,
                         mx::StreamOrDevice);
// [units, p, columns of U] float32, then [units, p] where there is a bias. Host only.
Arrays ghost_grads(const Arrays& x, const Arrays& dy, const Arrays& mask, const Arrays& segments, int units, bool bias,
                   int groups, const std::vector<int>& window, mx::StreamOrDevice);
// Sum of factors[b] * D_b^T U_b, [p, columns of U] float32, then [p] where there is a bias; factors [B] float32. A
// sample whose factor is 0 is skipped, whatever it holds. Host only.
Arrays ghost_clipped_sum(const Arrays& x, const Arrays& dy, const Arrays& mask, const mx::array& factors, bool bias,
                         int groups, const std::vector<int>& window, mx::StreamOrDevice);

// U W^T for every row of x: a convolution, [B, *positions, p] float32. x float32, weight [p, *kernel, c / groups]
// float32, bias nothing or [p] float32. Host only.
mx::array convolved(const mx::array& x, const mx::array& weight, const Arrays& bias, int groups,
                    const std::vector<int>& window, mx::StreamOrDevice);

// The gradient of an embedding's weight [vocabulary, p] adds up dy [B, T, p] by tokens [B, T] int32. Rows of negative
// tokens take no part, whatever dy holds there. [units] float32, of its square
mx::array embedding_sq_norms(const Arrays& tokens, const Arrays& dy, const Arrays& segments, int units,
                             mx::StreamOrDevice);
// Sum of factors[b] times the gradient of sample b, [vocabulary, p] float32. Host only.
mx::array embedding_clipped_sum(const Arrays& tokens, const Arrays& dy, const mx::array& factors, int vocabulary,
                                mx::StreamOrDevice);
// Inner product of an embedding's gradient and that of a product x W^T with the same weight W [vocabulary, p]: the sum
// over the rows t and s of a unit of dy_linear[s, tokens[t]] * (dy[t] . x[s]). [units] float32
mx::array embedding_linear_products(const Arrays& tokens, const Arrays& dy, const Arrays& x, const Arrays& dy_linear,
                                    const Arrays& segments, int units, mx::StreamOrDevice);

// Their primitives. Inputs stand in the order of the arguments; `calls` tells where one list ends.
class GhostOp : public Op {
 public:
  GhostOp(mx::Stream s, const char* name, Ghost ghost, bool segmented)
      : Op(s), name_(name), ghost_(std::move(ghost)), segmented_(segmented) {}
  const char* name() const override { return name_; }

 protected:
  bool same(const Op& o) const override {
    auto& other = static_cast<const GhostOp&>(o);
    return ghost_ == other.ghost_ && segmented_ == other.segmented_;
  }
  Arrays reference(const Arrays& in) override;
  virtual int linear_calls() const { return 0; }
  int units(const Arrays& in) const { return segmented_ ? ghost_.units : in[0].shape(0); }

  const char* const name_;
  const Ghost ghost_;
  const bool segmented_;
};

class GhostSqNorms : public GhostOp {
 public:
  GhostSqNorms(mx::Stream s, Ghost g, bool segmented) : GhostOp(s, "ghost_sq_norms", std::move(g), segmented) {}
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {{units(in)}}; }

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
};

class GhostGrads : public GhostOp {
 public:
  GhostGrads(mx::Stream s, Ghost g, bool segmented) : GhostOp(s, "ghost_grads", std::move(g), segmented) {}
  std::vector<mx::Shape> output_shapes(const Arrays& in) override;

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
};

// Its last input is the factors.
class GhostClippedSum : public GhostOp {
 public:
  GhostClippedSum(mx::Stream s, Ghost g) : GhostOp(s, "ghost_clipped_sum", std::move(g), false) {}
  std::vector<mx::Shape> output_shapes(const Arrays& in) override;

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
};

// Inputs: x, weight, bias if there is one.
class Convolved : public GhostOp {
 public:
  Convolved(mx::Stream s, Ghost g) : GhostOp(s, "convolved", std::move(g), false) {}
  std::vector<mx::Shape> output_shapes(const Arrays& in) override;

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
};

class EmbeddingSqNorms : public GhostOp {
 public:
  EmbeddingSqNorms(mx::Stream s, Ghost g, bool segmented) : GhostOp(s, "embedding_sq_norms", std::move(g), segmented) {}
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {{units(in)}}; }

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
};

// Its last input is the factors; `units` of its Ghost is the vocabulary.
class EmbeddingClippedSum : public GhostOp {
 public:
  EmbeddingClippedSum(mx::Stream s, Ghost g) : GhostOp(s, "embedding_clipped_sum", std::move(g), false) {}
  std::vector<mx::Shape> output_shapes(const Arrays& in) override {
    return {{ghost_.units, in[ghost_.calls].shape(-1)}};
  }

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
};

class EmbeddingLinearProducts : public GhostOp {
 public:
  EmbeddingLinearProducts(mx::Stream s, Ghost g, int linear_calls, bool segmented)
      : GhostOp(s, "embedding_linear_products", std::move(g), segmented), linear_calls_(linear_calls) {}
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {{units(in)}}; }

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
  int linear_calls() const override { return linear_calls_; }
  bool same(const Op& o) const override {
    return GhostOp::same(o) && linear_calls_ == static_cast<const EmbeddingLinearProducts&>(o).linear_calls_;
  }

 private:
  const int linear_calls_;
};
}  // namespace bulwark
