#include "cuda/gpu.h"

#include <cstdio>

#include "octavo/status.h"

namespace octavo::cuda {
namespace {

constexpr int kLeastComputeMajor = 8;  // asynchronous copies, and products of 16 x 8 x 16

std::string VersionText(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// The driver's refusals as sentences that say what to do.
void CheckDriver(cudaError_t error) {
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (driver == 0) throw Failure{kUnsupported, "this machine has no NVIDIA driver"};
    throw Failure{kUnsupported, "the NVIDIA driver runs CUDA " + VersionText(driver) +
                                    ", these kernels need " + VersionText(runtime) +
                                    "; install a newer driver"};
  }
  if (error == cudaErrorNoDevice) throw Failure{kUnsupported, "this machine has no NVIDIA GPU"};
  Check(error, "ask for devices");
}

void CheckCompute(const DeviceProperties& properties) {
  if (properties.compute_major >= kLeastComputeMajor) return;
  throw Failure{kUnsupported, std::string(properties.name) + " has compute capability " +
                                  std::to_string(properties.compute_major) + "." +
                                  std::to_string(properties.compute_minor) +
                                  ", the kernels need 8.0 or more"};
}

}  // namespace

Device::Device(int device_idx) : device_idx_(device_idx) {
  int num_devices = 0;
  CheckDriver(cudaGetDeviceCount(&num_devices));
  if (device_idx < 0 || device_idx >= num_devices) {
    throw Failure{kUnsupported, "there is no GPU " + std::to_string(device_idx) + ", only " +
                                    std::to_string(num_devices)};
  }
  CheckCompute(Properties());
  Use();
  Check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "create a stream");
  Check(cudaEventCreateWithFlags(&done_, cudaEventDisableTiming), "create an event");
}

Device::~Device() {
  if (done_ != nullptr) cudaEventDestroy(done_);
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

DeviceProperties Device::Properties() const {
  cudaDeviceProp found;
  Check(cudaGetDeviceProperties(&found, device_idx_), "read the GPU's properties");
  DeviceProperties properties = {};
  std::snprintf(properties.name, sizeof(properties.name), "%s", found.name);
  properties.compute_major = found.major;
  properties.compute_minor = found.minor;
  properties.num_multiprocessors = found.multiProcessorCount;
  Check(cudaDriverGetVersion(&properties.driver_version), "read the driver's version");
  return properties;
}

int64_t Device::FreeBytes() const {
  Use();
  size_t num_free = 0, num_total = 0;
  Check(cudaMemGetInfo(&num_free, &num_total), "read the GPU's free memory");
  return static_cast<int64_t>(num_free);
}

void Device::Use() const { Check(cudaSetDevice(device_idx_), "use the GPU"); }

void Device::Run(const Cache& cache, const Step& step) {
  Use();
  buffers_.Prepare(cache, step, stream_);
  buffers_.CopyIn(stream_);
  buffers_.Launch(cache, stream_);
  buffers_.CopyOut(stream_);
  Wait();
  buffers_.Finish(step);
}

void Device::CopyBlocks(const Cache& cache, const int64_t (*pairs)[2], int64_t num_pairs) {
  Use();
  const int64_t num_blocks = cache.on_device().num_blocks;
  for (int64_t i = 0; i < num_pairs; ++i) {
    for (const int64_t block : pairs[i]) {
      if (block >= 0 && block < num_blocks) continue;
      throw Failure{kInvalid, StatusMessage(Status::kBlockOutOfRange)};
    }
  }
  for (int64_t i = 0; i < num_pairs; ++i) {
    const auto source = static_cast<int32_t>(pairs[i][0]),
               target = static_cast<int32_t>(pairs[i][1]);
    Check(CopyBlock(cache.on_device(), source, target, stream_), "launch the copy kernel");
  }
  Wait();
}

void Device::Wait() {
  Check(cudaEventRecord(done_, stream_), "record an event");
  Check(cudaEventSynchronize(done_), "finish a step");
}

}  // namespace octavo::cuda
