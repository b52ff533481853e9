// Where codes lie in the cpu's pools.
//
// Four codes lie together as byte dot products take them: four dims of a token in K, four tokens of
// a dim in V. Lanes are tokens in K and dims in V, so that no sum goes across lanes. V comes in
// columns of 16 dims, each read from end to end; the last one may have 8. K and V of a (block, kv
// head) follow each other, as they are read.
//
//   codes: [num_blocks, num_kv_heads, (K, V)]
//   K: [head_dim / 4, block_size, 4]
//   V: [head_dim / 16, block_size / 4, 16, 4]

#ifndef OCTAVO_CPU_LAYOUT_H_
#define OCTAVO_CPU_LAYOUT_H_

#include "octavo/paged_cache.h"

namespace octavo::cpu {

inline constexpr int kQuad = 4;          // codes that lie together
inline constexpr int kValueColumn = 16;  // dims of V that do

// Bytes of K, or of V, of one kv head of one block.
inline int64_t TileBytes(const PagedInt8Cache& cache) {
  return int64_t{cache.head_dim} * cache.block_size;
}

// All address arithmetic of the pools. The layer's v_codes lie one tile behind its k_codes.
inline KvTile TileOf(const PagedInt8Cache& cache, const PagedInt8Layer& layer, int64_t block_id,
                     int64_t kv_head) {
  const int64_t tile = block_id * cache.num_kv_heads + kv_head;
  const int64_t codes = 2 * tile * TileBytes(cache), slots = tile * cache.block_size;
  return {layer.k_codes + codes, layer.v_codes + codes, layer.k_scales + slots,
          layer.v_scales + slots};
}

}  // namespace octavo::cpu

#endif  // OCTAVO_CPU_LAYOUT_H_
