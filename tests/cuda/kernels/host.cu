// What a host does with the runtime. Each scenario returns an error of the runtime.

#include "harness.h"

namespace octavo::cuda {
namespace {

constexpr size_t kNumBytes = 256;

__device__ int Descend(const TestParams& params, int depth) {
  char frame[256];
  for (int idx = 0; idx < 256; ++idx) frame[idx] = LoadGlobal(params.input + depth % 2 + idx % 4);
  return depth == 0 ? frame[0] : Descend(params, depth - 1) + frame[depth % 256];
}

__global__ void touch_kernel(const TestParams params) {
  StoreGlobal(params.output, LoadGlobal(params.input));
}

__global__ void descend_kernel(const TestParams params) {
  StoreGlobal(params.output, static_cast<char>(Descend(params, params.option)));
}

cudaError_t LaunchOn(DeviceBuffer& buffer, dim3 grid, dim3 block, size_t shared_bytes,
                     cudaStream_t stream = nullptr) {
  cudaMemsetAsync(buffer.bytes(), 1, kNumBytes);
  return Launch(touch_kernel, grid, block, TestParams{buffer.bytes(), buffer.bytes(), 0},
                shared_bytes, stream);
}

cudaError_t LaunchShape(dim3 grid, dim3 block) {
  DeviceBuffer buffer(kNumBytes);
  return LaunchOn(buffer, grid, block, 0);
}

cudaError_t Works() { return LaunchShape(2, 64); }
cudaError_t NoBlocks() { return LaunchShape(0, 64); }
cudaError_t PartOfWarp() { return LaunchShape(1, 48); }
cudaError_t TooManyThreads() { return LaunchShape(1, 1056); }

cudaError_t TooMuchShared() {
  DeviceBuffer buffer(kNumBytes);
  return LaunchOn(buffer, 1, 32, 48 * 1024 + 4);
}

cudaError_t AllowedShared() {
  constexpr int kSharedBytes = 200 * 1024;
  DeviceBuffer buffer(kNumBytes);
  if (cudaError_t error = AllowSharedBytes(touch_kernel, kSharedBytes); error != cudaSuccess) {
    return error;
  }
  const cudaError_t error = LaunchOn(buffer, 1, 32, kSharedBytes);
  AllowSharedBytes(touch_kernel, 48 * 1024);
  return error;
}

cudaError_t AllowTooMuchShared() { return AllowSharedBytes(touch_kernel, 228 * 1024); }

cudaError_t DestroyedStream() {
  DeviceBuffer buffer(kNumBytes);
  cudaStream_t stream;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (cudaError_t error = LaunchOn(buffer, 1, 32, 0, stream); error != cudaSuccess) return error;
  cudaStreamDestroy(stream);
  return LaunchOn(buffer, 1, 32, 0, stream);
}

cudaError_t CopyTooFar() {
  DeviceBuffer buffer(kNumBytes);
  const char host[kNumBytes + 1] = {};
  return cudaMemcpy(buffer.bytes(), host, kNumBytes + 1, cudaMemcpyHostToDevice);
}

cudaError_t CopyWrongWay() {
  DeviceBuffer buffer(kNumBytes);
  char host[kNumBytes] = {};
  return cudaMemcpy(host, buffer.bytes(), kNumBytes, cudaMemcpyHostToDevice);
}

cudaError_t OutOfMemory() {
  size_t free_bytes, total_bytes;
  cudaMemGetInfo(&free_bytes, &total_bytes);
  char* bytes;
  return cudaMalloc(&bytes, free_bytes + 1);
}

cudaError_t FreeTwice() {
  char* bytes;
  cudaMalloc(&bytes, kNumBytes);
  cudaFree(bytes);
  return cudaFree(bytes);
}

// After a use that the emulator may remember.
cudaError_t UseAfterFree() {
  char* bytes;
  cudaMalloc(&bytes, kNumBytes);
  cudaMemsetAsync(bytes, 1, kNumBytes);
  const TestParams params = {bytes, bytes, 0};
  if (cudaError_t error = Launch(touch_kernel, 1, 32, params, 0, nullptr); error != cudaSuccess) {
    return error;
  }
  cudaFree(bytes);
  return Launch(touch_kernel, 1, 32, params, 0, nullptr);
}

// Copies from one allocation to another, where a kernel reads it.
cudaError_t TouchCopyOf(const DeviceBuffer& from) {
  DeviceBuffer to(kNumBytes);
  cudaMemcpy(to.bytes(), from.bytes(), kNumBytes, cudaMemcpyDeviceToDevice);
  return Launch(touch_kernel, 1, 32, TestParams{to.bytes(), to.bytes(), 0}, 0, nullptr);
}

cudaError_t CopyUnwritten() { return TouchCopyOf(DeviceBuffer(kNumBytes)); }

cudaError_t CopyWritten() {
  DeviceBuffer from(kNumBytes);
  cudaMemsetAsync(from.bytes(), 1, kNumBytes);
  return TouchCopyOf(from);
}

cudaError_t DeepStack() {
  DeviceBuffer buffer(kNumBytes);
  cudaMemsetAsync(buffer.bytes(), 1, kNumBytes);
  return Launch(descend_kernel, 1, 32, TestParams{buffer.bytes(), buffer.bytes() + 8, 100000}, 0,
                nullptr);
}

cudaError_t Sticky() {
  UseAfterFree();
  return cudaDeviceSynchronize();
}

const struct {
  const char* name;
  cudaError_t (*run)();
} kScenarios[] = {
    {"works", Works},
    {"no_blocks", NoBlocks},
    {"part_of_warp", PartOfWarp},
    {"too_many_threads", TooManyThreads},
    {"too_much_shared", TooMuchShared},
    {"allowed_shared", AllowedShared},
    {"allow_too_much_shared", AllowTooMuchShared},
    {"destroyed_stream", DestroyedStream},
    {"copy_too_far", CopyTooFar},
    {"copy_wrong_way", CopyWrongWay},
    {"out_of_memory", OutOfMemory},
    {"free_twice", FreeTwice},
    {"use_after_free", UseAfterFree},
    {"copy_unwritten", CopyUnwritten},
    {"copy_written", CopyWritten},
    {"deep_stack", DeepStack},
    {"sticky", Sticky},
};

}  // namespace
}  // namespace octavo::cuda

OCTAVO_TEST_EXPORT int run_host(const char* name) {
  for (const auto& scenario : octavo::cuda::kScenarios) {
    if (std::strcmp(scenario.name, name) == 0) return scenario.run();
  }
  return -1;
}

OCTAVO_TEST_EXPORT int count_resident_blocks(int block_threads, int shared_bytes) {
  int num_blocks = -1;
  octavo::cuda::CountResidentBlocks(octavo::cuda::touch_kernel, block_threads, shared_bytes,
                                    &num_blocks);
  return num_blocks;
}
