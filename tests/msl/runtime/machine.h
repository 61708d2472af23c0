// The simulated GPU: what the files of the runtime share. It is one machine, used by one host thread at a time.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "kernel.h"

#define MSL_API extern "C" __attribute__((visibility("default")))
#define MSL_CALLER __builtin_return_address(0)

namespace msl {
constexpr unsigned simd_width = 32, most_threads = 1024;
constexpr size_t threadgroup_limit = 32 << 10, line_size = 64, page_size = 4096, largest_access = 16;

struct Options {
  int races = 1, lines = 1;
  int order = 0;  // of simdgroups, lanes and threadgroups: 0 forward, 1 reverse, 2 random
  unsigned seed = 1;
  int most_reports = 20;
};
inline Options options;

// Zeroed pages that cost nothing until they are touched. Their number must stay small: a process may have 65530 pieces.
char* map_pages(size_t bytes, int protection);

// The shadow of a buffer, of which a kernel may use a small part.
template <class T>
class Zeroed {
 public:
  explicit Zeroed(size_t count = 0) : bytes(count * sizeof(T)) {
    if (bytes) data = reinterpret_cast<T*>(map_pages(bytes, PROT_READ | PROT_WRITE));
  }
  Zeroed(Zeroed&& o) noexcept : data(std::exchange(o.data, nullptr)), bytes(std::exchange(o.bytes, 0)) {}
  Zeroed& operator=(Zeroed&& o) noexcept {
    std::swap(data, o.data);
    std::swap(bytes, o.bytes);
    return *this;
  }
  ~Zeroed() {
    if (bytes) munmap(data, bytes);
  }
  T& operator[](size_t i) { return data[i]; }
  size_t size() const { return bytes / sizeof(T); }
  void clear() {
    if (bytes) memset(data, 0, bytes);
  }

 private:
  T* data = nullptr;
  size_t bytes;
};

// ---- memory (memory.cpp)
enum class Space { device, constant, threadgroup, function_constant };
enum class Use { read, write, atomic_load, atomic_write };
constexpr bool writes(Use u) { return u == Use::write || u == Use::atomic_write; }
constexpr bool atomic(Use u) { return u == Use::atomic_load || u == Use::atomic_write; }

struct Visit {        // who touched a byte, and when
  uint32_t thread;    // of the whole grid, from 1; 0: nobody
  uint16_t barriers;  // threadgroup barriers that this thread had passed
  uint16_t simd_barriers;
};

struct History {  // of a few bytes that have always been used together
  Visit write, reads[2], atomics[2];
};

struct Traffic {  // bytes that were asked for; lines of 64 bytes and accesses of whole simdgroups
  uint64_t read = 0, written = 0, atomic = 0;
  uint64_t lines_read = 0, lines_written = 0, accesses_read = 0, accesses_written = 0;
};

struct Region {
  std::string name;
  char* base;
  size_t size;
  Space space;
  bool defined;                     // holds data before the kernel runs
  Zeroed<History> history{};        // of each granule; empty where no race is possible or looked for
  size_t granule = largest_access;  // in bytes, a power of two; becomes smaller when a smaller access comes
  Zeroed<uint8_t> touched{};        // bit 0: read, bit 1: written
  void* mapping = nullptr;          // null for what lies in the library's own data
  size_t mapping_size = 0;
  Traffic traffic{};
};
inline std::vector<Region> regions;

Region* region_at(uintptr_t address);
Region& add_region(const char* name, char* base, size_t size, Space space, bool defined);
char* add_buffer(const char* name, size_t size, Space space, bool defined);
void remove_regions();
void poison_threadgroup_memory();
size_t threadgroup_bytes();
extern uint64_t launched_threads;  // of the last launch
void access(void* address, size_t bytes, Use use, const void* pc);

// ---- races (races.cpp)
void check_races(Region& region, size_t offset, size_t bytes, Use use, const void* pc);

// ---- traffic (traffic.cpp)
struct Touch {  // of lines, by one instruction of one thread
  uintptr_t pc, first_line, last_line;
  bool write;
};
void log_lines(uintptr_t address, size_t bytes, bool write, const void* pc);
void count_lines(unsigned first_thread, unsigned end_thread);  // of one simdgroup since it last met

// ---- threads (scheduler.cpp)
enum class State { ready, at_simd, at_barrier, done };

struct Fiber {  // one GPU thread
  void* stack_pointer;
  char* stack;
  State state;
  Thread thread;
  const void* site;                        // of the barrier or exchange where it waits
  int fence;                               // memory flags of the barrier; -1 for a plain exchange
  uint16_t barriers[2], simd_barriers[2];  // passed that order device memory, threadgroup memory
  std::vector<Touch> log;
};
constexpr size_t stack_size = 256 << 10;
inline std::vector<Fiber> fibers;
inline Fiber* current;                                // the thread that runs; null on the host's side
inline unsigned threadgroup_number, threads_a_group;  // of the threadgroup that runs
inline unsigned threads_in_group;                     // fewer at the grid's edge
inline const Kernel* kernel;

void run_grid(Uint3 grid, Uint3 group, void* const* buffers, void* const* threadgroup_buffers);
void let_others_run(const void* site);  // for a thread that may spin
[[noreturn]] void end_thread();

// ---- reports (reports.cpp)
void report(const char* what, const void* pc, const std::string& detail = "", const char* where = "");
void clear_reports();
int report_count();
std::string format(const char* form, ...) __attribute__((format(printf, 1, 2)));
const char* result_json();

// ---- this library (launch.cpp)
inline uintptr_t image_base, image_end;
inline std::string image_path;
}  // namespace msl
