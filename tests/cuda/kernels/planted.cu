// Kernels with one bug each when option is not 0, and right when it is 0.
//
// Grid: one block of 64 threads, shared memory [64] int32. Input and output [64] int32; a right
// kernel gives each thread the input of a thread that it names.

#include "harness.h"

namespace octavo::cuda {
namespace {

constexpr int kBlockThreads = 64;
constexpr int kSharedBytes = kBlockThreads * 4;

__device__ int Thread() { return static_cast<int>(threadIdx.x); }

__device__ int32_t LoadOwn(const TestParams& params) {
  return LoadGlobal(InputAs<int32_t>(params) + Thread());
}

__device__ void StoreOwn(const TestParams& params, int32_t value) {
  StoreGlobal(OutputAs<int32_t>(params) + Thread(), value);
}

__device__ void ShareOwn(const TestParams& params) {
  StoreShared(SharedAs<int32_t>() + Thread(), LoadOwn(params));
}

// Gives all of shared memory a value, so that to come too early is no read of what never had one.
__device__ void ClearShared() {
  StoreShared(SharedAs<int32_t>() + Thread(), 0);
  SyncBlock();
}

__device__ int32_t LoadSharedOf(int thread) { return LoadShared(SharedAs<int32_t>() + thread); }

__device__ void StartOwnCopy(const TestParams& params) {
  CopyAsync<4>(SharedAs<int32_t>() + Thread(), InputAs<int32_t>(params) + Thread(), 4);
}

// ---- Barriers: all threads read what the opposite one wrote -------------------------------------

__global__ void missing_sync_block_kernel(const TestParams params) {
  ClearShared();
  ShareOwn(params);
  if (params.option == 0) SyncBlock();
  StoreOwn(params, LoadSharedOf(63 - Thread()));
}

__global__ void sync_warp_for_sync_block_kernel(const TestParams params) {
  ClearShared();
  ShareOwn(params);
  if (params.option == 0) SyncBlock();
  SyncWarp();
  StoreOwn(params, LoadSharedOf(63 - Thread()));
}

__global__ void missing_sync_warp_kernel(const TestParams params) {
  ClearShared();
  ShareOwn(params);
  if (params.option == 0) SyncWarp();
  StoreOwn(params, LoadSharedOf(Thread() ^ 1));
}

__global__ void shuffle_for_sync_warp_kernel(const TestParams params) {
  ClearShared();
  ShareOwn(params);
  if (params.option == 0) SyncWarp();
  const int32_t neighbour = ShuffleXor(Thread(), 1);
  StoreOwn(params, LoadSharedOf(neighbour));
}

// Writes again what another thread may not have read yet.
__global__ void write_after_read_kernel(const TestParams params) {
  ShareOwn(params);
  SyncBlock();
  const int32_t opposite = LoadSharedOf(63 - Thread());
  if (params.option == 0) SyncBlock();
  StoreShared(SharedAs<int32_t>() + Thread(), 0);
  StoreOwn(params, opposite);
}

// The first warp reads, and its last thread writes: the last reader is the writer itself.
__global__ void write_after_warp_reads_kernel(const TestParams params) {
  ClearShared();
  if (Thread() < kWarpThreads) {
    StoreOwn(params, LoadSharedOf(0));
    if (params.option == 0) SyncWarp();
    if (Thread() == kWarpThreads - 1) StoreShared(SharedAs<int32_t>(), 1);
  }
  SyncBlock();
  if (Thread() >= kWarpThreads) StoreOwn(params, LoadSharedOf(0));
}

// The block's last thread reads, then the first warp, which is in step and writes: a reader of
// another warp is the one that is not.
__global__ void write_after_far_read_kernel(const TestParams params) {
  ClearShared();
  if (Thread() < kWarpThreads || Thread() == kBlockThreads - 1) LoadSharedOf(0);
  if (params.option == 0) SyncBlock();
  SyncWarp();
  if (Thread() == 0) StoreShared(SharedAs<int32_t>(), 1);
  StoreOwn(params, 2);
}

// Bytes of their own in one word, or one byte for two.
__global__ void write_after_write_kernel(const TestParams params) {
  const int byte = params.option == 0 ? Thread() : Thread() / 2;
  StoreShared(DynamicShared() + byte, static_cast<char>(LoadOwn(params)));
  SyncBlock();
  StoreOwn(params, LoadShared(DynamicShared() + Thread()));
}

// ---- Asynchronous copies ------------------------------------------------------------------------

__global__ void missing_wait_kernel(const TestParams params) {
  StartOwnCopy(params);
  CommitCopies();
  if (params.option == 0) WaitCopies<0>();
  StoreOwn(params, LoadSharedOf(Thread()));
}

__global__ void missing_commit_kernel(const TestParams params) {
  StartOwnCopy(params);
  if (params.option == 0) CommitCopies();
  WaitCopies<0>();
  StoreOwn(params, LoadSharedOf(Thread()));
}

__global__ void too_many_pending_kernel(const TestParams params) {
  StartOwnCopy(params);
  CommitCopies();
  if (params.option == 0) CommitCopies();  // an empty group, and one pending is none of ours
  WaitCopies<1>();
  StoreOwn(params, LoadSharedOf(Thread()));
}

__global__ void wait_without_barrier_kernel(const TestParams params) {
  ClearShared();
  StartOwnCopy(params);
  CommitCopies();
  WaitCopies<0>();
  if (params.option == 0) SyncWarp();
  StoreOwn(params, LoadSharedOf(Thread() ^ 1));
}

__global__ void barrier_before_wait_kernel(const TestParams params) {
  StartOwnCopy(params);
  CommitCopies();
  if (params.option != 0) SyncBlock();
  WaitCopies<0>();
  if (params.option == 0) SyncBlock();
  StoreOwn(params, LoadSharedOf(63 - Thread()));
}

// One thread copies, passes a barrier, and only then waits: to another its copy is not there yet.
__global__ void read_what_another_waited_for_kernel(const TestParams params) {
  if (Thread() == 0) StartOwnCopy(params);
  CommitCopies();
  SyncBlock();
  WaitCopies<0>();
  if (params.option == 0) SyncWarp();
  StoreOwn(params, Thread() == 1 ? LoadSharedOf(0) : 0);
}

__global__ void store_into_copy_kernel(const TestParams params) {
  StartOwnCopy(params);
  CommitCopies();
  if (params.option == 0) WaitCopies<0>();
  StoreShared(SharedAs<int32_t>() + Thread(), 7);
  WaitCopies<0>();
  StoreOwn(params, LoadSharedOf(Thread()));
}

// Starts to overwrite what the other warp still reads.
__global__ void copy_too_early_kernel(const TestParams params) {
  ShareOwn(params);
  SyncBlock();
  const int32_t opposite = LoadSharedOf(63 - Thread());
  if (params.option == 0) SyncBlock();
  StartOwnCopy(params);
  CommitCopies();
  WaitCopies<0>();
  StoreOwn(params, opposite);
}

// ---- Addresses ----------------------------------------------------------------------------------

__device__ int OffBy(const TestParams& params) { return Thread() + (params.option != 0 ? 1 : 0); }

__global__ void global_read_off_kernel(const TestParams params) {
  StoreOwn(params, LoadGlobal(InputAs<int32_t>(params) + OffBy(params)));
}

__global__ void global_write_off_kernel(const TestParams params) {
  StoreGlobal(OutputAs<int32_t>(params) + OffBy(params), LoadOwn(params));
}

__global__ void atomic_off_kernel(const TestParams params) {
  StoreOwn(params, LoadOwn(params));
  SyncBlock();
  AtomicAdd(OutputAs<int32_t>(params) + OffBy(params), 0);
}

__global__ void copy_source_off_kernel(const TestParams params) {
  CopyAsync<4>(SharedAs<int32_t>() + Thread(), InputAs<int32_t>(params) + OffBy(params), 4);
  CommitCopies();
  WaitCopies<0>();
  StoreOwn(params, LoadSharedOf(Thread()));
}

__global__ void shared_read_off_kernel(const TestParams params) {
  ShareOwn(params);
  SyncBlock();
  StoreOwn(params, LoadSharedOf(OffBy(params)));
}

__global__ void shared_write_off_kernel(const TestParams params) {
  StoreShared(SharedAs<int32_t>() + OffBy(params), LoadOwn(params));
  StoreOwn(params, LoadSharedOf(OffBy(params)));
}

// The block's shared memory ends amid the vector.
__global__ void shared_end_amid_vector_kernel(const TestParams params) {
  const int last = params.option != 0 ? 31 : 30;
  if (Thread() <= last) StoreShared(SharedAs<Bytes8>() + Thread(), Bytes8{{1, 2}});
  StoreOwn(params, 0);
}

__global__ void shared_before_start_kernel(const TestParams params) {
  ShareOwn(params);
  SyncBlock();
  StoreOwn(params, LoadSharedOf(Thread() - (params.option != 0 ? 1 : 0)));
}

__global__ void global_as_shared_kernel(const TestParams params) {
  ShareOwn(params);
  const int32_t* own = SharedAs<int32_t>() + Thread();
  StoreOwn(params, LoadShared(params.option != 0 ? InputAs<int32_t>(params) : own));
}

__global__ void misaligned_global_kernel(const TestParams params) {
  const char* vector = params.input + (params.option != 0 ? 4 : 16) * (Thread() / 16);
  StoreOwn(params,
           static_cast<int32_t>(LoadGlobal(reinterpret_cast<const Bytes16*>(vector)).words[0]));
}

__global__ void misaligned_shared_kernel(const TestParams params) {
  ShareOwn(params);
  SyncBlock();
  const char* vector = DynamicShared() + (params.option != 0 ? 4 : 8) * (Thread() / 2);
  StoreOwn(params,
           static_cast<int32_t>(LoadShared(reinterpret_cast<const Bytes8*>(vector)).words[0]));
}

__global__ void misaligned_copy_kernel(const TestParams params) {
  const int step = params.option != 0 ? 4 : 8;
  if (Thread() < 32) {
    CopyAsync<8>(DynamicShared() + 8 * Thread(), params.input + step * Thread(), 8);
  }
  CommitCopies();
  WaitCopies<0>();
  SyncBlock();
  StoreOwn(params, LoadSharedOf(Thread()));
}

__global__ void unwritten_global_kernel(const TestParams params) {
  if (params.option == 0) StoreOwn(params, 3);
  StoreOwn(params, LoadGlobal(OutputAs<int32_t>(params) + Thread()));
}

// To copy what nothing wrote is no fault, to load the copy is.
__global__ void unwritten_copy_kernel(const TestParams params) {
  if (params.option == 0) StoreOwn(params, 4);
  SyncBlock();
  auto* output = OutputAs<Bytes16>(params);
  if (Thread() == 0) CopyGlobal(output, output + 8);
  SyncBlock();
  StoreOwn(params, LoadGlobal(OutputAs<int32_t>(params)));
}

__global__ void unwritten_shared_kernel(const TestParams params) {
  if (params.option == 0 || Thread() != 5) ShareOwn(params);
  StoreOwn(params, LoadSharedOf(Thread()));
}

// Three of a word's four bytes are written.
__global__ void partly_written_shared_kernel(const TestParams params) {
  const int num_bytes = params.option != 0 ? 3 : 4;
  for (int idx = 0; idx < num_bytes; ++idx) {
    StoreShared(DynamicShared() + 4 * Thread() + idx, static_cast<char>(1));
  }
  StoreOwn(params, LoadSharedOf(Thread()));
}

__global__ void bare_global_kernel(const TestParams params) {
  const int32_t* own = InputAs<int32_t>(params) + Thread();
  StoreOwn(params, params.option != 0 ? *own : LoadGlobal(own));
}

__global__ void bare_shared_kernel(const TestParams params) {
  ShareOwn(params);
  const int32_t* own = SharedAs<int32_t>() + Thread();
  StoreOwn(params, params.option != 0 ? *own : LoadShared(own));
}

// ---- Divergence ---------------------------------------------------------------------------------

__global__ void half_at_sync_block_kernel(const TestParams params) {
  ShareOwn(params);
  if (params.option == 0 || Thread() < 32) SyncBlock();
  StoreOwn(params, LoadSharedOf(Thread()));
}

__global__ void early_return_kernel(const TestParams params) {
  StoreOwn(params, LoadOwn(params));
  if (params.option != 0 && Thread() == 63) return;
  SyncBlock();
}

__global__ void half_at_shuffle_kernel(const TestParams params) {
  int32_t value = LoadOwn(params);
  if (params.option == 0 || Thread() % 2 == 0) value = ShuffleXor(value, 2);
  StoreOwn(params, value);
}

__global__ void different_collectives_kernel(const TestParams params) {
  int32_t value = LoadOwn(params);
  if (params.option == 0 || Thread() % 2 == 0) {
    value = ShuffleXor(value, 2);
  } else {
    value += AnyOfWarp(value > 0) ? 1 : 0;
  }
  StoreOwn(params, value);
}

__global__ void block_and_warp_kernel(const TestParams params) {
  if (params.option == 0 || Thread() % 2 == 0) {
    SyncWarp();
  } else {
    SyncBlock();
  }
  StoreOwn(params, LoadOwn(params));
}

__global__ void no_such_lane_kernel(const TestParams params) {
  StoreOwn(params, ShuffleFrom(LoadOwn(params), params.option != 0 ? Thread() % 32 + 1 : 31));
}

#define OCTAVO_PLANTED(name) {#name, name##_kernel, kBlockThreads, kSharedBytes}

const NamedKernel kKernels[] = {
    OCTAVO_PLANTED(missing_sync_block),
    OCTAVO_PLANTED(sync_warp_for_sync_block),
    OCTAVO_PLANTED(missing_sync_warp),
    OCTAVO_PLANTED(shuffle_for_sync_warp),
    OCTAVO_PLANTED(write_after_read),
    OCTAVO_PLANTED(write_after_warp_reads),
    OCTAVO_PLANTED(write_after_far_read),
    OCTAVO_PLANTED(write_after_write),
    OCTAVO_PLANTED(missing_wait),
    OCTAVO_PLANTED(missing_commit),
    OCTAVO_PLANTED(too_many_pending),
    OCTAVO_PLANTED(wait_without_barrier),
    OCTAVO_PLANTED(barrier_before_wait),
    OCTAVO_PLANTED(read_what_another_waited_for),
    OCTAVO_PLANTED(store_into_copy),
    OCTAVO_PLANTED(copy_too_early),
    OCTAVO_PLANTED(global_read_off),
    OCTAVO_PLANTED(global_write_off),
    OCTAVO_PLANTED(atomic_off),
    OCTAVO_PLANTED(copy_source_off),
    OCTAVO_PLANTED(shared_read_off),
    OCTAVO_PLANTED(shared_write_off),
    {"shared_end_amid_vector", shared_end_amid_vector_kernel, kBlockThreads, kSharedBytes - 4},
    OCTAVO_PLANTED(shared_before_start),
    OCTAVO_PLANTED(global_as_shared),
    OCTAVO_PLANTED(misaligned_global),
    OCTAVO_PLANTED(misaligned_shared),
    OCTAVO_PLANTED(misaligned_copy),
    OCTAVO_PLANTED(unwritten_global),
    OCTAVO_PLANTED(unwritten_copy),
    OCTAVO_PLANTED(unwritten_shared),
    OCTAVO_PLANTED(partly_written_shared),
    OCTAVO_PLANTED(bare_global),
    OCTAVO_PLANTED(bare_shared),
    OCTAVO_PLANTED(half_at_sync_block),
    OCTAVO_PLANTED(early_return),
    OCTAVO_PLANTED(half_at_shuffle),
    OCTAVO_PLANTED(different_collectives),
    OCTAVO_PLANTED(block_and_warp),
    OCTAVO_PLANTED(no_such_lane),
};

}  // namespace
}  // namespace octavo::cuda

OCTAVO_TEST_EXPORT int run_planted(const char* name, const octavo::cuda::TestJob* job) {
  return octavo::cuda::RunNamed(octavo::cuda::kKernels, name, *job);
}
