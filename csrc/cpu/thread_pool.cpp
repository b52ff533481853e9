#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cfenv>

namespace octavo::cpu {
namespace {

constexpr uint32_t kShut = 1u << 31;
constexpr int kSpinsBeforeSleep =
    1000;  // about 20 us: a step's append is followed by its attention
constexpr int kSpinsBeforeYield = 200;

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(num_threads), owner_pid_(getpid()), gate_(kShut) {
  for (int i = 1; i < num_threads; ++i) {
    workers_->threads.emplace_back([this] { WorkerLoop(); });
    pthread_setname_np(workers_->threads.back().native_handle(), "octavo-cpu");
  }
}

ThreadPool::~ThreadPool() {
  if (getpid() != owner_pid_) {  // the parent's threads cannot be joined here, nor waited for
    static_cast<void>(workers_.release());
    return;
  }
  is_stopping_ = true;
  {
    std::lock_guard<std::mutex> lock(workers_->sleep_mutex);
    workers_->wake.notify_all();
  }
  for (std::thread& worker : workers_->threads) worker.join();
}

void ThreadPool::Run(const Job& job, bool is_parallel) {
  if (!is_parallel || job.num_items < 2 || num_threads_ == 1 || getpid() != owner_pid_) {
    for (int64_t item = 0; item < job.num_items; ++item) job.run_item(job.context, item);
    return;
  }
  std::lock_guard<std::mutex> lock(run_mutex_);
  job_ = job;
  next_item_.store(0, std::memory_order_relaxed);
  gate_.store(0, std::memory_order_release);
  Announce(job.num_items);
  ClaimItems();
  gate_.fetch_or(kShut);
  for (int spins = 0; gate_.load(std::memory_order_acquire) != kShut; ++spins) {
    if (spins < kSpinsBeforeYield) {
      Pause();
    } else {
      std::this_thread::yield();
    }
  }
}

// Tells idle workers of a job, and wakes as many sleepers as it can use.
void ThreadPool::Announce(int64_t num_items) {
  num_jobs_.fetch_add(1);
  const int64_t num_wanted = std::min<int64_t>(num_sleepers_.load(), num_items - 1);
  if (num_wanted == 0) return;
  // A worker that counted itself a sleeper holds this lock until it waits or has seen the job.
  std::lock_guard<std::mutex> lock(workers_->sleep_mutex);
  for (int64_t i = 0; i < num_wanted; ++i) workers_->wake.notify_one();
}

void ThreadPool::ClaimItems() {
  for (;;) {
    const int64_t item = next_item_.fetch_add(1, std::memory_order_relaxed);
    if (item >= job_.num_items) return;
    job_.run_item(job_.context, item);
  }
}

void ThreadPool::WorkerLoop() {
  std::fesetenv(FE_DFL_ENV);  // round to nearest, subnormals kept: a thread inherits its creator's
  uint64_t seen_job = 0;
  while (WaitForJob(&seen_job)) {
    uint32_t gate = gate_.load();
    while (!(gate & kShut) && !gate_.compare_exchange_weak(gate, gate + 1)) {
    }
    if (gate & kShut) continue;
    ClaimItems();
    gate_.fetch_sub(1, std::memory_order_release);
  }
}

// Waits for a job other than *seen_job: spins briefly, then sleeps. Returns false at the end.
bool ThreadPool::WaitForJob(uint64_t* seen_job) {
  const auto has_news = [&] { return num_jobs_.load() != *seen_job || is_stopping_.load(); };
  for (int spins = 0; spins < kSpinsBeforeSleep && !has_news(); ++spins) Pause();
  if (!has_news()) {
    std::unique_lock<std::mutex> lock(workers_->sleep_mutex);
    num_sleepers_.fetch_add(1);
    workers_->wake.wait(lock, has_news);
    num_sleepers_.fetch_sub(1);
  }
  *seen_job = num_jobs_.load();
  return !is_stopping_.load();
}

int NumAvailableCores() {
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof(cores), &cores) == 0) return CPU_COUNT(&cores);
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace octavo::cpu
