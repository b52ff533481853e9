// Device primitives: every instruction that C++ has no word for, and every access to device memory.
//
// Kernels are written in terms of these alone, so that they read as prose and so that a test can
// run their source on a CPU: tests/cuda_emulator/cuda/device.h declares the same names, checks each
// access, and is found before this header there.
//
// Rules that kernels keep:
// - Global and shared memory are touched by the functions below only, never through a bare pointer.
//   Accesses are of 1, 2, 4, 8 or 16 bytes, aligned to their size.
// - A warp's collectives (shuffles, votes, SyncWarp, MultiplyTile, TransposeTile) are called by all
// its
//   32 threads together; SyncBlock by all threads of the block.
// - Shared memory is dynamic only: DynamicShared() is its start, aligned to 16 bytes.

#ifndef OCTAVO_CUDA_DEVICE_H_
#define OCTAVO_CUDA_DEVICE_H_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace octavo::cuda {

inline constexpr int kWarpThreads = 32;
inline constexpr unsigned kFullWarp = 0xffffffffu;

// ---- Launching ----------------------------------------------------------------------------------

// Launches a kernel that takes one params struct by value. Returns what the launch said; a fault of
// the kernel itself is said by a later call.
template <typename Params>
cudaError_t Launch(void (*kernel)(Params), dim3 grid, dim3 block, const Params& params,
                   size_t shared_bytes, cudaStream_t stream) {
  void* args[] = {const_cast<Params*>(&params)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, args, shared_bytes,
                          stream);
}

// Lets a kernel use more than 48 KiB of dynamic shared memory.
template <typename Params>
cudaError_t AllowSharedBytes(void (*kernel)(Params), int shared_bytes) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
}

// Sets how many blocks of a kernel one multiprocessor holds at once.
template <typename Params>
cudaError_t CountResidentBlocks(void (*kernel)(Params), int block_threads, int shared_bytes,
                                int* num_blocks) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      num_blocks, reinterpret_cast<const void*>(kernel), block_threads, shared_bytes);
}

// ---- Memory -------------------------------------------------------------------------------------

// 16, 8 bytes moved at once.
struct alignas(16) Bytes16 {
  uint32_t words[4];
};
struct alignas(8) Bytes8 {
  uint32_t words[2];
};

__device__ __forceinline__ char* DynamicShared() {
  extern __shared__ Bytes16 octavo_dynamic_shared[];
  return reinterpret_cast<char*>(octavo_dynamic_shared);
}

template <typename T>
__device__ __forceinline__ T LoadGlobal(const T* source) {
  return *source;
}

template <typename T>
__device__ __forceinline__ void StoreGlobal(T* target, T value) {
  *target = value;
}

// Loads what another block of this launch has stored, past the caches that are not shared.
__device__ __forceinline__ float LoadGlobalFresh(const float* source) { return __ldcg(source); }

__device__ __forceinline__ Bytes8 LoadGlobalFresh(const Bytes8* source) {
  const uint2 words = __ldcg(reinterpret_cast<const uint2*>(source));
  return {{words.x, words.y}};
}

// Copies global memory that may hold anything, also what nothing has written.
__device__ __forceinline__ void CopyGlobal(Bytes16* target, const Bytes16* source) {
  *target = *source;
}

template <typename T>
__device__ __forceinline__ T LoadShared(const T* source) {
  return *source;
}

template <typename T>
__device__ __forceinline__ void StoreShared(T* target, T value) {
  *target = value;
}

// Starts to copy kBytes (4, 8 or 16) of global memory to shared memory: num_bytes of them (0 to
// kBytes), zeros for the rest. Nothing is read from the source when num_bytes is 0. Both are
// aligned to kBytes. The copy is this thread's, and lands no later than its WaitCopies.
template <int kBytes>
__device__ __forceinline__ void CopyAsync(void* shared, const void* global, int num_bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {  // read once: not worth a place in L1
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(target), "l"(global),
                 "r"(num_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(target), "l"(global),
                 "n"(kBytes), "r"(num_bytes)
                 : "memory");
  }
}

// The same of kBytes that are all there.
template <int kBytes>
__device__ __forceinline__ void CopyAsync(void* shared, const void* global) {
  static_assert(kBytes == 16, "whole copies are of 16 bytes");
  const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(target), "l"(global) : "memory");
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most kPending of this thread's latest groups are still under way. Other threads
// see what has landed after the next SyncWarp or SyncBlock.
template <int kPending>
__device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses across: loads that come early would take registers.
__device__ __forceinline__ void KeepLoadsHere() { asm volatile("" ::: "memory"); }

// Adds to a counter in global memory; returns what it held before.
__device__ __forceinline__ int32_t AtomicAdd(int32_t* counter, int32_t value) {
  return atomicAdd(counter, value);
}

