// FP16 and BF16 in software, to the bit; NaN becomes the NaN that a GPU makes of it, 0x7fff.

#ifndef OCTAVO_CUDA_EMULATOR_NUMERICS_H_
#define OCTAVO_CUDA_EMULATOR_NUMERICS_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace octavo::emulator {

inline constexpr uint32_t kFloatInfinity = 0x7f800000u;
inline constexpr uint32_t kMagnitude = 0x7fffffffu;
inline constexpr uint16_t kNan16 = 0x7fff;

inline uint32_t ToBits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float FromBits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The magnitude of an FP16 number below 2^-14, a multiple of 2^-24: which is what 0.5 + x rounds
// to.
inline uint32_t RoundToSubnormalHalf(uint32_t magnitude) {
  return ToBits(FromBits(magnitude) + 0.5f) - ToBits(0.5f);
}

// The magnitude of an FP16 number from 2^-14: another exponent bias (127 - 15) and 13 bits fewer.
inline uint32_t RoundToNormalHalf(uint32_t magnitude) {
  const uint32_t is_odd = magnitude >> 13 & 1;
  return (magnitude - (112u << 23) + 0xfff + is_odd) >> 13;
}

inline uint16_t RoundToHalf(float x) {
  constexpr uint32_t kSmallestNormal = 0x38800000u;  // 2^-14
  constexpr uint32_t kOverflow = 0x477ff000u;        // 65520, halfway from the largest to infinity
  const uint32_t magnitude = ToBits(x) & kMagnitude;
  const uint32_t sign = ToBits(x) >> 16 & 0x8000;
  if (magnitude > kFloatInfinity) return kNan16;
  if (magnitude >= kOverflow) return static_cast<uint16_t>(sign | 0x7c00);
  return static_cast<uint16_t>(sign | (magnitude < kSmallestNormal ? RoundToSubnormalHalf(magnitude)
                                                                   : RoundToNormalHalf(magnitude)));
}

// Every FP16 number in FP32.
extern const float (&kWideHalves)[1 << 16];

inline float WidenHalf(uint16_t half) { return kWideHalves[half]; }

inline uint16_t RoundToBfloat16(float x) {
  const uint32_t bits = ToBits(x);
  if ((bits & kMagnitude) > kFloatInfinity) return kNan16;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint32_t PackPair(uint16_t low, uint16_t high) {
  return low | static_cast<uint32_t>(high) << 16;
}

// FP32 has 24 bits, two more than twice FP16's 11: rounding twice is rounding once.
inline uint16_t SubtractHalf(uint16_t x, uint16_t y) {
  return RoundToHalf(WidenHalf(x) - WidenHalf(y));
}

// cvt.rni.s32.f32: saturates, and makes 0 of NaN.
inline int32_t RoundToInt32(float x) {
  if (std::isnan(x)) return 0;
  if (x >= 0x1p31f) return std::numeric_limits<int32_t>::max();
  if (x <= -0x1p31f) return std::numeric_limits<int32_t>::min();
  return static_cast<int32_t>(std::nearbyintf(x));
}

// prmt.b32, default mode; the fourth bit of a nibble, which would repeat a sign, is not for
// kernels.
inline uint32_t PickBytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = low | static_cast<uint64_t>(high) << 32;
  uint32_t picked = 0;
  for (int idx = 0; idx < 4; ++idx) {
    const uint32_t from = selector >> (4 * idx) & 7;
    picked |= static_cast<uint32_t>(bytes >> (8 * from) & 0xff) << (8 * idx);
  }
  return picked;
}

}  // namespace octavo::emulator

#endif  // OCTAVO_CUDA_EMULATOR_NUMERICS_H_
