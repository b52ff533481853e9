#include "pool_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

namespace octavo::cpu {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kMinShare = 16 * kHugePage;  // less than that is not worth a thread

size_t PageBytes(size_t num_bytes) { return num_bytes < kHugePage ? kPage : kHugePage; }

size_t MappedBytes(size_t num_bytes) {
  const size_t page = PageBytes(num_bytes);
  return std::max(page, (num_bytes + page - 1) / page * page);
}

// Maps whole pages: one more than is asked for, less what lies before the first boundary and behind
// the last.
char* MapPages(size_t num_bytes, size_t page) {
  void* mapped =
      mmap(nullptr, num_bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  auto* first = static_cast<char*>(mapped);
  const size_t before = -reinterpret_cast<uintptr_t>(first) % page;
  if (before > 0) munmap(first, before);
  munmap(first + before + num_bytes, page - before);
  return first + before;
}

// Touches every page, by threads of its own: a thread pool would bind this one if it binds any.
void Zero(char* pool, size_t num_bytes, int num_threads) {
  const size_t most = std::max<size_t>(1, num_bytes / kMinShare);
  const size_t num_shares = std::min<size_t>(most, num_threads);
  const size_t share = (num_bytes + num_shares - 1) / num_shares;
  std::vector<std::thread> helpers;
  size_t end = num_bytes;  // of what is left to this thread
  try {
    for (; end > share; end -= std::min(share, end - share)) {
      const size_t first = end - std::min(share, end - share);
      helpers.emplace_back(std::memset, pool + first, 0, end - first);
    }
  } catch (const std::system_error&) {  // no more threads to be had
  }
  std::memset(pool, 0, end);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace

void* MapPool(size_t num_bytes, int num_threads) {
  char* pool = MapPages(MappedBytes(num_bytes), PageBytes(num_bytes));
  if (pool == nullptr) return nullptr;
  if (PageBytes(num_bytes) == kHugePage) {
    madvise(pool, MappedBytes(num_bytes), MADV_HUGEPAGE);  // refused: small pages, then
  }
  Zero(pool, num_bytes, num_threads);
  return pool;
}

void UnmapPool(void* pool, size_t num_bytes) { munmap(pool, MappedBytes(num_bytes)); }

}  // namespace octavo::cpu
