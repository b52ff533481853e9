// The CUDA library's C ABI: what the cuda backend calls, from one thread at a time.
//
// Every function that can fail returns a Result; octavo_cuda_error() then says why, in a sentence.

#ifndef OCTAVO_CUDA_API_H_
#define OCTAVO_CUDA_API_H_

#include <cstdint>

#include "octavo/paged_cache.h"

#define OCTAVO_CUDA_EXPORT extern "C" __attribute__((visibility("default")))

namespace octavo::cuda {

class Device;
class Cache;

enum Result : int32_t {
  kDone = 0,
  kInvalid = 1,      // an argument is wrong, nothing was done
  kUnsupported = 2,  // this device or driver will not do, or has no memory left; nothing was done
  kFailed = 3,       // the device failed: its memory is not to be trusted any more
};

// What a device is.
struct DeviceProperties {
  char name[256];
  int32_t compute_major;
  int32_t compute_minor;
  int32_t num_multiprocessors;
  int32_t driver_version;  // the newest CUDA that the driver runs, 1000 * major + 10 * minor
};

// A model's cache. Pointers are the host's, but for the pools.
struct CacheSpec {
  int32_t num_layers;
  int32_t num_blocks;
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t block_size;
  int32_t is_deterministic;
  const PagedInt8Layer* layers;  // [num_layers] device pointers, which the caller keeps alive
  const float* sm_scale;         // [num_layers]
  const float* soft_cap;         // [num_layers] 0 = none
  const int32_t* window;         // [num_layers] 0 = none
  const float* sinks;            // [num_layers, num_q_heads] or null
};

// One step over host arrays: append k and v where they are given, then attend where q is.
struct Step {
  RaggedBatch batch;  // host pointers
  int32_t dtype;      // a DataType, of q, k, v and out
  const void* k;      // [total_tokens, num_kv_heads, head_dim] or null, like v
  const void* v;      // like k
  const void* q;      // [total_tokens, num_q_heads, head_dim] or null
  void* out;          // like q; written
  float* lse;         // [total_tokens, num_q_heads] or null; written
  int64_t* offences;  // [num_entries]; written
};

}  // namespace octavo::cuda

// Returns the sentence of this thread's last failure.
OCTAVO_CUDA_EXPORT const char* octavo_cuda_error();

// Opens a device, with a stream and buffers of its own.
OCTAVO_CUDA_EXPORT int32_t octavo_cuda_open(int32_t device_idx, octavo::cuda::Device** device);
OCTAVO_CUDA_EXPORT void octavo_cuda_close(octavo::cuda::Device* device);

OCTAVO_CUDA_EXPORT int32_t octavo_cuda_properties(octavo::cuda::Device* device,
                                                  octavo::cuda::DeviceProperties* properties);

// Returns the bytes of device memory that are free.
OCTAVO_CUDA_EXPORT int32_t octavo_cuda_free_bytes(octavo::cuda::Device* device, int64_t* num_bytes);

// Binds a model's pools. A cache is freed before its device is closed.
OCTAVO_CUDA_EXPORT int32_t octavo_cuda_make_cache(octavo::cuda::Device* device,
                                                  const octavo::cuda::CacheSpec* spec,
                                                  octavo::cuda::Cache** cache);
OCTAVO_CUDA_EXPORT void octavo_cuda_free_cache(octavo::cuda::Cache* cache);

// Runs a step, and returns when its answer is there.
OCTAVO_CUDA_EXPORT int32_t octavo_cuda_step(octavo::cuda::Device* device,
                                            octavo::cuda::Cache* cache,
                                            const octavo::cuda::Step* step);

// Copies block pairs[i][0] to block pairs[i][1] in every layer, in the order of i.
OCTAVO_CUDA_EXPORT int32_t octavo_cuda_copy_blocks(octavo::cuda::Device* device,
                                                   octavo::cuda::Cache* cache,
                                                   const int64_t (*pairs)[2], int64_t num_pairs);

#endif  // OCTAVO_CUDA_API_H_
