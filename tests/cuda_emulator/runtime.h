// What the parts of the emulated runtime share: the device, the order of calls, and the last error.

#ifndef OCTAVO_CUDA_EMULATOR_RUNTIME_H_
#define OCTAVO_CUDA_EMULATOR_RUNTIME_H_

#include <cstddef>
#include <cstdint>
#include <mutex>

#include "cuda_runtime.h"
#include "faults.h"
#include "scheduler.h"

namespace octavo::emulator {

// Small, so that small shapes already share multiprocessors and split their contexts.
struct DeviceModel {
  uint64_t num_devices = 1;
  uint64_t driver_version = 13000;
  uint64_t major = 9;
  uint64_t minor = 0;
  uint64_t num_multiprocessors = 4;
  uint64_t l2_bytes = uint64_t{4} << 20;
  uint64_t memory_bytes = uint64_t{1} << 30;
  uint64_t shared_optin_bytes = uint64_t{227} << 10;
  uint64_t shared_multiprocessor_bytes = uint64_t{228} << 10;
};

extern DeviceModel g_device;
extern std::recursive_mutex g_call_mutex;
extern cudaError_t g_last_error;

// Keeps an error for cudaGetLastError, and returns it.
cudaError_t NoteError(cudaError_t error);

// Does the work of one call of the runtime, which returns what the call does. After a fault of a
// kernel no work is done any more.
template <typename Work>
cudaError_t DoCall(const Work& work) {
  const std::lock_guard<std::recursive_mutex> lock(g_call_mutex);
  return NoteError(HasFault() ? cudaErrorLaunchFailure : work());
}

// Whether a stream, nullptr included, exists.
bool IsStream(cudaStream_t stream);

// Checks and runs a launch.
cudaError_t LaunchGrid(const void* kernel, const GridCall& call, cudaStream_t stream);

}  // namespace octavo::emulator

#endif  // OCTAVO_CUDA_EMULATOR_RUNTIME_H_
