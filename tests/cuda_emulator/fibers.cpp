#include "fibers.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

namespace octavo::emulator {
namespace {

constexpr size_t kGuardBytes = 4096;
constexpr size_t kStackBytes = size_t{128} << 10;  // guard and all

char* MapStacks() {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* stacks = mmap(nullptr, kMaxFibers * kStackBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (stacks == MAP_FAILED) std::abort();
  for (int idx = 0; idx < kMaxFibers; ++idx) {
    mprotect(static_cast<char*>(stacks) + idx * kStackBytes, kGuardBytes, PROT_NONE);
  }
  return static_cast<char*>(stacks);
}

char* Stacks() {
  static char* const stacks = MapStacks();
  return stacks;
}

// The ends are staggered, or the same line of all stacks would fall into the same set of the cache.
size_t UsableBytes(int stack_idx) { return kStackBytes - (stack_idx % 32) * 320; }

}  // namespace

bool IsStackGuard(const void* address) {
  const size_t offset =
      reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(Stacks());
  return offset < kMaxFibers * kStackBytes && offset % kStackBytes < kGuardBytes;
}

#if defined(__x86_64__)

// System V ABI: a call keeps rbx, rbp and r12 to r15, so that a switch, being a call, saves just
// these.
asm(R"(
.text
.globl octavo_emulator_switch
.hidden octavo_emulator_switch
.type octavo_emulator_switch, @function
octavo_emulator_switch:
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
.size octavo_emulator_switch, . - octavo_emulator_switch
)");

extern "C" void octavo_emulator_switch(void** from, void* to);

void StartFiber(Fiber& fiber, int stack_idx, void (*entry)()) {
  constexpr int kNumSaved = 6;
  auto* end =
      reinterpret_cast<uintptr_t*>(Stacks() + stack_idx * kStackBytes + UsableBytes(stack_idx));
  end[-2] = reinterpret_cast<uintptr_t>(entry);  // to where the switch returns
  end[-1] = 0;                                   // to where `entry` would: aligned as after a call
  fiber.stack_pointer = end - 2 - kNumSaved;
}

void SwitchFiber(Fiber& from, Fiber& to) {
  octavo_emulator_switch(&from.stack_pointer, to.stack_pointer);
}

#else

void StartFiber(Fiber& fiber, int stack_idx, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = Stacks() + stack_idx * kStackBytes + kGuardBytes;
  fiber.context.uc_stack.ss_size = UsableBytes(stack_idx) - kGuardBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

void SwitchFiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

}  // namespace octavo::emulator
