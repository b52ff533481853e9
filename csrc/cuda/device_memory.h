// Buffers on the device and pinned on the host, that grow and are used again.

#ifndef OCTAVO_CUDA_DEVICE_MEMORY_H_
#define OCTAVO_CUDA_DEVICE_MEMORY_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "octavo/cuda_api.h"

namespace octavo::cuda {

// Why a call of the C ABI failed. Thrown and caught within the library.
struct Failure {
  Result result;
  std::string text;
};

// Throws what a call of the CUDA runtime said, unless that was nothing.
//
// Args: doing: what was tried, as in "cannot <doing>".
void Check(cudaError_t error, const char* doing);

// A buffer of one kind of memory. Growing it forgets what it held, and waits for nobody: the owner
// grows it between steps.
class Buffer {
 public:
  enum class Kind { kDevice, kPinned };

  explicit Buffer(Kind kind) : kind_(kind) {}
  ~Buffer() { Free(); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // Makes room for num_bytes; returns whether the memory is another one than before.
  bool Reserve(int64_t num_bytes);

  template <typename T = char>
  T* At(int64_t offset = 0) const {
    return reinterpret_cast<T*>(data_ + offset);
  }

  int64_t capacity() const { return capacity_; }

 private:
  void Free();

  const Kind kind_;
  char* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace octavo::cuda

#endif  // OCTAVO_CUDA_DEVICE_MEMORY_H_
