// What the benchmark calls by ctypes: steps over a cache of one layer, and the device's limits.
//
// Every function that can fail returns an octavo::cuda::Result; octavo_bench_error() then says why.
// Streams are the caller's. Calls come from one thread at a time.

#ifndef OCTAVO_TESTS_BENCH_BENCH_H_
#define OCTAVO_TESTS_BENCH_BENCH_H_

#include <cuda_runtime.h>

#include <cstdint>

#define OCTAVO_BENCH_EXPORT extern "C" __attribute__((visibility("default")))

namespace octavo::cuda {

class ResidentStep;
class HostStep;

// One step in FP16: every entry has num_tokens tokens, the last ones of its length. Arrays are the
// host's, but for the pools.
struct BenchStep {
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t block_size;
  int32_t num_blocks;
  int32_t num_entries;
  int32_t num_tokens;
  int32_t max_num_blocks;
  int8_t* k_codes;  // the pools, as PagedInt8Layer has them
  int8_t* v_codes;
  uint16_t* k_scales;
  uint16_t* v_scales;
  const int32_t* kv_lens;       // [num_entries], num_tokens included
  const int32_t* block_tables;  // [num_entries, max_num_blocks]
  const uint16_t* q;            // [total_tokens, num_q_heads, head_dim] or null
  const uint16_t* k;            // [total_tokens, num_kv_heads, head_dim] or null, like v
  const uint16_t* v;
};

// How a step was planned.
struct BenchPlan {
  int32_t num_items;
  int32_t num_partials;
  int32_t longest_span;  // tokens of one item
  int32_t resident_blocks;
  int32_t num_multiprocessors;
};

// Which kernels a launch runs.
enum BenchKernel : int32_t { kOctavo = 0, kThreePass = 1 };

}  // namespace octavo::cuda

OCTAVO_BENCH_EXPORT const char* octavo_bench_error();

// Sets the bytes a second that the memory's clock and width allow.
OCTAVO_BENCH_EXPORT int32_t octavo_bench_nominal_rate(int32_t device_idx, double* bytes_per_s);

// Reads num_bytes (a multiple of 16) by num_blocks thread blocks; sink is 4 bytes, hardly written.
OCTAVO_BENCH_EXPORT int32_t octavo_bench_read(const void* source, int64_t num_bytes, uint32_t* sink,
                                              int32_t num_blocks, cudaStream_t stream);

// Copies num_bytes (a multiple of 16) by num_blocks thread blocks.
OCTAVO_BENCH_EXPORT int32_t octavo_bench_copy(void* target, const void* source, int64_t num_bytes,
                                              int32_t num_blocks, cudaStream_t stream);

// Plans a step, and puts all that it needs on the device.
OCTAVO_BENCH_EXPORT int32_t octavo_bench_make_resident(const octavo::cuda::BenchStep* step,
                                                       octavo::cuda::ResidentStep** resident,
                                                       octavo::cuda::BenchPlan* plan);
OCTAVO_BENCH_EXPORT void octavo_bench_free_resident(octavo::cuda::ResidentStep* resident);

// Queues the kernels of `count` steps, step first % num_steps first and then around.
OCTAVO_BENCH_EXPORT int32_t octavo_bench_launch(octavo::cuda::ResidentStep* const* steps,
                                                int32_t num_steps, int64_t first, int32_t count,
                                                int32_t kernel, cudaStream_t stream);

// Copies a step's answer to the host, [total_tokens, num_q_heads, head_dim], and leaves NaN where
// it was.
OCTAVO_BENCH_EXPORT int32_t octavo_bench_take_out(octavo::cuda::ResidentStep* resident,
                                                  uint16_t* out, cudaStream_t stream);

// Runs a step from its inputs in the pinned buffer to its outputs there; sets how long that took.
OCTAVO_BENCH_EXPORT int32_t octavo_bench_run_resident(octavo::cuda::ResidentStep* resident,
                                                      cudaStream_t stream, double* us);

// Binds a step to a device of its own, as a server has it.
OCTAVO_BENCH_EXPORT int32_t octavo_bench_make_host(const octavo::cuda::BenchStep* step,
                                                   int32_t device_idx,
                                                   octavo::cuda::HostStep** host);
OCTAVO_BENCH_EXPORT void octavo_bench_free_host(octavo::cuda::HostStep* host);

// Runs a step from host arrays to host arrays; sets how long that took.
OCTAVO_BENCH_EXPORT int32_t octavo_bench_run_host(octavo::cuda::HostStep* host, double* us);

#endif  // OCTAVO_TESTS_BENCH_BENCH_H_
