#include "common/isa.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

namespace bulwark {
static Isa supported() {
#if defined(__x86_64__)
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::base;
#else
  return Isa::base;
#endif
}

static Isa chosen() {
  const char* e = std::getenv("BULWARK_ISA");
  std::string_view name = e ? e : "";
  Isa limit = name == "base" ? Isa::base : name == "avx2" ? Isa::avx2 : Isa::avx512;
  return std::min(limit, supported());
}

Isa isa() {
  static const Isa value = chosen();
  return value;
}
}  // namespace bulwark
