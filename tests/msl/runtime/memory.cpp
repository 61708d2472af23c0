// Memory of the simulated GPU: every access of a kernel arrives here through the hooks of ThreadSanitizer's
// instrumentation, which this file defines in place of that library.
#include <cstdio>
#include <cstdlib>

#include "machine.h"

namespace msl {
char* map_pages(size_t bytes, int protection) {
  void* pages = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) {
    perror("the Metal simulator cannot map memory");
    abort();
  }
  return static_cast<char*>(pages);
}

Region* region_at(uintptr_t address) {
  for (auto& r : regions)
    if (address - reinterpret_cast<uintptr_t>(r.base) < r.size) return &r;
  return nullptr;
}

Region& add_region(const char* name, char* base, size_t size, Space space, bool defined) {
  bool shared = space == Space::device || space == Space::threadgroup;
  Region r{name, base, size, space, defined};
  if (shared && options.races) r.history = Zeroed<History>(size / largest_access + 1);
  r.touched = Zeroed<uint8_t>(size);
  regions.push_back(std::move(r));
  return regions.back();
}

// A buffer starts on a line and ends less than a line before the end of a page, in a wide empty neighbourhood: what
// goes past it by any plausible index hits nothing else, and is told by the nearest buffer's name.
char* add_buffer(const char* name, size_t size, Space space, bool defined) {
  constexpr size_t gap = 64 << 20;
  size_t body = (size + page_size - 1) / page_size * page_size;
  char* m = map_pages(body + 2 * gap, PROT_NONE);
  mprotect(m + gap, body, PROT_READ | PROT_WRITE);
  char* base = m + gap + (body - size) / line_size * line_size;
  memset(base, 0xff, size);  // NaN in every floating type
  auto& r = add_region(name, base, size, space, defined);
  r.mapping = m;
  r.mapping_size = body + 2 * gap;
  return base;
}

void remove_regions() {
  for (auto& r : regions)
    if (r.mapping) munmap(r.mapping, r.mapping_size);
  regions.clear();
}

void poison_threadgroup_memory() {
  for (auto& r : regions)
    if (r.space == Space::threadgroup) {
      memset(r.base, 0xff, r.size);
      r.touched.clear();
    }
}

size_t threadgroup_bytes() {
  size_t sum = 0;
  for (auto& r : regions)
    if (r.space == Space::threadgroup) sum += (r.size + 15) / 16 * 16;
  return sum;
}

static std::string describe(const Region& r, size_t bytes, int64_t offset) {
  return format("%zu bytes at offset %lld of %s (%zu bytes)", bytes, static_cast<long long>(offset), r.name.c_str(),
                r.size);
}

static void out_of_bounds(uintptr_t address, size_t bytes, Use use, const void* pc) {
  const char* what = writes(use) ? "out-of-bounds write" : "out-of-bounds read";
  const Region* nearest = nullptr;
  int64_t best = INT64_MAX;
  for (auto& r : regions) {
    auto offset = static_cast<int64_t>(address - reinterpret_cast<uintptr_t>(r.base));
    int64_t distance = offset < 0 ? -offset : offset - static_cast<int64_t>(r.size);
    if (distance < best) best = distance, nearest = &r;
  }
  if (!nearest)
    report(what, pc);
  else
    report(what, pc,
           describe(*nearest, bytes, static_cast<int64_t>(address - reinterpret_cast<uintptr_t>(nearest->base))));
  end_thread();
}

void access(void* pointer, size_t bytes, Use use, const void* pc) {
  if (!current) return;
  auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address - reinterpret_cast<uintptr_t>(current->stack) < stack_size) return;  // this thread's own memory
  Region* r = region_at(address);
  if (!r) {
    bool program_scope_constant = address >= image_base && address < image_end && !writes(use);
    if (program_scope_constant) return;
    out_of_bounds(address, bytes, use, pc);
  }
  size_t offset = address - reinterpret_cast<uintptr_t>(r->base);
  if (offset + bytes > r->size) out_of_bounds(address, bytes, use, pc);
  if (r->space == Space::function_constant) {
    if (!r->defined) report("read of a function constant that the host did not set", pc, r->name);
    return;
  }
  if (writes(use) && r->space == Space::constant) report("write to constant memory", pc, r->name);

  (atomic(use) ? r->traffic.atomic : writes(use) ? r->traffic.written : r->traffic.read) += bytes;
  if (r->space == Space::device) log_lines(address, bytes, writes(use), pc);

  bool reads = use != Use::write;
  for (size_t i = offset; i < offset + bytes; i++) {
    auto& touched = r->touched[i];
    if (reads && use != Use::atomic_write && !r->defined && !(touched & 2)) {
      report("read of memory never written", pc, format("offset %zu of %s", i, r->name.c_str()));
      touched |= 2;  // once a byte
    }
    touched |= (reads ? 1 : 0) | (writes(use) ? 2 : 0);
  }
  if (r->history.size()) check_races(*r, offset, bytes, use, pc);
}
}  // namespace msl

using msl::access;
using msl::Use;

static void aligned_access(void* p, size_t bytes, Use use, const void* pc) {
  if (msl::current && reinterpret_cast<uintptr_t>(p) % bytes) msl::report("misaligned pointer", pc);
  access(p, bytes, use, pc);
}

#define HOOKS(N)                                                                          \
  MSL_API void __tsan_read##N(void* p) { aligned_access(p, N, Use::read, MSL_CALLER); }   \
  MSL_API void __tsan_write##N(void* p) { aligned_access(p, N, Use::write, MSL_CALLER); } \
  MSL_API void __tsan_unaligned_read##N(void* p) { access(p, N, Use::read, MSL_CALLER); } \
  MSL_API void __tsan_unaligned_write##N(void* p) { access(p, N, Use::write, MSL_CALLER); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

MSL_API void __tsan_init() {}

MSL_API void* __tsan_memcpy(void* to, const void* from, size_t n) {
  if (n) {
    access(const_cast<void*>(from), n, Use::read, MSL_CALLER);
    access(to, n, Use::write, MSL_CALLER);
  }
  return memcpy(to, from, n);
}

MSL_API void* __tsan_memmove(void* to, const void* from, size_t n) {
  if (n) {
    access(const_cast<void*>(from), n, Use::read, MSL_CALLER);
    access(to, n, Use::write, MSL_CALLER);
  }
  return memmove(to, from, n);
}

MSL_API void* __tsan_memset(void* to, int value, size_t n) {
  if (n) access(to, n, Use::write, MSL_CALLER);
  return memset(to, value, n);
}

// A kernel's own threadgroup variable, told by every thread that reaches its declaration.
MSL_API void msl_threadgroup_variable(const char* name, void* address, size_t size) {
  using namespace msl;
  if (!current || region_at(reinterpret_cast<uintptr_t>(address))) return;
  auto& r = add_region(name, static_cast<char*>(address), size, Space::threadgroup, false);
  memset(r.base, 0xff, size);
  if (threadgroup_bytes() > threadgroup_limit)
    report("more than 32 KiB of threadgroup memory", MSL_CALLER,
           format("%zu bytes with %s", threadgroup_bytes(), name));
}
