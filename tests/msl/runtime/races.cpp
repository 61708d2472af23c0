// Data races: two accesses of different threads to one byte, at least one of them a write and not both atomic, with no
// barrier between them that orders this kind of memory. What happened before a barrier is known by counting barriers.
#include <algorithm>

#include "machine.h"

namespace msl {
namespace {
uint32_t group_of(const Visit& v) { return (v.thread - 1) / threads_a_group; }
uint32_t simdgroup_of(const Visit& v) { return (v.thread - 1) % threads_a_group / simd_width; }

bool ordered(const Visit& before, const Visit& now, Space space) {
  if (!before.thread || before.thread == now.thread) return true;
  if (group_of(before) != group_of(now)) return space == Space::threadgroup;  // its memory is not ours
  if (before.barriers != now.barriers) return true;
  return simdgroup_of(before) == simdgroup_of(now) && before.simd_barriers != now.simd_barriers;
}

// How much synchronisation two threads would need.
int distance(const Visit& a, const Visit& b) {
  return group_of(a) != group_of(b) ? 3 : simdgroup_of(a) != simdgroup_of(b) ? 2 : a.thread != b.thread ? 1 : 0;
}

// Two visits stand for all that were made since the last barrier, when they lie as far apart as any two of them: a
// later thread that is not ordered after a forgotten one is not ordered after one of these either.
void remember(Visit (&kept)[2], const Visit& now, Space space) {
  if (ordered(kept[0], now, space))
    kept[0] = now;
  else if (ordered(kept[1], now, space) || distance(kept[0], now) >= distance(kept[0], kept[1]))
    kept[1] = now;
}

const Visit* conflict(const Visit (&visits)[2], const Visit& now, Space space) {
  for (auto& v : visits)
    if (!ordered(v, now, space)) return &v;
  return nullptr;
}
// Smaller granules, each with the history of the one that it was part of.
void split(Region& r, size_t granule) {
  size_t pieces = r.granule / granule;
  Zeroed<History> finer(r.history.size() * pieces);
  for (size_t i = 0; i < r.history.size(); i++) {
    const History& h = r.history[i];
    bool unused = !h.write.thread && !h.reads[0].thread && !h.atomics[0].thread;
    if (!unused) std::fill_n(&finer[i * pieces], pieces, h);
  }
  r.history = std::move(finer);
  r.granule = granule;
}
}  // namespace

void check_races(Region& region, size_t offset, size_t bytes, Use use, const void* pc) {
  int kind = region.space == Space::threadgroup;
  Visit now{threadgroup_number * threads_a_group + current->thread.thread_index_in_threadgroup + 1,
            current->barriers[kind], current->simd_barriers[kind]};
  Space space = region.space;
  bool reported = false;
  size_t divides_both = (offset | bytes) & -(offset | bytes);
  if (divides_both < region.granule) split(region, divides_both);
  for (size_t at = offset; at < offset + bytes; at += region.granule) {
    History& h = region.history[at / region.granule];
    const Visit* other = nullptr;
    const char* what = nullptr;
    if (!ordered(h.write, now, space)) {
      other = &h.write;
      what = atomic(use)   ? "data race: atomic operation after a plain write without a barrier"
             : writes(use) ? "data race: two writes without a barrier"
                           : "data race: read after write without a barrier";
    } else if (writes(use) && (other = conflict(h.reads, now, space))) {
      what = atomic(use) ? "data race: atomic operation after a plain read without a barrier"
                         : "data race: write after read without a barrier";
    } else if (!atomic(use) && (other = conflict(h.atomics, now, space))) {
      what = writes(use) ? "data race: plain write after an atomic operation without a barrier"
                         : "data race: plain read after an atomic operation without a barrier";
    }
    if (other && !reported) {
      report(what, pc,
             format("offset %zu of %s; the other access by thread %u of threadgroup %u", at, region.name.c_str(),
                    (other->thread - 1) % threads_a_group, group_of(*other)));
      reported = true;
    }
    if (use == Use::write)
      h = {now, {}, {}};
    else if (use == Use::read)
      remember(h.reads, now, space);
    else if (use == Use::atomic_write)
      remember(h.atomics, now, space);
    // An atomic load is not kept: beside plain reads and atomics it is harmless, and against a plain write it is found
    // when another thread order puts the write first.
  }
}
}  // namespace msl
