// Launchers of the CUDA kernels. They queue work on the stream that comes last, and return at once.
//
// Pointers in the params are device pointers, unless they say host. Nothing here allocates, waits
// or owns memory.

#ifndef OCTAVO_CUDA_OPS_H_
#define OCTAVO_CUDA_OPS_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "octavo/paged_cache.h"

namespace octavo::cuda {

struct AppendParams {
  PagedInt8Cache cache;
  RaggedBatch batch;
  DataType dtype;
  int32_t num_rows;            // total_tokens
  const int32_t* row_entries;  // [num_rows] entry of each row
  const void* k;               // [num_rows, num_kv_heads, head_dim] dtype
  const void* v;               // [num_rows, num_kv_heads, head_dim] dtype
  int64_t* offences;           // [num_entries] packed, lowered from kNoOffence
};

// Rows of q that one thread block answers together for one kv head.
inline constexpr int32_t kTileRows = 8;

// Most spans that a context is split into: their factors have to fit shared memory.
inline constexpr int32_t kMaxSplits = 512;

// One thread block's share of a launch, for each kv head: a few rows of an entry over one span of
// its context. Row r of an entry is query token r / group of its query head r % group of the kv
// head.
struct DecodeItem {
  int32_t entry;
  int32_t first_row;
  int32_t num_rows;  // 1 to kTileRows
  int32_t begin;     // positions [begin, end) of the span
  int32_t end;
  int32_t split_idx;      // of the spans of these rows
  int32_t num_splits;     // 1 = nothing to merge
  int32_t first_partial;  // of these rows, where they are split: num_splits of them
  int32_t counter;        // of these rows, where they are split
};

// Softmax over a part of the context, in the logarithm to base 2. A token's weight in `sum` counts
// from max, its weight in the summed values, where the V scale joins it, from value_max.
struct SoftmaxState {
  float max;        // about the largest score; the lowest FP32 over nothing
  float sum;        // of 2^(score - max)
  float value_max;  // about the largest (score - max) + log2(V scale); likewise
};

struct DecodeParams {
  PagedInt8Cache cache;
  RaggedBatch batch;
  DataType dtype;
  int32_t block_shift;  // block_size is 2^block_shift
  int32_t num_items;
  const DecodeItem* items;  // [num_items]
  const void* q;            // [total_tokens, num_q_heads, head_dim] dtype
  void* out;                // like q; written, zeros for skipped entries
  float* lse;               // [total_tokens, num_q_heads] or null; written, -inf for skipped ones
  int64_t* offences;        // [num_entries] packed, lowered from kNoOffence
  SoftmaxState* partials;   // [num_partials, num_kv_heads, kTileRows]
  float* partial_values;    // [num_partials, num_kv_heads, kTileRows, head_dim]
  int32_t* counters;        // [num_counters, num_kv_heads] zeros, and left as zeros
};

// What the planner of decode has to know of a device and a cache's shape.
struct DecodeOccupancy {
  int32_t num_multiprocessors;
  int32_t resident_blocks;  // of the decode kernel, on one multiprocessor
};

// Quantises k and v per (token, kv head) and scatters them to the batch's slots.
cudaError_t AppendPagedInt8(const AppendParams& params, cudaStream_t stream);

// Attends over the cached tokens of every entry.
cudaError_t DecodePagedInt8(const DecodeParams& params, cudaStream_t stream);

// Prepares the kernels that decode takes for a head_dim on this device, and measures their
// occupancy.
cudaError_t PrepareDecode(int32_t head_dim, DecodeOccupancy* occupancy);

// Copies block source to block target in every layer.
cudaError_t CopyBlock(const PagedInt8Cache& cache, int32_t source, int32_t target,
                      cudaStream_t stream);

}  // namespace octavo::cuda

#endif  // OCTAVO_CUDA_OPS_H_
