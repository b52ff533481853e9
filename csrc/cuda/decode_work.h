// What a block of the decode kernel works on, and where its threads and rows stand.

#ifndef OCTAVO_CUDA_DECODE_WORK_H_
#define OCTAVO_CUDA_DECODE_WORK_H_

#include "cuda/device.h"
#include "cuda/tile_shape.h"
#include "octavo/cuda_ops.h"

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
  work.kv_len = LoadGlobal(params.batch.kv_lens + entry);
  // The layer of an entry that is skipped may be anything.
  work.layer = work.kv_len == 0 ? 0 : LoadGlobal(params.batch.layers + entry);
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

}  // namespace octavo::cuda

#endif  // OCTAVO_CUDA_DECODE_WORK_H_
