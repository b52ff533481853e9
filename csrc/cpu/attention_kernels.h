// Attention of a few rows of one kv head over a span of the cache. Include after a simd_*.h and
// vector_math.h.
//
// The context is walked in tiles of 64 tokens: scores of the tile, softmax, weighted values. Each
// code of K and V is read and converted once for all rows (a template over their number), and used
// in place: K's scales multiply the scores, V's scales fold into the weights. Per token and kv head
// that is 2 * head_dim bytes of codes and 4 of scales. Codes are exact in FP32; scores, softmax and
// sums are FP32. The tile after this one is prefetched line by line within the two inner loops: its
// K while scoring, its V while summing.

#ifndef OCTAVO_CPU_ATTENTION_KERNELS_H_
#define OCTAVO_CPU_ATTENTION_KERNELS_H_

#include "isa.h"
#include "octavo/half.h"

namespace octavo::cpu {
namespace {

inline constexpr int kLineBytes = 64;
inline constexpr int kUnroll = 8;  // divides head_dim and the slots of a segment
inline constexpr float kMinusInf = -__builtin_inff();
inline constexpr float kLargestFloat = 0x1.fffffep127f;

// V's scales carry this factor until a span ends. It keeps the products of the smallest weight
// (2^-126) with the smallest scale (2^-24) clear of slow subnormal numbers, and leaves the largest
// sums (2^31 tokens of 2^23) far from overflow.
inline constexpr float kValueFactor = 0x1p40f;

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
// A pass covers whole lines of codes every kUnroll steps, which is what it prefetches there.
static_assert(kUnroll * kLanes * 2 % kLineBytes == 0);

// The part of a block that a tile covers: some slots of one kv head.
struct Segment {
  const int8_t* k_codes;       // [head_dim, block_size] from the segment's first slot
  const int8_t* v_codes;       // [num_slots, head_dim]
  const uint16_t* k_scales;    // [num_slots] float16 bits
  const uint16_t* v_scales;    // [num_slots] float16 bits
  const int8_t* next_k_codes;  // what lies one tile ahead: num_slots * head_dim bytes of each
  const int8_t* next_v_codes;
  int tile_offset;
  int num_slots;  // a multiple of 16
};

// Up to 64 tokens in up to four segments, and what is known of them.
struct Tile {
  int begin;  // position of its first token
  int num_tokens;
  int num_segments;
  Segment segments[kTileTokens / kMinBlockSize];
  alignas(64) float k_scales[kTileTokens];               // times sm_scale; 0 past kv_len
  alignas(64) float v_scales[kTileTokens];               // times kValueFactor; 0 past kv_len
  alignas(64) float scores[kMaxTileRows * kTileTokens];  // [num_rows, kTileTokens], then weights
};

inline int Min(int a, int b) { return a < b ? a : b; }
inline int Max(int a, int b) { return a > b ? a : b; }
inline int RoundDown(int x, int step) { return x / step * step; }
inline int RoundUp(int x, int step) { return RoundDown(x + step - 1, step); }

template <int kNumLines>
inline void PrefetchLines(const int8_t* p) {
#pragma GCC unroll 8
  for (int line = 0; line < kNumLines; ++line) __builtin_prefetch(p + line * kLineBytes);
}

// Describes the tokens [position, end) of one block; `end` may not lie past the block.
inline Segment MakeSegment(const SpanParams& params, int position, int end) {
  const PagedInt8Cache& cache = *params.cache;
  const int block_idx = position / cache.block_size;
  const int slot = position % cache.block_size;
  const int ahead = block_idx + Max(1, kTileTokens / cache.block_size);
  const int next_block_idx = ahead * cache.block_size < params.end ? ahead : block_idx;
  const KvTile tile = cache.Tile(*params.layer, params.block_table[block_idx], params.kv_head);
  const KvTile next = cache.Tile(*params.layer, params.block_table[next_block_idx], params.kv_head);
  __builtin_prefetch(next.k_scales + slot);
  __builtin_prefetch(next.v_scales + slot);
  Segment segment;
  segment.k_codes = tile.k_codes + slot;
  segment.v_codes = tile.v_codes + slot * cache.head_dim;
  segment.k_scales = tile.k_scales + slot;
  segment.v_scales = tile.v_scales + slot;
  segment.next_k_codes = next.k_codes + slot * cache.head_dim;
  segment.next_v_codes = next.v_codes + slot * cache.head_dim;
  segment.num_slots = end - position;
  return segment;
}

// Loads a segment's scales. Slots at and past kv_len may hold anything: their scales become zero,
// so that no product of them can be NaN.
inline void LoadScales(const SpanParams& params, const Segment& segment, Tile* tile) {
  const Floats sm_scale = Broadcast(params.options->sm_scale);
  float* k_scales = tile->k_scales + segment.tile_offset;
  float* v_scales = tile->v_scales + segment.tile_offset;
  for (int i = 0; i < segment.num_slots; i += kLanes) {
    Store(k_scales + i, Mul(LoadHalves(segment.k_scales + i), sm_scale));
    Store(v_scales + i, Mul(LoadHalves(segment.v_scales + i), Broadcast(kValueFactor)));
  }
  const int first_position = tile->begin + segment.tile_offset;
  for (int i = Max(0, params.kv_len - first_position); i < segment.num_slots; ++i) {
    k_scales[i] = v_scales[i] = 0.0f;
  }
}

// Gathers the tile that starts at `begin`, a multiple of 16; it ends at the next multiple of 64, or
// with the span.
inline void LoadTile(const SpanParams& params, int begin, Tile* tile) {
  const int block_size = params.cache->block_size;
  const int end = Min(RoundDown(begin, kTileTokens) + kTileTokens, RoundUp(params.end, 16));
  tile->begin = begin;
  tile->num_tokens = end - begin;
  tile->num_segments = 0;
  for (int position = begin; position < end;) {
    const int segment_end = Min(end, RoundDown(position, block_size) + block_size);
    Segment& segment = tile->segments[tile->num_segments++];
    segment = MakeSegment(params, position, segment_end);
    segment.tile_offset = position - begin;
    LoadScales(params, segment, tile);
    position = segment_end;
  }
}

// Dot products of kNumRows rows of q with kNumVectors vectors of slots.
//
// k: [head_dim, stride] codes. q: [kNumRows, kMaxHeadDim]. scores: [kNumRows, kTileTokens].
template <int kNumRows, int kNumVectors>
void ScorePass(const int8_t* k, int stride, const float* q, int head_dim, const int8_t* next,
               float* scores) {
  // Few accumulators would wait for the latency of their own sums: take several of each.
  constexpr int kNumChains = kNumRows * kNumVectors >= 8 ? 1 : kNumRows * kNumVectors >= 4 ? 2 : 4;
  constexpr int kPassBytes = kUnroll * kNumVectors * kLanes;
  Floats sums[kNumChains][kNumRows][kNumVectors];
#pragma GCC unroll 4
  for (int chain = 0; chain < kNumChains; ++chain) {
#pragma GCC unroll 8
    for (int row = 0; row < kNumRows; ++row) {
#pragma GCC unroll 4
      for (int i = 0; i < kNumVectors; ++i) sums[chain][row][i] = Zero();
    }
  }
  for (int d = 0; d < head_dim; d += kUnroll) {
    PrefetchLines<kPassBytes / kLineBytes>(next);
    next += kPassBytes;
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) {
      Floats codes[kNumVectors];
#pragma GCC unroll 4
      for (int i = 0; i < kNumVectors; ++i) codes[i] = LoadCodes(k + i * kLanes);
      k += stride;
#pragma GCC unroll 8
      for (int row = 0; row < kNumRows; ++row) {
        const Floats x = Broadcast(q[row * kMaxHeadDim + d + u]);
#pragma GCC unroll 4
        for (int i = 0; i < kNumVectors; ++i) {
          Floats& sum = sums[u % kNumChains][row][i];
          sum = Fma(x, codes[i], sum);
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
  const int stride = params.cache->block_size;
  for (int s = 0; s < tile->num_segments; ++s) {
    const Segment& segment = tile->segments[s];
    float* scores = tile->scores + segment.tile_offset;
    int slot = 0;
    for (; slot + kNumVectors * kLanes <= segment.num_slots; slot += kNumVectors * kLanes) {
      ScorePass<kNumRows, kNumVectors>(segment.k_codes + slot, stride, params.q, head_dim,
                                       segment.next_k_codes + slot * head_dim, scores + slot);
    }
    if constexpr (kLanes == 16) {
      if (slot < segment.num_slots) {
        ScorePass<kNumRows, 1>(segment.k_codes + slot, stride, params.q, head_dim,
                               segment.next_k_codes + slot * head_dim, scores + slot);
      }
    }
  }
}

// Applies K's scales, the row's factor, the soft cap and the mask to a row of scores; returns the
// largest. A score beyond FP32 becomes its largest number: infinity would make NaN of the weights.
inline float FinishScores(const SpanParams& params, const Tile& tile, int row, float* scores) {
  const float soft_cap = params.options->soft_cap;
  const Floats q_factor = Broadcast(params.q_factors[row]);
  const Floats first = Broadcast(static_cast<float>(params.row_begin[row] - tile.begin));
  const Floats last = Broadcast(static_cast<float>(params.row_end[row] - tile.begin));
  constexpr float kIota[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Floats index = Load(kIota);
  Floats max = Broadcast(kMinusInf);
  for (int i = 0; i < tile.num_tokens; i += kLanes) {
    Floats score = Mul(Mul(Load(scores + i), Load(tile.k_scales + i)), q_factor);
    score = Clamp(score, kLargestFloat);
    if (soft_cap > 0.0f) {
      score = Mul(Broadcast(soft_cap), Tanh(Div(score, Broadcast(soft_cap))));
    }
    const Mask is_attended = And(NotLess(index, first), Less(index, last));
    score = Select(is_attended, score, Broadcast(kMinusInf));
    max = Max(max, score);
    Store(scores + i, score);
    index = Add(index, Broadcast(static_cast<float>(kLanes)));
  }
  return ReduceMax(max);
}

// Turns a row of scores into weights exp(score - max) * v_scale; returns the sum of exp.
inline float TakeWeights(const Tile& tile, float max, float* scores) {
  const Floats reference = Broadcast(max);
  Floats sum = Zero();
  for (int i = 0; i < tile.num_tokens; i += kLanes) {
    const Floats weight = ExpOfNonPositive(Sub(Load(scores + i), reference));
    sum = Add(sum, weight);
    Store(scores + i, Mul(weight, Load(tile.v_scales + i)));
  }
  return ReduceAdd(sum);
}

// Makes room for scores up to `max`: rescales a row's sum and weighted values to it.
inline void RaiseMax(float max, int head_dim, SoftmaxState* softmax, float* values) {
  SoftmaxState raised = {max, 0.0f};
  float own_factor, other_factor;
  softmax->Merge(raised, &own_factor, &other_factor);
  const Floats factor = Broadcast(own_factor);
  for (int d = 0; d < RoundUp(head_dim, kLanes); d += kLanes) {
    Store(values + d, Mul(Load(values + d), factor));
  }
}

// Turns the tile's scores into weights and moves each row's softmax state.
inline void SoftmaxTile(const SpanParams& params, Tile* tile, SpanState* state) {
  for (int row = 0; row < params.num_rows; ++row) {
    float* scores = tile->scores + row * kTileTokens;
    SoftmaxState& softmax = state->softmax[row];
    const float max = FinishScores(params, *tile, row, scores);
    if (max > softmax.max) {
      RaiseMax(max, params.cache->head_dim, &softmax, state->values + row * kMaxHeadDim);
    }
    // A row that has attended to nothing yet has only scores of -inf: any reference will do.
    const float reference = softmax.max == kMinusInf ? 0.0f : softmax.max;
    softmax.sum += TakeWeights(*tile, reference, scores);
  }
}

template <bool kIsHalf>
inline Floats LoadValueCodes(const int8_t* p) {
  if constexpr (kIsHalf) {
    return LoadRemainingCodes(p);
  } else {
    return LoadCodes(p);
  }
}

// Adds weight * code to kNumVectors vectors of kNumRows rows, over the slots of a segment.
//
// v: [num_slots, stride] codes. weights: [kNumRows, kTileTokens]. values: [kNumRows, kMaxHeadDim].
// kIsHalf: the one vector has only 8 elements.
template <int kNumRows, int kNumVectors, bool kIsHalf>
void ValuePass(const int8_t* v, int stride, int num_slots, const float* weights, const int8_t* next,
               float* values) {
  constexpr int kPassBytes = kUnroll * kNumVectors * kLanes / (kIsHalf ? 2 : 1);
  Floats sums[kNumRows][kNumVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kNumRows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < kNumVectors; ++i) {
      sums[row][i] = Load(values + row * kMaxHeadDim + i * kLanes);
    }
  }
  for (int slot = 0; slot < num_slots; slot += kUnroll) {
    PrefetchLines<kPassBytes / kLineBytes>(next);
    next += kPassBytes;
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) {
      Floats codes[kNumVectors];
#pragma GCC unroll 4
      for (int i = 0; i < kNumVectors; ++i) codes[i] = LoadValueCodes<kIsHalf>(v + i * kLanes);
      v += stride;
#pragma GCC unroll 8
      for (int row = 0; row < kNumRows; ++row) {
        const Floats weight = Broadcast(weights[row * kTileTokens + slot + u]);
#pragma GCC unroll 4
        for (int i = 0; i < kNumVectors; ++i) sums[row][i] = Fma(weight, codes[i], sums[row][i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kNumRows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < kNumVectors; ++i) {
      Store(values + row * kMaxHeadDim + i * kLanes, sums[row][i]);
    }
  }
}

// Runs ValuePass over the columns [d, ...) as long as whole passes fit; returns where it stopped.
template <int kNumRows, int kNumVectors, bool kIsHalf = false>
int ValuePasses(const Segment& segment, const float* weights, int head_dim, int d, float* values) {
  constexpr int kStep = kNumVectors * kLanes / (kIsHalf ? 2 : 1);
  for (; d + kStep <= head_dim; d += kStep) {
    ValuePass<kNumRows, kNumVectors, kIsHalf>(segment.v_codes + d, head_dim, segment.num_slots,
                                              weights, segment.next_v_codes + d * segment.num_slots,
                                              values + d);
  }
  return d;
}

// Adds the tile's weighted values.
template <int kNumRows>
void ValueTile(const SpanParams& params, const Tile& tile, SpanState* state) {
  const int head_dim = params.cache->head_dim;
  for (int s = 0; s < tile.num_segments; ++s) {
    const Segment& segment = tile.segments[s];
    const float* weights = tile.scores + segment.tile_offset;
    int d = ValuePasses<kNumRows, kValueVectors<kNumRows>>(segment, weights, head_dim, 0,
                                                           state->values);
    if constexpr (kValueVectors<kNumRows> > 1) {
      d = ValuePasses<kNumRows, 1>(segment, weights, head_dim, d, state->values);
    }
    if constexpr (kLanes == 16) {
      ValuePasses<kNumRows, 1, true>(segment, weights, head_dim, d, state->values);
    }
  }
}

template <int kNumRows>
void AttendSpanOf(const SpanParams& params, SpanState* state) {
  Tile tile;
  int position = RoundDown(params.begin, 16);
  while (position < params.end) {
    LoadTile(params, position, &tile);
    ScoreTile<kNumRows>(params, &tile);
    SoftmaxTile(params, &tile, state);
    ValueTile<kNumRows>(params, tile, state);
    position += tile.num_tokens;
  }
}

// Takes kValueFactor out of num_rows rows of weighted values.
inline void UnscaleValues(int num_rows, int head_dim, float* values) {
  const Floats factor = Broadcast(1.0f / kValueFactor);
  for (int row = 0; row < num_rows; ++row, values += kMaxHeadDim) {
    for (int d = 0; d < RoundUp(head_dim, kLanes); d += kLanes) {
      Store(values + d, Mul(Load(values + d), factor));
    }
  }
}

void AttendSpan(const SpanParams& params, SpanState* state) {
  for (int row = 0; row < params.num_rows; ++row) state->softmax[row] = {kMinusInf, 0.0f};
  __builtin_memset(state->values, 0, sizeof(float) * kMaxHeadDim * params.num_rows);
  constexpr void (*kByNumRows[])(const SpanParams&, SpanState*) = {
      AttendSpanOf<1>, AttendSpanOf<2>, AttendSpanOf<3>, AttendSpanOf<4>,
      AttendSpanOf<5>, AttendSpanOf<6>, AttendSpanOf<7>, AttendSpanOf<8>};
  kByNumRows[params.num_rows - 1](params, state);
  UnscaleValues(params.num_rows, params.cache->head_dim, state->values);
}

}  // namespace
}  // namespace octavo::cpu

#endif  // OCTAVO_CPU_ATTENTION_KERNELS_H_
