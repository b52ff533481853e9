#include "segfaults.h"

#include "address_space.h"
#include "fibers.h"
#include "scheduler.h"

namespace octavo::emulator {
namespace {

alignas(16) char g_signal_stack[size_t{64} << 10];
thread_local bool t_is_guarded = false;

const char* Explain(const void* address) {
  if (IsDeviceAddress(address)) return "a bare access to device memory, not through a primitive";
  return IsStackGuard(address) ? "a thread's stack overflows" : "a segmentation fault";
}

// FailThread leaves for the scheduler's stack and never comes back; SA_NODEFER lets a later one in.
void OnSegfault(int, siginfo_t* fault, void*) {
  if (!t_is_guarded) {
    signal(SIGSEGV, SIG_DFL);  // of another OS thread: it faults again, for good
    return;
  }
  FailThread({"an access", "kernel", 0}, "%s, at %p", Explain(fault->si_addr), fault->si_addr);
}

}  // namespace

SegfaultGuard::SegfaultGuard() {
  stack_t stack = {};
  stack.ss_sp = g_signal_stack;
  stack.ss_size = sizeof g_signal_stack;
  sigaltstack(&stack, &old_stack_);
  struct sigaction action = {};
  action.sa_sigaction = OnSegfault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &old_action_);
  t_is_guarded = true;
}

SegfaultGuard::~SegfaultGuard() {
  t_is_guarded = false;
  sigaction(SIGSEGV, &old_action_, nullptr);
  sigaltstack(&old_stack_, nullptr);
}

}  // namespace octavo::emulator
