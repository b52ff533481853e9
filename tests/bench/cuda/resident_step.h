// A step of which everything is in place: its inputs in a pinned buffer and on the device, its plan
// made. A server's Device has one step in its buffers at a time; the benchmark needs many, so that
// one after the other meets a cold cache.

#ifndef OCTAVO_TESTS_BENCH_RESIDENT_STEP_H_
#define OCTAVO_TESTS_BENCH_RESIDENT_STEP_H_

#include <cuda_runtime.h>

#include "bench_batch.h"
#include "cuda/cache.h"
#include "cuda/step_buffers.h"

namespace octavo::cuda {

class ResidentStep {
 public:
  explicit ResidentStep(const BenchStep& step);
  ~ResidentStep();
  ResidentStep(const ResidentStep&) = delete;
  ResidentStep& operator=(const ResidentStep&) = delete;

  BenchPlan plan() const;

  // Queues the step's kernels over what is on the device.
  void LaunchKernels(cudaStream_t stream) const;
  void LaunchThreePass(cudaStream_t stream) const;

  // Copies out and waits; out is NaN on the device afterwards.
  void TakeOut(uint16_t* out, cudaStream_t stream);

  // Copies in, runs, copies out, waits: what Device::Run does between its host copies.
  void Run(cudaStream_t stream);

 private:
  int64_t OutBytes() const;

  BenchBatch batch_;
  BenchSpec spec_;
  Cache cache_;
  StepBuffers buffers_;
  int64_t num_out_elements_ = 0;
  int32_t max_kv_len_ = 0;
  bool is_one_token_each_ = false;
  cudaEvent_t done_ = nullptr;
};

}  // namespace octavo::cuda

#endif  // OCTAVO_TESTS_BENCH_RESIDENT_STEP_H_
