// Which thread touched which byte of shared memory when, and so which accesses no barrier orders.
//
// A block's clock counts its barriers, those of a warp alone too. An access is stamped with its
// thread and the clock. It came before what another thread does now if the block's last barrier is
// later than it, or, within a warp, the warp's last (which every barrier of the block is too). That
// is all of happens-before here: threads of a block have no other means to wait for each other.

#ifndef OCTAVO_CUDA_EMULATOR_RACES_H_
#define OCTAVO_CUDA_EMULATOR_RACES_H_

#include <cstddef>
#include <cstdint>

#include "faults.h"

namespace octavo::emulator {

inline constexpr size_t kMaxSharedBytes = size_t{228} << 10;

// Starts a block: nothing of its shared memory is written.
void BeginRaces();

// A barrier of the block, or of one warp, has been passed.
void OrderBlock(const Site& site);
void OrderWarp(const Site& site, int warp_idx);

// Note an access by a thread to num_bytes (1, 2, 4, 8, 16) at an aligned offset, after checking it
// against those before. kFlying: written by an asynchronous copy that has not been waited for.
enum class Landing { kLanded, kFlying };
void NoteRead(const Site& site, int thread_id, size_t offset, size_t num_bytes);
void NoteWrite(const Site& site, int thread_id, size_t offset, size_t num_bytes, Landing landing);

// The copy that this thread has in flight there has landed.
void NoteLanding(int thread_id, size_t offset, size_t num_bytes);

}  // namespace octavo::emulator

#endif  // OCTAVO_CUDA_EMULATOR_RACES_H_
