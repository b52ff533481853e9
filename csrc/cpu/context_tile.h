// A tile of context as the attention kernels walk it: where its codes lie, its scales, and which of
// its tokens a row attends to. Include after a simd_*.h and vector_math.h.
//
// The context is walked in tiles of 64 tokens: scores of the tile, softmax, weighted values. Codes
// are used in place: K's scales multiply the scores, V's scales fold into the weights. Per token
// and kv head that is 2 * head_dim bytes of codes and 4 of scales. Scores, softmax and sums are
// FP32. The tile after this one is prefetched line by line within the two inner loops: its K while
// scoring, its V while summing.

#ifndef OCTAVO_CPU_CONTEXT_TILE_H_
#define OCTAVO_CPU_CONTEXT_TILE_H_

#include "isa.h"
#include "layout.h"
#include "octavo/half.h"

namespace octavo::cpu {
namespace {

inline constexpr int kLineBytes = 64;
inline constexpr int kQuadVectorBytes = kQuad * kLanes;  // a vector of quads
// Quads of dims (scores) or of slots (values) that one step of an inner loop takes: head_dim and a
// segment's slots are multiples of 8.
inline constexpr int kUnrolledQuads = 2;
inline constexpr float kMinusInf = -__builtin_inff();
inline constexpr float kLargestFloat = 0x1.fffffep127f;

// V's scales carry this factor until a span ends. It keeps the products of the smallest weight
// (2^-126) with the smallest scale (2^-24) clear of slow subnormal numbers, and leaves the largest
// sums (2^31 tokens of 2^23) far from overflow.
inline constexpr float kValueFactor = 0x1p40f;

// The part of a block that a tile covers: some slots of one kv head.
struct Segment {
  const int8_t* k_codes;       // [head_dim / 4, block_size, 4] from the segment's first slot
  const int8_t* v_codes;       // [head_dim / 16, block_size / 4, 16, 4] from the block's first slot
  const uint16_t* k_scales;    // [num_slots] float16 bits
  const uint16_t* v_scales;    // [num_slots] float16 bits
  const int8_t* next_k_codes;  // what lies one tile ahead: num_slots * head_dim bytes of each
  const int8_t* next_v_codes;
  int first_slot;  // of the block, and how many; multiples of 16
  int num_slots;
  int tile_offset;
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

// Into the second-level cache: it has more misses in flight than the first, and a tile and the next
// one together are more than the first holds.
template <int kNumLines>
inline void PrefetchLines(const int8_t* p) {
#pragma GCC unroll 8
  for (int line = 0; line < kNumLines; ++line) __builtin_prefetch(p + line * kLineBytes, 0, 2);
}

// Bytes from one quad of slots to the next in the column of V that dim d belongs to.
inline int ValueStride(int head_dim, int d) {
  return kQuad * Min(kValueColumn, head_dim - RoundDown(d, kValueColumn));
}

// Where a segment's codes of dims [d, ...) begin.
inline const int8_t* ValueCodesAt(const Segment& segment, int block_size, int head_dim, int d) {
  const int column = RoundDown(d, kValueColumn);
  return segment.v_codes + column * block_size +
         segment.first_slot / kQuad * ValueStride(head_dim, d) + (d - column) * kQuad;
}

// head_idx counts from the run's first kv head.
inline KvTile TileAt(const PagedInt8Cache& cache, const ContextRun& run, int position,
                     int head_idx) {
  const int block_idx = position >> __builtin_ctz(cache.block_size);
  return TileOf(cache, *run.layer, run.block_table[block_idx], run.kv_head + head_idx);
}

// What is read after the tile of `position`: that of the next kv head, or, after the last one, one
// tile (or block, where that is more) ahead, of this run or of the next one.
inline KvTile TileAhead(const SpanParams& params, int position, int head_idx) {
  const PagedInt8Cache& cache = *params.cache;
  if (head_idx + 1 < params.run.num_kv_heads) {
    return TileAt(cache, params.run, position, head_idx + 1);
  }
  const int step = Max(kTileTokens, cache.block_size);  // powers of two
  const int ahead = position + step;
  if (ahead < params.run.end) return TileAt(cache, params.run, ahead, 0);
  const int last_step = (params.run.end - 1) & -step;
  const int next = (params.next.begin & -step) + position - last_step;
  if (position < last_step || next >= params.next.end) {
    return TileAt(cache, params.run, position, head_idx);
  }
  return TileAt(cache, params.next, next, 0);
}

// Describes the tokens [position, end) of one block; `end` may not lie past the block.
inline Segment MakeSegment(const SpanParams& params, int head_idx, int position, int end) {
  const PagedInt8Cache& cache = *params.cache;
  const int slot = position & (cache.block_size - 1);
  const KvTile tile = TileAt(cache, params.run, position, head_idx);
  const KvTile ahead = TileAhead(params, position, head_idx);
  __builtin_prefetch(ahead.k_scales + slot);
  __builtin_prefetch(ahead.v_scales + slot);
  Segment segment;
  segment.k_codes = tile.k_codes + slot * kQuad;
  segment.v_codes = tile.v_codes;
  segment.k_scales = tile.k_scales + slot;
  segment.v_scales = tile.v_scales + slot;
  segment.next_k_codes = ahead.k_codes + slot * cache.head_dim;
  segment.next_v_codes = ahead.v_codes + slot * cache.head_dim;
  segment.first_slot = slot;
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

// Gathers the tile that starts at `begin`, a multiple of 16; it ends at the next multiple of 64,
// or with the span.
inline void LoadTile(const SpanParams& params, int head_idx, int begin, Tile* tile) {
  const int block_size = params.cache->block_size;
  const int end = Min(RoundDown(begin, kTileTokens) + kTileTokens, RoundUp(params.run.end, 16));
  tile->begin = begin;
  tile->num_tokens = end - begin;
  tile->num_segments = 0;
  for (int position = begin; position < end;) {
    const int segment_end = Min(end, (position & -block_size) + block_size);
    Segment& segment = tile->segments[tile->num_segments++];
    segment = MakeSegment(params, head_idx, position, segment_end);
    segment.tile_offset = position - begin;
    LoadScales(params, segment, tile);
    position = segment_end;
  }
}

// Whether a row attends to every token of a tile.
inline bool AttendsToAll(const SpanParams& params, const Tile& tile, int row) {
  return params.row_begin[row] <= tile.begin && params.row_end[row] >= tile.begin + tile.num_tokens;
}

// Applies the soft cap and the mask to a row of scores; returns the largest.
inline Floats CapAndMask(const SpanParams& params, const Tile& tile, int row, float* scores) {
  const float soft_cap = params.options->soft_cap;
  const Floats first = Broadcast(static_cast<float>(params.row_begin[row] - tile.begin));
  const Floats last = Broadcast(static_cast<float>(params.row_end[row] - tile.begin));
  constexpr float kIota[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Floats index = Load(kIota);
  Floats max = Broadcast(kMinusInf);
  for (int i = 0; i < tile.num_tokens; i += kLanes) {
    Floats score = Load(scores + i);
    if (soft_cap > 0.0f) {
      score = Mul(Broadcast(soft_cap), Tanh(Div(score, Broadcast(soft_cap))));
    }
    const Mask is_attended = And(NotLess(index, first), Less(index, last));
    score = Select(is_attended, score, Broadcast(kMinusInf));
    max = Max(max, score);
    Store(scores + i, score);
    index = Add(index, Broadcast(static_cast<float>(kLanes)));
  }
  return max;
}

template <bool kIsHalf>
inline Quads LoadValueQuads(const int8_t* p) {
  if constexpr (kIsHalf) {
    return LoadRemainingQuads(p);
  } else {
    return LoadQuads(p);
  }
}

inline void ScaleRow(float factor, int head_dim, float* row) {
  const Floats factors = Broadcast(factor);
  for (int d = 0; d < head_dim; d += kLanes) Store(row + d, Mul(Load(row + d), factors));
}

// Starts rows from nothing attended to.
inline void InitState(int num_rows, int head_dim, SpanState* state) {
  for (int row = 0; row < num_rows; ++row) {
    state->softmax[row] = {kMinusInf, 0.0f};
    float* values = state->values + row * kMaxHeadDim;
    for (int d = 0; d < head_dim; d += kLanes) Store(values + d, Zero());
  }
}

// Takes kValueFactor out of num_rows rows of weighted values.
inline void UnscaleValues(int num_rows, int head_dim, float* values) {
  for (int row = 0; row < num_rows; ++row) {
    ScaleRow(1.0f / kValueFactor, head_dim, values + row * kMaxHeadDim);
  }
}

}  // namespace
}  // namespace octavo::cpu

#endif  // OCTAVO_CPU_CONTEXT_TILE_H_
