// Undefined behaviour inside a kernel: the hooks of UndefinedBehaviorSanitizer's instrumentation, of whose data only
// the place in the source is used; and the signals of traps and wild pointers.
#include <signal.h>
#include <ucontext.h>

#include "faults.h"
#include "machine.h"

namespace {
struct Place {  // how every one of those hooks' data begins
  const char* file;
  unsigned line, column;
};

void report_at(const char* what, const void* data) {
  auto place = static_cast<const Place*>(data);
  if (msl::current && place->file)
    msl::report(what, nullptr, "", msl::format("%s:%u:%u", place->file, place->line, place->column).c_str());
}

void on_signal(int signal_number, siginfo_t* info, void* context) {
  if (!msl::current) {
    signal(signal_number, SIG_DFL);
    return;
  }
  auto pc = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP] + 1;  // reported are return addresses
  if (signal_number == SIGILL)
    msl::report("access outside of an array, or unreachable code", reinterpret_cast<void*>(pc));
  else if (signal_number == SIGSEGV)
    msl::report("wild pointer, or too much private memory", reinterpret_cast<void*>(pc),
                msl::format("address %p", info->si_addr));
  else
    msl::report("arithmetic fault", reinterpret_cast<void*>(pc));
  msl::end_thread();
}
}  // namespace

namespace msl {
constexpr int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};

Faults::Faults() : stack(new char[1 << 16]), before(new struct sigaction[std::size(signals)]) {
  stack_t s{stack.get(), 0, 1 << 16};  // the thread's own stack may be what is used up
  sigaltstack(&s, &stack_before);
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  for (size_t i = 0; i < std::size(signals); i++) sigaction(signals[i], &action, &before[i]);
}

Faults::~Faults() {
  for (size_t i = 0; i < std::size(signals); i++) sigaction(signals[i], &before[i], nullptr);
  sigaltstack(&stack_before, nullptr);
}
}  // namespace msl

#define HOOK(NAME, WHAT) \
  MSL_API void __ubsan_handle_##NAME(void* data, ...) { report_at(WHAT, data); }
HOOK(out_of_bounds, "array index out of bounds")
HOOK(shift_out_of_bounds, "shift out of range")
HOOK(divrem_overflow, "integer division by zero or overflow")
HOOK(add_overflow, "signed overflow")
HOOK(sub_overflow, "signed overflow")
HOOK(mul_overflow, "signed overflow")
HOOK(negate_overflow, "signed overflow")
HOOK(type_mismatch_v1, "null or misaligned pointer")
HOOK(float_cast_overflow, "float to integer cast out of range")
HOOK(builtin_unreachable, "unreachable code reached")
HOOK(missing_return, "function ends without a return")
