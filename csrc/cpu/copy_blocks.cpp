// Copies whole blocks within every layer: copy before write.

#include <cstring>

#include "layout.h"
#include "octavo/cpu_ops.h"
#include "runtime.h"

namespace octavo::cpu {
namespace {

// A block's kv heads lie one after the other, so the tile of head 0 is where the block begins,
// and K and V of all of them are one run.
void CopyBlock(const PagedInt8Cache& cache, const PagedInt8Layer& layer, int64_t source,
               int64_t target) {
  const KvTile from = TileOf(cache, layer, source, 0);
  const KvTile to = TileOf(cache, layer, target, 0);
  const size_t num_scales = static_cast<size_t>(cache.num_kv_heads) * cache.block_size;
  std::memmove(to.k_codes, from.k_codes, 2 * num_scales * cache.head_dim);
  std::memmove(to.k_scales, from.k_scales, num_scales * sizeof(uint16_t));
  std::memmove(to.v_scales, from.v_scales, num_scales * sizeof(uint16_t));
}

}  // namespace

Status CopyBlocks(const PagedInt8Cache& cache, const int64_t (*copies)[2], int64_t num_copies,
                  Runtime& runtime) {
  for (int64_t i = 0; i < num_copies; ++i) {
    for (const int64_t block : copies[i]) {
      if (block < 0 || block >= cache.num_blocks) return Status::kBlockOutOfRange;
    }
  }
  const int64_t num_codes = int64_t{2} * cache.num_layers * num_copies * cache.num_kv_heads *
                            cache.block_size * cache.head_dim;
  runtime.threads.ForEach(cache.num_layers, num_codes >= kMinSharedCodes, [&](int64_t layer) {
    for (int64_t i = 0; i < num_copies; ++i) {
      CopyBlock(cache, cache.layers[layer], copies[i][0], copies[i][1]);
    }
  });
  return Status::kOk;
}

}  // namespace octavo::cpu
