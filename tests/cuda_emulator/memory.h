// Global memory: the live allocations, and which of their bytes were ever written.

#ifndef OCTAVO_CUDA_EMULATOR_MEMORY_H_
#define OCTAVO_CUDA_EMULATOR_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "faults.h"

namespace octavo::emulator {

struct Range {
  uintptr_t begin;
  size_t num_bytes;
  ptrdiff_t to_host;
  uint8_t* written;  // [num_bytes]: 0xff where written
  bool is_allocated;

  bool Holds(uintptr_t address, size_t size) const {
    return address - begin < num_bytes && num_bytes - (address - begin) >= size;
  }
  char* HostSide(uintptr_t address) const { return reinterpret_cast<char*>(address + to_host); }
  uint8_t* Written(uintptr_t address) const { return written + (address - begin); }
};

// ---- For the host -------------------------------------------------------------------------------

// Returns a new address in the device's heap, null when that is full.
void* Allocate(size_t num_bytes);

// Returns whether there was such an allocation.
bool Free(void* address);

// Makes memory of the host an allocation of the device, unwritten. False when it overlaps another.
bool Register(void* address, size_t num_bytes);
bool Unregister(void* address);

// The allocation that holds all of these bytes, or null.
const Range* FindRange(const void* address, size_t num_bytes);

void SetWritten(const Range& range, const void* address, size_t num_bytes, bool is_written);

size_t CountAllocatedBytes();

// ---- For the thread that runs -------------------------------------------------------------------

// The allocation last used by the calls of a few source lines, by line; or null.
inline constexpr int kNumRecent = 64;
extern const Range* g_recent[kNumRecent];

// Finds the allocation that holds the bytes, and makes it recent, or fails the thread.
const Range* LocateGlobal(const Site& site, uintptr_t address, size_t num_bytes);
[[noreturn]] void FailAlignment(const Site& site, uintptr_t address, size_t num_bytes);
[[noreturn]] void FailUnwritten(const Site& site, const Range& range, uintptr_t address,
                                size_t num_bytes);

inline const Range& CheckedRange(const Site& site, uintptr_t address, size_t num_bytes,
                                 size_t alignment) {
  if (address % alignment != 0) FailAlignment(site, address, alignment);
  const Range* range = g_recent[site.line % kNumRecent];
  if (range != nullptr && range->Holds(address, num_bytes)) return *range;
  return *LocateGlobal(site, address, num_bytes);
}

// Moves up to 16 bytes, the most frequent size without a call.
inline void MoveBytes(void* target, const void* source, size_t num_bytes) {
  if (num_bytes == 16) {
    std::memcpy(target, source, 16);
  } else {
    std::memcpy(target, source, num_bytes);
  }
}

inline bool IsAllWritten(const uint8_t* written, size_t num_bytes) {
  constexpr uint64_t kAll = ~uint64_t{0};
  uint64_t words[2] = {kAll, kAll};
  MoveBytes(words, written, num_bytes);
  return (words[0] & words[1]) == kAll;
}

// Checks a read of up to 16 bytes; returns where they are.
inline const char* CheckGlobalRead(const Site& site, const void* source, size_t num_bytes,
                                   size_t alignment) {
  const auto address = reinterpret_cast<uintptr_t>(source);
  const Range& range = CheckedRange(site, address, num_bytes, alignment);
  const bool is_written = IsAllWritten(range.Written(address), num_bytes);
  if (!is_written) FailUnwritten(site, range, address, num_bytes);
  return range.HostSide(address);
}

// Checks a write and notes it; returns where it goes.
inline char* CheckGlobalWrite(const Site& site, void* target, size_t num_bytes) {
  const auto address = reinterpret_cast<uintptr_t>(target);
  const Range& range = CheckedRange(site, address, num_bytes, num_bytes);
  std::memset(range.Written(address), 0xff, num_bytes);
  return range.HostSide(address);
}

// Copies bytes and whether they were ever written, which they need not be.
void CopyGlobalBytes(const Site& site, void* target, const void* source, size_t num_bytes);

}  // namespace octavo::emulator

#endif  // OCTAVO_CUDA_EMULATOR_MEMORY_H_
