// What a translated kernel file and the runtime know of each other. C++ without the standard library, since it is
// compiled in front of kernel text.
#pragma once

namespace msl {
struct Uint3 {
  unsigned x, y, z;
};

// Everything that the parameters of a kernel can ask for. The members bear the names of Metal's attributes.
struct Thread {
  static constexpr int slots = 31;
  void* buffer[slots];
  void* threadgroup_buffer[slots];
  Uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid, threads_per_threadgroup,
      dispatch_threads_per_threadgroup, threads_per_grid, threadgroups_per_grid;
  unsigned thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup,
      simdgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup, threads_per_simdgroup, thread_execution_width,
      thread_index_in_quadgroup, quadgroup_index_in_threadgroup, quadgroups_per_threadgroup;
};

enum class Slot { device, constant, threadgroup };

struct Parameter {
  Slot slot;
  int index;
  const char* name;
  bool optional;  // bound only where a function constant says so
};

struct Kernel {
  const char* name;
  const char* defined_at;  // file:line
  unsigned most_threads;   // a threadgroup, by its attribute or by the hardware
  void (*run)(const Thread&);
  const Parameter* parameters;
  int parameter_count;
};

struct FunctionConstant {
  int index;
  const char* name;
  bool is_bool;
  void* address;
  unsigned size;
};
}  // namespace msl
