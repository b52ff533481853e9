// Plans a ragged batch into the decode kernel's items. Pure host code: no device, no CUDA calls.

#ifndef OCTAVO_CUDA_PLAN_H_
#define OCTAVO_CUDA_PLAN_H_

#include <cstdint>
#include <vector>

#include "octavo/cuda_ops.h"
#include "octavo/paged_cache.h"

namespace octavo::cuda {

// Whole spans first, each kind in the order of entries, rows and positions. All spans of an entry
// have one length but the last, in a deterministic model by the entry alone, else by the batch.
struct DecodePlan {
  std::vector<DecodeItem> items;
  int32_t num_partials = 0;
  int32_t num_counters = 0;
  std::vector<DecodeItem> tiles, rests;  // on the way to items; kept for their storage
};

// Fills a plan, whose storage is used again.
//
// Args:
//   cache: The model; its pointers are not followed.
//   windows: [num_layers] window of each layer, 0 = none.
//   batch: Host pointers, checked before.
//   occupancy: What the device runs at once.
void PlanDecode(const PagedInt8Cache& cache, const int32_t* windows, const RaggedBatch& batch,
                const DecodeOccupancy& occupancy, DecodePlan* plan);

}  // namespace octavo::cuda

#endif  // OCTAVO_CUDA_PLAN_H_
