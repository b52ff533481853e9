#include "bench_batch.h"

#include <cmath>

namespace octavo::cuda {

BenchBatch::BenchBatch(const BenchStep& step)
    : layers_(step.num_entries, 0), is_causal_(std::make_unique<bool[]>(step.num_entries)) {
  for (int32_t entry = 0; entry < step.num_entries; ++entry) {
    const int32_t* block_table = step.block_tables + int64_t{entry} * step.max_num_blocks;
    start_pos_.push_back(step.kv_lens[entry] - step.num_tokens);
    token_starts_.push_back(entry * step.num_tokens);
    is_causal_[entry] = true;
    for (int32_t position = start_pos_.back(); position < step.kv_lens[entry]; ++position) {
      const int64_t block_id = block_table[position / step.block_size];
      slot_mapping_.push_back(block_id * step.block_size + position % step.block_size);
    }
  }
  token_starts_.push_back(step.num_entries * step.num_tokens);
  batch_.num_entries = step.num_entries;
  batch_.max_num_blocks = step.max_num_blocks;
  batch_.layers = layers_.data();
  batch_.start_pos = start_pos_.data();
  batch_.token_starts = token_starts_.data();
  batch_.kv_lens = step.kv_lens;
  batch_.is_causal = is_causal_.get();
  batch_.block_tables = step.block_tables;
  batch_.slot_mapping = slot_mapping_.data();
}

BenchSpec::BenchSpec(const BenchStep& step)
    : layer_{step.k_codes, step.v_codes, step.k_scales, step.v_scales},
      sm_scale_(1.0f / std::sqrt(static_cast<float>(step.head_dim))) {
  spec_.num_layers = 1;
  spec_.num_blocks = step.num_blocks;
  spec_.num_q_heads = step.num_q_heads;
  spec_.num_kv_heads = step.num_kv_heads;
  spec_.head_dim = step.head_dim;
  spec_.block_size = step.block_size;
  spec_.layers = &layer_;
  spec_.sm_scale = &sm_scale_;
  spec_.soft_cap = &soft_cap_;
  spec_.window = &window_;
}

}  // namespace octavo::cuda
