// The ring in shared memory through which the tiles of one warp pass, copied while others are
// computed.
//
// Layout of a tile: tile_shape.h. The rows of a tile follow each other in the pool, so a warp
// copies 16 bytes a lane from 512 that lie together.

#ifndef OCTAVO_CUDA_TILE_RING_H_
#define OCTAVO_CUDA_TILE_RING_H_

#include "cuda/decode_work.h"
#include "cuda/device.h"
#include "cuda/elements.h"
#include "cuda/tile_shape.h"

namespace octavo::cuda {

// Copies a tile's rows, which follow each other in the pool, into rows of kPitch bytes. Where lanes
// take whole rows between them, every copy is the first one's, some rows further on.
template <int kDim, int kPitch>
__device__ __forceinline__ void CopyWholeRows(const int8_t* source, const Lane& lane,
                                              char* target) {
  constexpr int kRowChunks = kDim / 16, kNumChunks = kTileTokens * kRowChunks;
  const int8_t* lane_source = source + lane.idx * 16;
  char* lane_target = target + lane.idx / kRowChunks * kPitch + lane.idx % kRowChunks * 16;
#pragma unroll
  for (int first = 0; first < kNumChunks; first += kWarpThreads) {
    if constexpr (kWarpThreads % kRowChunks == 0) {
      CopyAsync<16>(lane_target + first / kRowChunks * kPitch, lane_source + first * 16);
    } else {
      const int chunk = first + lane.idx;
      if (kNumChunks % kWarpThreads != 0 && chunk >= kNumChunks) break;
      const int row = chunk / kRowChunks, byte = chunk % kRowChunks * 16;
      CopyAsync<16>(target + row * kPitch + byte, lane_source + first * 16);
    }
  }
}

// The same with zeros past head_dim and past num_rows.
template <int kDim, int kPitch>
__device__ __forceinline__ void CopySomeRows(const int8_t* source, int head_dim, int num_rows,
                                             const Lane& lane, char* target) {
  constexpr int kRowChunks = kDim / 8, kNumChunks = kTileTokens * kRowChunks;
#pragma unroll 1
  for (int chunk = lane.idx; chunk < kNumChunks; chunk += kWarpThreads) {
    const int row = chunk / kRowChunks, byte = chunk % kRowChunks * 8;
    const bool exists = row < num_rows && byte < head_dim;
    CopyAsync<8>(target + row * kPitch + byte, source + row * head_dim + byte, exists ? 8 : 0);
  }
}

// Copies the scales of K by lanes 0 and 1, those of V by lanes 2 and 3.
template <int kDim>
__device__ __forceinline__ void CopyScales(const KvTile& tile, int offset, int num_rows,
                                           const Lane& lane, char* stage) {
  using Shape = TileShape<kDim>;
  if (lane.idx >= 4) return;
  const bool is_k = lane.idx < 2;
  const int first = lane.idx % 2 * 8;
  const uint16_t* source = (is_k ? tile.k_scales : tile.v_scales) + offset + first;
  char* target = stage + (is_k ? Shape::kKeyScalesOffset : Shape::kValueScalesOffset) + first * 2;
  CopyAsync<16>(target, source, 2 * min(max(num_rows - first, 0), 8));
}

// The tiles that one warp takes of a span, and the ring that they pass through.
template <int kDim>
class TileRing {
 public:
  using Shape = TileShape<kDim>;

  // Args: shared: the warp's part of shared memory.
  __device__ __forceinline__ TileRing(const DecodeParams& params, const Work& work,
                                      const Lane& lane, char* shared)
      : cache_(params.cache),
        layer_(LoadLayer(params.cache, work.layer)),
        block_table_(params.batch.BlockTable(work.item.entry)),
        lane_(lane),
        shared_(shared),
        kv_head_(work.kv_head),
        block_shift_(params.block_shift),
        kv_len_(work.kv_len),
        end_(work.item.end) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
    position_ = next_position_ = work.item.begin / kTileTokens * kTileTokens + warp * kTileTokens;
    next_block_ = LoadBlock(next_position_);
#pragma unroll
    for (int i = 0; i < Shape::kNumStages - 1; ++i) StartNext();
  }

  // Position of the first token of the tile to compute.
  __device__ __forceinline__ int position() const { return position_; }

  __device__ __forceinline__ bool HasTile() const { return position_ < end_; }

  // Waits for the tile to compute, and returns it; the stage that was computed last is filled anew.
  __device__ __forceinline__ const char* Take() {
    WaitCopies<Shape::kNumStages - 2>();
    SyncWarp();
    StartNext();
    return shared_ + stage_ * Shape::kStageBytes;
  }

  // Ends the computation of the tile taken.
  __device__ __forceinline__ void Advance() {
    position_ += kBlockWarps * kTileTokens;
    stage_ = stage_ + 1 == Shape::kNumStages ? 0 : stage_ + 1;
  }

 private:
  __device__ __forceinline__ int32_t LoadBlock(int position) const {
    return position < end_ ? LoadGlobal(block_table_ + (position >> block_shift_)) : 0;
  }

  // Starts to copy the next tile, if there is one; a group is committed in any case, so that groups
  // and tiles count alike.
  __device__ __forceinline__ void StartNext() {
    if (next_position_ < end_) {
      const KvTile tile = cache_.Tile(layer_, next_block_, kv_head_);
      CopyTile(tile, next_position_ & (cache_.block_size - 1),
               min(kv_len_ - next_position_, kTileTokens));
    }
    CommitCopies();
    next_position_ += kBlockWarps * kTileTokens;
    next_block_ = LoadBlock(next_position_);
    next_stage_ = next_stage_ + 1 == Shape::kNumStages ? 0 : next_stage_ + 1;
  }

  __device__ __forceinline__ void CopyTile(const KvTile& tile, int offset, int num_rows) const {
    char* stage = shared_ + next_stage_ * Shape::kStageBytes;
    char* values = stage + Shape::kValuesOffset;
    const int head_dim = cache_.head_dim;
    const int8_t* k = tile.k_codes + offset * head_dim;
    const int8_t* v = tile.v_codes + offset * head_dim;
    if (head_dim == kDim && num_rows == kTileTokens) {
      CopyWholeRows<kDim, Shape::kKeyPitch>(k, lane_, stage);
      CopyWholeRows<kDim, Shape::kValuePitch>(v, lane_, values);
    } else {
      CopySomeRows<kDim, Shape::kKeyPitch>(k, head_dim, num_rows, lane_, stage);
      CopySomeRows<kDim, Shape::kValuePitch>(v, head_dim, num_rows, lane_, values);
    }
    CopyScales<kDim>(tile, offset, num_rows, lane_, stage);
  }

  const PagedInt8Cache& cache_;
  const PagedInt8Layer layer_;
  const int32_t* block_table_;
  const Lane lane_;
  char* shared_;
  int kv_head_;
  int block_shift_;
  int kv_len_;
  int end_;
  int position_;       // of the tile to compute
  int next_position_;  // of the tile to copy
  int32_t next_block_;
  int stage_ = 0;
  int next_stage_ = 0;
};

}  // namespace octavo::cuda

#endif  // OCTAVO_CUDA_TILE_RING_H_
