// A device with the buffers that steps pass through, and a model's cache on it.

#ifndef OCTAVO_CUDA_STEP_H_
#define OCTAVO_CUDA_STEP_H_

#include <cuda_runtime.h>

#include <vector>

#include "cuda/device_memory.h"
#include "cuda/plan.h"
#include "cuda/staging.h"
#include "octavo/cuda_api.h"
#include "octavo/cuda_ops.h"

namespace octavo::cuda {

// A model's cache: what kernels read of it lies on the device, what planning reads on the host.
class Cache {
 public:
  Cache(const CacheSpec& spec, cudaStream_t stream);

  const PagedInt8Cache& on_device() const { return on_device_; }
  const int32_t* windows() const { return windows_.data(); }
  const DecodeOccupancy& occupancy() const { return occupancy_; }

 private:
  PagedInt8Cache on_device_ = {};
  std::vector<int32_t> windows_;
  DecodeOccupancy occupancy_ = {};
  Buffer tables_{Buffer::Kind::kDevice};  // layers, options, sinks
};

// A device: its stream, and buffers that grow to the largest step so far. A step is one copy in,
// the kernels, one copy out and one event waited on; it allocates nothing once the buffers are
// large enough.
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
  void Plan(const Cache& cache, const Step& step);
  void Reserve(const Cache& cache);
  void Stage(const Step& step);
  void Launch(const Cache& cache, const Step& step);
  RaggedBatch BatchOnDevice(const RaggedBatch& batch) const;
  void Wait();
  void Unstage(const Step& step) const;

  const int device_idx_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t done_ = nullptr;
  DecodePlan plan_;
  StepShape shape_ = {};
  StagingLayout layout_ = {};
  Buffer pinned_{Buffer::Kind::kPinned};
  Buffer staging_{Buffer::Kind::kDevice};
  Buffer partials_{Buffer::Kind::kDevice};
  Buffer partial_values_{Buffer::Kind::kDevice};
  Buffer counters_{Buffer::Kind::kDevice};
};

}  // namespace octavo::cuda

#endif  // OCTAVO_CUDA_STEP_H_