// Lowers a value in global memory.
__device__ __forceinline__ void AtomicMin(int64_t* target, int64_t value) {
  atomicMin(reinterpret_cast<long long*>(target), static_cast<long long>(value));
}

// Makes this thread's stores visible to the whole device before anything that it stores later.
__device__ __forceinline__ void FenceDevice() { __threadfence(); }

// ---- Threads ------------------------------------------------------------------------------------

__device__ __forceinline__ void SyncBlock() { __syncthreads(); }

__device__ __forceinline__ void SyncWarp() { __syncwarp(); }

// Returns the value of the lane whose number differs by lane_mask.
template <typename T>
__device__ __forceinline__ T ShuffleXor(T value, int lane_mask) {
  return __shfl_xor_sync(kFullWarp, value, lane_mask);
}

// Returns the value of a lane.
template <typename T>
__device__ __forceinline__ T ShuffleFrom(T value, int lane) {
  return __shfl_sync(kFullWarp, value, lane);
}

// Whether any thread of the warp says so.
__device__ __forceinline__ bool AnyOfWarp(bool condition) {
  return __any_sync(kFullWarp, condition);
}

// ---- Tiles --------------------------------------------------------------------------------------

// d += a * b over 16 x 8 x 16, FP16 in, FP32 out:
// mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32. Lane l is in group g = l / 4 with t = l % 4.
// Its registers hold, low half first:
//   a[0] = A[g][2t, 2t+1]     a[1] = A[g+8][2t, 2t+1]
//   a[2] = A[g][2t+8, 2t+9]   a[3] = A[g+8][2t+8, 2t+9]
//   b[0] = B[2t, 2t+1][g]     b[1] = B[2t+8, 2t+9][g]
//   d[0, 1] = D[g][2t, 2t+1]  d[2, 3] = D[g+8][2t, 2t+1]
// (PTX ISA, section "Matrix Fragments for mma.m16n8k16 with floating point type".)
__device__ __forceinline__ void MultiplyTile(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Transposes an 8 x 8 matrix of 16-bit elements held by a warp: lane l brings row l / 4, columns
// 2 (l % 4) and + 1, and takes the same place of the transposed matrix.
// movmatrix.sync.aligned.m8n8.trans.b16.
__device__ __forceinline__ uint32_t TransposeTile(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// ---- Bits and numbers ---------------------------------------------------------------------------

// Picks four of the eight bytes of {high, low}: nibble i of selector numbers byte i of the result,
// 0 to 3 low's, 4 to 7 high's. prmt.b32 in its default mode, nibbles below 8.
__device__ __forceinline__ uint32_t PermuteBytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// FP16 pairs in one register, low half first.
__device__ __forceinline__ uint32_t SubtractHalves(uint32_t x, uint32_t y) {
  uint32_t difference;
  asm("sub.f16x2 %0, %1, %2;\n" : "=r"(difference) : "r"(x), "r"(y));
  return difference;
}

// Rounds to nearest even; what is too large becomes infinite.
__device__ __forceinline__ uint32_t PackHalves(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ uint16_t FloatToHalf(float x) {
  return __half_as_ushort(__float2half_rn(x));
}

__device__ __forceinline__ float HalfToFloat(uint16_t half) {
  return __half2float(__ushort_as_half(half));
}

__device__ __forceinline__ uint16_t FloatToBfloat16(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

__device__ __forceinline__ float Bfloat16ToFloat(uint16_t x) {
  return __uint_as_float(static_cast<uint32_t>(x) << 16);
}

__device__ __forceinline__ uint32_t FloatBits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float BitsFloat(uint32_t bits) { return __uint_as_float(bits); }

// IEEE division and multiplication, never contracted or approximated.
__device__ __forceinline__ float Divide(float x, float y) { return __fdiv_rn(x, y); }
__device__ __forceinline__ float Multiply(float x, float y) { return __fmul_rn(x, y); }

// Rounds to the nearest integer, ties to even.
__device__ __forceinline__ int32_t RoundToInt(float x) { return __float2int_rn(x); }

// 2^x and log2(x) to a few units in the last place, in one instruction: 2^-inf = 0, log2(0) = -inf,
// and results below 2^-126 are 0.
__device__ __forceinline__ float Exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(power) : "f"(x));
  return power;
}
__device__ __forceinline__ float Log2(float x) {
  float logarithm;
  asm("lg2.approx.ftz.f32 %0, %1;\n" : "=f"(logarithm) : "f"(x));
  return logarithm;
}
__device__ __forceinline__ float Tanh(float x) { return tanhf(x); }

}  // namespace octavo::cuda

#endif  // OCTAVO_CUDA_DEVICE_H_
