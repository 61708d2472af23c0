#include "clip/clip.h"

#include "clip/clip_simd.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"

namespace bulwark {
static Arrays contiguous(const Arrays& in, mx::Stream s) {
  Arrays r;
  for (auto& x : in) r.push_back(mx::contiguous(x, false, s));
  return r;
}

mx::array sample_sq_norms(const Arrays& grads, mx::StreamOrDevice sd) {
  auto s = mx::to_stream(sd);
  return mx::array({grads[0].shape(0)}, mx::float32, std::make_shared<SampleSqNorms>(s), contiguous(grads, s));
}

void SampleSqNorms::cpu(const Arrays& in, Arrays& out) {
  out[0].set_data(mx::allocator::malloc(out[0].nbytes()));
  size_t batch = out[0].size();
  if (!batch) return;
  mx::cpu::get_command_encoder(stream()).dispatch([in, batch, y = out[0].data<float>()] {
    parallel_for(batch, [&](size_t b) {
      double sum = 0;
      for (auto& g : in) {
        size_t n = g.size() / batch;
        if (n) sum += BULWARK_PICK(clip_kernels).sum_of_squares(g.data<float>() + b * n, n);
      }
      y[b] = float(sum);
    });
  });
}
}  // namespace bulwark
