// Copies a block to another in every layer: what a shared block needs before it is written.
//
// Grid: x over layers, y over K codes, V codes, K scales and V scales. Bytes move 16 at a time: a
// block's codes are a multiple of 128 bytes, its scales of 32.

#include "cuda/device.h"
#include "cuda/elements.h"
#include "octavo/cuda_ops.h"

namespace octavo::cuda {
namespace {

constexpr int kThreads = 256;

struct CopyParams {
  PagedInt8Cache cache;
  int32_t source;
  int32_t target;
};

__device__ char* PoolOf(const PagedInt8Layer& layer, unsigned idx) {
  switch (idx) {
    case 0:
      return reinterpret_cast<char*>(layer.k_codes);
    case 1:
      return reinterpret_cast<char*>(layer.v_codes);
    case 2:
      return reinterpret_cast<char*>(layer.k_scales);
    default:
      return reinterpret_cast<char*>(layer.v_scales);
  }
}

__global__ void __launch_bounds__(kThreads) copy_block_kernel(CopyParams params) {
  const PagedInt8Cache& cache = params.cache;
  char* pool = PoolOf(LoadLayer(cache, static_cast<int32_t>(blockIdx.x)), blockIdx.y);
  const int64_t num_rows = int64_t{cache.num_kv_heads} * cache.block_size;
  const int64_t num_bytes = blockIdx.y < 2 ? num_rows * cache.head_dim : num_rows * 2;
  const auto* source = reinterpret_cast<const Bytes16*>(pool + params.source * num_bytes);
  auto* target = reinterpret_cast<Bytes16*>(pool + params.target * num_bytes);
  for (int64_t i = threadIdx.x; i < num_bytes / 16; i += kThreads) {
    CopyGlobal(target + i, source + i);
  }
}

}  // namespace

cudaError_t CopyBlock(const PagedInt8Cache& cache, int32_t source, int32_t target,
                      cudaStream_t stream) {
  return Launch(copy_block_kernel, dim3(static_cast<unsigned>(cache.num_layers), 4), dim3(kThreads),
                CopyParams{cache, source, target}, 0, stream);
}

}  // namespace octavo::cuda
