// The decode kernel: INT8 paged attention of up to 8 rows of q over one span of one kv head's
// context.
//
// Grid: x over DecodeItems, y over kv heads. A block is 4 warps, and each is on its own until the
// end: it takes every fourth tile of 16 tokens, copies it into a ring of its own in shared memory
// while others are computed (cp.async), and keeps its own softmax state. So the main loop has no
// barrier of the block. K and V are read from device memory once for all rows: per token and kv
// head 2 * head_dim bytes of codes and 4 of scales.
//
// Products run on tensor cores with tokens (K) and dims (V) as M and rows of q as N:
//   S[token, row] = K[token, dim] * Q[dim, row]     codes become FP16 in registers, exactly
//   O[dim, row] += V[dim, token] * W[token, row]    V's bytes are turned within a lane's registers
// Q goes in as FP16 times a power of two a row, FP32 as two such terms; weights W go in as two
// terms. All sums are FP32. K scales multiply scores, V scales join the weights before they are
// rounded.
//
// A span's result is stored, or, where the context was split, kept as a partial one; the block that
// finishes last merges them all, in their order.

#ifndef OCTAVO_CUDA_DECODE_KERNEL_H_
#define OCTAVO_CUDA_DECODE_KERNEL_H_

#include "cuda/attend_tile.h"
#include "cuda/decode_results.h"
#include "cuda/decode_work.h"
#include "cuda/device.h"
#include "cuda/queries.h"
#include "cuda/tile_ring.h"
#include "cuda/tile_shape.h"
#include "octavo/cuda_ops.h"

namespace octavo::cuda {

// Dynamic shared memory of a block: the rings, which give way to the results and the table by which
// they merge; then a flag.
template <int kDim>
struct SharedLayout {
  static constexpr int kTableOffset = SharedResults<kDim>::kBytes;
  static constexpr int kFlagOffset = TileShape<kDim>::kSharedBytes;
  static constexpr int kBytes = kFlagOffset + 16;
  static_assert(kTableOffset + MergeTable::kBytes <= kFlagOffset,
                "results fit where the rings were");
};

// Attends to this warp's tiles of the block's span. What the block works on is loaded here, and
// again for the results: held over the loop, it would take registers.
template <int kDim, bool kIsSplit>
__device__ __forceinline__ Accumulator<kDim> AttendSpan(const DecodeParams& params,
                                                        const Lane& lane, char* shared) {
  const Work work = LoadWork(params);
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  TileRing<kDim> ring(params, work, lane, shared + warp * TileShape<kDim>::kWarpBytes);
  Queries<kDim, kIsSplit> queries;  // loaded while the first tiles are on their way
  LoadQueries<kDim, kIsSplit>(params, work, lane, &queries);
  Accumulator<kDim> sums = {{EmptyState(), EmptyState()}, {}};
  for (; ring.HasTile(); ring.Advance()) {
    const char* stage = ring.Take();
    AttendTile<kDim, kIsSplit>(stage, ring.position(), work.options.soft_cap, lane, queries, &sums);
  }
  return sums;
}

template <int kDim, bool kIsSplit>
__global__ void __launch_bounds__(kBlockThreads, TileShape<kDim>::kResidentBlocks)
    decode_paged_int8_kernel(const __grid_constant__ DecodeParams params) {
  char* shared = DynamicShared();
  const Lane lane = ThisLane();
  const SharedResults<kDim> results(shared);
  {
    const Accumulator<kDim> sums = AttendSpan<kDim, kIsSplit>(params, lane, shared);
    WaitCopies<0>();
    SyncBlock();  // the rings give way to the results
    ShareResults<kDim>(lane, sums, results);
  }
  SyncBlock();
  const Work work = LoadWork(params);
  const MergeTable table(shared + SharedLayout<kDim>::kTableOffset);
  StoreOwnResults<kDim>(params, work, results, table);
  auto* flag = reinterpret_cast<int32_t*>(shared + SharedLayout<kDim>::kFlagOffset);
  if (work.item.num_splits > 1 && IsLastSplit(params, work, flag)) {
    StoreMergedSplits(params, work, table);
  }
}

}  // namespace octavo::cuda

#endif  // OCTAVO_CUDA_DECODE_KERNEL_H_
