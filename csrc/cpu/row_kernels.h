// Rows in and out: conversion to and from FP32, and the quantiser's rounding. Include after a
// simd_*.h and vector_math.h.
//
// head_dim is a multiple of 8, so only 16 lanes leave a remainder; rows in and out do it with the
// scalar conversions, which round alike.

#ifndef OCTAVO_CPU_ROW_KERNELS_H_
#define OCTAVO_CPU_ROW_KERNELS_H_

#include "octavo/half.h"
#include "octavo/paged_cache.h"
#include "row_scale.h"

namespace octavo::cpu {
namespace {

struct Float32Codec {
  using Element = float;
  static Floats Load(const float* p) { return cpu::Load(p); }
  static Floats LoadRemaining(const float* p) { return cpu::LoadRemaining(p); }
  static void Store(float* p, Floats x) { cpu::Store(p, x); }
  static float FromElement(float x) { return x; }
  static float ToElement(float x) { return x; }
};

// Saturates: a sum of V may be a little over 65504 where no V is, as scales are rounded up, and far
// over where V was stored from a wider type. BF16 holds whatever a cache can (65504 * 127).
struct Float16Codec {
  using Element = uint16_t;
  static Floats Load(const uint16_t* p) { return LoadHalves(p); }
  static Floats LoadRemaining(const uint16_t* p) { return LoadRemainingHalves(p); }
  static void Store(uint16_t* p, Floats x) { StoreHalves(p, Clamp(x, kLargestHalf)); }
  static float FromElement(uint16_t x) { return HalfToFloat(x); }
  static uint16_t ToElement(float x) {
    const float bounded = x > kLargestHalf ? kLargestHalf : x < -kLargestHalf ? -kLargestHalf : x;
    return FloatToHalf(bounded);
  }
};

struct Bfloat16Codec {
  using Element = uint16_t;
  static Floats Load(const uint16_t* p) { return LoadBfloat16s(p); }
  static Floats LoadRemaining(const uint16_t* p) { return LoadRemainingBfloat16s(p); }
  static void Store(uint16_t* p, Floats x) { StoreBfloat16s(p, x); }
  static float FromElement(uint16_t x) { return BitsFloat(static_cast<uint32_t>(x) << 16); }
  static uint16_t ToElement(float x) { return FloatToBfloat16(x); }
};

// The largest absolute value of a row as bits of FP32, 0x7f800000 or more where not all are finite.
// That of 16-bit elements is the largest of their bits.
template <typename Codec>
uint32_t LargestBits(const typename Codec::Element* row, int num_elements) {
  if constexpr (sizeof(typename Codec::Element) == 2) {
    return FloatBits(Codec::FromElement(LargestMagnitude(row, num_elements)));
  } else {
    MaxBits bits = NoBits();
    int i = 0;
    for (; i + kLanes <= num_elements; i += kLanes) bits = MaxOfBits(bits, Codec::Load(row + i));
    if (i < num_elements) bits = MaxOfBits(bits, Codec::LoadRemaining(row + i));
    return ReduceBits(bits);
  }
}

template <typename Codec>
uint32_t LoadRowOf(const void* source, int num_elements, float* row) {
  const auto* elements = static_cast<const typename Codec::Element*>(source);
  MaxBits bits = NoBits();
  int i = 0;
  for (; i + kLanes <= num_elements; i += kLanes) {
    const Floats x = Codec::Load(elements + i);
    bits = MaxOfBits(bits, x);
    Store(row + i, x);
  }
  uint32_t max_bits = ReduceBits(bits);
  for (; i < num_elements; ++i) {
    row[i] = Codec::FromElement(elements[i]);
    const uint32_t magnitude = FloatBits(row[i]) & 0x7fffffffu;
    max_bits = magnitude > max_bits ? magnitude : max_bits;
  }
  return max_bits;
}

template <typename Codec>
void StoreRowOf(const float* row, float factor, int num_elements, void* target) {
  auto* elements = static_cast<typename Codec::Element*>(target);
  const Floats factors = Broadcast(factor);
  int i = 0;
  for (; i + kLanes <= num_elements; i += kLanes) {
    Codec::Store(elements + i, Mul(Load(row + i), factors));
  }
  for (; i < num_elements; ++i) elements[i] = Codec::ToElement(row[i] * factor);
}

uint32_t LoadRow(DataType dtype, const void* source, int num_elements, float* row) {
  switch (dtype) {
    case DataType::kFloat16:
      return LoadRowOf<Float16Codec>(source, num_elements, row);
    case DataType::kBfloat16:
      return LoadRowOf<Bfloat16Codec>(source, num_elements, row);
    default:
      return LoadRowOf<Float32Codec>(source, num_elements, row);
  }
}

void StoreRow(DataType dtype, const float* row, float factor, int num_elements, void* target) {
  switch (dtype) {
    case DataType::kFloat16:
      return StoreRowOf<Float16Codec>(row, factor, num_elements, target);
    case DataType::kBfloat16:
      return StoreRowOf<Bfloat16Codec>(row, factor, num_elements, target);
    default:
      return StoreRowOf<Float32Codec>(row, factor, num_elements, target);
  }
}

template <typename Codec>
uint32_t QuantizeRowOf(const void* source, int num_elements, int8_t* codes, uint16_t* scale) {
  const auto* elements = static_cast<const typename Codec::Element*>(source);
  const uint32_t amax_bits = LargestBits<Codec>(elements, num_elements);
  const RowScale row_scale = ScaleOf(amax_bits);
  *scale = row_scale.scale;
  const Floats inverse_scales = Broadcast(row_scale.inverse_scale);
  int i = 0;
  for (; i + kLanes <= num_elements; i += kLanes) {
    StoreCodes(codes + i, Mul(Codec::Load(elements + i), inverse_scales));
  }
  if (i < num_elements) {
    StoreCodes(codes + i, Mul(Codec::LoadRemaining(elements + i), inverse_scales));
  }
  return amax_bits;
}

uint32_t QuantizeRow(DataType dtype, const void* source, int num_elements, int8_t* codes,
                     uint16_t* scale) {
  switch (dtype) {
    case DataType::kFloat16:
      return QuantizeRowOf<Float16Codec>(source, num_elements, codes, scale);
    case DataType::kBfloat16:
      return QuantizeRowOf<Bfloat16Codec>(source, num_elements, codes, scale);
    default:
      return QuantizeRowOf<Float32Codec>(source, num_elements, codes, scale);
  }
}

}  // namespace
}  // namespace octavo::cpu

#endif  // OCTAVO_CPU_ROW_KERNELS_H_
