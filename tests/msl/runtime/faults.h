// While one of these lives, a trap or a wild pointer ends the GPU thread that met it, and no more than that.
#pragma once
#include <signal.h>

#include <memory>

namespace msl {
class Faults {
 public:
  Faults();
  ~Faults();

 private:
  std::unique_ptr<char[]> stack;
  std::unique_ptr<struct sigaction[]> before;
  stack_t stack_before;
};
}  // namespace msl
