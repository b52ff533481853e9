// The buffers that a step passes through, and the step's way through them.
//
// A step is staged in pinned memory, copied to the device in one go, run, copied back in one go,
// and unstaged. Buffers grow to the largest step so far: after that nothing is allocated.

#ifndef OCTAVO_CUDA_STEP_BUFFERS_H_
#define OCTAVO_CUDA_STEP_BUFFERS_H_

#include <cuda_runtime.h>

#include "cuda/cache.h"
#include "cuda/device_memory.h"
#include "cuda/plan.h"
#include "cuda/staging.h"
#include "octavo/cuda_api.h"
#include "octavo/cuda_ops.h"

namespace octavo::cuda {

// Calls come in the order Prepare, CopyIn, Launch, CopyOut, and once the stream is through, Finish.
class StepBuffers {
 public:
  // Checks a step, plans its attention, makes room, and stages its arrays.
  void Prepare(const Cache& cache, const Step& step, cudaStream_t stream);

  // Queues the copy to the device, the kernels, and the copy back.
  void CopyIn(cudaStream_t stream);
  void Launch(const Cache& cache, cudaStream_t stream) const;
  void CopyOut(cudaStream_t stream);

  // Copies the answer to the step's arrays.
  void Finish(const Step& step) const;

  const DecodePlan& plan() const { return plan_; }
  const StagingLayout& layout() const { return layout_; }
  const Buffer& on_device() const { return staging_; }

  // The batch, with pointers into the device's buffer.
  RaggedBatch BatchOnDevice() const;

 private:
  void Plan(const Cache& cache, const Step& step);
  void Reserve(cudaStream_t stream);
  void Stage(const Step& step);
  void StageRows(const Step& step);
  void LaunchAppend(const Cache& cache, cudaStream_t stream) const;
  void LaunchDecode(const Cache& cache, cudaStream_t stream) const;

  DecodePlan plan_;
  DataType dtype_ = DataType::kFloat32;
  StepShape shape_ = {};
  StagingLayout layout_ = {};
  Buffer pinned_{Buffer::Kind::kPinned};
  Buffer staging_{Buffer::Kind::kDevice};
  Buffer partials_{Buffer::Kind::kDevice};
  Buffer partial_values_{Buffer::Kind::kDevice};
  Buffer counters_{Buffer::Kind::kDevice};
};

}  // namespace octavo::cuda

#endif  // OCTAVO_CUDA_STEP_BUFFERS_H_
