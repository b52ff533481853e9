// What the device's memory could move by its clock and width; apart from the rest, as the emulated
// device has neither.

#include "bench.h"
#include "octavo/cuda_api.h"

int32_t octavo_bench_nominal_rate(int32_t device_idx, double* bytes_per_s) {
  int clock_khz = 0, bus_bits = 0;
  if (cudaDeviceGetAttribute(&clock_khz, cudaDevAttrMemoryClockRate, device_idx) != cudaSuccess ||
      cudaDeviceGetAttribute(&bus_bits, cudaDevAttrGlobalMemoryBusWidth, device_idx) !=
          cudaSuccess) {
    return octavo::cuda::kUnsupported;
  }
  constexpr double kTransfersPerCycle = 2.0;
  *bytes_per_s = kTransfersPerCycle * clock_khz * 1e3 * bus_bits / 8;
  return octavo::cuda::kDone;
}
