// Attention of a warp's rows of q over one tile of 16 tokens: scores, weights, weighted V.

#ifndef OCTAVO_CUDA_ATTEND_TILE_H_
#define OCTAVO_CUDA_ATTEND_TILE_H_

#include "cuda/decode_work.h"
#include "cuda/device.h"
#include "cuda/queries.h"
#include "cuda/softmax.h"
#include "cuda/tile_shape.h"

namespace octavo::cuda {

// Bytes of a row that a lane takes at once, as words; two bytes are the low half of one.
template <int kBytes>
struct Vector {
  uint32_t words[(kBytes + 3) / 4];
};

template <int kBytes>
__device__ __forceinline__ Vector<kBytes> LoadVector(const char* source) {
  Vector<kBytes> vector;
  if constexpr (kBytes == 16) {
    const Bytes16 bytes = LoadShared(reinterpret_cast<const Bytes16*>(source));
#pragma unroll
    for (int i = 0; i < 4; ++i) vector.words[i] = bytes.words[i];
  } else if constexpr (kBytes == 8) {
    const Bytes8 bytes = LoadShared(reinterpret_cast<const Bytes8*>(source));
#pragma unroll
    for (int i = 0; i < 2; ++i) vector.words[i] = bytes.words[i];
  } else if constexpr (kBytes == 4) {
    vector.words[0] = LoadShared(reinterpret_cast<const uint32_t*>(source));
  } else {
    vector.words[0] = LoadShared(reinterpret_cast<const uint16_t*>(source));
  }
  return vector;
}

// Four INT8 codes as two pairs of FP16, in their order. A byte with its sign flipped is 128 more
// than its code; as the last byte of FP16's 1024 it counts in ones.
struct HalfPairs {
  uint32_t first;
  uint32_t second;
};

__device__ __forceinline__ HalfPairs WidenCodes(uint32_t codes) {
  constexpr uint32_t kHalf1024 = 0x64646464u;
  constexpr uint32_t kHalves1152 = 0x64806480u;  // 1024 + 128, twice
  const uint32_t shifted = codes ^ 0x80808080u;
  return {SubtractHalves(PermuteBytes(shifted, kHalf1024, 0x4140), kHalves1152),
          SubtractHalves(PermuteBytes(shifted, kHalf1024, 0x4342), kHalves1152)};
}

// products[0, 1] = token `group`, rows 2 * quad and + 1; products[2, 3] = token group + 8.
template <int kDim, bool kIsSplit>
__device__ __forceinline__ void MultiplyKeys(const char* keys, const Lane& lane,
                                             const Queries<kDim, kIsSplit>& queries,
                                             float (&products)[4]) {
  using Shape = TileShape<kDim>;
  constexpr int kWords = Shape::kKeyVector / 4;
  const char* first_row = keys + lane.group * Shape::kKeyPitch;
#pragma unroll
  for (int i = 0; i < Shape::kNumKeyVectors; ++i) {
    if constexpr (Shape::kIsLarge) KeepLoadsHere();
    const int dim = Shape::KeyDim(i, lane.quad);
    const auto low = LoadVector<Shape::kKeyVector>(first_row + dim);
    const auto high = LoadVector<Shape::kKeyVector>(first_row + 8 * Shape::kKeyPitch + dim);
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      const HalfPairs x = WidenCodes(low.words[j]), y = WidenCodes(high.words[j]);
      const uint32_t codes[4] = {x.first, y.first, x.second, y.second};
      MultiplyTile(products, codes, queries.high[i * kWords + j]);
      if constexpr (kIsSplit) MultiplyTile(products, codes, queries.low[i * kWords + j]);
    }
  }
}

// A score in the logarithm to base 2, finite whatever q was. The K scale comes first: the row's
// factor alone may be too large to be multiplied by it.
__device__ __forceinline__ float ScoreOf(float product, float k_scale, float factor,
                                         float soft_cap) {
  float score = product * k_scale * factor;
  if (soft_cap > 0.0f) score = soft_cap * kLog2E * Tanh(score / soft_cap);
  return ClampScore(score);
}

