// The shared memory of the block that runs, and the asynchronous copies into it.

#ifndef OCTAVO_CUDA_EMULATOR_SHARED_MEMORY_H_
#define OCTAVO_CUDA_EMULATOR_SHARED_MEMORY_H_

#include <cstddef>
#include <cstdint>

#include "address_space.h"
#include "faults.h"
#include "races.h"
#include "scheduler.h"

namespace octavo::emulator {

extern size_t g_shared_bytes;

// Starts a block, whose shared memory holds what the last one left there.
void BeginShared(size_t num_bytes);

[[noreturn]] void FailShared(const Site& site, ptrdiff_t offset, size_t num_bytes);

// The offset that a pointer into shared memory has, its bounds and alignment checked.
inline size_t SharedOffset(const Site& site, const void* pointer, size_t num_bytes) {
  const size_t offset = reinterpret_cast<uintptr_t>(pointer) - kDevice.shared;
  const bool is_inside = offset < g_shared_bytes && g_shared_bytes - offset >= num_bytes;
  if (!is_inside || offset % num_bytes != 0) {
    FailShared(site, static_cast<ptrdiff_t>(offset), num_bytes);
  }
  return offset;
}

inline char* SharedHostSide(size_t offset) {
  return reinterpret_cast<char*>(kDevice.shared + kDevice.to_host + offset);
}

// Check an access and note it; return where it goes.
inline const char* CheckSharedRead(const Site& site, const void* source, size_t num_bytes) {
  const size_t offset = SharedOffset(site, source, num_bytes);
  NoteRead(site, ThreadId(), offset, num_bytes);
  return SharedHostSide(offset);
}

inline char* CheckSharedWrite(const Site& site, void* target, size_t num_bytes) {
  const size_t offset = SharedOffset(site, target, num_bytes);
  NoteWrite(site, ThreadId(), offset, num_bytes, Landing::kLanded);
  return SharedHostSide(offset);
}

// Starts a copy of this thread: num_bytes from global memory, as they are now, and zeros up to
// copy_bytes. It lands with LandCopies only.
void StartCopy(const Site& site, void* target, const void* source, size_t num_bytes,
               size_t copy_bytes);

// Ends a group of this thread's copies.
void EndCopyGroup();

// Lands this thread's copies, all groups that have ended but the latest num_pending.
void LandCopies(int num_pending);

}  // namespace octavo::emulator

#endif  // OCTAVO_CUDA_EMULATOR_SHARED_MEMORY_H_
