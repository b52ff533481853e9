// Fibers: stacks of their own that one OS thread switches between.

#ifndef OCTAVO_CUDA_EMULATOR_FIBERS_H_
#define OCTAVO_CUDA_EMULATOR_FIBERS_H_

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace octavo::emulator {

#if defined(__x86_64__)
struct Fiber {
  void* stack_pointer;
};
#else
struct Fiber {
  ucontext_t context;
};
#endif

inline constexpr int kMaxFibers = 1024;

// Makes a fiber that runs `entry`, which never returns, on stack stack_idx (0 to kMaxFibers - 1)
// once it is switched to. What was on that stack is abandoned.
void StartFiber(Fiber& fiber, int stack_idx, void (*entry)());

// Leaves `from` to be gone on with later, and goes on with `to`.
void SwitchFiber(Fiber& from, Fiber& to);

// Whether an address is in the guard page below one of the stacks.
bool IsStackGuard(const void* address);

}  // namespace octavo::emulator

#endif  // OCTAVO_CUDA_EMULATOR_FIBERS_H_
