// A GPU with a stream and the buffers of a step.

#ifndef OCTAVO_CUDA_GPU_H_
#define OCTAVO_CUDA_GPU_H_

#include <cuda_runtime.h>

#include "cuda/cache.h"
#include "cuda/step_buffers.h"
#include "octavo/cuda_api.h"

namespace octavo::cuda {

// A step is one copy in, the kernels, one copy out and one event waited on.
class Device {
 public:
  explicit Device(int device_idx);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  cudaStream_t stream() const { return stream_; }
  DeviceProperties Properties() const;
  int64_t FreeBytes() const;

  // Makes this the device of the calling thread.
  void Use() const;

  void Run(const Cache& cache, const Step& step);
  void CopyBlocks(const Cache& cache, const int64_t (*pairs)[2], int64_t num_pairs);

 private:
  void Wait();

  const int device_idx_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t done_ = nullptr;
  StepBuffers buffers_;
};

}  // namespace octavo::cuda

#endif  // OCTAVO_CUDA_GPU_H_
