// What the CPU paths of all families do with arrays.
#pragma once
#include "common/primitive.h"
#include "mlx/allocator.h"
#include "mlx/ops.h"

namespace bulwark {
// Room for what is computed by parts: it grows, and serves the next part.
using Buffer = std::vector<float>;

inline float* room(Buffer& b, size_t n) {
  if (b.size() < n) b.resize(n);
  return b.data();
}

inline void allocate(Arrays& out) {
  for (auto& x : out) x.set_data(mx::allocator::malloc(x.nbytes()));
}

inline Arrays contiguous(const Arrays& in, mx::Stream s) {
  Arrays r;
  for (auto& x : in) {
    bool already = x.status() == mx::array::Status::available && x.flags().row_contiguous;
    r.push_back(already ? x : mx::contiguous(x, false, s));
  }
  return r;
}
}  // namespace bulwark
