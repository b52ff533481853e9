// How the test kernels are run: by name, an input and an output each a buffer of bytes on the
// device.

#ifndef OCTAVO_TESTS_CUDA_KERNELS_HARNESS_H_
#define OCTAVO_TESTS_CUDA_KERNELS_HARNESS_H_

#include <cstdint>
#include <cstring>

#include "cuda/device.h"

#define OCTAVO_TEST_EXPORT extern "C" __attribute__((visibility("default")))

namespace octavo::cuda {

// What every test kernel takes. What `option` means is the kernel's own; of a kernel with a planted
// bug, whether it has it.
struct TestParams {
  const char* input;
  char* output;
  int option;
};

using TestKernel = void (*)(TestParams);

struct NamedKernel {
  const char* name;
  TestKernel kernel;
  int block_threads;
  int shared_bytes;
};

// Layout known to the tests.
struct TestJob {
  const void* input;
  int64_t input_bytes;
  void* output;
  int64_t output_bytes;
  int32_t num_blocks;
  int32_t option;
  int32_t is_in_place;
};

// Memory of the device, freed with this.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(int64_t num_bytes) : num_bytes_(static_cast<size_t>(num_bytes)) {
    cudaMalloc(&bytes_, num_bytes_);  // a failure shows in the copies
  }
  ~DeviceBuffer() { cudaFree(bytes_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  char* bytes() const { return bytes_; }
  cudaError_t CopyFrom(const void* host) {
    return cudaMemcpy(bytes_, host, num_bytes_, cudaMemcpyHostToDevice);
  }
  cudaError_t CopyTo(void* host) const {
    return cudaMemcpy(host, bytes_, num_bytes_, cudaMemcpyDeviceToHost);
  }

 private:
  size_t num_bytes_;
  char* bytes_ = nullptr;
};

// Runs a kernel on the job's own memory, which the device has to have as well.
inline cudaError_t RunInPlace(const NamedKernel& named, const TestJob& job) {
  auto* input = static_cast<const char*>(job.input);
  return Launch(named.kernel, dim3(static_cast<unsigned>(job.num_blocks)),
                dim3(static_cast<unsigned>(named.block_threads)),
                TestParams{input, static_cast<char*>(job.output), job.option},
                static_cast<size_t>(named.shared_bytes), nullptr);
}

inline cudaError_t RunJob(const NamedKernel& named, const TestJob& job) {
  DeviceBuffer input(job.input_bytes), output(job.output_bytes);
  if (cudaError_t error = input.CopyFrom(job.input); error != cudaSuccess) return error;
  TestJob on_device = job;
  on_device.input = input.bytes();
  on_device.output = output.bytes();
  const cudaError_t error = RunInPlace(named, on_device);
  return error != cudaSuccess ? error : output.CopyTo(job.output);
}

template <int kNumKernels>
int RunNamed(const NamedKernel (&kernels)[kNumKernels], const char* name, const TestJob& job) {
  for (const NamedKernel& named : kernels) {
    if (std::strcmp(named.name, name) == 0) {
      return job.is_in_place != 0 ? RunInPlace(named, job) : RunJob(named, job);
    }
  }
  return cudaErrorInvalidValue;
}

template <typename T>
__device__ T* SharedAs() {
  return reinterpret_cast<T*>(DynamicShared());
}

template <typename T>
__device__ const T* InputAs(const TestParams& params) {
  return reinterpret_cast<const T*>(params.input);
}

template <typename T>
__device__ T* OutputAs(const TestParams& params) {
  return reinterpret_cast<T*>(params.output);
}

}  // namespace octavo::cuda

#endif  // OCTAVO_TESTS_CUDA_KERNELS_HARNESS_H_