// What a lane holds of a tile's scores for one row: those of tokens `group` and group + 8, -inf
// where not attended, and the logarithms of the tokens' V scales.
struct ScorePair {
  float score[2];
  float v_log[2];
};

// The largest of a row over the tokens of a tile.
__device__ __forceinline__ float MaxOverTokens(float x, float y) {
  float largest = fmaxf(x, y);
#pragma unroll
  for (int mask = 4; mask < kWarpThreads; mask *= 2) {
    largest = fmaxf(largest, ShuffleXor(largest, mask));
  }
  return largest;
}

// Whether a row's references are too low for this lane's scores.
__device__ __forceinline__ bool ExceedsReferences(const ScorePair& pair,
                                                  const SoftmaxState& state) {
  bool exceeds = false;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float distance = pair.score[i] - state.max;
    exceeds |= distance > kReferenceSlack;
    exceeds |= distance + pair.v_log[i] - state.value_max > kReferenceSlack;
  }
  return exceeds;
}

// Moves a row's references up to the largest of a tile; returns what its values are to be
// multiplied by.
__device__ __forceinline__ float RaiseReferences(const ScorePair& pair, SoftmaxState* state) {
  const float max = fmaxf(state->max, MaxOverTokens(pair.score[0], pair.score[1]));
  const SoftmaxState counted = CountedFrom(max, *state);
  const float value_max = fmaxf(
      counted.value_max,
      MaxOverTokens(pair.score[0] - max + pair.v_log[0], pair.score[1] - max + pair.v_log[1]));
  *state = {max, counted.sum, value_max};
  return Exp2(counted.value_max - value_max);
}

// A tile's weights for one row of a lane, of tokens `group` and group + 8, times 2^kWeightShift.
struct Weights {
  float first;
  float second;
};

// Adds scores to a row's sum, which stays this lane's own; returns the weights that meet V.
__device__ __forceinline__ Weights WeighScores(const ScorePair& pair, SoftmaxState* state) {
  const float first = pair.score[0] - state->max, second = pair.score[1] - state->max;
  state->sum += Exp2(first) + Exp2(second);
  // In the order in which ExceedsReferences compares: rounded otherwise, the largest might not fit.
  return {Exp2(first + pair.v_log[0] - state->value_max + kWeightShift),
          Exp2(second + pair.v_log[1] - state->value_max + kWeightShift)};
}

// The B operands of the values' products: tokens down, rows across, in two terms.
struct WeightTiles {
  uint32_t high[2];
  uint32_t low[2];
};

// Args: x, y: a lane's weights of rows 2 * quad and + 1, for one token.
__device__ __forceinline__ void RoundWeights(float x, float y, uint32_t* high, uint32_t* low) {
  const uint32_t rounded = PackHalves(x, y);
  *high = TransposeTile(rounded);
  *low = TransposeTile(PackHalves(x - HalfToFloat(static_cast<uint16_t>(rounded)),
                                  y - HalfToFloat(static_cast<uint16_t>(rounded >> 16))));
}

// values[i] = dims d and d + 1 of TileShape::ValueDim for rows 2 * quad and + 1: [d, row], [d, row
// + 1], [d + 1, row], [d + 1, row + 1]. Adds the tile's weighted V.
template <int kDim>
__device__ __forceinline__ void MultiplyValues(const char* values_rows, const Lane& lane,
                                               const WeightTiles& weights,
                                               float (&values)[kDim / 16][4]) {
  using Shape = TileShape<kDim>;
  constexpr int kWords = (Shape::kValueVector + 3) / 4;
  const char* first_row = values_rows + 2 * lane.quad * Shape::kValuePitch;
#pragma unroll
  for (int i = 0; i < Shape::kNumValueVectors; ++i) {
    if constexpr (Shape::kIsLarge) KeepLoadsHere();
    const char* source = first_row + Shape::ValueDim(i, lane.group);
    const auto row0 = LoadVector<Shape::kValueVector>(source);
    const auto row1 = LoadVector<Shape::kValueVector>(source + Shape::kValuePitch);
    const auto row8 = LoadVector<Shape::kValueVector>(source + 8 * Shape::kValuePitch);
    const auto row9 = LoadVector<Shape::kValueVector>(source + 9 * Shape::kValuePitch);
#pragma unroll
    for (int half = 0; half < Shape::kValueVector / 2; ++half) {
      // Two dims of two tokens side by side: bytes d, d of the next token, d + 1, d + 1 of the
      // next.
      const uint32_t selector = half % 2 == 0 ? 0x5140u : 0x7362u;
      const int j = half / 2;
      static_assert(kWords >= 1, "a vector is two bytes or more");
      const HalfPairs x = WidenCodes(PermuteBytes(row0.words[j], row1.words[j], selector));
      const HalfPairs y = WidenCodes(PermuteBytes(row8.words[j], row9.words[j], selector));
      const uint32_t codes[4] = {x.first, x.second, y.first, y.second};
      float (&sums)[4] = values[i * (Shape::kValueVector / 2) + half];
      MultiplyTile(sums, codes, weights.high);
      MultiplyTile(sums, codes, weights.low);
    }
  }
}

