// Turns a segmentation fault of a kernel into a fault of its thread: a bare dereference of a device
// address, or a stack that overflows.

#ifndef OCTAVO_CUDA_EMULATOR_SEGFAULTS_H_
#define OCTAVO_CUDA_EMULATOR_SEGFAULTS_H_

#include <signal.h>

namespace octavo::emulator {

// While it lives, faults of this OS thread are the running kernel thread's.
class SegfaultGuard {
 public:
  SegfaultGuard();
  ~SegfaultGuard();
  SegfaultGuard(const SegfaultGuard&) = delete;
  SegfaultGuard& operator=(const SegfaultGuard&) = delete;

 private:
  stack_t old_stack_;
  struct sigaction old_action_;
};

}  // namespace octavo::emulator

#endif  // OCTAVO_CUDA_EMULATOR_SEGFAULTS_H_
