// How a warp's tile of 16 tokens lies in shared memory, and which bytes of it a lane takes.
//
// Codes stay in rows, one a token, as they are in the pool. Rows are padded so that the lanes that
// read together read from different banks:
//   K: lane (group g, quad t) reads kKeyVector bytes of rows g and g + 8, at KeyDim(i, t).
//   V: it reads kValueVector bytes of rows 2t, 2t + 1, 2t + 8, 2t + 9, at ValueDim(i, g).
// Which dims a lane takes is free for K, as long as q is taken alike: a sum does not mind its
// order.

#ifndef OCTAVO_CUDA_TILE_SHAPE_H_
#define OCTAVO_CUDA_TILE_SHAPE_H_

#include <cstdint>

#include "octavo/host_device.h"

namespace octavo::cuda {

inline constexpr int kTileTokens = 16;  // a tile never crosses a block
inline constexpr int kBlockWarps = 4;   // each takes every fourth tile of the block's span

// kDim is head_dim, rounded up to one that is tuned: 64, 80, 96, 128, 192 or 256.
template <int kDim>
struct TileShape {
  static_assert(kDim % 16 == 0, "a product takes 16 dims");

  static constexpr int kKeyVector = kDim % 64 == 0 ? 16 : kDim % 32 == 0 ? 8 : 4;
  static constexpr int kNumKeyVectors = kDim / (4 * kKeyVector);
  static constexpr int kKeyPitch = kDim % 128 == 0 ? kDim + 16 : kDim;

  static constexpr int kValueVector = kDim % 128 == 0  ? 16
                                      : kDim % 64 == 0 ? 8
                                      : kDim % 32 == 0 ? 4
                                                       : 2;
  static constexpr int kNumValueVectors = kDim / (8 * kValueVector);
  static constexpr int kValuePitch = kDim == 80 ? kDim : kDim + 16;

  // A stage: K rows, V rows, K scales, V scales.
  static constexpr int kValuesOffset = kTileTokens * kKeyPitch;
  static constexpr int kKeyScalesOffset = kValuesOffset + kTileTokens * kValuePitch;
  static constexpr int kValueScalesOffset = kKeyScalesOffset + kTileTokens * 2;
  static constexpr int kStageBytes = kValueScalesOffset + kTileTokens * 2;

  // Blocks that a multiprocessor with 228 KiB of shared memory holds at least: what registers are
  // shared out by.
  static constexpr int kResidentBlocks = kDim <= 96 ? 4 : kDim <= 128 ? 3 : 2;

  // Whether a thread's sums and queries leave few registers for anything else.
  static constexpr bool kIsLarge = kDim > 128;

  // Copies in flight are kNumStages - 1 tiles a warp: 3 blocks fit an H200's multiprocessor, and
  // one fits the 99 KiB of the smaller devices.
  static constexpr int kNumStages = kDim <= 128 ? 4 : kDim <= 192 ? 3 : 2;
  static constexpr int kWarpBytes = kNumStages * kStageBytes;
  static constexpr int kSharedBytes = kBlockWarps * kWarpBytes;

  // First dim of the i-th vector of K that lanes of a quad take.
  OCTAVO_HOST_DEVICE static constexpr int KeyDim(int i, int quad) {
    if (kDim % 128 == 0) return 128 * (i / 2) + 32 * quad + 16 * (i % 2);
    return kKeyVector * (4 * i + quad);
  }

  // First dim of the i-th vector of V that lanes of a group take.
  OCTAVO_HOST_DEVICE static constexpr int ValueDim(int i, int group) {
    return kValueVector * (8 * i + group);
  }
};

}  // namespace octavo::cuda

#endif  // OCTAVO_CUDA_TILE_SHAPE_H_
