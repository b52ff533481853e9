// Launchers of the CPU kernels. They block until the work is done.

#ifndef OCTAVO_CPU_OPS_H_
#define OCTAVO_CPU_OPS_H_

#include <cstdint>

#include "octavo/paged_cache.h"
#include "octavo/status.h"

namespace octavo::cpu {

class Runtime;

struct AppendParams {
  PagedInt8Cache cache;
  RaggedBatch batch;
  DataType dtype;
  const void* k;      // [total_tokens, num_kv_heads, head_dim] dtype
  const void* v;      // [total_tokens, num_kv_heads, head_dim] dtype
  int64_t* offences;  // [num_entries] packed, or kNoOffence; written
};

struct DecodeParams {
  PagedInt8Cache cache;
  RaggedBatch batch;
  DataType dtype;
  const void* q;      // [total_tokens, num_q_heads, head_dim] dtype
  void* out;          // like q; written, zeros for skipped entries
  float* lse;         // [total_tokens, num_q_heads] or null; written, -inf for skipped entries
  int64_t* offences;  // [num_entries] packed, or kNoOffence; written
};

// Quantises k and v per (token, kv head) and scatters them to the batch's slots.
Status AppendPagedInt8(const AppendParams& params, Runtime& runtime);

// Attends over the cached tokens of every entry.
Status DecodePagedInt8(const DecodeParams& params, Runtime& runtime);

// Copies block copies[i][0] to block copies[i][1] in every layer, in the order of i.
Status CopyBlocks(const PagedInt8Cache& cache, const int64_t (*copies)[2], int64_t num_copies,
                  Runtime& runtime);

}  // namespace octavo::cpu

#endif  // OCTAVO_CPU_OPS_H_
