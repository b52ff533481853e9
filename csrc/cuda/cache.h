// A model's cache on a device: what kernels read of it lies there, what planning reads on the host.

#ifndef OCTAVO_CUDA_CACHE_H_
#define OCTAVO_CUDA_CACHE_H_

#include <cuda_runtime.h>

#include <vector>

#include "cuda/device_memory.h"
#include "octavo/cuda_api.h"
#include "octavo/cuda_ops.h"

namespace octavo::cuda {

class Cache {
 public:
  // Copies the spec's tables to the device and waits for that.
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

}  // namespace octavo::cuda

#endif  // OCTAVO_CUDA_CACHE_H_
