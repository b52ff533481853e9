#include "cuda/device_memory.h"

#include <algorithm>

namespace octavo::cuda {
namespace {

// Whether an error leaves the device as it was.
Result ResultOf(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
    case cudaErrorNoDevice:
    case cudaErrorInvalidDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return kUnsupported;
    default:
      return kFailed;
  }
}

}  // namespace

void Check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // told here, not by the next call
  throw Failure{ResultOf(error), std::string("cannot ") + doing + ": " + cudaGetErrorString(error)};
}

bool Buffer::Reserve(int64_t num_bytes) {
  if (num_bytes <= capacity_) return false;
  const int64_t capacity = std::max(num_bytes, capacity_ + capacity_ / 2);
  Free();
  void* data = nullptr;
  const bool is_pinned = kind_ == Kind::kPinned;
  const std::string doing =
      "take " + std::to_string(capacity) +
      (is_pinned ? " bytes of pinned host memory" : " bytes of device memory");
  Check(is_pinned ? cudaMallocHost(&data, capacity) : cudaMalloc(&data, capacity), doing.c_str());
  data_ = static_cast<char*>(data);
  capacity_ = capacity;
  return true;
}

void Buffer::Free() {
  if (data_ == nullptr) return;
  if (kind_ == Kind::kPinned) {
    cudaFreeHost(data_);
  } else {
    cudaFree(data_);
  }
  data_ = nullptr;
  capacity_ = 0;
}

}  // namespace octavo::cuda
