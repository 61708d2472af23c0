// One binary, several instruction sets. A file <family>_simd.cpp is compiled once for each (CMakeLists.txt defines
// BULWARK_ISA as base, avx2 or avx512), puts everything into namespace bulwark::BULWARK_ISA, and includes nothing but
// this header, lanes.h or readers.h, its own and C headers: an inline function of the standard library compiled here
// for AVX-512 could be the copy that the linker keeps for everybody.
#pragma once

namespace bulwark {
enum class Isa { base, avx2, avx512 };

// The best that this processor runs, at most what BULWARK_ISA in the environment names. Fixed at the first call.
Isa isa();

#if defined(__x86_64__)
  // A family declares `extern const Kernels kernels;` in each namespace; this picks one.
  #define BULWARK_PICK(kernels)                                              \
    (::bulwark::isa() == ::bulwark::Isa::avx512 ? ::bulwark::avx512::kernels \
     : ::bulwark::isa() == ::bulwark::Isa::avx2 ? ::bulwark::avx2::kernels   \
                                                : ::bulwark::base::kernels)
#else
  #define BULWARK_PICK(kernels) (::bulwark::base::kernels)
#endif
}  // namespace bulwark
