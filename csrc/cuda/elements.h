// Elements of q, k, v and out in global memory, in whichever dtype, to and from FP32.

#ifndef OCTAVO_CUDA_ELEMENTS_H_
#define OCTAVO_CUDA_ELEMENTS_H_

#include "cuda/device.h"
#include "octavo/half.h"
#include "octavo/paged_cache.h"

namespace octavo::cuda {

// Elements that a lane moves at once: head_dim is a multiple of it.
inline constexpr int kVectorElements = kHeadDimStep;

// Converts the two 16-bit elements of a word, low half first.
__device__ __forceinline__ void WidenPair(DataType dtype, uint32_t word, float* elements) {
  if (dtype == DataType::kFloat16) {
    elements[0] = HalfToFloat(static_cast<uint16_t>(word));
    elements[1] = HalfToFloat(static_cast<uint16_t>(word >> 16));
  } else {
    elements[0] = Bfloat16ToFloat(static_cast<uint16_t>(word));
    elements[1] = Bfloat16ToFloat(static_cast<uint16_t>(word >> 16));
  }
}

// Loads kCount elements (4 or 8) from element `first` on, which is a multiple of kCount; zeros, and
// no access, where they do not exist.
template <int kCount>
__device__ __forceinline__ void LoadElements(DataType dtype, const void* source, int64_t first,
                                             bool exists, float (&elements)[kCount]) {
#pragma unroll
  for (float& element : elements) element = 0.0f;
  if (!exists) return;
  if (dtype == DataType::kFloat32) {
    const auto* words = static_cast<const float*>(source) + first;
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const Bytes16 four = LoadGlobal(reinterpret_cast<const Bytes16*>(words + i));
#pragma unroll
      for (int j = 0; j < 4; ++j) elements[i + j] = BitsFloat(four.words[j]);
    }
    return;
  }
  const auto* halves = static_cast<const uint16_t*>(source) + first;
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const Bytes8 four = LoadGlobal(reinterpret_cast<const Bytes8*>(halves + i));
    WidenPair(dtype, four.words[0], elements + i);
    WidenPair(dtype, four.words[1], elements + i + 2);
  }
}

// FP16 saturates: a sum of V may be a little over 65504 where no V is, as scales are rounded up,
// and far over where V was stored from a wider type.
__device__ __forceinline__ uint16_t NarrowToHalf(float x) {
  return FloatToHalf(fminf(fmaxf(x, -kLargestHalf), kLargestHalf));
}

// Stores the elements `first` (even) and first + 1.
__device__ __forceinline__ void StorePair(DataType dtype, void* target, int64_t first, float x,
                                          float y) {
  if (dtype == DataType::kFloat32) {
    const Bytes8 pair = {{FloatBits(x), FloatBits(y)}};
    StoreGlobal(reinterpret_cast<Bytes8*>(static_cast<float*>(target) + first), pair);
    return;
  }
  const bool is_half = dtype == DataType::kFloat16;
  const uint32_t low = is_half ? NarrowToHalf(x) : FloatToBfloat16(x);
  const uint32_t high = is_half ? NarrowToHalf(y) : FloatToBfloat16(y);
  StoreGlobal(reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(target) + first),
              low | high << 16);
}

// Loads a layer's pointers.
__device__ __forceinline__ PagedInt8Layer LoadLayer(const PagedInt8Cache& cache, int32_t layer) {
  const auto* halves = reinterpret_cast<const Bytes16*>(cache.layers + layer);
  union {
    Bytes16 halves[2];
    PagedInt8Layer layer;
  } loaded = {{LoadGlobal(halves), LoadGlobal(halves + 1)}};
  return loaded.layer;
}

}  // namespace octavo::cuda

#endif  // OCTAVO_CUDA_ELEMENTS_H_
