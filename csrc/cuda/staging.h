// Where the arrays of one step lie in its staging buffer: pinned on the host, and the same on the
// device, so that one copy brings everything in and one takes everything out. Pure host code.
//
//   [ batch, plan, k, v, q | offences | out, lse ]
//   copied in ------------------------>
//                           <------------------ copied out

#ifndef OCTAVO_CUDA_STAGING_H_
#define OCTAVO_CUDA_STAGING_H_

#include <cstddef>
#include <cstdint>

namespace octavo::cuda {

// What one step brings and wants.
struct StepShape {
  int64_t num_entries;
  int64_t max_num_blocks;
  int64_t total_tokens;
  int64_t num_items;  // of the plan, 0 without attention
  int64_t num_q_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t element_bytes;
  bool appends;
  bool attends;
  bool returns_lse;
};

// Offsets in bytes, each a multiple of kStagingAlignment.
struct StagingLayout {
  int64_t layers;
  int64_t start_pos;
  int64_t token_starts;
  int64_t kv_lens;
  int64_t is_causal;
  int64_t block_tables;
  int64_t slot_mapping;
  int64_t row_entries;
  int64_t items;
  int64_t k;
  int64_t v;
  int64_t q;
  int64_t offences;
  int64_t out;
  int64_t lse;
  int64_t total_bytes;

  int64_t InBytes() const { return out; }
  int64_t OutBytes() const { return total_bytes - offences; }
};

inline constexpr int64_t kStagingAlignment = 128;

StagingLayout LayOutStaging(const StepShape& shape);

}  // namespace octavo::cuda

#endif  // OCTAVO_CUDA_STAGING_H_
