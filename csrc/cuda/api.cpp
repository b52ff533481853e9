#include <exception>
#include <memory>
#include <string>

#include "cuda/gpu.h"
#include "octavo/cuda_api.h"

namespace octavo::cuda {
namespace {

thread_local std::string last_error;

// Runs a call and turns what it throws into a result.
template <typename Call>
int32_t Guarded(Call call) {
  try {
    call();
    return kDone;
  } catch (const Failure& failure) {
    last_error = failure.text;
    return failure.result;
  } catch (const std::exception& error) {  // out of host memory
    last_error = error.what();
    return kUnsupported;
  }
}

}  // namespace
}  // namespace octavo::cuda

using octavo::cuda::Cache;
using octavo::cuda::CacheSpec;
using octavo::cuda::Device;
using octavo::cuda::DeviceProperties;
using octavo::cuda::Guarded;
using octavo::cuda::Step;

const char* octavo_cuda_error() { return octavo::cuda::last_error.c_str(); }

int32_t octavo_cuda_open(int32_t device_idx, Device** device) {
  return Guarded([&] { *device = std::make_unique<Device>(device_idx).release(); });
}

void octavo_cuda_close(Device* device) { delete device; }

int32_t octavo_cuda_properties(Device* device, DeviceProperties* properties) {
  return Guarded([&] { *properties = device->Properties(); });
}

int32_t octavo_cuda_free_bytes(Device* device, int64_t* num_bytes) {
  return Guarded([&] { *num_bytes = device->FreeBytes(); });
}

int32_t octavo_cuda_make_cache(Device* device, const CacheSpec* spec, Cache** cache) {
  return Guarded([&] {
    device->Use();
    *cache = std::make_unique<Cache>(*spec, device->stream()).release();
  });
}

void octavo_cuda_free_cache(Cache* cache) { delete cache; }

int32_t octavo_cuda_step(Device* device, Cache* cache, const Step* step) {
  return Guarded([&] { device->Run(*cache, *step); });
}

int32_t octavo_cuda_copy_blocks(Device* device, Cache* cache, const int64_t (*pairs)[2],
                                int64_t num_pairs) {
  return Guarded([&] { device->CopyBlocks(*cache, pairs, num_pairs); });
}
