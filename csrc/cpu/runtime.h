// What the launchers need beside their parameters: kernels, threads, and memory that they reuse.

#ifndef OCTAVO_CPU_RUNTIME_H_
#define OCTAVO_CPU_RUNTIME_H_

#include <cfenv>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "isa.h"
#include "thread_pool.h"

namespace octavo::cpu {

// Some rows of each of some neighbouring kv heads of one entry, and the context that they attend
// to.
struct RowTile {
  int32_t entry;
  int32_t kv_head;  // the first one
  int32_t num_kv_heads;
  int32_t first_row;  // of the entry's num_tokens * group_size rows of each kv head
  int32_t num_rows;
  int32_t begin;     // first position that any of its rows attends to
  int32_t end;       // one past the last
  int32_t span_len;  // positions of a span, but for the first and the last one
  int32_t num_spans;
  bool is_shared;       // each span is an item of its own
  int64_t first_state;  // of its states, [num_spans, num_kv_heads], where shared
};

// A piece of work for one thread: all spans of a row tile, or one.
struct DecodeItem {
  int32_t tile_idx;
  int32_t span_idx;  // where the tile is shared
};

// Memory of one decode launch, kept for the next.
struct DecodeWorkspace {
  std::vector<int32_t> entry_order;
  std::vector<RowTile> tiles;
  std::vector<DecodeItem> items;
  int64_t num_states = 0;                                  // of shared tiles
  int64_t states_capacity = 0;                             // elements behind `states`
  std::unique_ptr<SpanState[]> states;                     // [num_states]
  int64_t counts_capacity = 0;                             // elements behind `num_spans_done`
  std::unique_ptr<std::atomic<int32_t>[]> num_spans_done;  // [num_tiles]
};

// Launches take turns: one at a time per runtime.
class Runtime {
 public:
  // num_threads, cores: ThreadPool's.
  Runtime(const IsaKernels& kernels, int num_threads, std::vector<int> cores = {})
      : kernels(kernels), threads(num_threads, std::move(cores)) {}

  const IsaKernels& kernels;
  ThreadPool threads;
  DecodeWorkspace workspace;
};

// The floating-point environment that the numerics ask for (to nearest, subnormals kept), whatever
// the caller's.
class ScopedFloatEnvironment {
 public:
  ScopedFloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~ScopedFloatEnvironment() { std::fesetenv(&saved_); }
  ScopedFloatEnvironment(const ScopedFloatEnvironment&) = delete;
  ScopedFloatEnvironment& operator=(const ScopedFloatEnvironment&) = delete;

 private:
  std::fenv_t saved_;
};

// Keeps the smaller of *offence and `packed`; threads may race.
inline void RecordOffence(int64_t* offence, int64_t packed) {
  int64_t known = __atomic_load_n(offence, __ATOMIC_RELAXED);
  while (packed < known && !__atomic_compare_exchange_n(offence, &known, packed, true,
                                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

// Codes that one core works through in about 20 us, the time that waking another one may take:
// less is not shared out.
inline constexpr int64_t kMinSharedCodes = 200'000;

}  // namespace octavo::cpu

#endif  // OCTAVO_CPU_RUNTIME_H_
