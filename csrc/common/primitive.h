// Base of every primitive: one CPU path, and every transformation by the Python reference.
#pragma once
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/transforms.h"

namespace bulwark {
namespace mx = mlx::core;
using Arrays = std::vector<mx::array>;

// Calls the reference that Python registered under this name (bindings.cpp). Only while a graph is traced.
Arrays call_reference(const char* name, const Arrays& in, const mx::Stream&);

class Op : public mx::Primitive {
 public:
  using mx::Primitive::Primitive;

  void eval_cpu(const Arrays& in, Arrays& out) final { cpu(in, out); }
  void eval_gpu(const Arrays&, Arrays&) final {  // Python sends GPU streams to the reference (_native.runs_native)
    throw std::runtime_error(std::string("[") + name() + "] stream must be a CPU stream but is a GPU stream");
  }

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
    return same(static_cast<const Op&>(other));
  }

 protected:
  virtual void cpu(const Arrays& in, Arrays& out) = 0;
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
};
}  // namespace bulwark
