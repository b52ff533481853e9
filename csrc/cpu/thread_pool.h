// A fixed set of threads that claim the items of one job after the other.

#ifndef OCTAVO_CPU_THREAD_POOL_H_
#define OCTAVO_CPU_THREAD_POOL_H_

#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace octavo::cpu {

// Runs jobs on the calling thread and num_threads - 1 of its own. One job at a time; further
// callers wait. Nobody waits for a thread that is slow to wake: a job ends when its items have.
//
// In a child after fork() the pool's threads do not exist, and the caller does all items alone.
class ThreadPool {
 public:
  // num_threads: 1 or more.
  // cores: empty, or the core that each thread is bound to, the caller's first. A caller is bound
  // when it first shares a job out, and stays so; the threads that it starts after that inherit it.
  explicit ThreadPool(int num_threads, std::vector<int> cores = {});
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Calls run_item(i) once for each i in [0, num_items), in any order, and returns when all are
  // done. is_parallel = false keeps a job that is too small to share on the calling thread.
  template <typename RunItem>
  void ForEach(int64_t num_items, bool is_parallel, const RunItem& run_item) {
    const Job job = {
        [](const void* context, int64_t item) { (*static_cast<const RunItem*>(context))(item); },
        &run_item, num_items};
    Run(job, is_parallel);
  }

 private:
  struct Job {
    void (*run_item)(const void* context, int64_t item);
    const void* context;
    int64_t num_items;
  };

  void StartWorker(int thread_idx);
  void StopWorkers();
  void Run(const Job& job, bool is_parallel);
  void Announce(int64_t num_items);
  void ClaimItems();
  void WorkerLoop();
  bool WaitForJob(uint64_t* seen_job);

  const int num_threads_;
  const std::vector<int> cores_;  // [num_threads_] or empty
  const pid_t owner_pid_;
  std::mutex run_mutex_;  // held by the caller whose job runs

  // The gate guards job_: the number of workers inside, and a bit that says that none may enter.
  // job_ changes only while it is shut and empty.
  std::atomic<uint32_t> gate_;
  Job job_ = {};
  std::atomic<int64_t> next_item_{0};

  std::atomic<uint64_t> num_jobs_{0};  // what idle workers watch
  std::atomic<int> num_sleepers_{0};
  std::atomic<bool> is_stopping_{false};

  // What threads hold on to, and what a child after fork() can therefore not destroy.
  struct Workers {
    std::mutex sleep_mutex;
    std::condition_variable wake;
    std::vector<std::thread> threads;
  };
  std::unique_ptr<Workers> workers_ = std::make_unique<Workers>();
};

// Returns the cores that this thread may run on, ascending; a process begins with those that it was
// given.
std::vector<int> AvailableCores();

}  // namespace octavo::cpu

#endif  // OCTAVO_CPU_THREAD_POOL_H_
