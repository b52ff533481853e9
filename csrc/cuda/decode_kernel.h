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

#include "cuda/device.h"
#include "cuda/elements.h"
#include "cuda/softmax.h"
#include "cuda/tile_shape.h"
#include "octavo/cuda_ops.h"
#include "octavo/offence.h"

namespace octavo::cuda {

inline constexpr int kBlockThreads = kBlockWarps * kWarpThreads;

// This thread's place in its warp, and in the fragments of a product.
struct Lane {
  int idx;    // 0 to 31
  int group;  // idx / 4: a row of M, or a row of q
  int quad;   // idx % 4: two rows of q, or two dims or tokens
};

__device__ __forceinline__ Lane ThisLane() {
  const int idx = static_cast<int>(threadIdx.x) % kWarpThreads;
  return {idx, idx / 4, idx % 4};
}

// What a block works on.
struct Work {
  DecodeItem item;
  int32_t kv_head;
  int32_t layer;
  int32_t kv_len;
  int32_t start_pos;
  int32_t first_token;  // of the entry, in the batch
  bool is_causal;
  LayerOptions options;
};

__device__ __forceinline__ Work LoadWork(const DecodeParams& params) {
  Work work;
  const auto* words = reinterpret_cast<const int32_t*>(params.items + blockIdx.x);
  int32_t* fields[] = {&work.item.entry,      &work.item.first_row,     &work.item.num_rows,
                       &work.item.begin,      &work.item.end,           &work.item.split_idx,
                       &work.item.num_splits, &work.item.first_partial, &work.item.counter};
#pragma unroll
  for (int i = 0; i < 9; ++i) *fields[i] = LoadGlobal(words + i);
  const int32_t entry = work.item.entry;
  work.kv_head = static_cast<int32_t>(blockIdx.y);
  work.layer = LoadGlobal(params.batch.layers + entry);
  work.kv_len = LoadGlobal(params.batch.kv_lens + entry);
  work.start_pos = LoadGlobal(params.batch.start_pos + entry);
  work.first_token = LoadGlobal(params.batch.token_starts + entry);
  work.is_causal = LoadGlobal(params.batch.is_causal + entry);
  const LayerOptions* options = params.cache.options + work.layer;
  work.options.sm_scale = LoadGlobal(&options->sm_scale);
  work.options.soft_cap = LoadGlobal(&options->soft_cap);
  work.options.window = LoadGlobal(&options->window);
  work.options.sinks = LoadGlobal(&options->sinks);
  return work;
}

// Where a row of an item stands: its query token within the entry, and its q head.
struct RowPlace {
  int32_t token;
  int32_t q_head;
};

__device__ __forceinline__ RowPlace PlaceOf(const DecodeParams& params, const Work& work, int row) {
  const int32_t group_size = params.cache.GroupSize();
  const int32_t entry_row = work.item.first_row + row;
  return {entry_row / group_size, work.kv_head * group_size + entry_row % group_size};
}

// The index of a row into [total_tokens, num_q_heads].
__device__ __forceinline__ int64_t OutRow(const DecodeParams& params, const Work& work,
                                          const RowPlace& place) {
  return int64_t{work.first_token + place.token} * params.cache.num_q_heads + place.q_head;
}

// Positions [begin, end) of the block's span that a row attends to.
struct Range {
  int32_t begin;
  int32_t end;
};

__device__ __forceinline__ Range AttendedRange(const DecodeParams& params, const Work& work,
                                               int row) {
  if (row >= work.item.num_rows) return {0, 0};
  if (!work.is_causal) return {work.item.begin, work.item.end};
  const int32_t end = work.start_pos + PlaceOf(params, work, row).token + 1;
  const int32_t begin = work.options.window > 0 ? end - work.options.window : 0;
  return {max(begin, work.item.begin), min(end, work.item.end)};
}

// ---- Queries ------------------------------------------------------------------------------------

// Rows of q as the B operands of the scores' products: row `group`, dims of TileShape::KeyDim.
template <int kDim, bool kIsSplit>
struct Queries {
  uint32_t high[kDim / 16][2];
  uint32_t low[kIsSplit ? kDim / 16 : 1][2];  // what FP16 did not hold
  // Of rows 2 * quad and + 1: what turns their products into scores, to base 2 unless they are
  // capped.
  float factors[2];
  Range ranges[2];  // of the same rows
};

// A power of two that brings a row's largest magnitude to [2^14, 2^15), and its inverse.
struct RowScale {
  float factor;
  float inverse;
};

__device__ __forceinline__ RowScale ScaleOf(uint32_t amax_bits) {
  const int exponent = min(141 - static_cast<int>(amax_bits >> 23), 126);
  return {BitsFloat(static_cast<uint32_t>(127 + exponent) << 23),
          BitsFloat(static_cast<uint32_t>(127 - exponent) << 23)};
}

// Records a row that is not finite. The block of the first span does it, once.
__device__ __forceinline__ void CheckQuery(const DecodeParams& params, const Work& work,
                                           const Lane& lane, uint32_t amax_bits) {
  const bool is_recorder = work.item.split_idx == 0 && threadIdx.x < kWarpThreads && lane.quad == 0;
  if (!is_recorder || amax_bits < kFloatInfBits || work.kv_len == 0) return;
  const RowPlace place = PlaceOf(params, work, lane.group);
  AtomicMin(params.offences + work.item.entry,
            PackOffence(OffenceField::kQ, place.token, place.q_head, OffenceKind::kNonFinite));
}

// Rounds four scaled elements to FP16, and what is left of them where that counts.
template <int kDim, bool kIsSplit>
__device__ __forceinline__ void RoundQuery(const float* x, int i,
                                           Queries<kDim, kIsSplit>* queries) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float first = x[2 * half], second = x[2 * half + 1];
    const uint32_t high = PackHalves(first, second);
    queries->high[i][half] = high;
    if constexpr (kIsSplit) {
      queries->low[i][half] = PackHalves(first - HalfToFloat(static_cast<uint16_t>(high)),
                                         second - HalfToFloat(static_cast<uint16_t>(high >> 16)));
    }
  }
}

