// The device's own addresses: nothing can be read or written there, what they stand for lies a
// constant distance away. So a kernel or a host that dereferences one by itself is stopped.

#ifndef OCTAVO_CUDA_EMULATOR_ADDRESS_SPACE_H_
#define OCTAVO_CUDA_EMULATOR_ADDRESS_SPACE_H_

#include <cstddef>
#include <cstdint>

namespace octavo::emulator {

inline constexpr size_t kSharedWindowBytes = size_t{1} << 20;
inline constexpr size_t kHeapBytes = size_t{64} << 30;

struct AddressSpace {
  uintptr_t shared;   // kSharedWindowBytes
  uintptr_t heap;     // kHeapBytes
  ptrdiff_t to_host;  // from an address of these to the byte that it stands for
};

extern const AddressSpace kDevice;

bool IsDeviceAddress(const void* address);

}  // namespace octavo::emulator

#endif  // OCTAVO_CUDA_EMULATOR_ADDRESS_SPACE_H_
