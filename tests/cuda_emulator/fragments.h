// The matrix instructions of a warp: which lane's register holds which element, and what they
// compute.

#ifndef OCTAVO_CUDA_EMULATOR_FRAGMENTS_H_
#define OCTAVO_CUDA_EMULATOR_FRAGMENTS_H_

#include <cstdint>

namespace octavo::emulator {

inline constexpr int kTileRows = 16, kTileColumns = 8, kTileDepth = 16;

// What a lane brings to mma.m16n8k16: registers of FP16 pairs, low half first.
struct MultiplyOperand {
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [2]
  float* d;           // [4], added to
};

// d += a * b for the lanes' operands. Products are exact; sums are FP32, rounded one by one in the
// order of the depth, d first (a GPU's order and rounding are not specified).
void MultiplyFragments(MultiplyOperand* const (&lanes)[32]);

// movmatrix.m8n8.trans: replaces each lane's pair by the transposed matrix's.
void TransposeFragments(uint32_t* const (&lanes)[32]);

}  // namespace octavo::emulator

#endif  // OCTAVO_CUDA_EMULATOR_FRAGMENTS_H_
