#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "drills.h"
#include "thread_pool.h"

namespace octavo::tests {
namespace {

using cpu::ThreadPool;

constexpr int kNumThreads = 4;
constexpr int kMaxItems = 9;
constexpr int kJobsPerRound = 300;
constexpr int kSleepsPerRound = 10;
constexpr int kPoolsPerRound = 10;
constexpr auto kUntilAsleep = std::chrono::microseconds(300);

// Runs one job; the counts are plain, so that two threads at one item would be a race.
void RunJob(ThreadPool& pool, int num_items) {
  std::vector<int> num_runs(num_items);
  pool.ForEach(num_items, true, [&](int64_t item) { ++num_runs[item]; });
  for (const int count : num_runs) Check(count == 1, "each item ran once");
}

void RunJobs(ThreadPool& pool, int num_jobs) {
  for (int i = 0; i < num_jobs; ++i) RunJob(pool, i % (kMaxItems + 1));
}

void RunFromTwoCallers(ThreadPool& pool) {
  std::thread other([&] { RunJobs(pool, kJobsPerRound); });
  RunJobs(pool, kJobsPerRound);
  other.join();
}

// The pauses are about as long as the threads spin, too short and too long for it.
void RunAfterSleeps(ThreadPool& pool) {
  for (int i = 0; i < kSleepsPerRound; ++i) {
    std::this_thread::sleep_for(kUntilAsleep * i / kSleepsPerRound);
    RunJob(pool, 1 + i % kMaxItems);
  }
}

// Bound to cores, two a core where there are too few.
void RunBound() {
  const std::vector<int> available = cpu::AvailableCores();
  std::vector<int> cores;
  for (int i = 0; i < kNumThreads; ++i) cores.push_back(available[i % available.size()]);
  ThreadPool pool(kNumThreads, std::move(cores));
  std::thread caller([&] { RunFromTwoCallers(pool); });  // it stays bound
  caller.join();
}

void EndIdlePools() {
  for (int i = 0; i < kPoolsPerRound; ++i) {
    ThreadPool pool(1 + i % kNumThreads);
    RunJobs(pool, i / 2);
    if (i % 2 == 1) std::this_thread::sleep_for(kUntilAsleep);
  }
}

void ForkIdlePool() {
  auto pool = std::make_unique<ThreadPool>(kNumThreads);
  RunJobs(*pool, kMaxItems);
  const pid_t child = fork();
  RunJobs(*pool, kMaxItems);
  pool.reset();
  if (child == 0) _exit(0);
  int status = -1;
  Check(waitpid(child, &status, 0) == child && status == 0, "a child does its items and exits");
}

}  // namespace

void DrillPool(int num_rounds) {
  ThreadPool pool(kNumThreads);
  for (int round = 0; round < num_rounds; ++round) {
    RunJobs(pool, kJobsPerRound);
    RunFromTwoCallers(pool);
    RunAfterSleeps(pool);
    RunBound();
    EndIdlePools();
    ForkIdlePool();
  }
}

}  // namespace octavo::tests
