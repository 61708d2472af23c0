// Host side of step.metal: shapes, grid, order of buffers. Compiled on every platform.
#include <limits>
#include <stdexcept>

#include "step/step.h"

namespace bulwark {
namespace {
constexpr uint32_t THREADS = 512, EACH = 16;  // these stand in step.metal too

uint32_t count_of(uint64_t n) {
  if (n > std::numeric_limits<uint32_t>::max()) throw std::runtime_error("[bulwark] too large for Metal");
  return uint32_t(n);
}
}  // namespace

void ProjectedStep::metal(const Arrays& in, Arrays& out) {
  allocate(stream(), out[0]);
  const uint64_t n = out[0].size(), rows = in[0].shape(0);
  if (n == 0) return;
  const uint32_t size = count_of(n / rows);
  const bool linf = norm_ == Norm::linf;
  KernelCall call{step_source, std::string(linf ? "step_linf" : "step_ball") + suffix(out[0].dtype()),
                  count_of(linf ? (n + THREADS - 1) / THREADS : rows), THREADS};
  for (auto& x : in) call.in(x);
  call.out(out[0]).bytes(size).bytes(std::array<uint32_t, 2>{in[3].size() > 1, in[4].size() > 1});
  call.bytes(std::array<float, 2>{low_, high_});
  if (linf) call.bytes(n);
  launch(stream(), call.constant(0, norm_ == Norm::l1).constant(1, size <= THREADS * EACH));
}
}  // namespace bulwark
