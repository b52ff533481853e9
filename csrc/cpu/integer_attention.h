// Attention with integer dot products, for FP16 and BF16 inputs. Include after context_tile.h, in
// an instruction set whose vocabulary has DotSums.
//
// A tile's weights are rounded to 16 bits against the largest among them; their products with V's
// codes are then summed without error. Scores, softmax and the sums over tiles are FP32.

#ifndef OCTAVO_CPU_INTEGER_ATTENTION_H_
#define OCTAVO_CPU_INTEGER_ATTENTION_H_

#include "context_tile.h"
#include "integer_scores.h"

namespace octavo::cpu {
namespace {

inline constexpr int kMaxBlockRows = 4;  // rows that keep their sums in registers together
template <int kNumRows>
inline constexpr int kValueVectorsInIntegers = kLanes == 16 && kNumRows <= 2 ? 4 : 2;

// A row's weights in a tile as multipliers.
struct WeightRow {
  alignas(64) Multiplier quads[kTileTokens / kQuad];
  float factor;  // what a sum of products with codes is to be multiplied by
};

// The online softmax of one row, over scores of a unit of its own: that of a dot product times K's
// scale, so that the row's factor costs nothing. A soft cap needs scores as they are, in units
// of 1.
struct RowSoftmax {
  float max;  // in units
  float sum;  // of exp(score - max)
  float unit;
};

// What a span keeps of one kv head, besides its state.
struct HeadWork {
  QueryRow queries[kMaxTileRows];
  RowSoftmax softmax[kMaxTileRows];
};

// What a span works with: a tile at a time, of one kv head after the other.
struct IntegerWork {
  Tile tile;
  WeightRow weights[kMaxTileRows];
  HeadWork heads[kMaxSpanHeads];
};

// Turns a row of dot products into scores in the row's unit; returns the largest, by lane.
inline Floats ScaleScores(const Tile& tile, int num_tokens, float* scores) {
  Floats max = Broadcast(kMinusInf);
#pragma GCC unroll 8
  for (int i = 0; i < num_tokens; i += kLanes) {
    const Floats score = Mul(Load(scores + i), Load(tile.k_scales + i));
    max = Max(max, score);
    Store(scores + i, score);
  }
  return max;
}

// Takes scores into units of 1, bounded to what FP32 holds.
inline void ApplyFactor(const Tile& tile, float factor, float* scores) {
  for (int i = 0; i < tile.num_tokens; i += kLanes) {
    Store(scores + i, Clamp(Mul(Load(scores + i), Broadcast(factor)), kLargestFloat));
  }
}

// Makes room for scores up to `max`: rescales the row's sum and weighted values to it.
inline void RaiseMaxInIntegers(float max, int head_dim, RowSoftmax* softmax, float* values) {
  if (!(max > softmax->max)) return;
  if (softmax->max != kMinusInf) {
    const float factor = __builtin_expf((softmax->max - max) * softmax->unit);
    softmax->sum *= factor;
    ScaleRow(factor, head_dim, values);
  }
  softmax->max = max;
}

// Turns a row of scores into weights exp(score - max) * v_scale, of which the largest is kept in
// their factor. kIsMasked: scores of -inf have no weight, others may not occur.
template <bool kIsMasked>
inline void TakeWeightsInIntegers(const Tile& tile, int num_tokens, float* scores,
                                  RowSoftmax* softmax, WeightRow* weights) {
  constexpr float kLog2OfE = 1.44269504f;
  const Floats unit = Broadcast(softmax->unit * kLog2OfE);
  const Floats reference = Broadcast(softmax->max == kMinusInf ? 0.0f : softmax->max);
  Floats sum = Zero(), largest = Zero();
#pragma GCC unroll 8
  for (int i = 0; i < num_tokens; i += kLanes) {
    const Floats score = Load(scores + i);
    Floats share = Exp2OfNonPositive(Mul(Sub(score, reference), unit));
    if constexpr (kIsMasked) {
      share = Select(Less(Broadcast(kMinusInf), score), share, Zero());
    }
    sum = Add(sum, share);
    const Floats weight = Mul(share, Load(tile.v_scales + i));
    largest = Max(largest, weight);
    Store(scores + i, weight);
  }
  softmax->sum += ReduceAdd(sum);
  weights->factor = ReduceMax(largest);
}

// Rounds a row of weights against their largest.
inline void RoundWeights(int num_tokens, const float* scores, WeightRow* weights) {
  const float largest = weights->factor;
  const Floats inverse = Broadcast(largest > 0.0f ? kMaxWeightMultiplier / largest : 0.0f);
#pragma GCC unroll 4
  for (int i = 0; i < num_tokens; i += 2 * kLanes) {
    const Floats next = i + kLanes < num_tokens ? Load(scores + i + kLanes) : Zero();
    StoreWeightMultipliers(weights->quads + i / kQuad, Mul(Load(scores + i), inverse),
                           Mul(next, inverse));
  }
  weights->factor = largest / kMaxWeightMultiplier;
}

// Turns the dot products of all rows into weights and moves their softmax: every row attends to all
// of 64 tokens, and there is no soft cap. Step by step over the rows, so that one row's sums
// across lanes overlap with the next row's work.
inline void SoftmaxFullTile(const SpanParams& params, HeadWork* head, IntegerWork* work,
                            SpanState* state) {
  const int num_rows = params.num_rows;
  float* scores = work->tile.scores;
  float max[kMaxTileRows];
  for (int row = 0; row < num_rows; ++row) {
    max[row] = ReduceMax(ScaleScores(work->tile, kTileTokens, scores + row * kTileTokens));
  }
  for (int row = 0; row < num_rows; ++row) {
    RaiseMaxInIntegers(max[row], params.cache->head_dim, &head->softmax[row],
                       state->values + row * kMaxHeadDim);
  }
  for (int row = 0; row < num_rows; ++row) {
    TakeWeightsInIntegers<false>(work->tile, kTileTokens, scores + row * kTileTokens,
                                 &head->softmax[row], &work->weights[row]);
  }
  for (int row = 0; row < num_rows; ++row) {
    RoundWeights(kTileTokens, scores + row * kTileTokens, &work->weights[row]);
  }
}

// The same for one row of any tile.
inline void SoftmaxRow(const SpanParams& params, int row, HeadWork* head, IntegerWork* work,
                       float* values) {
  const Tile& tile = work->tile;
  RowSoftmax* softmax = &head->softmax[row];
  float* scores = work->tile.scores + row * kTileTokens;
  ScaleScores(tile, tile.num_tokens, scores);
  if (params.options->soft_cap > 0.0f) ApplyFactor(tile, head->queries[row].factor, scores);
  const float max = ReduceMax(CapAndMask(params, tile, row, scores));
  RaiseMaxInIntegers(max, params.cache->head_dim, softmax, values);
  TakeWeightsInIntegers<true>(tile, tile.num_tokens, scores, softmax, &work->weights[row]);
  RoundWeights(tile.num_tokens, scores, &work->weights[row]);
}

inline void SoftmaxTileInIntegers(const SpanParams& params, HeadWork* head, IntegerWork* work,
                                  SpanState* state) {
  bool is_full = work->tile.num_tokens == kTileTokens && params.options->soft_cap <= 0.0f;
  for (int row = 0; row < params.num_rows; ++row) {
    is_full = is_full && AttendsToAll(params, work->tile, row);
  }
  if (is_full) return SoftmaxFullTile(params, head, work, state);
  for (int row = 0; row < params.num_rows; ++row) {
    SoftmaxRow(params, row, head, work, state->values + row * kMaxHeadDim);
  }
}

// Adds weight * code to kNumVectors vectors of dims from `column` on, of kNumRows rows, over all
// slots of a tile.
//
// values: [kNumRows, kMaxHeadDim]. kIsHalf: the one vector has only 8 elements.
template <int kNumRows, int kNumVectors, bool kIsHalf, bool kPrefetches>
[[gnu::noinline]] void ValuePassInIntegers(const Tile& tile, const PagedInt8Cache& cache,
                                           int column, const WeightRow* weights, float* values) {
  constexpr int kStepBytes = kUnrolledQuads * kNumVectors * kQuadVectorBytes / (kIsHalf ? 2 : 1);
  const int stride = ValueStride(cache.head_dim, column);
  DotSums sums[kNumRows][kNumVectors];
#pragma GCC unroll 4
  for (int row = 0; row < kNumRows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < kNumVectors; ++i) sums[row][i] = NoSums();
  }
  for (int s = 0; s < tile.num_segments; ++s) {
    const Segment& segment = tile.segments[s];
    const int8_t* next = segment.next_v_codes + column * segment.num_slots;
    const int8_t* v[kNumVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kNumVectors; ++i) {
      v[i] = ValueCodesAt(segment, cache.block_size, cache.head_dim, column + i * kLanes);
    }
    const int first_quad = segment.tile_offset / kQuad;
    const int end_quad = first_quad + segment.num_slots / kQuad;
    for (int quad = first_quad; quad < end_quad; quad += kUnrolledQuads) {
      if constexpr (kPrefetches) {
        PrefetchLines<kStepBytes / kLineBytes>(next);
        next += kStepBytes;
      }
#pragma GCC unroll 2
      for (int u = 0; u < kUnrolledQuads; ++u) {
        ValueCodes codes[kNumVectors];
#pragma GCC unroll 4
        for (int i = 0; i < kNumVectors; ++i) {
          codes[i] = ToValueCodes(LoadValueQuads<kIsHalf>(v[i]));
          v[i] += stride;
        }
#pragma GCC unroll 4
        for (int row = 0; row < kNumRows; ++row) {
          const Multipliers x = BroadcastMultiplier(weights[row].quads[quad + u]);
#pragma GCC unroll 4
          for (int i = 0; i < kNumVectors; ++i) {
            sums[row][i] = AddValueProducts(sums[row][i], codes[i], x);
          }
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < kNumRows; ++row) {
    const Floats factor = Broadcast(weights[row].factor);
#pragma GCC unroll 4
    for (int i = 0; i < kNumVectors; ++i) {
      float* value = values + row * kMaxHeadDim + column + i * kLanes;
      Store(value, Fma(ToFloats(sums[row][i]), factor, Load(value)));
    }
  }
}

// Adds the weighted values of kNumVectors vectors of dims from `column` on, for all rows.
template <int kFirst, int kSecond, int kNumVectors, bool kIsHalf = false>
void ValueColumns(const PagedInt8Cache& cache, const IntegerWork& work, int column, float* values) {
  ValuePassInIntegers<kFirst, kNumVectors, kIsHalf, true>(work.tile, cache, column, work.weights,
                                                          values);
  if constexpr (kSecond > 0) {
    ValuePassInIntegers<kSecond, kNumVectors, kIsHalf, false>(
        work.tile, cache, column, work.weights + kFirst, values + kFirst * kMaxHeadDim);
  }
}

template <int kFirst, int kSecond>
void ValueTileInIntegers(const PagedInt8Cache& cache, const IntegerWork& work, float* values) {
  constexpr int kNumVectors = kValueVectorsInIntegers<kFirst>;
  int d = 0;
  for (; d + kNumVectors * kLanes <= cache.head_dim; d += kNumVectors * kLanes) {
    ValueColumns<kFirst, kSecond, kNumVectors>(cache, work, d, values);
  }
  for (; d + kLanes <= cache.head_dim; d += kLanes) {
    ValueColumns<kFirst, kSecond, 1>(cache, work, d, values);
  }
  if constexpr (kLanes == 16) {
    if (d < cache.head_dim) ValueColumns<kFirst, kSecond, 1, true>(cache, work, d, values);
  }
}

// The state of a row whose scores had units: a score beyond FP32 is its largest number.
inline SoftmaxState InUnitsOfOne(const RowSoftmax& softmax) {
  if (softmax.max == kMinusInf) return {kMinusInf, 0.0f};
  const float max = softmax.max * softmax.unit;
  const float bounded = max > kLargestFloat ? kLargestFloat : max;
  return {bounded < -kLargestFloat ? -kLargestFloat : bounded, softmax.sum};
}

// q: [num_rows, kMaxHeadDim], q_factors: [num_rows] of the head.
inline void InitHead(const SpanParams& params, const float* q, const float* q_factors,
                     HeadWork* head) {
  for (int row = 0; row < params.num_rows; ++row) {
    QueryRow* query = &head->queries[row];
    SplitQuery(q + row * kMaxHeadDim, params.cache->head_dim, q_factors[row], query);
    const float unit = params.options->soft_cap > 0.0f ? 1.0f : query->factor;
    head->softmax[row] = {kMinusInf, 0.0f, unit};
  }
}

// Attends to work->tile with the rows of one kv head. They are worked on in one block, or in two of
// about the same size.
template <int kNumRows>
void AttendTileInIntegers(const SpanParams& params, HeadWork* head, IntegerWork* work,
                          SpanState* state) {
  constexpr int kFirst = kNumRows <= kMaxBlockRows ? kNumRows : (kNumRows + 1) / 2;
  constexpr int kSecond = kNumRows - kFirst;
  const PagedInt8Cache& cache = *params.cache;
  ScoreTileInIntegers<kFirst, kSecond>(cache, head->queries, &work->tile);
  SoftmaxTileInIntegers(params, head, work, state);
  ValueTileInIntegers<kFirst, kSecond>(cache, *work, state->values);
}

template <int kNumRows>
void AttendSpanInIntegersOf(const SpanParams& params, SpanState* states) {
  IntegerWork work;
  const int num_heads = params.run.num_kv_heads;
  for (int h = 0; h < num_heads; ++h) {
    const int row = h * kNumRows;
    InitHead(params, params.q + row * kMaxHeadDim, params.q_factors + row, &work.heads[h]);
  }
  int position = RoundDown(params.run.begin, 16);
  while (position < params.run.end) {
    for (int h = 0; h < num_heads; ++h) {
      LoadTile(params, h, position, &work.tile);
      AttendTileInIntegers<kNumRows>(params, &work.heads[h], &work, &states[h]);
    }
    position += work.tile.num_tokens;
  }
  for (int h = 0; h < num_heads; ++h) {
    for (int row = 0; row < kNumRows; ++row) {
      states[h].softmax[row] = InUnitsOfOne(work.heads[h].softmax[row]);
    }
  }
}

void AttendSpanInIntegers(const SpanParams& params, SpanState* states) {
  const int num_rows = params.num_rows, head_dim = params.cache->head_dim;
  for (int h = 0; h < params.run.num_kv_heads; ++h) InitState(num_rows, head_dim, &states[h]);
  constexpr void (*kByNumRows[])(const SpanParams&, SpanState*) = {
      AttendSpanInIntegersOf<1>, AttendSpanInIntegersOf<2>, AttendSpanInIntegersOf<3>,
      AttendSpanInIntegersOf<4>, AttendSpanInIntegersOf<5>, AttendSpanInIntegersOf<6>,
      AttendSpanInIntegersOf<7>, AttendSpanInIntegersOf<8>};
  kByNumRows[num_rows - 1](params, states);
  for (int h = 0; h < params.run.num_kv_heads; ++h) {
    UnscaleValues(num_rows, head_dim, states[h].values);
  }
}

}  // namespace
}  // namespace octavo::cpu

#endif  // OCTAVO_CPU_INTEGER_ATTENTION_H_
