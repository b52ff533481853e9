// The vector vocabulary in AVX2, FMA and F16C. Included by isa_avx2.cpp alone.

#ifndef OCTAVO_CPU_SIMD_AVX2_H_
#define OCTAVO_CPU_SIMD_AVX2_H_

#include <immintrin.h>

namespace octavo::cpu {
namespace {

inline constexpr int kLanes = 8;

using Floats = __m256;
using Mask = __m256;

inline Floats Zero() { return _mm256_setzero_ps(); }
inline Floats Broadcast(float x) { return _mm256_set1_ps(x); }
inline Floats Load(const float* p) { return _mm256_loadu_ps(p); }
inline void Store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
inline Floats Add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats Sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats Mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats Div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
// Of two numbers of which one is NaN, Min and Max return the second.
inline Floats Min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats Max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats Fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats Abs(Floats x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline Floats CopySign(Floats magnitude, Floats sign) {
  return _mm256_or_ps(magnitude, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
}
inline Floats Round(Floats x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Floats Floor(Floats x) { return _mm256_floor_ps(x); }
// x * 2^n for a whole n, where neither is out of range.
inline Floats ScaleByPowerOfTwo(Floats x, Floats n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), exponent));
}

inline Mask Less(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline Mask NotLess(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
inline Mask And(Mask a, Mask b) { return _mm256_and_ps(a, b); }
inline Floats Select(Mask mask, Floats yes, Floats no) { return _mm256_blendv_ps(no, yes, mask); }
inline float ReduceMax(Floats x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
inline float ReduceAdd(Floats x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// A vector of quads: four codes in each lane.
using Quads = __m256i;
inline Quads LoadQuads(const int8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
// Any head_dim is whole vectors: nothing remains.
inline Quads LoadRemainingQuads(const int8_t* p) { return LoadQuads(p); }
// Code j of each quad.
inline Floats CodesOf(Quads quads, int j) {
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(quads, 24 - 8 * j), 24));
}
inline void StoreCodes(int8_t* p, Floats x) {
  const __m256i codes = _mm256_cvtps_epi32(x);
  const __m128i halves =
      _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(halves, halves));
}
// Rounds the same dims of four rows to codes. Each run of 16 bytes has one quad of dims of the
// rows.
inline Quads PackCodes(Floats a, Floats b, Floats c, Floats d) {
  const __m256i ab = _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
  const __m256i cd = _mm256_packs_epi32(_mm256_cvtps_epi32(c), _mm256_cvtps_epi32(d));
  return _mm256_packs_epi16(ab, cd);
}
// Turns the 4 x 4 bytes of each run of 16.
inline Quads TurnBytes(Quads x) {
  return _mm256_shuffle_epi8(x, _mm256_broadcastsi128_si256(_mm_setr_epi8(
                                    0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
}
// Turns vectors of runs of 16 bytes: run j of vector i becomes run i of vector j.
inline void TurnRuns(Quads (&x)[2]) {
  const __m256i low = _mm256_permute2x128_si256(x[0], x[1], 0x20);
  x[1] = _mm256_permute2x128_si256(x[0], x[1], 0x31);
  x[0] = low;
}
inline void StoreQuads(int8_t* p, Quads x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
}
// Past the caches, to an aligned p; other threads see it after FinishStreams.
inline void StreamQuads(int8_t* p, Quads x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), x);
}
inline void FinishStreams() { _mm_sfence(); }
// The largest of 16 bits each without their sign; num_elements is a multiple of 8.
inline uint16_t LargestMagnitude(const uint16_t* p, int num_elements) {
  __m128i largest = _mm_setzero_si128();  // twice the magnitudes
  for (int i = 0; i < num_elements; i += 8) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i));
    largest = _mm_max_epu16(largest, _mm_add_epi16(x, x));
  }
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(largest, _mm_set1_epi16(-1)));
  return static_cast<uint16_t>(~_mm_cvtsi128_si32(least)) >> 1;
}
inline Floats LoadHalves(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void StoreHalves(uint16_t* p, Floats x) {
  constexpr int kRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, kRounding));
}
inline Floats LoadBfloat16s(const uint16_t* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline void StoreBfloat16s(uint16_t* p, Floats x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounding = _mm256_add_epi32(is_odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, rounding), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i halves = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}

// Dot products of codes with multipliers of 16 bits: pairs of products summed into 32 bits.
//
// A multiplier holds four numbers for the four codes of a quad: even.low, odd.low, even.high,
// odd.high. Codes are widened to match, the even ones and the odd ones of a quad apart.
inline constexpr int kKeyMultiplierBits = 15;  // below the sign
inline constexpr float kMaxWeightMultiplier = 32767.0f;

struct Multiplier {
  int32_t even;
  int32_t odd;
};
struct DotSums {
  __m256i sums;
};
struct WideCodes {
  __m256i even;
  __m256i odd;
};
using KeyCodes = WideCodes;
using ValueCodes = WideCodes;

inline DotSums NoSums() { return {_mm256_setzero_si256()}; }
inline WideCodes WidenCodes(Quads quads) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(quads, 8), 8), _mm256_srai_epi16(quads, 8)};
}
inline KeyCodes ToKeyCodes(Quads quads) { return WidenCodes(quads); }
inline ValueCodes ToValueCodes(Quads quads) { return WidenCodes(quads); }

