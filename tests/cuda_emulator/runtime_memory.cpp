// The host's allocations and copies.

#include <cstdlib>
#include <cstring>
#include <set>

#include "address_space.h"
#include "memory.h"
#include "runtime.h"

namespace octavo::emulator {
namespace {

constexpr uint8_t kPoison = 0xa5;  // what memory holds before anything was written

std::set<void*>& PinnedMemory() {
  static std::set<void*> pinned;
  return pinned;
}

// One end of a copy. `range` is null for the host's memory, `bytes` for an end that is not valid.
struct End {
  char* bytes;
  const Range* range;
  uintptr_t address;
};

End ResolveEnd(const void* pointer, size_t num_bytes, bool is_device) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (!is_device) {
    return {IsDeviceAddress(pointer) ? nullptr : reinterpret_cast<char*>(address), nullptr,
            address};
  }
  const Range* range = FindRange(pointer, num_bytes);
  return {range == nullptr ? nullptr : range->HostSide(address), range, address};
}

bool IsOnDevice(const void* pointer, cudaMemcpyKind kind, cudaMemcpyKind one_way) {
  if (kind == cudaMemcpyDefault)
    return IsDeviceAddress(pointer) || FindRange(pointer, 1) != nullptr;
  return kind == one_way || kind == cudaMemcpyDeviceToDevice;
}

void PoisonUnwritten(const End& target, const End& source, size_t num_bytes) {
  const uint8_t* written = source.range->Written(source.address);
  for (size_t idx = 0; idx < num_bytes; ++idx) {
    if (written[idx] == 0) target.bytes[idx] = static_cast<char>(kPoison);
  }
}

// What the target is said to hold from now on.
void CarryWritten(const End& target, const End& source, size_t num_bytes) {
  if (target.range == nullptr) {
    if (source.range != nullptr) PoisonUnwritten(target, source, num_bytes);
  } else if (source.range == nullptr) {
    SetWritten(*target.range, reinterpret_cast<void*>(target.address), num_bytes, true);
  } else {
    std::memmove(target.range->Written(target.address), source.range->Written(source.address),
                 num_bytes);
  }
}

cudaError_t Copy(void* target, const void* source, size_t num_bytes, cudaMemcpyKind kind) {
  if (num_bytes == 0) return cudaSuccess;
  const End to = ResolveEnd(target, num_bytes, IsOnDevice(target, kind, cudaMemcpyHostToDevice));
  const End from = ResolveEnd(source, num_bytes, IsOnDevice(source, kind, cudaMemcpyDeviceToHost));
  if (to.bytes == nullptr || from.bytes == nullptr) return cudaErrorInvalidValue;
  std::memmove(to.bytes, from.bytes, num_bytes);
  CarryWritten(to, from, num_bytes);
  return cudaSuccess;
}

cudaError_t Fill(void* target, int value, size_t num_bytes) {
  if (num_bytes == 0) return cudaSuccess;
  const End to = ResolveEnd(target, num_bytes, true);
  if (to.bytes == nullptr) return cudaErrorInvalidValue;
  std::memset(to.bytes, value, num_bytes);
  SetWritten(*to.range, target, num_bytes, true);
  return cudaSuccess;
}

cudaError_t AllocateOnDevice(void** address, size_t num_bytes) {
  *address = nullptr;
  if (num_bytes == 0) return cudaSuccess;
  if (CountAllocatedBytes() + num_bytes > g_device.memory_bytes) return cudaErrorMemoryAllocation;
  *address = Allocate(num_bytes);
  return *address == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t AllocatePinned(void** address, size_t num_bytes) {
  *address = std::malloc(num_bytes);
  if (*address == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*address, kPoison, num_bytes);
  PinnedMemory().insert(*address);
  return cudaSuccess;
}

cudaError_t FreePinned(void* address) {
  if (PinnedMemory().erase(address) == 0) return cudaErrorInvalidValue;
  std::free(address);
  return cudaSuccess;
}

template <typename Work>
cudaError_t DoOnStream(cudaStream_t stream, const Work& work) {
  return DoCall([&] { return IsStream(stream) ? work() : cudaErrorInvalidResourceHandle; });
}

}  // namespace
}  // namespace octavo::emulator

using namespace octavo::emulator;  // NOLINT: the definitions of a C API

cudaError_t cudaMalloc(void** address, size_t num_bytes) {
  return DoCall([&] { return AllocateOnDevice(address, num_bytes); });
}

cudaError_t cudaFree(void* address) {
  return DoCall(
      [&] { return address == nullptr || Free(address) ? cudaSuccess : cudaErrorInvalidValue; });
}

cudaError_t cudaHostAlloc(void** address, size_t num_bytes, unsigned) {
  return DoCall([&] { return AllocatePinned(address, num_bytes); });
}

cudaError_t cudaMallocHost(void** address, size_t num_bytes) {
  return cudaHostAlloc(address, num_bytes, cudaHostAllocDefault);
}

cudaError_t cudaFreeHost(void* address) {
  return DoCall([&] { return address == nullptr ? cudaSuccess : FreePinned(address); });
}

cudaError_t cudaMemcpy(void* target, const void* source, size_t num_bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(target, source, num_bytes, kind);
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t num_bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return DoOnStream(stream, [&] { return Copy(target, source, num_bytes, kind); });
}

cudaError_t cudaMemsetAsync(void* target, int value, size_t num_bytes, cudaStream_t stream) {
  return DoOnStream(stream, [&] { return Fill(target, value, num_bytes); });
}
