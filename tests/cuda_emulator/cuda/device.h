// The emulator's twin of csrc/cuda/device.h: the same names, every access checked and every
// collective a meeting of fibers. The last parameter of a primitive says where a kernel calls it,
// for the fault's text.

#ifndef OCTAVO_CUDA_EMULATOR_CUDA_DEVICE_H_
#define OCTAVO_CUDA_EMULATOR_CUDA_DEVICE_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../fragments.h"
#include "../memory.h"
#include "../numerics.h"
#include "../runtime.h"
#include "../shared_memory.h"

namespace octavo::cuda {

using emulator::Here;
using emulator::Site;

inline constexpr int kWarpThreads = 32;
inline constexpr unsigned kFullWarp = 0xffffffffu;

// ---- Launching ----------------------------------------------------------------------------------

template <typename Params>
cudaError_t Launch(void (*kernel)(Params), dim3 grid, dim3 block, const Params& params,
                   size_t shared_bytes, cudaStream_t stream) {
  struct Closure {
    void (*kernel)(Params);
    Params params;
  };
  const Closure closure = {kernel, params};
  const auto run_thread = [](const void* pointer) {
    const auto* call = static_cast<const Closure*>(pointer);
    call->kernel(call->params);
  };
  return emulator::LaunchGrid(reinterpret_cast<const void*>(kernel),
                              {grid, block, shared_bytes, run_thread, &closure}, stream);
}

template <typename Params>
cudaError_t AllowSharedBytes(void (*kernel)(Params), int shared_bytes) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
}

template <typename Params>
cudaError_t CountResidentBlocks(void (*kernel)(Params), int block_threads, int shared_bytes,
                                int* num_blocks) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      num_blocks, reinterpret_cast<const void*>(kernel), block_threads,
      static_cast<size_t>(shared_bytes));
}

// ---- Memory -------------------------------------------------------------------------------------

struct alignas(16) Bytes16 {
  uint32_t words[4];
};
struct alignas(8) Bytes8 {
  uint32_t words[2];
};

template <typename T>
constexpr void RequireAccessSize() {
  static_assert(std::is_trivially_copyable_v<T>);
  static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0,
                "an access is of 1, 2, 4, 8 or 16 bytes");
}

template <typename T>
T ReadAs(const char* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

inline char* DynamicShared() { return reinterpret_cast<char*>(emulator::kDevice.shared); }

template <typename T>
T LoadGlobal(const T* source, Site site = Here("LoadGlobal")) {
  RequireAccessSize<T>();
  return ReadAs<T>(emulator::CheckGlobalRead(site, source, sizeof(T), sizeof(T)));
}

template <typename T>
void StoreGlobal(T* target, T value, Site site = Here("StoreGlobal")) {
  RequireAccessSize<T>();
  std::memcpy(emulator::CheckGlobalWrite(site, target, sizeof(T)), &value, sizeof(T));
}

template <typename T>
T LoadGlobalFresh(const T* source, Site site = Here("LoadGlobalFresh")) {
  return LoadGlobal(source, site);
}

inline void CopyGlobal(Bytes16* target, const Bytes16* source, Site site = Here("CopyGlobal")) {
  emulator::CopyGlobalBytes(site, target, source, sizeof(Bytes16));
}

template <typename T>
T LoadShared(const T* source, Site site = Here("LoadShared")) {
  RequireAccessSize<T>();
  return ReadAs<T>(emulator::CheckSharedRead(site, source, sizeof(T)));
}

template <typename T>
void StoreShared(T* target, T value, Site site = Here("StoreShared")) {
  RequireAccessSize<T>();
  std::memcpy(emulator::CheckSharedWrite(site, target, sizeof(T)), &value, sizeof(T));
}

template <int kBytes>
void CopyAsync(void* shared, const void* global, int num_bytes, Site site = Here("CopyAsync")) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  emulator::StartCopy(site, shared, global, static_cast<size_t>(num_bytes), kBytes);
}

template <int kBytes>
void CopyAsync(void* shared, const void* global, Site site = Here("CopyAsync")) {
  CopyAsync<kBytes>(shared, global, kBytes, site);
}

inline void CommitCopies() { emulator::EndCopyGroup(); }

template <int kPending>
void WaitCopies() {
  emulator::LandCopies(kPending);
}

// A thread does all as it is written.
inline void KeepLoadsHere() {}

inline int32_t AtomicAdd(int32_t* counter, int32_t value, Site site = Here("AtomicAdd")) {
  const int32_t before = LoadGlobal(counter, site);
  StoreGlobal(counter, static_cast<int32_t>(static_cast<uint32_t>(before) + value), site);
  return before;
}

inline void AtomicMin(int64_t* target, int64_t value, Site site = Here("AtomicMin")) {
  const int64_t before = LoadGlobal(target, site);
  StoreGlobal(target, value < before ? value : before, site);
}