struct Multipliers {
  __m256i even;
  __m256i odd;
};
inline Multipliers BroadcastMultiplier(const Multiplier& x) {
  return {_mm256_set1_epi32(x.even), _mm256_set1_epi32(x.odd)};
}
inline DotSums AddProducts(DotSums sums, const WideCodes& codes, const Multipliers& x) {
  const __m256i even = _mm256_madd_epi16(codes.even, x.even);
  const __m256i odd = _mm256_madd_epi16(codes.odd, x.odd);
  return {_mm256_add_epi32(sums.sums, _mm256_add_epi32(even, odd))};
}
inline DotSums AddKeyProducts(DotSums sums, const WideCodes& codes, const Multipliers& x) {
  return AddProducts(sums, codes, x);
}
inline DotSums AddValueProducts(DotSums sums, const WideCodes& codes, const Multipliers& x) {
  return AddProducts(sums, codes, x);
}
inline Floats ToFloats(DotSums sums) { return _mm256_cvtepi32_ps(sums.sums); }

// Rounds two quads' worth of numbers to multipliers.
inline void StoreMultipliers(Multiplier* p, Floats x) {
  const __m256i numbers = _mm256_cvtps_epi32(x);
  const __m256i low = _mm256_and_si256(numbers, _mm256_set1_epi32(0xffff));
  const __m256i high = _mm256_slli_epi32(_mm256_shuffle_epi32(numbers, 0xee), 16);
  const __m256i pairs = _mm256_permute4x64_epi64(_mm256_or_si256(low, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(pairs));
}
// Makes multipliers of whole numbers of 16 bits.
inline void StoreKeyMultipliers(Multiplier* p, Floats x) { StoreMultipliers(p, x); }
// Rounds numbers, those of a before those of b, to multipliers.
inline void StoreWeightMultipliers(Multiplier* p, Floats a, Floats b) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
  // Within 16 bytes there are now a quad of a and one of b.
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  const __m256i multipliers = _mm256_shuffle_epi8(words, order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(multipliers, 0xd8));
}
// What sums of products of keys with these multipliers start from.
inline int32_t KeySumStart(const Multiplier*, int) { return 0; }
inline DotSums StartSums(int32_t) { return NoSums(); }

// What multipliers leave of q, 14 bits more of it.
inline constexpr float kFineUnits = 16384.0f;
using FineMultiplier = Multiplier;
using FineSums = DotSums;

inline FineSums NoFineSums() { return NoSums(); }
inline FineSums AddFineProducts(FineSums sums, Quads codes, const FineMultiplier& x) {
  return AddProducts(sums, WidenCodes(codes), BroadcastMultiplier(x));
}
inline Floats FineToFloats(FineSums sums) { return ToFloats(sums); }
inline void StoreFineMultipliers(FineMultiplier* p, Floats x) { StoreMultipliers(p, x); }
// Collects the multipliers of quads that have any; returns how many.
inline int CollectNonZero(const FineMultiplier* dense, int num_quads, FineMultiplier* fine,
                          int32_t* quads) {
  int count = 0;
  for (int quad = 0; quad < num_quads; ++quad) {
    fine[count] = dense[quad];
    quads[count] = quad;
    count += (dense[quad].even | dense[quad].odd) != 0;
  }
  return count;
}

// Any head_dim is whole vectors: nothing remains.
inline void StoreRemainingQuads(int8_t* p, Quads x) { StoreQuads(p, x); }
inline Floats LoadRemaining(const float* p) { return Load(p); }
inline Floats LoadRemainingHalves(const uint16_t* p) { return LoadHalves(p); }
inline Floats LoadRemainingBfloat16s(const uint16_t* p) { return LoadBfloat16s(p); }

// A running maximum of absolute values, taken on their bits so that NaN counts as large.
using MaxBits = __m256i;
inline MaxBits NoBits() { return _mm256_setzero_si256(); }
inline MaxBits MaxOfBits(MaxBits bits, Floats x) {
  return _mm256_max_epu32(bits, _mm256_castps_si256(Abs(x)));
}
inline uint32_t ReduceBits(MaxBits bits) {
  __m128i half = _mm_max_epu32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(half));
}

}  // namespace
}  // namespace octavo::cpu

#endif  // OCTAVO_CPU_SIMD_AVX2_H_
