// The vector vocabulary in the compilers' own vector extensions, 16 bytes wide: what every 64-bit
// x86 and ARM core has. Included by isa_portable.cpp alone.

#ifndef OCTAVO_CPU_SIMD_PORTABLE_H_
#define OCTAVO_CPU_SIMD_PORTABLE_H_

#include <cstdint>
#include <cstring>

#include "octavo/half.h"

namespace octavo::cpu {
namespace {

inline constexpr int kLanes = 4;

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));
typedef uint32_t MaxBits __attribute__((vector_size(16)));

inline Floats Zero() { return Floats{}; }
inline Floats Broadcast(float x) { return Floats{x, x, x, x}; }
inline Floats Load(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
inline void Store(float* p, Floats x) { std::memcpy(p, &x, sizeof(x)); }
inline Floats Add(Floats a, Floats b) { return a + b; }
inline Floats Sub(Floats a, Floats b) { return a - b; }
inline Floats Mul(Floats a, Floats b) { return a * b; }
inline Floats Div(Floats a, Floats b) { return a / b; }
// Of two numbers of which one is NaN, Min and Max return the second.
inline Floats Min(Floats a, Floats b) { return a < b ? a : b; }
inline Floats Max(Floats a, Floats b) { return a > b ? a : b; }
inline Floats Fma(Floats a, Floats b, Floats c) { return a * b + c; }  // rounds twice
inline Floats Abs(Floats x) { return (Floats)((Mask)x & 0x7fffffff); }
inline Floats CopySign(Floats magnitude, Floats sign) {
  return (Floats)((Mask)magnitude | ((Mask)sign & INT32_MIN));
}
// To nearest even, for |x| <= 2^22: adding 1.5 * 2^23 leaves no bits below one.
inline Floats Round(Floats x) {
  const Floats magic = Broadcast(0x1.8p23f);
  return (x + magic) - magic;
}
// x * 2^n for a whole n, where neither is out of range.
inline Floats ScaleByPowerOfTwo(Floats x, Floats n) {
  return (Floats)((Mask)x + (__builtin_convertvector(n, Mask) << 23));
}

inline Mask Less(Floats a, Floats b) { return a < b; }
inline Mask NotLess(Floats a, Floats b) { return a >= b; }
inline Mask And(Mask a, Mask b) { return a & b; }
inline Floats Select(Mask mask, Floats yes, Floats no) { return mask ? yes : no; }
inline float ReduceMax(Floats x) {
  const float low = x[0] > x[1] ? x[0] : x[1];
  const float high = x[2] > x[3] ? x[2] : x[3];
  return low > high ? low : high;
}
inline float ReduceAdd(Floats x) { return (x[0] + x[2]) + (x[1] + x[3]); }

// A vector of quads: four codes in each lane.
typedef int32_t Quads __attribute__((vector_size(16)));
inline Quads LoadQuads(const int8_t* p) {
  Quads x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
// Any head_dim is whole vectors: nothing remains.
inline Quads LoadRemainingQuads(const int8_t* p) { return LoadQuads(p); }
// Code j of each quad.
inline Floats CodesOf(Quads quads, int j) {
  return __builtin_convertvector((quads << (24 - 8 * j)) >> 24, Floats);
}
inline void StoreCodes(int8_t* p, Floats x) {
  const Mask codes = __builtin_convertvector(Round(x), Mask);
  for (int lane = 0; lane < kLanes; ++lane) p[lane] = static_cast<int8_t>(codes[lane]);
}
// Turns the 4 x 4 bytes of a vector.
inline Quads TurnBytes(Quads x) {
  int8_t bytes[kLanes * 4], turned[kLanes * 4];
  std::memcpy(bytes, &x, sizeof(x));
  for (int i = 0; i < kLanes * 4; ++i) turned[i] = bytes[i % 4 * 4 + i / 4];
  std::memcpy(&x, turned, sizeof(x));
  return x;
}
// Rounds the same dims of four rows to codes, the quad of the first row first.
inline Quads PackCodes(Floats a, Floats b, Floats c, Floats d) {
  Quads turned = __builtin_convertvector(Round(a), Quads) & 0xff;
  turned |= (__builtin_convertvector(Round(b), Quads) & 0xff) << 8;
  turned |= (__builtin_convertvector(Round(c), Quads) & 0xff) << 16;
  turned |= __builtin_convertvector(Round(d), Quads) << 24;
  return TurnBytes(turned);
}
// Turns vectors of runs of 16 bytes, of which there is one.
inline void TurnRuns(Quads (&)[1]) {}
inline void StoreQuads(int8_t* p, Quads x) { std::memcpy(p, &x, sizeof(x)); }
// Nothing here goes past the caches.
inline void StreamQuads(int8_t* p, Quads x) { StoreQuads(p, x); }
inline void FinishStreams() {}
// The largest of 16 bits each without their sign; num_elements is a multiple of 8.
inline uint16_t LargestMagnitude(const uint16_t* p, int num_elements) {
  uint16_t largest = 0;
  for (int i = 0; i < num_elements; ++i) {
    const uint16_t magnitude = p[i] & 0x7fff;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}
// The product moves the exponent from FP16's bias to FP32's, exactly, subnormals included.
inline Floats LoadHalves(const uint16_t* p) {
  const MaxBits bits = {p[0], p[1], p[2], p[3]};
  const MaxBits magnitude = bits & 0x7fff;
  const MaxBits no_number = (MaxBits)(magnitude >= kHalfInfBits) & kFloatInfBits;
  const Floats rebiased = (Floats)(magnitude << 13) * Broadcast(0x1p112f);
  return (Floats)((MaxBits)rebiased | no_number | (bits & 0x8000) << 16);
}
inline void StoreHalves(uint16_t* p, Floats x) {
  for (int lane = 0; lane < kLanes; ++lane) p[lane] = FloatToHalf(x[lane]);
}
inline Floats LoadBfloat16s(const uint16_t* p) {
  const MaxBits bits = {p[0], p[1], p[2], p[3]};
  return (Floats)(bits << 16);
}
inline void StoreBfloat16s(uint16_t* p, Floats x) {
  for (int lane = 0; lane < kLanes; ++lane) p[lane] = FloatToBfloat16(x[lane]);
}

// Any head_dim is whole vectors: nothing remains.
inline void StoreRemainingQuads(int8_t* p, Quads x) { StoreQuads(p, x); }
inline Floats LoadRemaining(const float* p) { return Load(p); }
inline Floats LoadRemainingHalves(const uint16_t* p) { return LoadHalves(p); }
inline Floats LoadRemainingBfloat16s(const uint16_t* p) { return LoadBfloat16s(p); }

// A running maximum of absolute values, taken on their bits so that NaN counts as large.
inline MaxBits NoBits() { return MaxBits{}; }
inline MaxBits MaxOfBits(MaxBits bits, Floats x) {
  const MaxBits magnitude = (MaxBits)Abs(x);
  return magnitude > bits ? magnitude : bits;
}
inline uint32_t ReduceBits(MaxBits bits) {
  const uint32_t low = bits[0] > bits[1] ? bits[0] : bits[1];
  const uint32_t high = bits[2] > bits[3] ? bits[2] : bits[3];
  return low > high ? low : high;
}

}  // namespace
}  // namespace octavo::cpu

#endif  // OCTAVO_CPU_SIMD_PORTABLE_H_