// Where a lane's elements of row `group` of q come from.
template <int kDim>
struct QuerySource {
  DataType dtype;
  const void* q;
  int64_t first;  // element of the row
  int head_dim;   // 0 where there is no such row
  const Lane& lane;

  // Loads the four elements that the i-th product takes.
  __device__ __forceinline__ void Load(int i, float (&elements)[4]) const {
    using Shape = TileShape<kDim>;
    constexpr int kVectorFours = Shape::kKeyVector / 4;
    const int dim = Shape::KeyDim(i / kVectorFours, lane.quad) + 4 * (i % kVectorFours);
    LoadElements(dtype, q, first + dim, dim < head_dim, elements);
  }

  // Returns the bits of the row's largest magnitude.
  __device__ __forceinline__ uint32_t LoadMaxBits() const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      float elements[4];
      Load(i, elements);
#pragma unroll
      for (float x : elements) bits = max(bits, FloatBits(x) & 0x7fffffffu);
    }
    bits = max(bits, ShuffleXor(bits, 1));
    return max(bits, ShuffleXor(bits, 2));
  }
};

// Loads row `group` of q. Every warp holds all rows: they are few, and L1 has them. They are loaded
// twice, so as not to hold them in FP32.
template <int kDim, bool kIsSplit>
__device__ __forceinline__ void LoadQueries(const DecodeParams& params, const Work& work,
                                            const Lane& lane, Queries<kDim, kIsSplit>* queries) {
  const bool is_row = lane.group < work.item.num_rows;
  const int64_t out_row = OutRow(params, work, PlaceOf(params, work, lane.group));
  const QuerySource<kDim> source = {params.dtype, params.q, out_row * params.cache.head_dim,
                                    is_row ? params.cache.head_dim : 0, lane};
  const uint32_t amax_bits = source.LoadMaxBits();
  CheckQuery(params, work, lane, amax_bits);
  const RowScale scale = ScaleOf(amax_bits);
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    float elements[4];
    source.Load(i, elements);
#pragma unroll
    for (float& x : elements) x *= scale.factor;
    RoundQuery(elements, i, queries);
  }
#pragma unroll
  for (int column = 0; column < 2; ++column) {
    const int row = 2 * lane.quad + column;
    queries->factors[column] = ShuffleFrom(scale.inverse, 4 * row) * work.options.sm_scale;
    if (work.options.soft_cap == 0.0f) queries->factors[column] *= kLog2E;
    queries->ranges[column] = AttendedRange(params, work, row);
  }
}

// ---- Copies -------------------------------------------------------------------------------------

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

// ---- A tile -------------------------------------------------------------------------------------

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
  return fminf(fmaxf(score, -kLargestFloat), kLargestFloat);
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
    exceeds |= distance + pair.v_log[i] > state.value_max + kReferenceSlack;
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
  const float shift = kWeightShift - state->value_max;
  state->sum += Exp2(first) + Exp2(second);
  return {Exp2(first + pair.v_log[0] + shift), Exp2(second + pair.v_log[1] + shift)};
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

// ---- Results ------------------------------------------------------------------------------------

// The warps' results side by side in shared memory, in place of the rings.
template <int kDim>
struct SharedResults {
  SoftmaxState* states;  // [kBlockWarps, kTileRows]
  float* values;         // [kBlockWarps, kTileRows, kDim]

