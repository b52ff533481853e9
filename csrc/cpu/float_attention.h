// Attention in FP32 throughout, for FP32 inputs and for instruction sets without integer dot
// products. Include after context_tile.h.
//
// Each code of K and V is converted once for all rows of a tile (a template over their number) and
// multiplied with q, or with a weight, in FP32. Codes are exact in FP32.

#ifndef OCTAVO_CPU_FLOAT_ATTENTION_H_
#define OCTAVO_CPU_FLOAT_ATTENTION_H_

#include "context_tile.h"

namespace octavo::cpu {
namespace {

// Vectors of slots (scores) and of head_dim (values) that one pass keeps in registers beside its
// rows: AVX-512 has 32 registers, the others count on 16.
template <int kNumRows>
inline constexpr int kScoreVectors = kLanes == 8 && kNumRows > 6 ? 1 : 2;
template <int kNumRows>
inline constexpr int kValueVectors = kLanes == 16  ? (kNumRows <= 4 ? 4 : 2)
                                     : kLanes == 4 ? 2
                                                   : (kNumRows <= 2   ? 4
                                                      : kNumRows <= 6 ? 2
                                                                      : 1);
// A step covers whole lines of codes, which is what it prefetches.
static_assert(kUnrolledQuads * kQuadVectorBytes * (kLanes == 4 ? 2 : 1) % kLineBytes == 0);

// Dot products of kNumRows rows of q with kNumVectors vectors of slots.
//
// k: [head_dim / 4, stride / 4, 4] codes. q: [kNumRows, kMaxHeadDim]. scores: [kNumRows,
// kTileTokens].
template <int kNumRows, int kNumVectors>
void ScorePass(const int8_t* k, int stride, const float* q, int head_dim, const int8_t* next,
               float* scores) {
  // Few accumulators would wait for the latency of their own sums: take several of each.
  constexpr int kNumChains = kNumRows * kNumVectors >= 8 ? 1 : kNumRows * kNumVectors >= 4 ? 2 : 4;
  constexpr int kStepBytes = kUnrolledQuads * kNumVectors * kQuadVectorBytes;
  Floats sums[kNumChains][kNumRows][kNumVectors];
#pragma GCC unroll 4
  for (int chain = 0; chain < kNumChains; ++chain) {
#pragma GCC unroll 8
    for (int row = 0; row < kNumRows; ++row) {
#pragma GCC unroll 4
      for (int i = 0; i < kNumVectors; ++i) sums[chain][row][i] = Zero();
    }
  }
  for (int d = 0; d < head_dim; d += kUnrolledQuads * kQuad) {
    PrefetchLines<kStepBytes / kLineBytes>(next);
    next += kStepBytes;
#pragma GCC unroll 2
    for (int quad = 0; quad < kUnrolledQuads; ++quad) {
      Quads quads[kNumVectors];
#pragma GCC unroll 4
      for (int i = 0; i < kNumVectors; ++i) quads[i] = LoadQuads(k + i * kQuadVectorBytes);
      k += stride;
#pragma GCC unroll 4
      for (int j = 0; j < kQuad; ++j) {
        Floats codes[kNumVectors];
#pragma GCC unroll 4
        for (int i = 0; i < kNumVectors; ++i) codes[i] = CodesOf(quads[i], j);
#pragma GCC unroll 8
        for (int row = 0; row < kNumRows; ++row) {
          const Floats x = Broadcast(q[row * kMaxHeadDim + d + quad * kQuad + j]);
#pragma GCC unroll 4
          for (int i = 0; i < kNumVectors; ++i) {
            Floats& sum = sums[j % kNumChains][row][i];
            sum = Fma(x, codes[i], sum);
          }
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kNumRows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < kNumVectors; ++i) {
      Floats sum = sums[0][row][i];
#pragma GCC unroll 4
      for (int chain = 1; chain < kNumChains; ++chain) sum = Add(sum, sums[chain][row][i]);
      Store(scores + row * kTileTokens + i * kLanes, sum);
    }
  }
}

// Fills tile->scores with q . k_codes, scales not yet applied.
template <int kNumRows>
void ScoreTile(const SpanParams& params, Tile* tile) {
  constexpr int kNumVectors = kScoreVectors<kNumRows>;
  const int head_dim = params.cache->head_dim;
  const int stride = params.cache->block_size * kQuad;
  for (int s = 0; s < tile->num_segments; ++s) {
    const Segment& segment = tile->segments[s];
    float* scores = tile->scores + segment.tile_offset;
    int slot = 0;
    for (; slot + kNumVectors * kLanes <= segment.num_slots; slot += kNumVectors * kLanes) {
      ScorePass<kNumRows, kNumVectors>(segment.k_codes + slot * kQuad, stride, params.q, head_dim,
                                       segment.next_k_codes + slot * head_dim, scores + slot);
    }
    if constexpr (kLanes == 16) {
      if (slot < segment.num_slots) {
        ScorePass<kNumRows, 1>(segment.k_codes + slot * kQuad, stride, params.q, head_dim,
                               segment.next_k_codes + slot * head_dim, scores + slot);
      }
    }
  }
}

// Turns a row of dot products into scores: K's scales, the row's factor, the soft cap and the mask;
// returns the largest. A score beyond FP32 becomes its largest number: infinity would make NaN of
// the weights.
inline float FinishScores(const SpanParams& params, const Tile& tile, int row, float q_factor,
                          float* scores) {
  const Floats factor = Broadcast(q_factor);
  Floats max = Broadcast(kMinusInf);
  for (int i = 0; i < tile.num_tokens; i += kLanes) {
    Floats score = Mul(Mul(Load(scores + i), Load(tile.k_scales + i)), factor);
    score = Clamp(score, kLargestFloat);
    max = Max(max, score);
    Store(scores + i, score);
  }
  const bool is_all_attended =
      params.row_begin[row] <= tile.begin && params.row_end[row] >= tile.begin + tile.num_tokens;
  if (!is_all_attended || params.options->soft_cap > 0.0f) {
    max = CapAndMask(params, tile, row, scores);
  }
  return ReduceMax(max);
}

// Makes room for scores up to `max`: rescales a row's sum and weighted values to it. Returns what
// weights are to be taken against: a row that has attended to nothing yet has only scores of -inf,
// and any reference will do.
inline float RaiseMax(float max, int head_dim, SoftmaxState* softmax, float* values) {
  if (max > softmax->max) {
    float own_factor, other_factor;
    softmax->Merge({max, 0.0f}, &own_factor, &other_factor);
    ScaleRow(own_factor, head_dim, values);
  }
  return softmax->max == kMinusInf ? 0.0f : softmax->max;
}

// Turns a row of scores into weights exp(score - max) * v_scale; returns the sum of exp.
inline float TakeWeights(const Tile& tile, float max, float* scores) {
  const Floats reference = Broadcast(max);
  Floats sum = Zero();
  for (int i = 0; i < tile.num_tokens; i += kLanes) {
    const Floats share = ExpOfNonPositive(Sub(Load(scores + i), reference));
    sum = Add(sum, share);
    Store(scores + i, Mul(share, Load(tile.v_scales + i)));
  }
  return ReduceAdd(sum);
}

// Turns the tile's scores into weights and moves each row's softmax state.
inline void SoftmaxTile(const SpanParams& params, Tile* tile, SpanState* state) {
  for (int row = 0; row < params.num_rows; ++row) {
    float* scores = tile->scores + row * kTileTokens;
    SoftmaxState& softmax = state->softmax[row];
    const float max = FinishScores(params, *tile, row, params.q_factors[row], scores);
    const float reference =
        RaiseMax(max, params.cache->head_dim, &softmax, state->values + row * kMaxHeadDim);
    softmax.sum += TakeWeights(*tile, reference, scores);
  }
}

// Adds weight * code to kNumVectors vectors of dims from `column` on, of kNumRows rows, over the
// slots of a segment.
//
// weights: [kNumRows, kTileTokens] from the segment's first slot. values: [kNumRows, kMaxHeadDim].
// kIsHalf: the one vector has only 8 elements.
template <int kNumRows, int kNumVectors, bool kIsHalf>
void ValuePass(const Segment& segment, const PagedInt8Cache& cache, int column,
               const float* weights, float* values) {
  constexpr int kStepBytes = kUnrolledQuads * kNumVectors * kQuadVectorBytes / (kIsHalf ? 2 : 1);
  const int stride = ValueStride(cache.head_dim, column);
  const int8_t* next = segment.next_v_codes + column * segment.num_slots;
  const int8_t* v[kNumVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kNumVectors; ++i) {
    v[i] = ValueCodesAt(segment, cache.block_size, cache.head_dim, column + i * kLanes);
  }
  Floats sums[kNumRows][kNumVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kNumRows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < kNumVectors; ++i) {
      sums[row][i] = Load(values + row * kMaxHeadDim + column + i * kLanes);
    }
  }
  for (int slot = 0; slot < segment.num_slots; slot += kUnrolledQuads * kQuad) {
    PrefetchLines<kStepBytes / kLineBytes>(next);
    next += kStepBytes;
#pragma GCC unroll 2
    for (int quad = 0; quad < kUnrolledQuads; ++quad) {
      Quads quads[kNumVectors];
#pragma GCC unroll 4
      for (int i = 0; i < kNumVectors; ++i) {
        quads[i] = LoadValueQuads<kIsHalf>(v[i]);
        v[i] += stride;
      }
#pragma GCC unroll 4
      for (int j = 0; j < kQuad; ++j) {
        Floats codes[kNumVectors];
#pragma GCC unroll 4
        for (int i = 0; i < kNumVectors; ++i) codes[i] = CodesOf(quads[i], j);
#pragma GCC unroll 8
        for (int row = 0; row < kNumRows; ++row) {
          const Floats weight = Broadcast(weights[row * kTileTokens + slot + quad * kQuad + j]);
#pragma GCC unroll 4
          for (int i = 0; i < kNumVectors; ++i) sums[row][i] = Fma(weight, codes[i], sums[row][i]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kNumRows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < kNumVectors; ++i) {
      Store(values + row * kMaxHeadDim + column + i * kLanes, sums[row][i]);
    }
  }
}

// Runs ValuePass over the columns [d, ...) as long as whole passes fit; returns where it stopped.
template <int kNumRows, int kNumVectors, bool kIsHalf = false>
int ValuePasses(const Segment& segment, const PagedInt8Cache& cache, const float* weights, int d,
                float* values) {
  constexpr int kStep = kNumVectors * kLanes / (kIsHalf ? 2 : 1);
  for (; d + kStep <= cache.head_dim; d += kStep) {
    ValuePass<kNumRows, kNumVectors, kIsHalf>(segment, cache, d, weights, values);
  }
  return d;
}

// Adds the tile's weighted values.
template <int kNumRows>
void ValueTile(const PagedInt8Cache& cache, const Tile& tile, SpanState* state) {
  for (int s = 0; s < tile.num_segments; ++s) {
    const Segment& segment = tile.segments[s];
    const float* weights = tile.scores + segment.tile_offset;
    int d =
        ValuePasses<kNumRows, kValueVectors<kNumRows>>(segment, cache, weights, 0, state->values);
    if constexpr (kValueVectors<kNumRows> > 1) {
      d = ValuePasses<kNumRows, 1>(segment, cache, weights, d, state->values);
    }
    if constexpr (kLanes == 16) {
      ValuePasses<kNumRows, 1, true>(segment, cache, weights, d, state->values);
    }
  }
}

template <int kNumRows>
void AttendSpanOf(const SpanParams& params, SpanState* state) {
  Tile tile;
  int position = RoundDown(params.run.begin, 16);
  while (position < params.run.end) {
    LoadTile(params, 0, position, &tile);
    ScoreTile<kNumRows>(params, &tile);
    SoftmaxTile(params, &tile, state);
    ValueTile<kNumRows>(*params.cache, tile, state);
    position += tile.num_tokens;
  }
}

// Rows of one kv head.
inline void AttendHeadInFloat(const SpanParams& params, SpanState* state) {
  InitState(params.num_rows, params.cache->head_dim, state);
  constexpr void (*kByNumRows[])(const SpanParams&, SpanState*) = {
      AttendSpanOf<1>, AttendSpanOf<2>, AttendSpanOf<3>, AttendSpanOf<4>,
      AttendSpanOf<5>, AttendSpanOf<6>, AttendSpanOf<7>, AttendSpanOf<8>};
  kByNumRows[params.num_rows - 1](params, state);
  UnscaleValues(params.num_rows, params.cache->head_dim, state->values);
}

// One kv head after the other.
void AttendSpanInFloat(const SpanParams& params, SpanState* states) {
  for (int head_idx = 0; head_idx < params.run.num_kv_heads; ++head_idx) {
    SpanParams head = params;
    head.run.kv_head += head_idx;
    head.run.num_kv_heads = 1;
    head.q += head_idx * params.num_rows * kMaxHeadDim;
    head.q_factors += head_idx * params.num_rows;
    AttendHeadInFloat(head, &states[head_idx]);
  }
}

}  // namespace
}  // namespace octavo::cpu

#endif  // OCTAVO_CPU_FLOAT_ATTENTION_H_
