// Decode: picks the kernel for a head_dim and dtype, and launches it over a planned batch.

#include "cuda/decode_kernel.h"

namespace octavo::cuda {
namespace {

using DecodeKernel = void (*)(DecodeParams);

// One tuned head_dim: what a smaller one is rounded up to.
struct DecodeVariant {
  int head_dim;
  int shared_bytes;
  DecodeKernel kernel;        // of FP16 and BF16
  DecodeKernel split_kernel;  // of FP32, whose q takes two terms
};

template <int kDim>
constexpr DecodeVariant VariantOf() {
  return {kDim, SharedLayout<kDim>::kBytes, decode_paged_int8_kernel<kDim, false>,
          decode_paged_int8_kernel<kDim, true>};
}

const DecodeVariant* FindVariant(int head_dim) {
  static const DecodeVariant kVariants[] = {VariantOf<64>(),  VariantOf<80>(),  VariantOf<96>(),
                                            VariantOf<128>(), VariantOf<192>(), VariantOf<256>()};
  for (const DecodeVariant& variant : kVariants) {
    if (head_dim <= variant.head_dim) return &variant;
  }
  return nullptr;
}

}  // namespace

cudaError_t PrepareDecode(int32_t head_dim, DecodeOccupancy* occupancy) {
  const DecodeVariant* variant = FindVariant(head_dim);
  if (variant == nullptr) return cudaErrorInvalidValue;
  for (DecodeKernel kernel : {variant->kernel, variant->split_kernel}) {
    const cudaError_t error = AllowSharedBytes(kernel, variant->shared_bytes);
    if (error != cudaSuccess) return error;
  }
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&occupancy->num_multiprocessors, cudaDevAttrMultiProcessorCount,
                                 device);
  if (error != cudaSuccess) return error;
  return CountResidentBlocks(variant->kernel, kBlockThreads, variant->shared_bytes,
                             &occupancy->resident_blocks);
}

cudaError_t DecodePagedInt8(const DecodeParams& params, cudaStream_t stream) {
  if (params.num_items == 0) return cudaSuccess;
  const DecodeVariant* variant = FindVariant(params.cache.head_dim);
  if (variant == nullptr) return cudaErrorInvalidValue;
  const bool is_split = params.dtype == DataType::kFloat32;
  const dim3 grid(static_cast<unsigned>(params.num_items),
                  static_cast<unsigned>(params.cache.num_kv_heads));
  return Launch(is_split ? variant->split_kernel : variant->kernel, grid, dim3(kBlockThreads),
                params, variant->shared_bytes, stream);
}

}  // namespace octavo::cuda
