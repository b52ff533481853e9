// Launches: what a kernel was allowed, what fits, and the run itself.

#include <algorithm>
#include <map>

#include "races.h"
#include "runtime.h"

namespace octavo::emulator {
namespace {

constexpr uint64_t kDefaultSharedBytes = uint64_t{48} << 10;
constexpr uint64_t kReservedSharedBytes = uint64_t{1} << 10;  // of each block, by the system
constexpr int kMaxResidentThreads = 2048;
constexpr int kMaxResidentBlocks = 32;

std::map<const void*, uint64_t>& AllowedSharedBytes() {
  static std::map<const void*, uint64_t> allowed;
  return allowed;
}

uint64_t AllowedFor(const void* kernel) {
  const auto found = AllowedSharedBytes().find(kernel);
  return found == AllowedSharedBytes().end() ? kDefaultSharedBytes : found->second;
}

bool IsBlockShape(const dim3& block) {
  const uint64_t num_threads = uint64_t{block.x} * block.y * block.z;
  return num_threads > 0 && num_threads <= kMaxBlockThreads && num_threads % kLanes == 0;
}

bool IsGridShape(const dim3& grid) {
  return grid.x > 0 && grid.x <= 0x7fffffffu && grid.y > 0 && grid.y <= 0xffffu && grid.z > 0 &&
         grid.z <= 0xffffu;
}

cudaError_t CheckLaunch(const void* kernel, const GridCall& call, cudaStream_t stream) {
  if (!IsStream(stream)) return cudaErrorInvalidResourceHandle;
  if (!IsBlockShape(call.block) || !IsGridShape(call.grid)) return cudaErrorInvalidConfiguration;
  return call.shared_bytes > AllowedFor(kernel) ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

cudaError_t LaunchGrid(const void* kernel, const GridCall& call, cudaStream_t stream) {
  return DoCall([&] {
    const cudaError_t error = CheckLaunch(kernel, call, stream);
    if (error != cudaSuccess) return error;
    RunGrid(call);
    return HasFault() ? cudaErrorLaunchFailure : cudaSuccess;
  });
}

}  // namespace octavo::emulator

using namespace octavo::emulator;  // NOLINT: the definitions of a C API

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  return DoCall([&] {
    const uint64_t limit = std::min<uint64_t>(g_device.shared_optin_bytes, kMaxSharedBytes);
    const bool is_valid = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && value >= 0 &&
                          static_cast<uint64_t>(value) <= limit;
    if (!is_valid) return cudaErrorInvalidValue;
    AllowedSharedBytes()[kernel] = static_cast<uint64_t>(value);
    return cudaSuccess;
  });
}

// By threads and shared memory: what registers a kernel takes is not known here.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* num_blocks, const void* kernel,
                                                          int block_threads, size_t shared_bytes) {
  return DoCall([&] {
    if (block_threads <= 0 || block_threads > kMaxBlockThreads) return cudaErrorInvalidValue;
    const uint64_t by_shared =
        g_device.shared_multiprocessor_bytes / (shared_bytes + kReservedSharedBytes);
    const int by_threads = std::min(kMaxResidentBlocks, kMaxResidentThreads / block_threads);
    const bool is_allowed = shared_bytes <= AllowedFor(kernel);
    *num_blocks = is_allowed ? std::min(by_threads, static_cast<int>(by_shared)) : 0;
    return cudaSuccess;
  });
}
