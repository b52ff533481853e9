#include "memory.h"

#include <algorithm>
#include <cinttypes>
#include <cstdlib>
#include <iterator>
#include <map>

#include "address_space.h"
#include "scheduler.h"

namespace octavo::emulator {
namespace {

constexpr size_t kGapBytes = 512;  // between allocations, so that none runs on into the next

// By address.
std::map<uintptr_t, Range>& Ranges() {
  static std::map<uintptr_t, Range> ranges;
  return ranges;
}

void ForgetRecent() { std::fill(std::begin(g_recent), std::end(g_recent), nullptr); }

// The last allocation that begins at an address or below, or null.
const Range* RangeBelow(uintptr_t address) {
  const auto next = Ranges().upper_bound(address);
  return next == Ranges().begin() ? nullptr : &std::prev(next)->second;
}

void AddRange(const Range& range) {
  Ranges().emplace(range.begin, range);
  ForgetRecent();
}

bool RemoveRange(void* address, bool is_allocated) {
  const auto found = Ranges().find(reinterpret_cast<uintptr_t>(address));
  if (found == Ranges().end() || found->second.is_allocated != is_allocated) return false;
  std::free(found->second.written);
  Ranges().erase(found);
  ForgetRecent();
  return true;
}

bool Overlaps(uintptr_t begin, size_t num_bytes) {
  const Range* below = RangeBelow(begin + num_bytes - 1);
  return below != nullptr && below->begin + below->num_bytes > begin;
}

uint8_t* MakeShadow(size_t num_bytes) {
  return static_cast<uint8_t*>(std::calloc(std::max<size_t>(num_bytes, 1), 1));
}

// The first gap of the heap that has room, 0 when none has.
uintptr_t FindGap(size_t num_bytes) {
  uintptr_t start = kDevice.heap;
  for (auto it = Ranges().lower_bound(start); it != Ranges().end(); ++it) {
    if (!it->second.is_allocated || it->first - start >= num_bytes + kGapBytes) break;
    start = (it->first + it->second.num_bytes + 2 * kGapBytes - 1) / kGapBytes * kGapBytes;
  }
  return start + num_bytes <= kDevice.heap + kHeapBytes ? start : 0;
}

void FailOutside(const Site& site, uintptr_t address, size_t num_bytes) {
  const Range* below = RangeBelow(address);
  if (below == nullptr || address - below->begin > below->num_bytes + kGapBytes) {
    FailThread(site, "out of bounds: %zu bytes at 0x%" PRIxPTR ", which is in no live allocation",
               num_bytes, address);
  }
  FailThread(site, "out of bounds: %zu bytes at offset %zu of an allocation of %zu bytes",
             num_bytes, static_cast<size_t>(address - below->begin), below->num_bytes);
}

}  // namespace

const Range* g_recent[kNumRecent] = {};

void* Allocate(size_t num_bytes) {
  const uintptr_t begin = FindGap(num_bytes);
  if (begin == 0) return nullptr;
  AddRange({begin, num_bytes, kDevice.to_host, MakeShadow(num_bytes), true});
  return reinterpret_cast<void*>(begin);
}

bool Free(void* address) { return RemoveRange(address, true); }

bool Register(void* address, size_t num_bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  if (num_bytes == 0 || Overlaps(begin, num_bytes)) return false;
  AddRange({begin, num_bytes, 0, MakeShadow(num_bytes), false});
  return true;
}

bool Unregister(void* address) { return RemoveRange(address, false); }

const Range* FindRange(const void* address, size_t num_bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  const Range* range = RangeBelow(begin);
  return range != nullptr && range->Holds(begin, num_bytes) ? range : nullptr;
}

void SetWritten(const Range& range, const void* address, size_t num_bytes, bool is_written) {
  std::memset(range.Written(reinterpret_cast<uintptr_t>(address)), is_written ? 0xff : 0,
              num_bytes);
}

size_t CountAllocatedBytes() {
  size_t num_bytes = 0;
  for (const auto& [begin, range] : Ranges()) num_bytes += range.is_allocated ? range.num_bytes : 0;
  return num_bytes;
}

const Range* LocateGlobal(const Site& site, uintptr_t address, size_t num_bytes) {
  const Range* range = RangeBelow(address);
  if (range == nullptr || !range->Holds(address, num_bytes)) FailOutside(site, address, num_bytes);
  return g_recent[site.line % kNumRecent] = range;
}

void FailAlignment(const Site& site, uintptr_t address, size_t num_bytes) {
  FailThread(site, "misaligned: address 0x%" PRIxPTR " is no multiple of %zu", address, num_bytes);
}

void FailUnwritten(const Site& site, const Range& range, uintptr_t address, size_t num_bytes) {
  FailThread(site,
             "unwritten: of %zu bytes at offset %zu of an allocation of %zu bytes, some never "
             "had a value",
             num_bytes, static_cast<size_t>(address - range.begin), range.num_bytes);
}

void CopyGlobalBytes(const Site& site, void* target, const void* source, size_t num_bytes) {
  const auto from = reinterpret_cast<uintptr_t>(source), to = reinterpret_cast<uintptr_t>(target);
  const Range& from_range = CheckedRange(site, from, num_bytes, num_bytes);
  const Range& to_range = CheckedRange(site, to, num_bytes, num_bytes);
  std::memmove(to_range.HostSide(to), from_range.HostSide(from), num_bytes);
  std::memmove(to_range.Written(to), from_range.Written(from), num_bytes);
}

}  // namespace octavo::emulator
