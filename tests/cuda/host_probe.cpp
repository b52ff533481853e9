// Shows the step path's pure host code to the tests: the planner and the staging layout.

#include <algorithm>
#include <cstring>

#include "cuda/plan.h"
#include "cuda/staging.h"
#include "cuda/tile_shape.h"

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

// Args: numbers: [5] key_vector, key_pitch, value_vector, value_pitch, num_key_vectors; written.
// key_dims, value_dims: [num_vectors, 4] and [num_vectors, 8] dims by quad and by group; written.
template <int kDim>
void ShowShape(int32_t* numbers, int32_t* key_dims, int32_t* value_dims) {
  using Shape = octavo::cuda::TileShape<kDim>;
  const int32_t shown[] = {Shape::kKeyVector, Shape::kKeyPitch, Shape::kValueVector,
                           Shape::kValuePitch, Shape::kNumKeyVectors};
  std::copy_n(shown, 5, numbers);
  for (int i = 0; i < Shape::kNumKeyVectors; ++i) {
    for (int quad = 0; quad < 4; ++quad) key_dims[4 * i + quad] = Shape::KeyDim(i, quad);
  }
  for (int i = 0; i < Shape::kNumValueVectors; ++i) {
    for (int group = 0; group < 8; ++group) value_dims[8 * i + group] = Shape::ValueDim(i, group);
  }
}

PROBE void probe_shape(int32_t head_dim, int32_t* numbers, int32_t* key_dims, int32_t* value_dims) {
  switch (head_dim) {
    case 64:
      return ShowShape<64>(numbers, key_dims, value_dims);
    case 80:
      return ShowShape<80>(numbers, key_dims, value_dims);
    case 96:
      return ShowShape<96>(numbers, key_dims, value_dims);
    case 128:
      return ShowShape<128>(numbers, key_dims, value_dims);
    case 192:
      return ShowShape<192>(numbers, key_dims, value_dims);
    default:
      return ShowShape<256>(numbers, key_dims, value_dims);
  }
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
