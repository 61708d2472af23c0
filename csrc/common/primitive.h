// Base of every primitive: a CPU path, a Metal path, and every transformation by the Python reference.
#pragma once
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "common/launch.h"
#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/transforms.h"

namespace bulwark {
using Arrays = std::vector<mx::array>;

// Calls the reference that Python registered under this name (bindings.cpp). Only while a graph is traced.
Arrays call_reference(const char* name, const Arrays& in, const mx::Stream&);

class Op : public mx::Primitive {
 public:
  explicit Op(mx::Stream s) : Primitive(s), simulated_(simulating()) {}

  void eval_cpu(const Arrays& in, Arrays& out) final { simulated_ ? metal(in, out) : cpu(in, out); }
  void eval_gpu(const Arrays& in, Arrays& out) final { metal(in, out); }

  std::pair<Arrays, std::vector<int>> vmap(const Arrays& in, const std::vector<int>& axes) override {
    auto out = mx::vmap([this](const Arrays& x) { return reference(x); }, axes)(in);
    return {out, std::vector<int>(out.size(), 0)};
  }
  Arrays vjp(const Arrays& in, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    return mx::vjp(over(in, argnums), pick(in, argnums), cotangents).second;
  }
  Arrays jvp(const Arrays& in, const Arrays& tangents, const std::vector<int>& argnums) override {
    return mx::jvp(over(in, argnums), pick(in, argnums), tangents).second;
  }
  bool is_equivalent(const Primitive& other) const override {  // MLX asks only for the same type
    auto& o = static_cast<const Op&>(other);
    return simulated_ == o.simulated_ && same(o);
  }

 protected:
  virtual void cpu(const Arrays& in, Arrays& out) = 0;
  virtual void metal(const Arrays& in, Arrays& out) = 0;
  virtual Arrays reference(const Arrays& in) { return call_reference(name(), in, stream()); }
  virtual bool same(const Op&) const { return true; }  // an op with parameters compares them here

 private:
  static Arrays pick(const Arrays& in, const std::vector<int>& argnums) {
    Arrays r;
    for (int i : argnums) r.push_back(in[i]);
    return r;
  }
  std::function<Arrays(const Arrays&)> over(const Arrays& in, const std::vector<int>& argnums) {
    return [this, in, argnums](const Arrays& x) {
      auto all = in;
      for (size_t k = 0; k < x.size(); k++) all[argnums[k]] = x[k];
      return reference(all);
    };
  }

  const bool simulated_;
};
}  // namespace bulwark
