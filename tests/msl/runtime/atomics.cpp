// Atomic operations: every one comes through here, so that the race detector tells them from plain accesses.
#include <algorithm>

#include "atomic_operations.h"
#include "machine.h"

namespace {
template <class T>
T from_bits(uint64_t bits) {
  T v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

template <class T>
uint64_t to_bits(T v) {
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof v);
  return bits;
}

uint64_t combined(msl::Atomic op, uint64_t old, uint64_t v, unsigned size) {
  using msl::Atomic;
  auto as_signed = [size](uint64_t u) { return size == 4 ? from_bits<int32_t>(u) : from_bits<int64_t>(u); };
  switch (op) {
    case Atomic::load:
      return old;
    case Atomic::store:
    case Atomic::exchange:
    case Atomic::compare_exchange:
      return v;
    case Atomic::add:
      return old + v;
    case Atomic::sub:
      return old - v;
    case Atomic::bit_and:
      return old & v;
    case Atomic::bit_or:
      return old | v;
    case Atomic::bit_xor:
      return old ^ v;
    case Atomic::min_signed:
      return as_signed(old) < as_signed(v) ? old : v;
    case Atomic::max_signed:
      return as_signed(old) > as_signed(v) ? old : v;
    case Atomic::min_unsigned:
      return std::min(old, v);
    case Atomic::max_unsigned:
      return std::max(old, v);
    case Atomic::add_float:
      return to_bits(from_bits<float>(old) + from_bits<float>(v));
    case Atomic::sub_float:
      return to_bits(from_bits<float>(old) - from_bits<float>(v));
  }
  return old;
}
}  // namespace

// Returns the old value. A compare_exchange writes where it finds `expected`, and says so in `exchanged`.
MSL_API uint64_t msl_atomic(void* address, unsigned size, msl::Atomic op, uint64_t value, uint64_t expected,
                            int* exchanged) {
  using msl::Atomic;
  using msl::Use;
  if (op == Atomic::load || op == Atomic::compare_exchange) msl::let_others_run(MSL_CALLER);
  if (op != Atomic::store) msl::access(address, size, Use::atomic_load, MSL_CALLER);
  uint64_t old = 0;
  memcpy(&old, address, size);
  if (op == Atomic::compare_exchange) {
    *exchanged = old == expected;
    if (!*exchanged) return old;
  }
  if (op != Atomic::load) {
    msl::access(address, size, Use::atomic_write, MSL_CALLER);
    uint64_t result = combined(op, old, value, size);
    memcpy(address, &result, size);
  }
  return old;
}