// Blocks run one after the other.
inline void FenceDevice() {}

// ---- Threads ------------------------------------------------------------------------------------

inline void SyncBlock(Site site = Here("SyncBlock")) { emulator::MeetBlock(site); }

inline void SyncWarp(Site site = Here("SyncWarp")) {
  emulator::MeetWarp(site, &site, [](void* const(&operands)[kWarpThreads]) {
    emulator::OrderWarp(*static_cast<Site*>(operands[0]), emulator::ThreadId() / kWarpThreads);
  });
}

template <typename T>
T Shuffle(T value, int lane, Site site) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4);
  if (lane < 0 || lane >= kWarpThreads) emulator::FailThread(site, "there is no lane %d", lane);
  struct Operand {
    T value, result;
    int lane;
  } operand = {value, value, lane};
  emulator::MeetWarp(site, &operand, [](void* const(&operands)[kWarpThreads]) {
    for (void* pointer : operands) {
      auto* own = static_cast<Operand*>(pointer);
      own->result = static_cast<Operand*>(operands[own->lane])->value;
    }
  });
  return operand.result;
}

template <typename T>
T ShuffleXor(T value, int lane_mask, Site site = Here("ShuffleXor")) {
  return Shuffle(value, emulator::ThreadId() % kWarpThreads ^ lane_mask, site);
}

template <typename T>
T ShuffleFrom(T value, int lane, Site site = Here("ShuffleFrom")) {
  return Shuffle(value, lane, site);
}

inline bool AnyOfWarp(bool condition, Site site = Here("AnyOfWarp")) {
  emulator::MeetWarp(site, &condition, [](void* const(&operands)[kWarpThreads]) {
    bool is_any = false;
    for (void* pointer : operands) is_any |= *static_cast<bool*>(pointer);
    for (void* pointer : operands) *static_cast<bool*>(pointer) = is_any;
  });
  return condition;
}

// ---- Tiles --------------------------------------------------------------------------------------

// The lanes' operands, as what they are.
template <typename Operand>
struct Lanes {
  explicit Lanes(void* const (&operands)[kWarpThreads]) {
    for (int lane = 0; lane < kWarpThreads; ++lane)
      all[lane] = static_cast<Operand*>(operands[lane]);
  }
  Operand* all[kWarpThreads];
};

inline void MultiplyTile(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         Site site = Here("MultiplyTile")) {
  using Operand = emulator::MultiplyOperand;
  Operand operand = {a, b, d};
  emulator::MeetWarp(site, &operand, [](void* const(&operands)[kWarpThreads]) {
    emulator::MultiplyFragments(Lanes<Operand>(operands).all);
  });
}

inline uint32_t TransposeTile(uint32_t pair, Site site = Here("TransposeTile")) {
  emulator::MeetWarp(site, &pair, [](void* const(&operands)[kWarpThreads]) {
    emulator::TransposeFragments(Lanes<uint32_t>(operands).all);
  });
  return pair;
}

// ---- Bits and numbers ---------------------------------------------------------------------------

inline uint32_t PermuteBytes(uint32_t low, uint32_t high, uint32_t selector) {
  return emulator::PickBytes(low, high, selector);
}

inline uint32_t SubtractHalves(uint32_t x, uint32_t y) {
  const auto low = [](uint32_t pair) { return static_cast<uint16_t>(pair); };
  return emulator::PackPair(emulator::SubtractHalf(low(x), low(y)),
                            emulator::SubtractHalf(low(x >> 16), low(y >> 16)));
}

inline uint32_t PackHalves(float low, float high) {
  return emulator::PackPair(emulator::RoundToHalf(low), emulator::RoundToHalf(high));
}

inline uint16_t FloatToHalf(float x) { return emulator::RoundToHalf(x); }
inline float HalfToFloat(uint16_t half) { return emulator::WidenHalf(half); }

inline uint16_t FloatToBfloat16(float x) { return emulator::RoundToBfloat16(x); }
inline float Bfloat16ToFloat(uint16_t x) {
  return emulator::FromBits(static_cast<uint32_t>(x) << 16);
}

inline uint32_t FloatBits(float x) { return emulator::ToBits(x); }
inline float BitsFloat(uint32_t bits) { return emulator::FromBits(bits); }

inline float Divide(float x, float y) { return x / y; }
inline float Multiply(float x, float y) { return x * y; }

inline int32_t RoundToInt(float x) { return emulator::RoundToInt32(x); }

inline float Exp2(float x) { return std::exp2(x); }
inline float Log2(float x) { return std::log2(x); }
inline float Tanh(float x) { return std::tanh(x); }

}  // namespace octavo::cuda

#endif  // OCTAVO_CUDA_EMULATOR_CUDA_DEVICE_H_
