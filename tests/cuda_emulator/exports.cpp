// What tests call, by ctypes: the device's memory and model, the schedule, and the fault.

#include <cstring>

#include "memory.h"
#include "runtime.h"

#define OCTAVO_EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

namespace octavo::emulator {
namespace {

uint64_t* FindSetting(const char* name) {
  const struct {
    const char* name;
    uint64_t* value;
  } settings[] = {
      {"num_devices", &g_device.num_devices},
      {"driver_version", &g_device.driver_version},
      {"major", &g_device.major},
      {"minor", &g_device.minor},
      {"num_multiprocessors", &g_device.num_multiprocessors},
      {"l2_bytes", &g_device.l2_bytes},
      {"memory_bytes", &g_device.memory_bytes},
      {"shared_optin_bytes", &g_device.shared_optin_bytes},
      {"shared_multiprocessor_bytes", &g_device.shared_multiprocessor_bytes},
  };
  for (const auto& setting : settings) {
    if (std::strcmp(setting.name, name) == 0) return setting.value;
  }
  return nullptr;
}

}  // namespace
}  // namespace octavo::emulator

using namespace octavo::emulator;  // NOLINT: the definitions of a C API

// The functions that can fail return 0, or -1.

// Makes memory of the host, of which nothing is written yet, an allocation of the device.
OCTAVO_EMULATOR_EXPORT int octavo_emulator_register(void* address, size_t num_bytes) {
  const std::lock_guard<std::recursive_mutex> lock(g_call_mutex);
  return Register(address, num_bytes) ? 0 : -1;
}

OCTAVO_EMULATOR_EXPORT int octavo_emulator_unregister(void* address) {
  const std::lock_guard<std::recursive_mutex> lock(g_call_mutex);
  return Unregister(address) ? 0 : -1;
}

// Says that bytes of an allocation hold values, or no longer do.
OCTAVO_EMULATOR_EXPORT int octavo_emulator_set_written(const void* address, size_t num_bytes,
                                                       int is_written) {
  const std::lock_guard<std::recursive_mutex> lock(g_call_mutex);
  const Range* range = FindRange(address, num_bytes);
  if (range == nullptr) return -1;
  SetWritten(*range, address, num_bytes, is_written != 0);
  return 0;
}

// Sets a member of DeviceModel.
OCTAVO_EMULATOR_EXPORT int octavo_emulator_set_device(const char* name, uint64_t value) {
  const std::lock_guard<std::recursive_mutex> lock(g_call_mutex);
  uint64_t* setting = FindSetting(name);
  if (setting == nullptr) return -1;
  *setting = value;
  return 0;
}

// 0 runs blocks and threads in order; another seed shuffles both.
OCTAVO_EMULATOR_EXPORT void octavo_emulator_set_seed(uint64_t seed) {
  const std::lock_guard<std::recursive_mutex> lock(g_call_mutex);
  SetScheduleSeed(seed);
}

// The first fault since the last clearing; empty when there is none.
OCTAVO_EMULATOR_EXPORT const char* octavo_emulator_error() { return FaultText(); }

OCTAVO_EMULATOR_EXPORT void octavo_emulator_clear_error() {
  const std::lock_guard<std::recursive_mutex> lock(g_call_mutex);
  ClearFault();
  g_last_error = cudaSuccess;
}

// Switches to a thread, since the library was loaded.
OCTAVO_EMULATOR_EXPORT uint64_t octavo_emulator_num_switches() { return CountSwitches(); }
