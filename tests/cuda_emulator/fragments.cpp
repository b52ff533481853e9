#include "fragments.h"

#include "numerics.h"

namespace octavo::emulator {
namespace {

// PTX ISA 9.0, "Matrix Fragments for mma.m16n8k16 with floating point type": groupID and twice
// threadID_in_group of each lane, and to these added the row and column of each element of a lane,
// in the order a0, a1, ... of its registers.
constexpr int kGroup[32] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3,
                            4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7};
constexpr int kPair[32] = {0, 2, 4, 6, 0, 2, 4, 6, 0, 2, 4, 6, 0, 2, 4, 6,
                           0, 2, 4, 6, 0, 2, 4, 6, 0, 2, 4, 6, 0, 2, 4, 6};
constexpr int kRowOfA[8] = {0, 0, 8, 8, 0, 0, 8, 8};     // + group
constexpr int kColumnOfA[8] = {0, 1, 0, 1, 8, 9, 8, 9};  // + pair
constexpr int kRowOfB[4] = {0, 1, 8, 9};                 // + pair; the column is the group
constexpr int kRowOfD[4] = {0, 0, 8, 8};                 // + group
constexpr int kColumnOfD[4] = {0, 1, 0, 1};              // + pair

// PTX ISA 9.0, "Warp-level matrix transpose instruction: movmatrix": a row of four lanes, two
// elements each, for source and destination alike: kGroup is the row, kPair + 0, 1 the column.

using Quad = float __attribute__((vector_size(4 * sizeof(float))));

// A row of B or D.
struct Row {
  Quad left, right;
  float& operator[](int column) { return reinterpret_cast<float*>(this)[column]; }
};

struct Tiles {
  float a[kTileRows][kTileDepth];
  Row b[kTileDepth];
  Row d[kTileRows];
};

float ElementOf(const uint32_t* registers, int idx) {
  return WidenHalf(static_cast<uint16_t>(registers[idx / 2] >> (idx % 2 * 16)));
}

void GatherLane(const MultiplyOperand& operand, int group, int pair, Tiles& tiles) {
  for (int idx = 0; idx < 8; ++idx) {
    tiles.a[group + kRowOfA[idx]][pair + kColumnOfA[idx]] = ElementOf(operand.a, idx);
  }
  for (int idx = 0; idx < 4; ++idx) {
    tiles.b[pair + kRowOfB[idx]][group] = ElementOf(operand.b, idx);
    tiles.d[group + kRowOfD[idx]][pair + kColumnOfD[idx]] = operand.d[idx];
  }
}

void ScatterLane(Tiles& tiles, int group, int pair, float* d) {
  for (int idx = 0; idx < 4; ++idx) d[idx] = tiles.d[group + kRowOfD[idx]][pair + kColumnOfD[idx]];
}

void MultiplyRow(const float* a, const Row* b, Row& d) {
  Row sum = d;
  for (int depth = 0; depth < kTileDepth; ++depth) {
    sum.left += a[depth] * b[depth].left;
    sum.right += a[depth] * b[depth].right;
  }
  d = sum;
}

}  // namespace

void MultiplyFragments(MultiplyOperand* const (&lanes)[32]) {
  Tiles tiles;
  for (int lane = 0; lane < 32; ++lane) GatherLane(*lanes[lane], kGroup[lane], kPair[lane], tiles);
  for (int row = 0; row < kTileRows; ++row) MultiplyRow(tiles.a[row], tiles.b, tiles.d[row]);
  for (int lane = 0; lane < 32; ++lane)
    ScatterLane(tiles, kGroup[lane], kPair[lane], lanes[lane]->d);
}

void TransposeFragments(uint32_t* const (&lanes)[32]) {
  uint16_t matrix[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    matrix[kGroup[lane]][kPair[lane]] = static_cast<uint16_t>(*lanes[lane]);
    matrix[kGroup[lane]][kPair[lane] + 1] = static_cast<uint16_t>(*lanes[lane] >> 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    *lanes[lane] =
        PackPair(matrix[kPair[lane]][kGroup[lane]], matrix[kPair[lane] + 1][kGroup[lane]]);
  }
}

}  // namespace octavo::emulator
