// Threads of the GPU as fibers: each runs until it waits at a barrier or at an exchange between the lanes of its
// simdgroup. Threadgroups run one after the other.
#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <random>

#include "machine.h"

// Saves what a function call must preserve on the old stack, and takes it from the new one.
asm(R"(
.text
msl_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" void msl_switch_stack(void** save, void* to);

namespace msl {
namespace {
void* host_stack;
std::mt19937 rng;

struct Exchange {  // of values between the lanes of one simdgroup
  char values[2][simd_width * 64];
  int turn;  // lanes may write the next value while others still read the last
  unsigned mask;
};
Exchange exchanges[most_threads / simd_width];  // in this image, where kernels may read

void give_up_turn() { msl_switch_stack(&current->stack_pointer, host_stack); }

void fiber_main() {
  Thread thread = current->thread;
  kernel->run(thread);
  end_thread();
}

// The stacks of all threads of a threadgroup. They are kept, since mapping them takes longer than a small launch.
void make_stacks(size_t count) {
  static char* stacks = nullptr;
  static size_t mapped = 0;
  if (count <= mapped) return;
  if (stacks) munmap(stacks, mapped * stack_size);
  stacks = map_pages(count * stack_size, PROT_READ | PROT_WRITE);
  mapped = count;
  fibers.resize(count);
  for (size_t i = 0; i < count; i++) fibers[i].stack = stacks + i * stack_size;
}

// Pages between the stacks that trap would be surer, but a process can have too few of them for all its libraries.
bool used_up(const Fiber& f) {
  auto bottom = reinterpret_cast<const uint64_t*>(f.stack);
  return std::any_of(bottom, bottom + 8, [](uint64_t word) { return word != 0; });
}

void start(Fiber& f) {
  auto top = reinterpret_cast<void**>(f.stack + stack_size);
  *--top = nullptr;  // where a called function finds its return address, so that the stack is aligned as at a call
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  f.stack_pointer = top;
  f.state = State::ready;
  for (int kind : {0, 1}) f.barriers[kind] = f.simd_barriers[kind] = 0;
  f.log.clear();
}

void pass(uint16_t (&barriers)[2], int fence) {
  for (int kind : {0, 1})
    if (fence >> kind & 1) barriers[kind]++;
}

std::vector<unsigned> in_order(unsigned first, unsigned end) {
  std::vector<unsigned> v(end - first);
  std::iota(v.begin(), v.end(), first);
  if (options.order == 1) std::reverse(v.begin(), v.end());
  if (options.order == 2) std::shuffle(v.begin(), v.end(), rng);
  return v;
}

bool any(unsigned first, unsigned end, State s) {
  return std::any_of(&fibers[first], &fibers[end - 1] + 1, [s](const Fiber& f) { return f.state == s; });
}

void run_ready(unsigned first, unsigned end) {
  for (unsigned i : in_order(first, end))
    if (fibers[i].state == State::ready) {
      current = &fibers[i];
      msl_switch_stack(&host_stack, current->stack_pointer);
      if (used_up(*current)) {
        report("too much private memory", nullptr, format("more than %zu bytes", stack_size));
        current->state = State::done;
        memset(current->stack, 0, 64);
      }
    }
}

// Lets the lanes go on that wait at the lowest site: lanes that diverged meet again behind their branches, as on a GPU.
bool release_lanes(unsigned simdgroup, unsigned first, unsigned end) {
  const void* site = nullptr;
  for (unsigned i = first; i < end; i++)
    if (fibers[i].state == State::at_simd && (!site || fibers[i].site < site)) site = fibers[i].site;
  if (!site) return false;
  unsigned mask = 0, alive = 0;
  for (unsigned i = first; i < end; i++) {
    bool here = fibers[i].state == State::at_simd && fibers[i].site == site;
    mask |= static_cast<unsigned>(here) << (i - first);
    alive |= static_cast<unsigned>(fibers[i].state != State::done) << (i - first);
  }
  exchanges[simdgroup].mask = mask;
  exchanges[simdgroup].turn ^= 1;
  for (unsigned i = first; i < end; i++) {
    Fiber& f = fibers[i];
    if (!(mask >> (i - first) & 1)) continue;
    current = &f;
    f.state = State::ready;
    if (f.fence < 0) continue;
    if (mask != alive) report("simdgroup_barrier not reached by all lanes", f.site);
    pass(f.simd_barriers, f.fence);
  }
  return true;
}

// Until every lane is at a threadgroup barrier or done, or some lane only spins, so that others must run.
void run_simdgroup(unsigned simdgroup) {
  unsigned first = simdgroup * simd_width, end = std::min(first + simd_width, threads_in_group);
  do {
    run_ready(first, end);
    if (any(first, end, State::ready)) break;
    count_lines(first, end);
  } while (release_lanes(simdgroup, first, end));
}

void release_group() {
  const Fiber* waiting = nullptr;
  for (unsigned i = 0; i < threads_in_group && !waiting; i++)
    if (fibers[i].state == State::at_barrier) waiting = &fibers[i];
  for (unsigned i = 0; i < threads_in_group; i++) {
    Fiber& f = fibers[i];
    current = &f;
    if (f.state == State::done) {
      report("thread ended while others wait at a threadgroup_barrier", waiting->site);
      continue;
    }
    if (f.site != waiting->site) report("threads wait at different threadgroup_barriers", f.site);
    f.state = State::ready;
    pass(f.barriers, f.fence);
  }
}

void run_group() {
  constexpr int most_rounds = 100000;  // without anybody getting anywhere, when threads spin
  unsigned simdgroups = (threads_in_group + simd_width - 1) / simd_width;
  int rounds = 0;
  for (;;) {
    for (unsigned g : in_order(0, simdgroups)) run_simdgroup(g);
    if (any(0, threads_in_group, State::ready)) {
      if (++rounds < most_rounds) continue;
      for (unsigned i = 0; i < threads_in_group; i++)
        if (fibers[i].state == State::ready) current = &fibers[i];
      report("no progress: threads spin", current->site);
      break;
    }
    if (!any(0, threads_in_group, State::at_barrier)) break;
    release_group();
    rounds = 0;
  }
  current = nullptr;
}

void place(Thread& t, unsigned i, Uint3 size) {
  Uint3 g = t.threadgroup_position_in_grid, n = t.dispatch_threads_per_threadgroup;
  t.threads_per_threadgroup = size;
  t.thread_position_in_threadgroup = {i % size.x, i / size.x % size.y, i / size.x / size.y};
  t.thread_position_in_grid = {g.x * n.x + t.thread_position_in_threadgroup.x,
                               g.y * n.y + t.thread_position_in_threadgroup.y,
                               g.z * n.z + t.thread_position_in_threadgroup.z};
  t.thread_index_in_threadgroup = i;
  t.thread_index_in_simdgroup = i % simd_width;
  t.simdgroup_index_in_threadgroup = i / simd_width;
  t.simdgroups_per_threadgroup = (size.x * size.y * size.z + simd_width - 1) / simd_width;
  t.thread_index_in_quadgroup = i % 4;
  t.quadgroup_index_in_threadgroup = i / 4;
  t.quadgroups_per_threadgroup = (size.x * size.y * size.z + 3) / 4;
}
}  // namespace

void let_others_run(const void* site) {
  current->site = site;
  give_up_turn();
}

void end_thread() {
  current->state = State::done;
  give_up_turn();
  abort();  // nobody resumes it
}

void run_grid(Uint3 grid, Uint3 group, void* const* buffers, void* const* threadgroup_buffers) {
  auto groups = [](unsigned n, unsigned size) { return (n + size - 1) / size; };
  Thread common{};
  memcpy(common.buffer, buffers, sizeof common.buffer);
  memcpy(common.threadgroup_buffer, threadgroup_buffers, sizeof common.threadgroup_buffer);
  Uint3 count = {groups(grid.x, group.x), groups(grid.y, group.y), groups(grid.z, group.z)};
  common.threads_per_grid = grid;
  common.dispatch_threads_per_threadgroup = group;
  common.threadgroups_per_grid = count;
  common.threads_per_simdgroup = common.thread_execution_width = simd_width;
  common.dispatch_simdgroups_per_threadgroup = groups(group.x * group.y * group.z, simd_width);

  rng.seed(options.seed);
  threads_a_group = group.x * group.y * group.z;
  make_stacks(threads_a_group);
  for (unsigned number : in_order(0, count.x * count.y * count.z)) {
    threadgroup_number = number;
    common.threadgroup_position_in_grid = {number % count.x, number / count.x % count.y, number / count.x / count.y};
    Uint3 at = common.threadgroup_position_in_grid;
    Uint3 size = {std::min(group.x, grid.x - at.x * group.x), std::min(group.y, grid.y - at.y * group.y),
                  std::min(group.z, grid.z - at.z * group.z)};
    threads_in_group = size.x * size.y * size.z;
    poison_threadgroup_memory();
    for (unsigned i = 0; i < threads_in_group; i++) {
      fibers[i].thread = common;
      place(fibers[i].thread, i, size);
      start(fibers[i]);
    }
    run_group();
  }
}
}  // namespace msl

using msl::current;
using msl::State;

MSL_API unsigned msl_lane() { return current->thread.thread_index_in_simdgroup; }

// Hands over this lane's value, waits for the others, and returns the values of all: 32 in a row, those of the lanes in
// `mask` valid. `need`: lanes without which the operation has no meaning.
MSL_API const void* msl_simd_exchange(const void* value, unsigned size, unsigned* mask, unsigned need) {
  auto& e = msl::exchanges[current->thread.simdgroup_index_in_threadgroup];
  auto values = e.values[e.turn];
  memcpy(values + current->thread.thread_index_in_simdgroup * size, value, size);
  current->state = State::at_simd;
  current->site = MSL_CALLER;
  current->fence = -1;
  msl::give_up_turn();
  *mask = e.mask;
  if (need & ~e.mask) msl::report("simdgroup matrix operation with inactive lanes", MSL_CALLER);
  return values;
}

MSL_API void msl_simd_barrier(unsigned fence) {
  current->state = State::at_simd;
  current->site = MSL_CALLER;
  current->fence = static_cast<int>(fence);
  msl::give_up_turn();
}

MSL_API void msl_barrier(unsigned fence) {
  current->state = State::at_barrier;
  current->site = MSL_CALLER;
  current->fence = static_cast<int>(fence);
  msl::give_up_turn();
}
