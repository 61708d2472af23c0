// Barriers.
#pragma once
#pragma clang system_header
#include "types.h"

extern "C" {  // the runtime
MSL_MEETING void msl_barrier(unsigned fence);
MSL_MEETING void msl_simd_barrier(unsigned fence);
}

namespace metal {
enum class mem_flags : unsigned {  // the runtime knows the first two bits
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags((unsigned)a | (unsigned)b); }

enum memory_order {
  memory_order_relaxed,
  memory_order_acquire,
  memory_order_release,
  memory_order_acq_rel,
  memory_order_seq_cst
};
enum thread_scope {
  thread_scope_thread,
  thread_scope_simdgroup,
  thread_scope_threadgroup,
  thread_scope_device,
  thread_scope_system
};

MSL_INLINE void threadgroup_barrier(mem_flags flags, thread_scope = thread_scope_threadgroup) {
  msl_barrier((unsigned)flags);
}
MSL_INLINE void simdgroup_barrier(mem_flags flags, thread_scope = thread_scope_simdgroup) {
  msl_simd_barrier((unsigned)flags);
}
// Orders nothing for the race detector: it knows barriers only.
MSL_INLINE void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device) {}
}  // namespace metal
