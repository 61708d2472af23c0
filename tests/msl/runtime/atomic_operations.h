// The atomic operations that the shim asks of the runtime.
#pragma once

namespace msl {
enum class Atomic {
  load,
  store,
  exchange,
  add,
  sub,
  bit_and,
  bit_or,
  bit_xor,
  min_signed,
  max_signed,
  min_unsigned,
  max_unsigned,
  add_float,
  sub_float,
  compare_exchange
};
}  // namespace msl
