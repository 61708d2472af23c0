// What the host calls, in this order: msl_begin, then msl_constant and msl_buffer as the kernel wants them, what stands
// in the buffers, msl_launch, msl_result. A function that refuses says why through msl_error. README.md tells more.
#include <link.h>
#include <xmmintrin.h>

#include <algorithm>

#include "faults.h"
#include "machine.h"

// Emitted behind the translated kernel text.
extern const msl::Kernel msl_kernels[];
extern const int msl_kernel_count;
extern const msl::FunctionConstant msl_function_constants[];
extern const int msl_function_constant_count;

namespace msl {
uint64_t launched_threads = 0;

namespace {
std::string error;
void *buffers[Thread::slots], *threadgroup_buffers[Thread::slots];

int refuse(const std::string& why) {
  error = why;
  return -1;
}

const Parameter* parameter(bool threadgroup, int index) {
  for (int i = 0; i < kernel->parameter_count; i++) {
    auto& p = kernel->parameters[i];
    if ((p.slot == Slot::threadgroup) == threadgroup && p.index == index) return &p;
  }
  return nullptr;
}

char* bind(bool threadgroup, int index, size_t size, bool output) {
  const Parameter* p = kernel ? parameter(threadgroup, index) : nullptr;
  if (!p) {
    refuse(format("the kernel has no %sbuffer %d", threadgroup ? "threadgroup " : "", index));
    return nullptr;
  }
  if (output && p->slot == Slot::constant) {
    refuse(format("%s is constant in the kernel but an output on the host", p->name));
    return nullptr;
  }
  Space space = threadgroup ? Space::threadgroup : p->slot == Slot::constant ? Space::constant : Space::device;
  char* memory = add_buffer(p->name, std::max<size_t>(size, 1), space, !threadgroup && !output);
  (threadgroup ? threadgroup_buffers : buffers)[index] = memory;
  return memory;
}

int find_image(dl_phdr_info* info, size_t, void*) {
  uintptr_t first = UINTPTR_MAX, end = 0;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    first = std::min(first, info->dlpi_addr + header.p_vaddr);
    end = std::max(end, info->dlpi_addr + header.p_vaddr + header.p_memsz);
  }
  auto here = reinterpret_cast<uintptr_t>(&find_image);
  if (here < first || here >= end) return 0;
  image_base = info->dlpi_addr;
  image_end = end;
  image_path = info->dlpi_name;
  return 1;
}

__attribute__((constructor)) void initialize() { dl_iterate_phdr(find_image, nullptr); }
}  // namespace
}  // namespace msl

using namespace msl;

MSL_API const char* msl_error() { return error.c_str(); }

MSL_API int msl_option(const char* name, int value) {
  std::string n = name;
  if (n == "races")
    options.races = value;
  else if (n == "lines")
    options.lines = value;
  else if (n == "order")
    options.order = value;
  else if (n == "seed")
    options.seed = static_cast<unsigned>(value);
  else if (n == "most_reports")
    options.most_reports = value;
  else
    return refuse("there is no option " + n);
  return 0;
}

MSL_API int msl_begin(const char* name) {
  remove_regions();
  clear_reports();
  std::fill_n(buffers, Thread::slots, nullptr);
  std::fill_n(threadgroup_buffers, Thread::slots, nullptr);
  auto end = msl_kernels + msl_kernel_count;
  kernel = std::find_if(msl_kernels, end, [name](const Kernel& k) { return !strcmp(k.name, name); });
  if (kernel == end) {
    kernel = nullptr;
    return refuse(std::string("there is no kernel ") + name);
  }
  for (int i = 0; i < msl_function_constant_count; i++) {
    auto& c = msl_function_constants[i];
    add_region(c.name, static_cast<char*>(c.address), c.size, Space::function_constant, false);
  }
  return 0;
}

// An index that the text does not know is ignored, as Metal does.
MSL_API int msl_constant(int index, int is_bool, const void* value, size_t size) {
  for (int i = 0; i < msl_function_constant_count; i++) {
    auto& c = msl_function_constants[i];
    if (c.index != index) continue;
    if (c.is_bool != static_cast<bool>(is_bool) || c.size != size)
      return refuse(std::string("function constant ") + c.name + " has another type in the kernel");
    memcpy(c.address, value, size);
    region_at(reinterpret_cast<uintptr_t>(c.address))->defined = true;
  }
  return 0;
}

MSL_API void* msl_buffer(int index, size_t size, int output) { return bind(false, index, size, output); }

// Array `number` of those whose addresses the host writes into a buffer.
MSL_API void* msl_reached(int index, int number, size_t size) {
  const Parameter* p = kernel ? parameter(false, index) : nullptr;
  if (p) return add_buffer(format("%s[%d]", p->name, number).c_str(), size, Space::device, true);
  refuse(format("the kernel has no buffer %d", index));
  return nullptr;
}

MSL_API void* msl_threadgroup_buffer(int index, size_t size) { return bind(true, index, size, false); }

// `grid` counts threads. Returns the number of reports, or -1 where it refuses.
MSL_API int msl_launch(const uint32_t* grid, const uint32_t* group) {
  if (!kernel) return refuse("no kernel was begun");
  for (int i = 0; i < kernel->parameter_count; i++) {
    auto& p = kernel->parameters[i];
    if (!p.optional && !(p.slot == Slot::threadgroup ? threadgroup_buffers : buffers)[p.index])
      return refuse(std::string("nothing is bound to ") + p.name);
  }
  uint64_t threads = uint64_t{group[0]} * group[1] * group[2];
  if (!threads || !grid[0] || !grid[1] || !grid[2]) return refuse("the grid or the threadgroup is empty");
  if (threads > kernel->most_threads) {
    report(format("more than %u threads a threadgroup", kernel->most_threads).c_str(), nullptr,
           format("%llu threads", static_cast<unsigned long long>(threads)));
    return report_count();
  }
  if (threadgroup_bytes() > threadgroup_limit)
    report("more than 32 KiB of threadgroup memory", nullptr, format("%zu bytes", threadgroup_bytes()));

  launched_threads = uint64_t{grid[0]} * grid[1] * grid[2];
  Faults faults;
  unsigned control = _mm_getcsr();
  _mm_setcsr(control | 0x8040);  // denormals are zero, as in an Apple GPU's float
  run_grid({grid[0], grid[1], grid[2]}, {group[0], group[1], group[2]}, buffers, threadgroup_buffers);
  _mm_setcsr(control);
  return report_count();
}

MSL_API const char* msl_result() { return result_json(); }
