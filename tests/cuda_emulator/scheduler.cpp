#include "scheduler.h"

#include <cstdio>
#include <numeric>
#include <utility>
#include <vector>

#include "fibers.h"
#include "races.h"
#include "segfaults.h"
#include "shared_memory.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace octavo::emulator {
namespace {

enum class Wait { kNone, kBlock, kWarp, kEver };  // kEver: the thread has ended

struct Thread {
  Fiber fiber;
  uint3 idx;
  Wait wait;
  Site site;  // of what it waits at
};

struct Warp {
  int num_arrived;
  Site site;  // of the first to arrive
  void* operands[kLanes];
};

// Threads that can go on: a ring.
struct ReadyQueue {
  uint16_t ids[kMaxBlockThreads];
  uint32_t begin, end;

  bool IsEmpty() const { return begin == end; }
  uint16_t& At(uint32_t position) { return ids[position % kMaxBlockThreads]; }
  void Push(int id) { At(end++) = static_cast<uint16_t>(id); }
  int Pop() { return At(begin++); }
};

Fiber g_scheduler;
const GridCall* g_call;
Thread g_threads[kMaxBlockThreads];
Warp g_warps[kMaxBlockThreads / kLanes];
ReadyQueue g_ready;
int g_running;
int g_num_threads;
int g_num_at_block;
uint64_t g_num_switches = 0;
uint64_t g_seed = 0;
uint64_t g_random = 0;

// xorshift64.
uint64_t DrawBelow(uint64_t limit) {
  g_random ^= g_random << 13;
  g_random ^= g_random >> 7;
  g_random ^= g_random << 17;
  return (g_random >> 11) % limit;
}

// ---- Switching ----------------------------------------------------------------------------------

int TakeReady() {
  if (g_seed != 0) {
    const uint32_t num_ready = g_ready.end - g_ready.begin;
    std::swap(g_ready.At(g_ready.begin),
              g_ready.At(g_ready.begin + static_cast<uint32_t>(DrawBelow(num_ready))));
  }
  return g_ready.Pop();
}

// The fiber to go on with: the scheduler's when no thread can.
Fiber& NextFiber() {
  if (g_ready.IsEmpty()) return g_scheduler;
  g_running = TakeReady();
  ++g_num_switches;
  threadIdx = g_threads[g_running].idx;
  return g_threads[g_running].fiber;
}

void WaitAs(Wait wait, const Site& site) {
  Thread& self = g_threads[g_running];
  self.wait = wait;
  self.site = site;
  SwitchFiber(self.fiber, NextFiber());
}

// Makes threads go on, all but the one that runs and so has not stopped.
void Release(int begin_id, int end_id) {
  for (int id = begin_id; id < end_id; ++id) {
    g_threads[id].wait = Wait::kNone;
    if (id != g_running) g_ready.Push(id);
  }
}

void RunThread() {
  g_call->run_thread(g_call->closure);
  WaitAs(Wait::kEver, {"the end", "", 0});
}

// ---- Blocks -------------------------------------------------------------------------------------

uint3 Unflatten(uint64_t idx, const dim3& shape) {
  const auto x = static_cast<unsigned>(idx % shape.x);
  const auto y = static_cast<unsigned>(idx / shape.x % shape.y);
  return {x, y, static_cast<unsigned>(idx / shape.x / shape.y)};
}

void BeginThread(int id) {
  Thread& thread = g_threads[id];
  thread.idx = Unflatten(static_cast<uint64_t>(id), blockDim);
  thread.wait = Wait::kNone;
  StartFiber(thread.fiber, id, RunThread);
  g_ready.Push(id);
}

void BeginBlock(uint64_t block_idx) {
  blockIdx = Unflatten(block_idx, gridDim);
  BeginShared(g_call->shared_bytes);
  g_num_at_block = 0;
  g_ready.begin = g_ready.end = 0;
  for (Warp& warp : g_warps) warp.num_arrived = 0;
  for (int id = 0; id < g_num_threads; ++id) BeginThread(id);
}

int CountWaiting(Wait wait) {
  int count = 0;
  for (int id = 0; id < g_num_threads; ++id) count += g_threads[id].wait == wait ? 1 : 0;
  return count;
}

// A thread that waits for others that will not come: at a warp's collective if there is one.
int FindStuck() {
  for (Wait wait : {Wait::kWarp, Wait::kBlock}) {
    for (int id = 0; id < g_num_threads; ++id) {
      if (g_threads[id].wait == wait) return id;
    }
  }
  return -1;
}

// No thread can go on, and not all have ended.
void ReportStuck() {
  const int stuck = FindStuck();
  if (stuck < 0) return;
  const Site& site = g_threads[stuck].site;
  ReportFault(
      "%s:%d: %s by thread %d of block (%u, %u, %u): divergence: it waits in vain; of %d threads "
      "%d are at a warp's collective, %d at SyncBlock, %d at their end",
      FileName(site), site.line, site.primitive, stuck, blockIdx.x, blockIdx.y, blockIdx.z,
      g_num_threads, CountWaiting(Wait::kWarp), CountWaiting(Wait::kBlock),
      CountWaiting(Wait::kEver));
}

void RunBlock(uint64_t block_idx) {
  BeginBlock(block_idx);
  SwitchFiber(g_scheduler, NextFiber());
  if (!HasFault()) ReportStuck();
}

std::vector<uint64_t> OrderBlocks(uint64_t num_blocks) {
  std::vector<uint64_t> order(num_blocks);
  std::iota(order.begin(), order.end(), uint64_t{0});
  if (g_seed == 0) return order;
  for (uint64_t idx = num_blocks - 1; idx > 0; --idx) {
    std::swap(order[idx], order[DrawBelow(idx + 1)]);
  }
  return order;
}

void CheckSameCollective(const Warp& warp, const Site& site) {
  if (warp.num_arrived == 0 || SameSite(warp.site, site)) return;
  FailThread(site, "divergence: others of its warp are at %s, %s:%d", warp.site.primitive,
             FileName(warp.site), warp.site.line);
}

}  // namespace

