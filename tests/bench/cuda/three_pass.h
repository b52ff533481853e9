// Launcher of the plain decode kernel that Octavo's is measured against.

#ifndef OCTAVO_TESTS_BENCH_THREE_PASS_H_
#define OCTAVO_TESTS_BENCH_THREE_PASS_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "octavo/paged_cache.h"

namespace octavo::cuda {

inline constexpr int32_t kMaxThreePassTokens = 4096;

// One query token an entry, in a cache of one layer without options but sm_scale.
struct ThreePassParams {
  PagedInt8Cache cache;
  RaggedBatch batch;
  int32_t max_kv_len;  // of the batch, at most kMaxThreePassTokens
  const uint16_t* q;   // [num_entries, num_q_heads, head_dim] FP16
  uint16_t* out;       // like q; written
};

cudaError_t DecodeInThreePasses(const ThreePassParams& params, cudaStream_t stream);

}  // namespace octavo::cuda

#endif  // OCTAVO_TESTS_BENCH_THREE_PASS_H_
