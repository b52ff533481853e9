#include "shared_memory.h"

#include <algorithm>
#include <vector>

#include "memory.h"

namespace octavo::emulator {
namespace {

struct Copy {
  size_t offset;
  size_t num_bytes;
  int group;
  char bytes[16];
};

struct CopyQueue {
  std::vector<Copy> flying;  // the oldest first
  int num_groups;            // that have ended
};

CopyQueue g_queues[kMaxBlockThreads];

CopyQueue& OwnQueue() { return g_queues[ThreadId()]; }

void Land(const Copy& copy) {
  MoveBytes(SharedHostSide(copy.offset), copy.bytes, copy.num_bytes);
  NoteLanding(ThreadId(), copy.offset, copy.num_bytes);
}

void CheckCopySize(const Site& site, size_t num_bytes, size_t copy_bytes) {
  if (num_bytes <= copy_bytes) return;
  FailThread(site, "out of bounds: %zu bytes to copy where at most %zu can be", num_bytes,
             copy_bytes);
}

}  // namespace

size_t g_shared_bytes = 0;

void BeginShared(size_t num_bytes) {
  g_shared_bytes = num_bytes;
  BeginRaces();
  for (CopyQueue& queue : g_queues) {
    queue.flying.clear();
    queue.num_groups = 0;
  }
}

void FailShared(const Site& site, ptrdiff_t offset, size_t num_bytes) {
  const bool is_near = offset >= -static_cast<ptrdiff_t>(kSharedWindowBytes) &&
                       offset < static_cast<ptrdiff_t>(kSharedWindowBytes);
  if (!is_near) FailThread(site, "out of bounds: a pointer that is none into shared memory");
  const auto end = static_cast<ptrdiff_t>(g_shared_bytes - num_bytes);
  const char* what = offset < 0 || offset > end ? "out of bounds" : "misaligned";
  FailThread(site, "%s: %zu bytes at offset %td of %zu shared bytes", what, num_bytes, offset,
             g_shared_bytes);
}

void StartCopy(const Site& site, void* target, const void* source, size_t num_bytes,
               size_t copy_bytes) {
  CheckCopySize(site, num_bytes, copy_bytes);
  const size_t offset = SharedOffset(site, target, copy_bytes);
  Copy copy = {offset, copy_bytes, OwnQueue().num_groups, {}};
  if (num_bytes > 0) {
    MoveBytes(copy.bytes, CheckGlobalRead(site, source, num_bytes, copy_bytes), num_bytes);
  }
  NoteWrite(site, ThreadId(), offset, copy_bytes, Landing::kFlying);
  OwnQueue().flying.push_back(copy);
}

void EndCopyGroup() { ++OwnQueue().num_groups; }

void LandCopies(int num_pending) {
  CopyQueue& queue = OwnQueue();
  const int end_group = queue.num_groups - num_pending;
  const auto end = std::find_if(queue.flying.begin(), queue.flying.end(),
                                [&](const Copy& copy) { return copy.group >= end_group; });
  std::for_each(queue.flying.begin(), end, Land);
  queue.flying.erase(queue.flying.begin(), end);
}

}  // namespace octavo::emulator
