// Runs the blocks of a grid one after the other, each thread of a block as a fiber that runs until
// it has to wait for others.

#ifndef OCTAVO_CUDA_EMULATOR_SCHEDULER_H_
#define OCTAVO_CUDA_EMULATOR_SCHEDULER_H_

#include <cstddef>
#include <cstdint>

#include "cuda_runtime.h"
#include "faults.h"

namespace octavo::emulator {

inline constexpr int kLanes = 32;
inline constexpr int kMaxBlockThreads = 1024;

struct GridCall {
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  void (*run_thread)(const void* closure);
  const void* closure;
};

// Runs a grid whose shape has been checked, to its end or to the first fault.
void RunGrid(const GridCall& call);

// 0 runs blocks and threads in order; another seed shuffles both.
void SetScheduleSeed(uint64_t seed);

uint64_t CountSwitches();

// ---- For the thread that runs -------------------------------------------------------------------

// Its number in its block, x fastest.
int ThreadId();

// Reports a fault of this thread and ends the launch.
[[noreturn, gnu::format(printf, 2, 3)]] void FailThread(const Site& site, const char* format, ...);

// Waits for all threads of the block.
void MeetBlock(const Site& site);

// Computes what a collective gives, from and into what each lane brought.
using Complete = void (*)(void* const (&operands)[kLanes]);

// Waits for all threads of the warp; the last to arrive runs `complete`.
void MeetWarp(const Site& site, void* operand, Complete complete);

}  // namespace octavo::emulator

#endif  // OCTAVO_CUDA_EMULATOR_SCHEDULER_H_
