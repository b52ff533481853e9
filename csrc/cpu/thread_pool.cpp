#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cfenv>
#include <chrono>
#include <utility>

namespace octavo::cpu {
namespace {

constexpr uint32_t kShut = 1u << 31;
constexpr int kSpinsPerYield = 16;  // about 1 us

// How long an idle thread spins before it sleeps: launches that Python makes one after the other
// are up to 40 us apart. Jobs that are not shared out neither wake a thread nor make it spin on.
using Clock = std::chrono::steady_clock;
constexpr auto kSpinTime = std::chrono::microseconds(50);

constexpr int kMaxCores = 8192;
using CoreSet = cpu_set_t[kMaxCores / CPU_SETSIZE];

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits for a moment, as the spins-th of many; now and then, whoever else wants this core has it.
// A thread that was woken may be on the core of the very thread that it waits for.
void Spin(int spins) {
  if (spins % kSpinsPerYield == 0) {
    std::this_thread::yield();
  } else {
    Pause();
  }
}

// Does nothing when the core was taken from this process meanwhile.
void BindThread(pthread_t thread, int core) {
  CoreSet cores = {};
  CPU_SET_S(core, sizeof(cores), cores);
  pthread_setaffinity_np(thread, sizeof(cores), cores);
}

void BindCaller(int core) {
  static thread_local int bound_core = -1;
  if (bound_core == core) return;
  BindThread(pthread_self(), core);
  bound_core = core;
}

}  // namespace

ThreadPool::ThreadPool(int num_threads, std::vector<int> cores)
    : num_threads_(num_threads), cores_(std::move(cores)), owner_pid_(getpid()), gate_(kShut) {
  try {
    for (int i = 1; i < num_threads; ++i) StartWorker(i);
  } catch (...) {  // the system has no more threads
    StopWorkers();
    throw;
  }
}

void ThreadPool::StartWorker(int thread_idx) {
  workers_->threads.emplace_back([this] { WorkerLoop(); });
  const pthread_t thread = workers_->threads.back().native_handle();
  pthread_setname_np(thread, "octavo-cpu");
  if (!cores_.empty()) BindThread(thread, cores_[thread_idx]);
}

ThreadPool::~ThreadPool() {
  if (getpid() != owner_pid_) {  // the parent's threads cannot be joined here, nor waited for
    static_cast<void>(workers_.release());
    return;
  }
  StopWorkers();
}

void ThreadPool::StopWorkers() {
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
  if (!cores_.empty()) BindCaller(cores_[0]);
  job_ = job;
  next_item_.store(0, std::memory_order_relaxed);
  gate_.store(0, std::memory_order_release);
  Announce(job.num_items);
  ClaimItems();
  gate_.fetch_or(kShut);
  for (int spins = 1; gate_.load(std::memory_order_acquire) != kShut; ++spins) Spin(spins);
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
  const auto spin_end = Clock::now() + kSpinTime;
  for (int spins = 1; !has_news() && Clock::now() < spin_end; ++spins) Spin(spins);
  if (!has_news()) {
    std::unique_lock<std::mutex> lock(workers_->sleep_mutex);
    num_sleepers_.fetch_add(1);
    workers_->wake.wait(lock, has_news);
    num_sleepers_.fetch_sub(1);
  }
  *seen_job = num_jobs_.load();
  return !is_stopping_.load();
}

std::vector<int> AvailableCores() {
  CoreSet set = {};
  if (sched_getaffinity(0, sizeof(set), set) != 0) return {0};  // a system that does not tell
  std::vector<int> cores;
  for (int core = 0; core < kMaxCores; ++core) {
    if (CPU_ISSET_S(core, sizeof(set), set)) cores.push_back(core);
  }
  return cores;
}

}  // namespace octavo::cpu
