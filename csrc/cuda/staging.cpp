#include "cuda/staging.h"

#include "octavo/cuda_ops.h"

namespace octavo::cuda {
namespace {

// Hands out aligned offsets, one array after the other.
class Cursor {
 public:
  int64_t Take(int64_t num_bytes) {
    const int64_t offset = position_;
    position_ += (num_bytes + kStagingAlignment - 1) / kStagingAlignment * kStagingAlignment;
    return offset;
  }

 private:
  int64_t position_ = 0;
};

}  // namespace

StagingLayout LayOutStaging(const StepShape& shape) {
  const int64_t int32_bytes = sizeof(int32_t), int64_bytes = sizeof(int64_t);
  const int64_t row_bytes = shape.head_dim * shape.element_bytes;
  const int64_t kv_bytes =
      shape.appends ? shape.total_tokens * shape.num_kv_heads * row_bytes : int64_t{0};
  const int64_t num_q_rows = shape.attends ? shape.total_tokens * shape.num_q_heads : int64_t{0};
  const int64_t item_bytes = sizeof(DecodeItem);
  const int64_t lse_bytes = sizeof(float);
  Cursor cursor;
  StagingLayout layout = {};
  layout.layers = cursor.Take(shape.num_entries * int32_bytes);
  layout.start_pos = cursor.Take(shape.num_entries * int32_bytes);
  layout.token_starts = cursor.Take((shape.num_entries + 1) * int32_bytes);
  layout.kv_lens = cursor.Take(shape.num_entries * int32_bytes);
  layout.is_causal = cursor.Take(shape.num_entries);
  layout.block_tables = cursor.Take(shape.num_entries * shape.max_num_blocks * int32_bytes);
  layout.slot_mapping = cursor.Take(shape.appends ? shape.total_tokens * int64_bytes : 0);
  layout.row_entries = cursor.Take(shape.appends ? shape.total_tokens * int32_bytes : 0);
  layout.items = cursor.Take(shape.num_items * item_bytes);
  layout.k = cursor.Take(kv_bytes);
  layout.v = cursor.Take(kv_bytes);
  layout.q = cursor.Take(num_q_rows * row_bytes);
  layout.offences = cursor.Take(shape.num_entries * int64_bytes);
  layout.out = cursor.Take(num_q_rows * row_bytes);
  layout.lse = cursor.Take(shape.returns_lse ? num_q_rows * lse_bytes : 0);
  layout.total_bytes = cursor.Take(0);
  return layout;
}

}  // namespace octavo::cuda
