// From the sums of a block's warps to answers: the warps merge in shared memory, the spans of a
// split context in global memory.

#ifndef OCTAVO_CUDA_DECODE_RESULTS_H_
#define OCTAVO_CUDA_DECODE_RESULTS_H_

#include "cuda/attend_tile.h"
#include "cuda/decode_work.h"
#include "cuda/device.h"
#include "cuda/elements.h"
#include "cuda/softmax.h"
#include "cuda/tile_shape.h"

namespace octavo::cuda {

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

// How the parts of each row become one: what their values are multiplied by, and the state of the
// sum.
struct MergeTable {
  SoftmaxState* wholes;  // [kTileRows]
  float* factors;        // [num_parts, kTileRows]

  __device__ __forceinline__ explicit MergeTable(char* shared)
      : wholes(reinterpret_cast<SoftmaxState*>(shared)),
        factors(reinterpret_cast<float*>(wholes + kTileRows)) {}

  static constexpr int kBytes =
      kTileRows * (sizeof(SoftmaxState) + kMaxSplits * static_cast<int>(sizeof(float)));
};

__device__ __forceinline__ SoftmaxState MergedOverWarp(SoftmaxState state) {
#pragma unroll
  for (int mask = 1; mask < kWarpThreads; mask *= 2) {
    state = Merged(state, {ShuffleXor(state.max, mask), ShuffleXor(state.sum, mask),
                           ShuffleXor(state.value_max, mask)});
  }
  return state;
}

// Fills a table: a warp takes every fourth row, its lanes the parts. The order in which states are
// merged depends on num_parts alone. load_state(part, row) gives a state.
template <typename LoadState>
__device__ __forceinline__ void FillTable(int num_rows, int num_parts, const MergeTable& table,
                                          LoadState load_state) {
  const int lane = ThisLane().idx;
  for (int row = static_cast<int>(threadIdx.x) / kWarpThreads; row < num_rows; row += kBlockWarps) {
    SoftmaxState whole = EmptyState();
    for (int i = lane; i < num_parts; i += kWarpThreads) whole = Merged(whole, load_state(i, row));
    whole = MergedOverWarp(whole);
    if (lane == 0) StoreSharedState(table.wholes + row, whole);
    for (int i = lane; i < num_parts; i += kWarpThreads) {
      StoreShared(table.factors + i * kTileRows + row, ValueFactor(load_state(i, row), whole));
    }
  }
}

// Two neighbouring values of a row, and the state that they belong to.
struct RowPair {
  SoftmaxState state;
  float x;
  float y;
};

// Merges a row's parts by a table, in their order. load_pair(i) gives the i-th.
template <typename LoadPair>
__device__ __forceinline__ RowPair MergeRow(int row, int num_parts, const MergeTable& table,
                                            LoadPair load_pair) {
  RowPair merged = {LoadSharedState(table.wholes + row), 0.0f, 0.0f};
#pragma unroll 8
  for (int i = 0; i < num_parts; ++i) {
    const float factor = LoadShared(table.factors + i * kTileRows + row);
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

// Merges the warps' results, and stores the answer or a partial result.
template <int kDim>
__device__ __forceinline__ void StoreOwnResults(const DecodeParams& params, const Work& work,
                                                const SharedResults<kDim>& shared,
                                                const MergeTable& table) {
  FillTable(work.item.num_rows, kBlockWarps, table, [&](int part, int row) {
    return LoadSharedState(shared.states + part * kTileRows + row);
  });
  SyncBlock();
  ForEachPair(params, work, [&](int row, int dim) {
    const RowPair pair = MergeRow(row, kBlockWarps, table, [&](int part) {
      const float* values = shared.values + (part * kTileRows + row) * kDim + dim;
      return LoadShared(reinterpret_cast<const Bytes8*>(values));
    });
    if (work.item.num_splits > 1) {
      StorePartial(params, work, row, dim, pair);
    } else {
      StoreAnswer(params, work, row, dim, pair);
    }
  });
}

// Merges the partial results of all splits, and stores the answer.
__device__ __forceinline__ void StoreMergedSplits(const DecodeParams& params, const Work& work,
                                                  const MergeTable& table) {
  const int num_splits = work.item.num_splits;
  FillTable(work.item.num_rows, num_splits, table, [&](int part, int row) {
    return LoadFreshState(PartialOf(params, work, part).states + row);
  });
  SyncBlock();
  ForEachPair(params, work, [&](int row, int dim) {
    const int64_t offset = int64_t{row} * params.cache.head_dim + dim;
    const RowPair pair = MergeRow(row, num_splits, table, [&](int part) {
      const float* values = PartialOf(params, work, part).values + offset;
      return LoadGlobalFresh(reinterpret_cast<const Bytes8*>(values));
    });
    StoreAnswer(params, work, row, dim, pair);
  });
}

}  // namespace octavo::cuda

#endif  // OCTAVO_CUDA_DECODE_RESULTS_H_