void RunGrid(const GridCall& call) {
  const SegfaultGuard guard;
  g_call = &call;
  gridDim = call.grid;
  blockDim = call.block;
  g_num_threads = static_cast<int>(call.block.x * call.block.y * call.block.z);
  g_random = g_seed;
  for (uint64_t idx : OrderBlocks(uint64_t{gridDim.x} * gridDim.y * gridDim.z)) {
    RunBlock(idx);
    if (HasFault()) return;
  }
}

void SetScheduleSeed(uint64_t seed) { g_seed = seed; }

uint64_t CountSwitches() { return g_num_switches; }

int ThreadId() { return g_running; }

void FailThread(const Site& site, const char* format, ...) {
  char what[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(what, sizeof what, format, args);
  va_end(args);
  ReportFault("%s:%d: %s by thread %d of block (%u, %u, %u): %s", FileName(site), site.line,
              site.primitive, g_running, blockIdx.x, blockIdx.y, blockIdx.z, what);
  SwitchFiber(g_threads[g_running].fiber, g_scheduler);
  __builtin_unreachable();
}

void MeetBlock(const Site& site) {
  if (++g_num_at_block < g_num_threads) return WaitAs(Wait::kBlock, site);
  g_num_at_block = 0;
  OrderBlock(site);
  Release(0, g_num_threads);
}

void MeetWarp(const Site& site, void* operand, Complete complete) {
  const int first_id = g_running / kLanes * kLanes;
  Warp& warp = g_warps[g_running / kLanes];
  CheckSameCollective(warp, site);
  warp.site = site;
  warp.operands[g_running - first_id] = operand;
  if (++warp.num_arrived < kLanes) return WaitAs(Wait::kWarp, site);
  warp.num_arrived = 0;
  complete(warp.operands);
  Release(first_id, first_id + kLanes);
}

}  // namespace octavo::emulator
