// Each primitive that touches memory, used as it should be.

#include "harness.h"

namespace octavo::cuda {
namespace {

constexpr int kBlockThreads = 64;

__device__ int Thread() { return static_cast<int>(threadIdx.x); }

template <int kBytes>
__device__ void CopyOne(const TestParams& params) {
  char* shared = DynamicShared() + 16 * Thread();
  CopyAsync<kBytes>(shared, params.input + 16 * Thread(), Thread() % (kBytes + 1));
  CommitCopies();
  WaitCopies<0>();
  for (int idx = 0; idx < kBytes; ++idx) {
    StoreGlobal(params.output + kBytes * Thread() + idx, LoadShared(shared + idx));
  }
}

// Each thread copies thread % (size + 1) bytes; option: the size. Input [64, 16], output [64,
// size].
__global__ void copy_kernel(const TestParams params) {
  if (params.option == 4) CopyOne<4>(params);
  if (params.option == 8) CopyOne<8>(params);
  if (params.option == 16) CopyOne<16>(params);
}

// Two stages of copies in flight. Input [8, 64] int32, output [64] int32: the column's sum.
__global__ void pipeline_kernel(const TestParams params) {
  constexpr int kNumStages = 2, kNumRows = 8;
  int32_t* stages = SharedAs<int32_t>();
  const int32_t* input = InputAs<int32_t>(params) + Thread();
  int32_t sum = 0;
  CopyAsync<4>(stages + Thread(), input, 4);
  CommitCopies();
  for (int row = 0; row < kNumRows; ++row) {
    const int next = row + 1;
    if (next < kNumRows) {
      CopyAsync<4>(stages + next % kNumStages * kBlockThreads + Thread(),
                   input + next * kBlockThreads, 4);
    }
    CommitCopies();
    WaitCopies<1>();
    SyncBlock();
    sum += LoadShared(stages + row % kNumStages * kBlockThreads + Thread());
    SyncBlock();
  }
  StoreGlobal(OutputAs<int32_t>(params) + Thread(), sum);
}

// The first block leaves its copies in flight; the second, which waits for none, gives what it
// wrote. Input and output [64] int32.
__global__ void leftover_kernel(const TestParams params) {
  int32_t* shared = SharedAs<int32_t>() + Thread();
  if (blockIdx.x == 0) {
    CopyAsync<4>(shared, InputAs<int32_t>(params) + Thread(), 4);
    CommitCopies();
    return;
  }
  StoreShared(shared, 7);
  CommitCopies();
  WaitCopies<0>();
  StoreGlobal(OutputAs<int32_t>(params) + Thread(), LoadShared(shared));
}

template <typename T>
__device__ void ReverseAs(const TestParams& params, int num_items) {
  if (Thread() >= num_items) return;
  const T item = LoadGlobal(InputAs<T>(params) + Thread());
  StoreGlobal(OutputAs<T>(params) + (num_items - 1 - Thread()), item);
}

// Reverses 64 bytes as items of `option` bytes.
__global__ void reverse_kernel(const TestParams params) {
  if (params.option == 1) ReverseAs<int8_t>(params, 64);
  if (params.option == 2) ReverseAs<uint16_t>(params, 32);
  if (params.option == 4) ReverseAs<float>(params, 16);
  if (params.option == 8) ReverseAs<Bytes8>(params, 8);
  if (params.option == 16) ReverseAs<Bytes16>(params, 4);
}

// Neighbours write the bytes of one word, and all read the word after a barrier.
// Input [64] int8, output [64] int32.
__global__ void bytes_kernel(const TestParams params) {
  StoreShared(DynamicShared() + Thread(), LoadGlobal(params.input + Thread()));
  SyncBlock();
  StoreGlobal(OutputAs<int32_t>(params) + Thread(), LoadShared(SharedAs<int32_t>() + Thread() / 4));
}

struct Counters {
  int64_t least;
  int32_t count;
  int32_t pad;
};

__device__ void InitialiseCounters(Counters* counters, int64_t least) {
  StoreGlobal(&counters->least, least);
  StoreGlobal(&counters->count, 0);
  StoreGlobal(&counters->pad, 0);
}

// One block. Output: Counters, then [64] int32: what each thread's AtomicAdd returned.
// Input [64] int64, of which the least is found.
__global__ void atomics_kernel(const TestParams params) {
  auto* counters = OutputAs<Counters>(params);
  if (Thread() == 0) InitialiseCounters(counters, INT64_MAX);
  SyncBlock();
  AtomicMin(&counters->least, LoadGlobal(InputAs<int64_t>(params) + Thread()));
  const int32_t before = AtomicAdd(&counters->count, 2);
  StoreGlobal(reinterpret_cast<int32_t*>(counters + 1) + Thread(), before);
}

// The order in which blocks run. Input [1] int32 0, output [num_blocks + 1] int32: each block's
// turn.
__global__ void turns_kernel(const TestParams params) {
  if (Thread() != 0) return;
  auto* counter = const_cast<int32_t*>(InputAs<int32_t>(params));
  StoreGlobal(OutputAs<int32_t>(params) + blockIdx.x, AtomicAdd(counter, 1));
  FenceDevice();
}

const NamedKernel kKernels[] = {
    {"copy", copy_kernel, kBlockThreads, 16 * kBlockThreads},
    {"pipeline", pipeline_kernel, kBlockThreads, 2 * 4 * kBlockThreads},
    {"leftover", leftover_kernel, kBlockThreads, 4 * kBlockThreads},
    {"reverse", reverse_kernel, kBlockThreads, 0},
    {"bytes", bytes_kernel, kBlockThreads, kBlockThreads},
    {"atomics", atomics_kernel, kBlockThreads, 0},
    {"turns", turns_kernel, kWarpThreads, 0},
};

}  // namespace
}  // namespace octavo::cuda

OCTAVO_TEST_EXPORT int run_memory(const char* name, const octavo::cuda::TestJob* job) {
  return octavo::cuda::RunNamed(octavo::cuda::kKernels, name, *job);
}
