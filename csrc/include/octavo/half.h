// Scalar conversions of FP16 and BF16, the same bits wherever they run.

#ifndef OCTAVO_HALF_H_
#define OCTAVO_HALF_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#include "octavo/host_device.h"

namespace octavo {

inline constexpr uint32_t kFloatInfBits = 0x7f800000;
inline constexpr uint16_t kHalfInfBits = 0x7c00;
inline constexpr float kLargestHalf = 65504.0f;

OCTAVO_HOST_DEVICE inline uint32_t FloatBits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

OCTAVO_HOST_DEVICE inline float BitsFloat(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// Rounds x > 0, finite, up to FP16; above 65504 to infinity. Never returns zero.
OCTAVO_HOST_DEVICE inline uint16_t RoundUpToHalf(float x) {
  constexpr float kSmallestNormal = 0x1p-14f;
  if (x < kSmallestNormal) {
    const auto steps = static_cast<uint16_t>(ceilf(x * 0x1p24f));  // exact product
    return steps == 0 ? 1 : steps;
  }
  // Rebias the exponent, then let the 13 bits that FP16 drops carry into the last one kept.
  const uint32_t bits = (FloatBits(x) - (112u << 23) + 0x1fffu) >> 13;
  return bits < kHalfInfBits ? static_cast<uint16_t>(bits) : kHalfInfBits;
}

// Converts FP16 to FP32, exactly.
inline float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= kHalfInfBits) return BitsFloat(sign | kFloatInfBits | (magnitude << 13));
  if (magnitude < 0x400u) {
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  return BitsFloat(sign | ((magnitude << 13) + (112u << 23)));
}

// Rounds FP32 to FP16, to nearest even.
inline uint16_t FloatToHalf(float x) {
  const uint32_t bits = FloatBits(x);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > kFloatInfBits) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | kHalfInfBits;  // 65520 and more
  if (magnitude < 0x38800000u) {  // below 2^-14: the sum's last bit is worth 2^-24
    return sign | static_cast<uint16_t>(FloatBits(BitsFloat(magnitude) + 0.5f) - 0x3f000000u);
  }
  const uint32_t rounding = 0xfffu + (magnitude >> 13 & 1);
  return sign | static_cast<uint16_t>((magnitude - (112u << 23) + rounding) >> 13);
}

// Rounds FP32 to BF16, to nearest even.
inline uint16_t FloatToBfloat16(float x) {
  const uint32_t bits = FloatBits(x);
  if ((bits & 0x7fffffffu) > kFloatInfBits) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

}  // namespace octavo

#endif  // OCTAVO_HALF_H_