  static constexpr int kBytes =
      kBlockWarps * kTileRows * (kDim * sizeof(float) + sizeof(SoftmaxState));

  __device__ __forceinline__ explicit SharedResults(char* shared)
      : states(reinterpret_cast<SoftmaxState*>(shared)),
        values(reinterpret_cast<float*>(states + kBlockWarps * kTileRows)) {}
};

__device__ __forceinline__ SoftmaxState LoadSharedState(const SoftmaxState* source) {
  return {LoadShared(&source->max), LoadShared(&source->sum), LoadShared(&source->value_max)};
}

__device__ __forceinline__ void StoreSharedState(SoftmaxState* target, const SoftmaxState& state) {
  StoreShared(&target->max, state.max);
  StoreShared(&target->sum, state.sum);
  StoreShared(&target->value_max, state.value_max);
}

__device__ __forceinline__ SoftmaxState LoadFreshState(const SoftmaxState* source) {
  return {LoadGlobalFresh(&source->max), LoadGlobalFresh(&source->sum),
          LoadGlobalFresh(&source->value_max)};
}

__device__ __forceinline__ void StoreGlobalState(SoftmaxState* target, const SoftmaxState& state) {
  StoreGlobal(&target->max, state.max);
  StoreGlobal(&target->sum, state.sum);
  StoreGlobal(&target->value_max, state.value_max);
}

// Puts a warp's results into shared memory.
template <int kDim>
__device__ __forceinline__ void ShareResults(const Lane& lane, const Accumulator<kDim>& sums,
                                             const SharedResults<kDim>& shared) {
  using Shape = TileShape<kDim>;
  const int warp_row = static_cast<int>(threadIdx.x) / kWarpThreads * kTileRows + 2 * lane.quad;
#pragma unroll
  for (int column = 0; column < 2; ++column) {
    SoftmaxState state = sums.states[column];
#pragma unroll
    for (int mask = 4; mask < kWarpThreads; mask *= 2) state.sum += ShuffleXor(state.sum, mask);
    if (lane.group == 0) StoreSharedState(shared.states + warp_row + column, state);
    float* row = shared.values + (warp_row + column) * kDim;
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      const int dim = Shape::ValueDim(i / (Shape::kValueVector / 2), lane.group) +
                      i % (Shape::kValueVector / 2) * 2;
      const Bytes8 pair = {
          {FloatBits(sums.values[i][column]), FloatBits(sums.values[i][column + 2])}};
      StoreShared(reinterpret_cast<Bytes8*>(row + dim), pair);
    }
  }
}

// Two neighbouring values of a row, and the state that they belong to.
struct RowPair {
  SoftmaxState state;
  float x;
  float y;
};

// Merges num_parts results of a row, in their order. load_state(i) and load_pair(i) give the i-th.
template <typename LoadState, typename LoadPair>
__device__ __forceinline__ RowPair MergeRow(int num_parts, LoadState load_state,
                                            LoadPair load_pair) {
  RowPair merged = {EmptyState(), 0.0f, 0.0f};
  for (int i = 0; i < num_parts; ++i) merged.state = Merged(merged.state, load_state(i));
  for (int i = 0; i < num_parts; ++i) {
    const float factor = ValueFactor(load_state(i), merged.state);
    const Bytes8 pair = load_pair(i);
    merged.x += BitsFloat(pair.words[0]) * factor;
    merged.y += BitsFloat(pair.words[1]) * factor;
  }
  return merged;
}

// Stores a row's answer, two of its dims by this thread.
__device__ __forceinline__ void StoreAnswer(const DecodeParams& params, const Work& work, int row,
                                            int dim, const RowPair& pair) {
  const RowPlace place = PlaceOf(params, work, row);
  const int64_t out_row = OutRow(params, work, place);
  const float* sinks = work.options.sinks;
  const Normalizer by = NormalizerOf(pair.state, sinks == nullptr ? nullptr : sinks + place.q_head);
  StorePair(params.dtype, params.out, out_row * params.cache.head_dim + dim,
            pair.x * by.first * by.second, pair.y * by.first * by.second);
  if (params.lse != nullptr && dim == 0) StoreGlobal(params.lse + out_row, LseOf(pair.state));
}

// Partial results of one split of a block's rows.
struct Partial {
  SoftmaxState* states;  // [kTileRows]
  float* values;         // [kTileRows, head_dim]
};

__device__ __forceinline__ Partial PartialOf(const DecodeParams& params, const Work& work,
                                             int split_idx) {
  const int64_t partial =
      int64_t{work.item.first_partial + split_idx} * params.cache.num_kv_heads + work.kv_head;
  return {params.partials + partial * kTileRows,
          params.partial_values + partial * kTileRows * params.cache.head_dim};
}

