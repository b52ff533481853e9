#include "octavo/batch_checks.h"

#include <algorithm>

namespace octavo {
namespace {

Status CheckTokenStarts(const RaggedBatch& batch) {
  if (batch.token_starts[0] != 0) return Status::kBadTokenStarts;
  for (int32_t entry = 0; entry < batch.num_entries; ++entry) {
    if (batch.NumTokens(entry) < 0) return Status::kBadTokenStarts;
  }
  return Status::kOk;
}

bool IsLayer(const PagedInt8Cache& cache, int32_t layer) {
  return layer >= 0 && layer < cache.num_layers;
}

Status CheckSlots(const PagedInt8Cache& cache, const RaggedBatch& batch, int32_t entry) {
  const int64_t* slots = batch.slot_mapping + batch.token_starts[entry];
  const int64_t num_slots = static_cast<int64_t>(cache.num_blocks) * cache.block_size;
  int64_t min_slot = -1, max_slot = -1;
  for (int32_t token = 0; token < batch.NumTokens(entry); ++token) {
    min_slot = std::min(min_slot, slots[token]);
    max_slot = std::max(max_slot, slots[token]);
  }
  if (min_slot < -1 || max_slot >= num_slots) return Status::kSlotOutOfRange;
  if (max_slot >= 0 && !IsLayer(cache, batch.layers[entry])) return Status::kLayerOutOfRange;
  return Status::kOk;
}

Status CheckContext(const PagedInt8Cache& cache, const RaggedBatch& batch, int32_t entry) {
  const int64_t kv_len = batch.kv_lens[entry];
  if (kv_len == 0) return Status::kOk;
  if (!IsLayer(cache, batch.layers[entry])) return Status::kLayerOutOfRange;
  const int64_t num_blocks = (kv_len + cache.block_size - 1) / cache.block_size;
  const bool is_in_table = kv_len > 0 && num_blocks <= batch.max_num_blocks;
  if (!is_in_table || batch.start_pos[entry] < 0) return Status::kLengthOutOfRange;
  const int32_t* table = batch.BlockTable(entry);
  const auto [least, most] = std::minmax_element(table, table + num_blocks);
  if (*least < 0 || *most >= cache.num_blocks) return Status::kBlockOutOfRange;
  return Status::kOk;
}

template <typename CheckEntry>
Status CheckBatch(const PagedInt8Cache& cache, const RaggedBatch& batch, CheckEntry check_entry) {
  Status status = CheckTokenStarts(batch);
  for (int32_t entry = 0; entry < batch.num_entries && status == Status::kOk; ++entry) {
    status = check_entry(cache, batch, entry);
  }
  return status;
}

}  // namespace

Status CheckAppendBatch(const PagedInt8Cache& cache, const RaggedBatch& batch) {
  return CheckBatch(cache, batch, CheckSlots);
}

Status CheckDecodeBatch(const PagedInt8Cache& cache, const RaggedBatch& batch) {
  return CheckBatch(cache, batch, CheckContext);
}

const char* StatusMessage(Status status) {
  switch (status) {
    case Status::kOk:
      return "no error";
    case Status::kBadTokenStarts:
      return "token_starts must begin with 0 and never decrease";
    case Status::kLayerOutOfRange:
      return "a layer is not one of the cache's";
    case Status::kLengthOutOfRange:
      return "kv_lens must fit their block tables, and start_pos must not be negative";
    case Status::kBlockOutOfRange:
      return "a block id within kv_lens is not one of the cache's";
    case Status::kSlotOutOfRange:
      return "a slot is neither -1 nor one of the cache's";
    case Status::kOutOfMemory:
      return "out of memory for partial results";
  }
  return "unknown error";
}

}  // namespace octavo
