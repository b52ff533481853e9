// The scale of a row of codes, from the row's largest absolute value.

#ifndef OCTAVO_CPU_ROW_SCALE_H_
#define OCTAVO_CPU_ROW_SCALE_H_

#include <cstdint>

#include "octavo/half.h"

namespace octavo::cpu {

inline constexpr float kMaxCode = 127.0f;

struct RowScale {
  uint16_t scale;       // float16 bits; infinite where there is none
  float inverse_scale;  // codes are x * inverse_scale, to nearest even

  bool IsFinite() const { return scale < kHalfInfBits; }
};

// amax_bits: of the largest absolute value, 0x7f800000 or more where not all are finite.
inline RowScale ScaleOf(uint32_t amax_bits) {
  if (amax_bits == 0) return {0, 0.0f};
  if (amax_bits >= kFloatInfBits) return {kHalfInfBits, 0.0f};
  const uint16_t scale = RoundUpToHalf(BitsFloat(amax_bits) / kMaxCode);
  return {scale, 1.0f / HalfToFloat(scale)};
}

}  // namespace octavo::cpu

#endif  // OCTAVO_CPU_ROW_SCALE_H_
