#include "runtime.h"

#include <algorithm>
#include <cstdio>

#include "memory.h"
#include "races.h"

namespace octavo::emulator {

DeviceModel g_device;
std::recursive_mutex g_call_mutex;
cudaError_t g_last_error = cudaSuccess;

cudaError_t NoteError(cudaError_t error) {
  if (error != cudaSuccess && error != cudaErrorNotReady) g_last_error = error;
  return error;
}

namespace {

constexpr size_t kSharedBytes = size_t{48} << 10;  // without being allowed more
constexpr int kMaxThreadsPerMultiprocessor = 2048;
constexpr uint64_t kRuntimeVersion = 13000;

cudaError_t CheckDevice(int device) {
  if (g_device.driver_version < kRuntimeVersion) return cudaErrorInsufficientDriver;
  if (g_device.num_devices == 0) return cudaErrorNoDevice;
  const bool is_there = device >= 0 && static_cast<uint64_t>(device) < g_device.num_devices;
  return is_there ? cudaSuccess : cudaErrorInvalidDevice;
}

cudaDeviceProp DescribeDevice() {
  cudaDeviceProp properties = {};
  std::snprintf(properties.name, sizeof properties.name, "Octavo CUDA emulator");
  properties.totalGlobalMem = g_device.memory_bytes;
  properties.sharedMemPerBlock = kSharedBytes;
  properties.sharedMemPerBlockOptin = g_device.shared_optin_bytes;
  properties.sharedMemPerMultiprocessor = g_device.shared_multiprocessor_bytes;
  properties.warpSize = kLanes;
  properties.maxThreadsPerBlock = kMaxBlockThreads;
  properties.maxThreadsPerMultiProcessor = kMaxThreadsPerMultiprocessor;
  properties.major = static_cast<int>(g_device.major);
  properties.minor = static_cast<int>(g_device.minor);
  properties.multiProcessorCount = static_cast<int>(g_device.num_multiprocessors);
  properties.l2CacheSize = static_cast<int>(g_device.l2_bytes);
  return properties;
}

// -1 when the emulator does not know the attribute.
int FindAttribute(cudaDeviceAttr attribute) {
  const cudaDeviceProp device = DescribeDevice();
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      return device.maxThreadsPerBlock;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return static_cast<int>(device.sharedMemPerBlock);
    case cudaDevAttrWarpSize:
      return device.warpSize;
    case cudaDevAttrMultiProcessorCount:
      return device.multiProcessorCount;
    case cudaDevAttrL2CacheSize:
      return device.l2CacheSize;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return device.maxThreadsPerMultiProcessor;
    case cudaDevAttrComputeCapabilityMajor:
      return device.major;
    case cudaDevAttrComputeCapabilityMinor:
      return device.minor;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return static_cast<int>(device.sharedMemPerMultiprocessor);
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return static_cast<int>(device.sharedMemPerBlockOptin);
  }
  return -1;
}

template <typename T>
cudaError_t Answer(T* target, T value) {
  return DoCall([&] {
    if (target == nullptr) return cudaErrorInvalidValue;
    *target = value;
    return cudaSuccess;
  });
}

}  // namespace
}  // namespace octavo::emulator

using namespace octavo::emulator;  // NOLINT: the definitions of a C API

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorUnsupportedPtxVersion:
      return "the provided PTX was compiled with an unsupported toolchain.";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorNotReady:
      return "device not ready";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() {
  const std::lock_guard<std::recursive_mutex> lock(g_call_mutex);
  const cudaError_t last = g_last_error;
  g_last_error = HasFault() ? cudaErrorLaunchFailure : cudaSuccess;
  return last;
}

cudaError_t cudaPeekAtLastError() {
  const std::lock_guard<std::recursive_mutex> lock(g_call_mutex);
  return g_last_error;
}

cudaError_t cudaGetDeviceCount(int* num_devices) {
  return DoCall([&] {
    *num_devices = 0;
    const cudaError_t error = CheckDevice(0);
    if (error == cudaSuccess) *num_devices = static_cast<int>(g_device.num_devices);
    return error;
  });
}

cudaError_t cudaGetDevice(int* device) { return Answer(device, 0); }

cudaError_t cudaSetDevice(int device) {
  return DoCall([&] { return CheckDevice(device); });
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  return DoCall([&] {
    *properties = DescribeDevice();
    return CheckDevice(device);
  });
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return DoCall([&] {
    *value = FindAttribute(attribute);
    return *value < 0 ? cudaErrorInvalidValue : CheckDevice(device);
  });
}

cudaError_t cudaDriverGetVersion(int* version) {
  return Answer(version, static_cast<int>(g_device.driver_version));
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  return Answer(version, static_cast<int>(kRuntimeVersion));
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  return DoCall([&] {
    *total_bytes = g_device.memory_bytes;
    *free_bytes = *total_bytes - std::min(*total_bytes, CountAllocatedBytes());
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceSynchronize() {
  return DoCall([] { return cudaSuccess; });
}
