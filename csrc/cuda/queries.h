// Rows of q, in the registers of a warp, as the products with K take them.
//
// A row goes in as FP16 times a power of two of its own, with which its largest magnitude is near
// 2^15: so FP16 rows are exact, and so is BF16 but for what is 2^39 times smaller than the largest.
// FP32 takes a second term, for 22 bits in all.

#ifndef OCTAVO_CUDA_QUERIES_H_
#define OCTAVO_CUDA_QUERIES_H_

#include "cuda/decode_work.h"
#include "cuda/device.h"
#include "cuda/elements.h"
#include "cuda/softmax.h"
#include "octavo/offence.h"

namespace octavo::cuda {

// Rows of q as the B operands of the scores' products: row `group`, dims of TileShape::KeyDim.
template <int kDim, bool kIsSplit>
struct Queries {
  uint32_t high[kDim / 16][2];
  uint32_t low[kIsSplit ? kDim / 16 : 1][2];  // what FP16 did not hold
  // Of rows 2 * quad and + 1: what turns their products into scores, to base 2 unless they are
  // capped.
  float factors[2];
  Range ranges[2];  // of the same rows
};

// A power of two that brings a row's largest magnitude to [2^14, 2^15), and its inverse.
struct RowScale {
  float factor;
  float inverse;
};

__device__ __forceinline__ RowScale ScaleOf(uint32_t amax_bits) {
  const int exponent = min(141 - static_cast<int>(amax_bits >> 23), 126);
  return {BitsFloat(static_cast<uint32_t>(127 + exponent) << 23),
          BitsFloat(static_cast<uint32_t>(127 - exponent) << 23)};
}

// Records a row that is not finite. The block of the first span does it, once.
__device__ __forceinline__ void CheckQuery(const DecodeParams& params, const Work& work,
                                           const Lane& lane, uint32_t amax_bits) {
  const bool is_recorder = work.item.split_idx == 0 && threadIdx.x < kWarpThreads && lane.quad == 0;
  if (!is_recorder || amax_bits < kFloatInfBits || work.kv_len == 0) return;
  const RowPlace place = PlaceOf(params, work, lane.group);
  AtomicMin(params.offences + work.item.entry,
            PackOffence(OffenceField::kQ, place.token, place.q_head, OffenceKind::kNonFinite));
}

// Rounds four scaled elements to FP16, and what is left of them where that counts.
template <int kDim, bool kIsSplit>
__device__ __forceinline__ void RoundQuery(const float* x, int i,
                                           Queries<kDim, kIsSplit>* queries) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float first = x[2 * half], second = x[2 * half + 1];
    const uint32_t high = PackHalves(first, second);
    queries->high[i][half] = high;
    if constexpr (kIsSplit) {
      queries->low[i][half] = PackHalves(first - HalfToFloat(static_cast<uint16_t>(high)),
                                         second - HalfToFloat(static_cast<uint16_t>(high >> 16)));
    }
  }
}

// Where a lane's elements of row `group` of q come from.
template <int kDim>
struct QuerySource {
  DataType dtype;
  const void* q;
  int64_t first;  // element of the row
  int head_dim;   // 0 where there is no such row
  const Lane& lane;

  // Loads the four elements that the i-th product takes.
  __device__ __forceinline__ void Load(int i, float (&elements)[4]) const {
    using Shape = TileShape<kDim>;
    constexpr int kVectorFours = Shape::kKeyVector / 4;
    const int dim = Shape::KeyDim(i / kVectorFours, lane.quad) + 4 * (i % kVectorFours);
    LoadElements(dtype, q, first + dim, dim < head_dim, elements);
  }

  // Returns the bits of the row's largest magnitude.
  __device__ __forceinline__ uint32_t LoadMaxBits() const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      float elements[4];
      Load(i, elements);
#pragma unroll
      for (float x : elements) bits = max(bits, FloatBits(x) & 0x7fffffffu);
    }
    bits = max(bits, ShuffleXor(bits, 1));
    return max(bits, ShuffleXor(bits, 2));
  }
};

// Loads row `group` of q. Every warp holds all rows: they are few, and L1 has them. They are loaded
// twice, so as not to hold them in FP32.
template <int kDim, bool kIsSplit>
__device__ __forceinline__ void LoadQueries(const DecodeParams& params, const Work& work,
                                            const Lane& lane, Queries<kDim, kIsSplit>* queries) {
  const bool is_row = lane.group < work.item.num_rows;
  const int64_t out_row = OutRow(params, work, PlaceOf(params, work, lane.group));
  const QuerySource<kDim> source = {params.dtype, params.q, out_row * params.cache.head_dim,
                                    is_row ? params.cache.head_dim : 0, lane};
  const uint32_t amax_bits = source.LoadMaxBits();
  CheckQuery(params, work, lane, amax_bits);
  const RowScale scale = ScaleOf(amax_bits);
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    float elements[4];
    source.Load(i, elements);
#pragma unroll
    for (float& x : elements) x *= scale.factor;
    RoundQuery(elements, i, queries);
  }
#pragma unroll
  for (int column = 0; column < 2; ++column) {
    const int row = 2 * lane.quad + column;
    queries->factors[column] = ShuffleFrom(scale.inverse, 4 * row) * work.options.sm_scale;
    if (work.options.soft_cap == 0.0f) queries->factors[column] *= kLog2E;
    queries->ranges[column] = AttendedRange(params, work, row);
  }
}

}  // namespace octavo::cuda

#endif  // OCTAVO_CUDA_QUERIES_H_
