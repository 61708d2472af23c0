// Address spaces and kernels, as attributes that clang has for the host.
#pragma once
#pragma clang system_header
#include "types.h"

extern "C" void msl_threadgroup_variable(const char* name, void* address, size_t size);  // the runtime

// address_space(N) would switch the sanitizers' instrumentation off. These do not, and they lie in plain memory.
#ifdef MSL_STRICT  // disjoint: no space converts to another
  #define device __attribute__((opencl_global))
  #define constant const __attribute__((opencl_constant))
  #define MSL_THREADGROUP_VARIABLE(NAME)
#else  // those of SYCL: distinct types that convert to the default space, so that structs can be copied
  #define device __attribute__((opencl_global_device))
  #define constant const __attribute__((opencl_global_host))
  #define MSL_THREADGROUP_VARIABLE(NAME) msl_threadgroup_variable(#NAME, (void*)&NAME, sizeof(NAME));
#endif
#define threadgroup __attribute__((opencl_local))
#define thread
#define kernel
#define MSL_THREADGROUP static __attribute__((aligned(64)))
#define MSL_FUNCTION_CONSTANT __attribute__((used))

namespace metal {
template <class T>
struct remove_addrspace {
  using type = T;
};
template <class T>
struct remove_addrspace<device T> {
  using type = T;
};
template <class T>
struct remove_addrspace<threadgroup T> {
  using type = T;
};
template <class T>
using remove_addrspace_t = typename remove_addrspace<T>::type;
}  // namespace metal
