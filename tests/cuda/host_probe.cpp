// Shows the step path's pure host code to the tests: the planner and the staging layout.

#include <algorithm>
#include <cstring>

#include "cuda/plan.h"
#include "cuda/staging.h"

#define PROBE extern "C" __attribute__((visibility("default")))

using octavo::PagedInt8Cache;
using octavo::RaggedBatch;
using octavo::cuda::DecodeItem;
using octavo::cuda::DecodeOccupancy;
using octavo::cuda::DecodePlan;
using octavo::cuda::StagingLayout;
using octavo::cuda::StepShape;

// Args:
//   heads: q heads, kv heads, whether deterministic.
//   totals: [2] num_partials, num_counters; written.
// Returns the number of items, of which the first max_items are written.
PROBE int32_t probe_plan(const int32_t* heads, const int32_t* windows, const RaggedBatch* batch,
                         const DecodeOccupancy* occupancy, DecodeItem* items, int32_t max_items,
                         int32_t* totals) {
  PagedInt8Cache cache = {};
  cache.num_q_heads = heads[0];
  cache.num_kv_heads = heads[1];
  cache.is_deterministic = heads[2] != 0;
  DecodePlan plan;
  octavo::cuda::PlanDecode(cache, windows, *batch, *occupancy, &plan);
  const auto num_items = static_cast<int32_t>(plan.items.size());
  std::copy_n(plan.items.begin(), std::min(num_items, max_items), items);
  totals[0] = plan.num_partials;
  totals[1] = plan.num_counters;
  return num_items;
}

// Args: sizes: the numbers of StepShape, in its order. offsets: [16] those of StagingLayout;
// written.
PROBE void probe_staging(const int64_t* sizes, int64_t* offsets) {
  StepShape shape = {};
  std::memcpy(&shape, sizes, 8 * sizeof(int64_t));
  shape.appends = sizes[8] != 0;
  shape.attends = sizes[9] != 0;
  shape.returns_lse = sizes[10] != 0;
  const StagingLayout layout = octavo::cuda::LayOutStaging(shape);
  static_assert(sizeof(layout) == 16 * sizeof(int64_t), "a layout is offsets alone");
  std::memcpy(offsets, &layout, sizeof(layout));
}
