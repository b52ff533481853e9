// Memory for the pools.

#ifndef OCTAVO_CPU_POOL_MEMORY_H_
#define OCTAVO_CPU_POOL_MEMORY_H_

#include <cstddef>

namespace octavo::cpu {

// Maps zeroed memory, really there, in huge pages where the system has them: a block of one kv head
// is 4 KiB at head_dim 128, and with small pages each would need a translation of its own.
// num_threads, 1 or more, share the zeroing. Returns null when there is no address space for it.
void* MapPool(size_t num_bytes, int num_threads);

void UnmapPool(void* pool, size_t num_bytes);

}  // namespace octavo::cpu

#endif  // OCTAVO_CPU_POOL_MEMORY_H_