// A warp's results so far. States are of rows 2 * quad and + 1.
template <int kDim>
struct Accumulator {
  SoftmaxState states[2];
  float values[kDim / 16][4];
};

// Moves the references of both rows up, and the values with them.
template <int kDim>
__device__ __forceinline__ void RaiseAll(const ScorePair (&pairs)[2], Accumulator<kDim>* sums) {
  float factors[2];
#pragma unroll
  for (int column = 0; column < 2; ++column) {
    factors[column] = RaiseReferences(pairs[column], &sums->states[column]);
  }
#pragma unroll
  for (float (&four)[4] : sums->values) {
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] *= factors[i % 2];
  }
}

// Makes scores of a tile's products.
//
// Args: scales: [2, kTileTokens] K scales, V scales. position: of the tile's first token.
template <int kDim, bool kIsSplit>
__device__ __forceinline__ void ScoreTile(const float (&products)[4], const uint16_t* scales,
                                          int position, float soft_cap, const Lane& lane,
                                          const Queries<kDim, kIsSplit>& queries,
                                          ScorePair (&pairs)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane.group + 8 * i, token = position + row;
    const float k_scale = HalfToFloat(LoadShared(scales + row));
    const float v_log = Log2(HalfToFloat(LoadShared(scales + kTileTokens + row)));
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const Range range = queries.ranges[column];
      const bool is_attended = token >= range.begin && token < range.end;
      const float score =
          ScoreOf(products[2 * i + column], k_scale, queries.factors[column], soft_cap);
      pairs[column].score[i] = is_attended ? score : kMinusInf;
      pairs[column].v_log[i] = v_log;
    }
  }
}

// Attends to one tile whose first token is at `position`.
template <int kDim, bool kIsSplit>
__device__ __forceinline__ void AttendTile(const char* stage, int position, float soft_cap,
                                           const Lane& lane, const Queries<kDim, kIsSplit>& queries,
                                           Accumulator<kDim>* sums) {
  using Shape = TileShape<kDim>;
  float products[4] = {};
  MultiplyKeys<kDim, kIsSplit>(stage, lane, queries, products);
  ScorePair pairs[2];
  ScoreTile<kDim, kIsSplit>(products,
                            reinterpret_cast<const uint16_t*>(stage + Shape::kKeyScalesOffset),
                            position, soft_cap, lane, queries, pairs);
  SoftmaxState(&states)[2] = sums->states;
  if (AnyOfWarp(ExceedsReferences(pairs[0], states[0]) || ExceedsReferences(pairs[1], states[1]))) {
    RaiseAll<kDim>(pairs, sums);
  }
  const Weights first = WeighScores(pairs[0], &states[0]);
  const Weights second = WeighScores(pairs[1], &states[1]);
  WeightTiles tiles;
  RoundWeights(first.first, second.first, &tiles.high[0], &tiles.low[0]);
  RoundWeights(first.second, second.second, &tiles.high[1], &tiles.low[1]);
  MultiplyValues<kDim>(stage + Shape::kValuesOffset, lane, tiles, sums->values);
}

}  // namespace octavo::cuda

#endif  // OCTAVO_CUDA_ATTEND_TILE_H_
