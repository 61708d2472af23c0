#pragma once
#include <string>

#include "common/primitive.h"
#include "mlx/utils.h"
#include "tails/tails_simd.h"

namespace bulwark {
extern const Source tails_source;

// Rows x are [n, d] in float32, float16 or bfloat16; everything else is float32 or int32. What is what: ops/tails.py.

// count, mean, m2, minimum, maximum, nans, infs, mean_rest, [d] each
Arrays column_stats(const mx::array& x, mx::StreamOrDevice);
// values [d, n], counts [d], skewness [d]. Host only.
Arrays quantile_table(const mx::array& x, mx::StreamOrDevice);
// `ranks` holds nothing, or those of the values. kind 0 is ECOD and 1 COPOD, a column at a time: scores [n]; 2 the
// papers': scores [n]; 3 the negative logarithms of both tails: left and right [n, d].
Arrays tail_scores(const mx::array& x, const mx::array& values, const mx::array& counts, const mx::array& skewness,
                   const Arrays& ranks, int kind, mx::StreamOrDevice);
// edges [d, bins + 1] -> [d, bins] int32
mx::array histogram_counts(const mx::array& x, const mx::array& edges, mx::StreamOrDevice);
// scores [d, bins], reach [d]: how far outside a value still counts -> [n], or [n, d] by column
mx::array histogram_scores(const mx::array& x, const mx::array& edges, const mx::array& scores, const mx::array& reach,
                           bool per_column, mx::StreamOrDevice);
// -> [n, d]
mx::array robust_zscore(const mx::array& x, const mx::array& center, const mx::array& scale, mx::StreamOrDevice);
// -> [n]
mx::array mahalanobis(const mx::array& x, const mx::array& mean, const mx::array& cholesky, mx::StreamOrDevice);

class ColumnStats : public Op {
 public:
  using Op::Op;
  const char* name() const override { return "column_stats"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override {
    return std::vector<mx::Shape>(8, {in[0].shape(1)});
  }

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
};

class QuantileTable : public Op {
 public:
  using Op::Op;
  const char* name() const override { return "quantile_table"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override {
    const int n = in[0].shape(0), d = in[0].shape(1);
    return {{d, n}, {d}, {d}};
  }

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
};

class TailScores : public Op {
 public:
  TailScores(mx::Stream s, Tails kind)
      : Op(s), kind_(kind), name_("tail_scores{\"kind\":" + std::to_string(int(kind)) + "}") {}
  const char* name() const override { return name_.c_str(); }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override {
    const auto& x = in[0];
    if (kind_ == Tails::sides) return {x.shape(), x.shape()};
    return {{x.shape(0)}};
  }

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
  bool same(const Op& o) const override { return kind_ == static_cast<const TailScores&>(o).kind_; }

 private:
  const Tails kind_;
  const std::string name_;
};

class HistogramCounts : public Op {
 public:
  using Op::Op;
  const char* name() const override { return "histogram_counts"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {{in[1].shape(0), in[1].shape(1) - 1}}; }

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
};

class HistogramScores : public Op {
 public:
  HistogramScores(mx::Stream s, bool per_column) : Op(s), per_column_(per_column) {}
  const char* name() const override { return per_column_ ? "histogram_column_scores" : "histogram_scores"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override {
    if (per_column_) return {in[0].shape()};
    return {{in[0].shape(0)}};
  }

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
  bool same(const Op& o) const override { return per_column_ == static_cast<const HistogramScores&>(o).per_column_; }

 private:
  const bool per_column_;
};

class RobustZscore : public Op {
 public:
  using Op::Op;
  const char* name() const override { return "robust_zscore"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {in[0].shape()}; }

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
};

class Mahalanobis : public Op {
 public:
  using Op::Op;
  const char* name() const override { return "mahalanobis"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {{in[0].shape(0)}}; }

 protected:
  void cpu(const Arrays&, Arrays&) override;
  void metal(const Arrays&, Arrays&) override;
};
}  // namespace bulwark
