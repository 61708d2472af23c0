#pragma once
#include <stddef.h>

namespace bulwark {
enum class Norm { linf, l2, l1 };

struct Step {
  float eps, alpha, low, high;
};

struct StepKernels {
  // y = the step from x along g, inside the ball around o and the bounds; n values of one sample, all of them but for
  // linf. moved has room for n values and one vector more, and is not used by linf. One function a dtype (float32,
  // float16, bfloat16) of each norm.
  void (*step[3][3])(const Step&, const void* x, const void* g, const void* o, void* y, size_t n, float* moved);
};
namespace base {
extern const StepKernels step_kernels;
}
namespace avx2 {
extern const StepKernels step_kernels;
}
namespace avx512 {
extern const StepKernels step_kernels;
}
}  // namespace bulwark
