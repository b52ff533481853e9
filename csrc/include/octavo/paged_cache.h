// The paged INT8 cache and the ragged batch as the kernels see them: plain structs of raw pointers.
//
// Nothing here owns memory. Whoever fills a struct keeps its arrays alive for the length of a call.

#ifndef OCTAVO_PAGED_CACHE_H_
#define OCTAVO_PAGED_CACHE_H_

#include <cstdint>

#include "octavo/host_device.h"

namespace octavo {

inline constexpr int kMaxHeadDim = 256;
inline constexpr int kHeadDimStep = 8;    // head_dim is a multiple of it
inline constexpr int kMinBlockSize = 16;  // block_size is 16, 32, 64 or 128

// Element type of q, k, v and out.
enum class DataType : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

// Bytes of one element.
OCTAVO_HOST_DEVICE inline int64_t ElementBytes(DataType dtype) {
  return dtype == DataType::kFloat32 ? 4 : 2;
}

// One layer's pool. Blocks are head-major, so that what one kv head needs of a block is one run of
// bytes, a tile. How codes lie in it is the backend's own: cpu/layout.h; on CUDA both K and V run
// along head_dim.
struct PagedInt8Layer {
  int8_t* k_codes;     // [num_blocks, num_kv_heads, tile]
  int8_t* v_codes;     // [num_blocks, num_kv_heads, tile]
  uint16_t* k_scales;  // [num_blocks, num_kv_heads, block_size] float16 bits
  uint16_t* v_scales;  // [num_blocks, num_kv_heads, block_size] float16 bits
};

// One layer's attention options.
struct LayerOptions {
  float sm_scale;
  float soft_cap;      // 0 = none
  int32_t window;      // tokens, 0 = none
  const float* sinks;  // [num_q_heads] logits, or null
};

// One kv head of one block.
struct KvTile {
  int8_t* k_codes;     // [block_size, head_dim] on CUDA
  int8_t* v_codes;     // [block_size, head_dim] on CUDA
  uint16_t* k_scales;  // [block_size] float16 bits
  uint16_t* v_scales;  // [block_size] float16 bits
};

// All layers of one model.
struct PagedInt8Cache {
  int32_t num_layers;
  int32_t num_blocks;
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t block_size;
  bool is_deterministic;
  const PagedInt8Layer* layers;  // [num_layers]
  const LayerOptions* options;   // [num_layers]

  // Query heads that share one kv head.
  OCTAVO_HOST_DEVICE int32_t GroupSize() const { return num_q_heads / num_kv_heads; }

  // All address arithmetic of CUDA's pools.
  OCTAVO_HOST_DEVICE KvTile Tile(const PagedInt8Layer& layer, int64_t block_id,
                                 int64_t kv_head) const {
    const int64_t first_slot = (block_id * num_kv_heads + kv_head) * block_size;
    return {layer.k_codes + first_slot * head_dim, layer.v_codes + first_slot * head_dim,
            layer.k_scales + first_slot, layer.v_scales + first_slot};
  }
};

// One launch: entries of one model, each with its own layer and length. Entry e owns the rows
// token_starts[e] .. token_starts[e + 1] of q, k, v and out.
struct RaggedBatch {
  int32_t num_entries;
  int32_t max_num_blocks;       // columns of block_tables
  const int32_t* layers;        // [num_entries]
  const int32_t* start_pos;     // [num_entries] position of each entry's first token
  const int32_t* token_starts;  // [num_entries + 1]
  const int32_t* kv_lens;       // [num_entries] valid tokens, 0 skips the entry
  const bool* is_causal;        // [num_entries]
  const int32_t* block_tables;  // [num_entries, max_num_blocks] block ids
  const int64_t* slot_mapping;  // [total_tokens] block_id * block_size + offset, -1 = do not store

  OCTAVO_HOST_DEVICE int32_t NumTokens(int32_t entry) const {
    return token_starts[entry + 1] - token_starts[entry];
  }
  OCTAVO_HOST_DEVICE int32_t TotalTokens() const { return token_starts[num_entries]; }
  OCTAVO_HOST_DEVICE const int32_t* BlockTable(int32_t entry) const {
    return block_tables + static_cast<int64_t>(entry) * max_num_blocks;
  }
};

}  // namespace octavo

#endif  // OCTAVO_PAGED_CACHE_H_