__device__ __forceinline__ void StorePartial(const DecodeParams& params, const Work& work, int row,
                                             int dim, const RowPair& pair) {
  const Partial partial = PartialOf(params, work, work.item.split_idx);
  const Bytes8 values = {{FloatBits(pair.x), FloatBits(pair.y)}};
  StoreGlobal(reinterpret_cast<Bytes8*>(partial.values + row * params.cache.head_dim + dim),
              values);
  if (dim == 0) StoreGlobalState(partial.states + row, pair.state);
}

__device__ __forceinline__ RowPair MergePartials(const DecodeParams& params, const Work& work,
                                                 int row, int dim) {
  const int64_t offset = int64_t{row} * params.cache.head_dim + dim;
  return MergeRow(
      work.item.num_splits,
      [&](int i) { return LoadFreshState(PartialOf(params, work, i).states + row); },
      [&](int i) {
        const float* values = PartialOf(params, work, i).values + offset;
        return LoadGlobalFresh(reinterpret_cast<const Bytes8*>(values));
      });
}

// Calls visit(row, dim) for every row of the block and every second dim, spread over its threads.
template <typename Visit>
__device__ __forceinline__ void ForEachPair(const DecodeParams& params, const Work& work,
                                            Visit visit) {
  const int row_pairs = params.cache.head_dim / 2;
  for (int i = static_cast<int>(threadIdx.x); i < work.item.num_rows * row_pairs;
       i += kBlockThreads) {
    visit(i / row_pairs, i % row_pairs * 2);
  }
}

// Whether this block is the last of its rows' splits; all of them are visible to it then.
__device__ __forceinline__ bool IsLastSplit(const DecodeParams& params, const Work& work,
                                            int32_t* shared_flag) {
  FenceDevice();
  SyncBlock();
  if (threadIdx.x == 0) {
    int32_t* counter =
        params.counters + int64_t{work.item.counter} * params.cache.num_kv_heads + work.kv_head;
    const bool is_last = AtomicAdd(counter, 1) + 1 == work.item.num_splits;
    if (is_last) StoreGlobal(counter, 0);  // for the next launch
    StoreShared(shared_flag, static_cast<int32_t>(is_last));
  }
  SyncBlock();
  const bool is_last = LoadShared(shared_flag) != 0;
  if (is_last) FenceDevice();
  return is_last;
}

// Merges the warps' results and stores what comes of them.
template <int kDim>
__device__ __forceinline__ void StoreResults(const DecodeParams& params, const Work& work,
                                             const SharedResults<kDim>& shared, int32_t* flag) {
  const bool is_split = work.item.num_splits > 1;
  ForEachPair(params, work, [&](int row, int dim) {
    const RowPair pair = MergeRow(
        kBlockWarps, [&](int i) { return LoadSharedState(shared.states + i * kTileRows + row); },
        [&](int i) {
          const float* values = shared.values + (i * kTileRows + row) * kDim + dim;
          return LoadShared(reinterpret_cast<const Bytes8*>(values));
        });
    if (is_split) {
      StorePartial(params, work, row, dim, pair);
    } else {
      StoreAnswer(params, work, row, dim, pair);
    }
  });
  if (!is_split || !IsLastSplit(params, work, flag)) return;
  ForEachPair(params, work, [&](int row, int dim) {
    StoreAnswer(params, work, row, dim, MergePartials(params, work, row, dim));
  });
}

// ---- The kernel ---------------------------------------------------------------------------------

// Dynamic shared memory of a block: the rings, which the results replace later, then a flag.
template <int kDim>
struct SharedLayout {
  static constexpr int kFlagOffset = TileShape<kDim>::kSharedBytes > SharedResults<kDim>::kBytes
                                         ? TileShape<kDim>::kSharedBytes
                                         : SharedResults<kDim>::kBytes;
  static constexpr int kBytes = kFlagOffset + 16;
};

// Attends to this warp's tiles of the block's span. What the block works on is loaded here, and
// again for the results: held over the loop, it would take registers.
template <int kDim, bool kIsSplit>
__device__ __forceinline__ Accumulator<kDim> AttendSpan(const DecodeParams& params,
                                                        const Lane& lane, char* shared) {
  const Work work = LoadWork(params);
  Queries<kDim, kIsSplit> queries;
  LoadQueries<kDim, kIsSplit>(params, work, lane, &queries);
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  TileRing<kDim> ring(params, work, lane, shared + warp * TileShape<kDim>::kWarpBytes);
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
  auto* flag = reinterpret_cast<int32_t*>(shared + SharedLayout<kDim>::kFlagOffset);
  StoreResults<kDim>(params, LoadWork(params), results, flag);
}

}  // namespace octavo::cuda

#endif  // OCTAVO_CUDA_DECODE_KERNEL_H_
