#include "address_space.h"

#include <sys/mman.h>

#include <cstdlib>

namespace octavo::emulator {
namespace {

constexpr size_t kAllBytes = kSharedWindowBytes + kHeapBytes;

// Takes addresses; memory follows with the first write to each page.
uintptr_t Reserve(int protection) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* start = mmap(nullptr, kAllBytes, protection, flags, -1, 0);
  if (start == MAP_FAILED) std::abort();
  return reinterpret_cast<uintptr_t>(start);
}

AddressSpace MapAddressSpace() {
  const uintptr_t device = Reserve(PROT_NONE);
  const uintptr_t host = Reserve(PROT_READ | PROT_WRITE);
  return {device, device + kSharedWindowBytes, static_cast<ptrdiff_t>(host - device)};
}

}  // namespace

const AddressSpace kDevice = MapAddressSpace();

bool IsDeviceAddress(const void* address) {
  return reinterpret_cast<uintptr_t>(address) - kDevice.shared < kAllBytes;
}

}  // namespace octavo::emulator
