// What memory gives: pure reads, and copies, by any number of threads.
//
// Every thread walks over chunks of its own. While it sums one it prefetches the one that comes
// next for it, so that an order which jumps costs no more than one that does not. The clock starts
// once all threads are there and stops with the last of them.

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

using Vector = uint64_t __attribute__((vector_size(64), aligned(64)));

constexpr size_t kLineBytes = 64;
constexpr int kIntoL2 = 2;           // more lines are under way at once than L1 can wait for
constexpr size_t kStride = 1000003;  // a prime: every chunk has its turn

enum class Order { kContiguous, kFourStreams, kScattered };

struct Strategy {
  size_t chunk_bytes;
  Order order;
  bool prefetches;
};

// The last one is how a cache is read: 8 KB, 64 tokens of one kv head at head_dim 128, then
// elsewhere.
constexpr Strategy kStrategies[] = {
    {4096, Order::kContiguous, false}, {1024, Order::kContiguous, true},
    {4096, Order::kContiguous, true},  {1024, Order::kFourStreams, true},
    {8192, Order::kScattered, true},
};
constexpr int kNumStrategies = sizeof(kStrategies) / sizeof(kStrategies[0]);

// The chunk that a thread reads in its step-th turn, of the num_chunks that every thread has.
size_t ChunkOf(Order order, size_t thread, size_t step, size_t num_chunks) {
  const size_t first = thread * num_chunks;
  switch (order) {
    case Order::kContiguous:
      return first + step;
    case Order::kFourStreams:
      return first + step % 4 * (num_chunks / 4) + step / 4;
    case Order::kScattered:
      return first + step * kStride % num_chunks;
  }
  return 0;
}

// By reference: a CPU without such registers has no way to pass a vector that compilers agree on.
void AddChunk(const char* chunk, const char* next, size_t num_bytes, Vector& sum) {
  for (size_t at = 0; at < num_bytes; at += kLineBytes) {
    if (next != nullptr) __builtin_prefetch(next + at, 0, kIntoL2);
    sum += *reinterpret_cast<const Vector*>(chunk + at);
  }
}

uint64_t ReadShare(const char* data, size_t num_bytes, size_t thread, size_t num_threads,
                   const Strategy& strategy) {
  const size_t num_chunks = num_bytes / strategy.chunk_bytes / num_threads / 4 * 4;
  Vector sum = {};
  for (size_t step = 0; step < num_chunks; ++step) {
    const auto at = [&](size_t turn) {
      return data + ChunkOf(strategy.order, thread, turn, num_chunks) * strategy.chunk_bytes;
    };
    const char* next = strategy.prefetches && step + 1 < num_chunks ? at(step + 1) : nullptr;
    AddChunk(at(step), next, strategy.chunk_bytes, sum);
  }
  uint64_t total = 0;
  for (int lane = 0; lane < 8; ++lane) total += sum[lane];
  return total;
}

// Binds a thread to the idx-th of the cores that it may use, while this lives: two threads that
// share a core measure nothing.
class OnCoreOfItsOwn {
 public:
  explicit OnCoreOfItsOwn(size_t idx) {
    pthread_getaffinity_np(pthread_self(), sizeof(before_), &before_);
    cpu_set_t one;
    CPU_ZERO(&one);
    for (int core = 0; core < CPU_SETSIZE; ++core) {
      if (CPU_ISSET(core, &before_) && idx-- == 0) CPU_SET(core, &one);
    }
    pthread_setaffinity_np(pthread_self(), sizeof(one), &one);
  }
  ~OnCoreOfItsOwn() { pthread_setaffinity_np(pthread_self(), sizeof(before_), &before_); }

 private:
  cpu_set_t before_;
};

// Runs work(thread) in every thread, this one included; returns seconds.
template <typename Work>
double TimeTogether(size_t num_threads, const Work& work) {
  std::atomic<size_t> num_ready{0};
  const auto run = [&](size_t thread) {
    const OnCoreOfItsOwn bound(thread);
    num_ready.fetch_add(1);
    while (num_ready.load() < num_threads) std::this_thread::yield();
    work(thread);
  };
  std::vector<std::thread> others;
  for (size_t thread = 1; thread < num_threads; ++thread) others.emplace_back(run, thread);
  while (num_ready.load() + 1 < num_threads) std::this_thread::yield();
  const auto start = std::chrono::steady_clock::now();
  run(0);
  for (std::thread& other : others) other.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

extern "C" {

int octavo_num_strategies() { return kNumStrategies; }

// Reads all of data [num_bytes] num_passes times; returns seconds. data is aligned to 64 bytes, and
// num_bytes a multiple of 4 * 8192 * num_threads. *sum depends on every byte, so that no read can
// be left out.
double octavo_read(const void* data, size_t num_bytes, int num_passes, int num_threads,
                   int strategy, uint64_t* sum) {
  std::vector<uint64_t> sums(num_threads);
  const double seconds = TimeTogether(num_threads, [&](size_t thread) {
    for (int pass = 0; pass < num_passes; ++pass) {
      sums[thread] += ReadShare(static_cast<const char*>(data), num_bytes, thread, num_threads,
                                kStrategies[strategy]);
    }
  });
  *sum = 0;
  for (const uint64_t one : sums) *sum += one;
  return seconds;
}

// Copies source [num_bytes] onto target by memcpy, each thread an equal part of it; returns
// seconds.
double octavo_copy(void* target, const void* source, size_t num_bytes, int num_threads) {
  return TimeTogether(num_threads, [&](size_t thread) {
    const size_t first = num_bytes * thread / num_threads;
    const size_t last = num_bytes * (thread + 1) / num_threads;
    std::memcpy(static_cast<char*>(target) + first, static_cast<const char*>(source) + first,
                last - first);
  });
}
}
