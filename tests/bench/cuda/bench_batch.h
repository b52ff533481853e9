// A BenchStep as the kernels' host code takes it.

#ifndef OCTAVO_TESTS_BENCH_BENCH_BATCH_H_
#define OCTAVO_TESTS_BENCH_BENCH_BATCH_H_

#include <memory>
#include <vector>

#include "bench.h"
#include "octavo/cuda_api.h"
#include "octavo/paged_cache.h"

namespace octavo::cuda {

// The ragged batch of a BenchStep, with the arrays that it points to. Those that the BenchStep has
// stay the caller's.
class BenchBatch {
 public:
  explicit BenchBatch(const BenchStep& step);
  BenchBatch(const BenchBatch&) = delete;
  BenchBatch& operator=(const BenchBatch&) = delete;

  const RaggedBatch& batch() const { return batch_; }

 private:
  std::vector<int32_t> layers_;
  std::vector<int32_t> start_pos_;
  std::vector<int32_t> token_starts_;
  std::vector<int64_t> slot_mapping_;
  std::unique_ptr<bool[]> is_causal_;
  RaggedBatch batch_ = {};
};

// A model of one layer, without attention options, and its arrays.
class BenchSpec {
 public:
  explicit BenchSpec(const BenchStep& step);
  BenchSpec(const BenchSpec&) = delete;
  BenchSpec& operator=(const BenchSpec&) = delete;

  const CacheSpec& spec() const { return spec_; }

 private:
  PagedInt8Layer layer_;
  float sm_scale_;
  float soft_cap_ = 0.0f;
  int32_t window_ = 0;
  CacheSpec spec_ = {};
};

}  // namespace octavo::cuda

#endif  // OCTAVO_TESTS_BENCH_BENCH_BATCH_H_
