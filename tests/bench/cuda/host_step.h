// A step from host arrays to host arrays, through a device of its own: what a server's step is.

#ifndef OCTAVO_TESTS_BENCH_HOST_STEP_H_
#define OCTAVO_TESTS_BENCH_HOST_STEP_H_

#include <vector>

#include "bench_batch.h"
#include "cuda/gpu.h"

namespace octavo::cuda {

class HostStep {
 public:
  HostStep(const BenchStep& step, int32_t device_idx);

  void Run() { device_.Run(cache_, step_); }

 private:
  BenchBatch batch_;
  BenchSpec spec_;
  Device device_;
  Cache cache_;
  std::vector<uint16_t> q_, k_, v_, out_;
  std::vector<int64_t> offences_;
  Step step_ = {};
};

}  // namespace octavo::cuda

#endif  // OCTAVO_TESTS_BENCH_HOST_STEP_H_
