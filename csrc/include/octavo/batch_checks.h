// Bounds checks of what the launchers index with: a bad batch must end in an error code.

#ifndef OCTAVO_BATCH_CHECKS_H_
#define OCTAVO_BATCH_CHECKS_H_

#include "octavo/paged_cache.h"
#include "octavo/status.h"

namespace octavo {

// Checks token_starts, and for rows with a slot their layer and slot.
Status CheckAppendBatch(const PagedInt8Cache& cache, const RaggedBatch& batch);

// Checks token_starts, and for entries with context their layer, lengths and blocks.
Status CheckDecodeBatch(const PagedInt8Cache& cache, const RaggedBatch& batch);

}  // namespace octavo

#endif  // OCTAVO_BATCH_CHECKS_H_
