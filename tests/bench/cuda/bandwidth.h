// Launchers of the kernels that measure what the memory can do.

#ifndef OCTAVO_TESTS_BENCH_BANDWIDTH_H_
#define OCTAVO_TESTS_BENCH_BANDWIDTH_H_

#include <cuda_runtime.h>

#include <cstdint>

namespace octavo::cuda {

// Args: num_vectors: of 16 bytes; sink: 4 bytes, written only if what was read says so.
cudaError_t ReadMemory(const void* source, int64_t num_vectors, uint32_t* sink, int32_t num_blocks,
                       cudaStream_t stream);

cudaError_t CopyMemory(void* target, const void* source, int64_t num_vectors, int32_t num_blocks,
                       cudaStream_t stream);

}  // namespace octavo::cuda

#endif  // OCTAVO_TESTS_BENCH_BANDWIDTH_H_
