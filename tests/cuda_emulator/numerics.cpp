#include "numerics.h"

namespace octavo::emulator {
namespace {

float ComputeWideHalf(uint32_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00) return FromBits(sign | kFloatInfinity | magnitude << 13);
  if (magnitude >= 0x0400) return FromBits(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return FromBits(sign | ToBits(subnormal));
}

struct WideHalves {
  float all[1 << 16];
  WideHalves() {
    for (uint32_t half = 0; half < 1 << 16; ++half) all[half] = ComputeWideHalf(half);
  }
};
const WideHalves kTable;

}  // namespace

const float (&kWideHalves)[1 << 16] = kTable.all;

}  // namespace octavo::emulator
