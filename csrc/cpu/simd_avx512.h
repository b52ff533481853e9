// The vector vocabulary in AVX-512 (F, BW, DQ, VL). Included by isa_avx512.cpp alone.

#ifndef OCTAVO_CPU_SIMD_AVX512_H_
#define OCTAVO_CPU_SIMD_AVX512_H_

#include <immintrin.h>

namespace octavo::cpu {
namespace {

inline constexpr int kLanes = 16;

using Floats = __m512;
using Mask = __mmask16;

inline Floats Zero() { return _mm512_setzero_ps(); }
inline Floats Broadcast(float x) { return _mm512_set1_ps(x); }
inline Floats Load(const float* p) { return _mm512_loadu_ps(p); }
inline void Store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Floats Add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats Sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats Mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats Div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
// Of two numbers of which one is NaN, Min and Max return the second.
inline Floats Min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats Max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats Fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats Abs(Floats x) { return _mm512_abs_ps(x); }
inline Floats CopySign(Floats magnitude, Floats sign) {
  const Floats sign_bit = _mm512_set1_ps(-0.0f);
  return _mm512_or_ps(magnitude, _mm512_and_ps(sign, sign_bit));
}
inline Floats Round(Floats x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Floats Floor(Floats x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
// x * 2^n for a whole n.
inline Floats ScaleByPowerOfTwo(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }

inline Mask Less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask And(Mask a, Mask b) { return a & b; }
inline Mask NotLess(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Floats Select(Mask mask, Floats yes, Floats no) {
  return _mm512_mask_blend_ps(mask, no, yes);
}
inline float ReduceMax(Floats x) { return _mm512_reduce_max_ps(x); }
inline float ReduceAdd(Floats x) { return _mm512_reduce_add_ps(x); }

// A vector of quads: four codes in each lane.
using Quads = __m512i;
inline Quads LoadQuads(const int8_t* p) { return _mm512_loadu_si512(p); }
// The 8 quads that a row of a head_dim that 16 does not divide ends with; the other lanes are zero.
inline Quads LoadRemainingQuads(const int8_t* p) {
  const __m256i quads = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_zextsi256_si512(quads);
}
// Code j of each quad.
inline Floats CodesOf(Quads quads, int j) {
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(quads, 24 - 8 * j), 24));
}
inline void StoreCodes(int8_t* p, Floats x) {
  const __m128i codes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), codes);
}
// Rounds the same dims of four rows to codes. Each run of 16 bytes has one quad of dims of the
// rows.
inline Quads PackCodes(Floats a, Floats b, Floats c, Floats d) {
  const __m512i ab = _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
  const __m512i cd = _mm512_packs_epi32(_mm512_cvtps_epi32(c), _mm512_cvtps_epi32(d));
  return _mm512_packs_epi16(ab, cd);
}
// Turns the 4 x 4 bytes of each run of 16.
inline Quads TurnBytes(Quads x) {
  return _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6,
                                                                     10, 14, 3, 7, 11, 15)));
}
// Turns vectors of runs of 16 bytes: run j of vector i becomes run i of vector j.
inline void TurnRuns(Quads (&x)[4]) {
  const __m512i low01 = _mm512_shuffle_i64x2(x[0], x[1], 0x44);
  const __m512i high01 = _mm512_shuffle_i64x2(x[0], x[1], 0xee);
  const __m512i low23 = _mm512_shuffle_i64x2(x[2], x[3], 0x44);
  const __m512i high23 = _mm512_shuffle_i64x2(x[2], x[3], 0xee);
  x[0] = _mm512_shuffle_i64x2(low01, low23, 0x88);
  x[1] = _mm512_shuffle_i64x2(low01, low23, 0xdd);
  x[2] = _mm512_shuffle_i64x2(high01, high23, 0x88);
  x[3] = _mm512_shuffle_i64x2(high01, high23, 0xdd);
}
inline void StoreQuads(int8_t* p, Quads x) { _mm512_storeu_si512(p, x); }
// Past the caches, to an aligned p; other threads see it after FinishStreams.
inline void StreamQuads(int8_t* p, Quads x) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), x);
}
inline void FinishStreams() { _mm_sfence(); }
// The first 8.
inline void StoreRemainingQuads(int8_t* p, Quads x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(x));
}
// The 8 elements that a row of a head_dim that 16 does not divide ends with, and zeros.
inline Floats LoadRemaining(const float* p) { return _mm512_zextps256_ps512(_mm256_loadu_ps(p)); }
inline Floats LoadRemainingHalves(const uint16_t* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtph_ps(_mm256_zextsi128_si256(halves));
}
inline Floats LoadRemainingBfloat16s(const uint16_t* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_zextsi128_si256(halves));
  return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}
// The largest of 16 bits each without their sign; num_elements is a multiple of 8.
inline uint16_t LargestMagnitude(const uint16_t* p, int num_elements) {
  constexpr int kElements = 32;
  __m512i largest = _mm512_setzero_si512();  // twice the magnitudes
  for (int i = 0; i < num_elements; i += kElements) {
    const int left = num_elements - i;
    const __mmask32 mask = left < kElements ? (1u << left) - 1 : ~0u;
    const __m512i x = _mm512_maskz_loadu_epi16(mask, p + i);
    largest = _mm512_max_epu16(largest, _mm512_add_epi16(x, x));
  }
  const __m256i half =
      _mm256_max_epu16(_mm512_castsi512_si256(largest), _mm512_extracti64x4_epi64(largest, 1));
  const __m128i quarter =
      _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1)));
  return static_cast<uint16_t>(~_mm_cvtsi128_si32(least)) >> 1;
}
inline Floats LoadHalves(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void StoreHalves(uint16_t* p, Floats x) {
  constexpr int kRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, kRounding));
}
inline Floats LoadBfloat16s(const uint16_t* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline void StoreBfloat16s(uint16_t* p, Floats x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounding = _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, rounding), 16);
  const Mask is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i halves = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(halves));
}

// Dot products of codes with multipliers of 16 bits, by VNNI: four products of bytes are summed
// into 32 bits. A multiplier's high and low bytes have sums of their own.
//
// VNNI multiplies signed bytes with unsigned ones. Codes are signed, and so are the high bytes of
// q's numbers: there K's codes have 128 added, and what that adds to the products is taken off
// where sums start.
inline constexpr int kKeyMultiplierBits = 15;  // below the sign
inline constexpr float kMaxWeightMultiplier = 65535.0f;

struct Multiplier {
  int32_t high;  // bytes of the four numbers for a quad's codes
  int32_t low;
};
struct DotSums {
  __m512i high;
  __m512i low;
};
struct KeyCodes {
  __m512i codes;
  __m512i codes_plus_128;
};
using ValueCodes = __m512i;
struct Multipliers {
  __m512i high;
  __m512i low;
};

inline DotSums NoSums() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
inline KeyCodes ToKeyCodes(Quads quads) {
  return {quads, _mm512_xor_si512(quads, _mm512_set1_epi8(-128))};
}
inline ValueCodes ToValueCodes(Quads quads) { return quads; }
inline Multipliers BroadcastMultiplier(const Multiplier& x) {
  return {_mm512_set1_epi32(x.high), _mm512_set1_epi32(x.low)};
}
inline DotSums AddKeyProducts(DotSums sums, const KeyCodes& k, const Multipliers& x) {
  return {_mm512_dpbusd_epi32(sums.high, k.codes_plus_128, x.high),
          _mm512_dpbusd_epi32(sums.low, x.low, k.codes)};
}
inline DotSums AddValueProducts(DotSums sums, ValueCodes codes, const Multipliers& x) {
  return {_mm512_dpbusd_epi32(sums.high, x.high, codes),
          _mm512_dpbusd_epi32(sums.low, x.low, codes)};
}
inline Floats ToFloats(DotSums sums) {
  return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sums.high, 8), sums.low));
}

// Writes the bytes of four quads' numbers.
inline void StoreMultipliers(Multiplier* p, __m512i high, __m512i low) {
  const __m128i high_bytes = _mm512_cvtepi32_epi8(high), low_bytes = _mm512_cvtepi32_epi8(low);
  auto* target = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(target, _mm_unpacklo_epi32(high_bytes, low_bytes));
  _mm_storeu_si128(target + 1, _mm_unpackhi_epi32(high_bytes, low_bytes));
}
// Makes multipliers of whole numbers of 16 bits: high is signed, low is not.
inline void StoreKeyMultipliers(Multiplier* p, Floats x) {
  const __m512i numbers = _mm512_cvtps_epi32(x);
  StoreMultipliers(p, _mm512_srai_epi32(numbers, 8), numbers);
}
// Rounds numbers, those of a before those of b, to unsigned multipliers.
inline void StoreWeightMultipliers(Multiplier* p, Floats a, Floats b) {
  const __m512i words = _mm512_packus_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
  // Within 16 bytes there are now a quad of a and one of b, in words.
  const __m512i order =
      _mm512_broadcast_i32x4(_mm_setr_epi8(1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14));
  const __m512i multipliers = _mm512_shuffle_epi8(words, order);
  const __m512i quads = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi64(quads, multipliers));
}

// What sums of products of keys with the high bytes start from: less 128 times their numbers.
inline int32_t KeySumStart(const Multiplier* x, int num_quads) {
  const __m512i offset = _mm512_set1_epi8(-128);  // 128, unsigned
  __m512i sums = _mm512_setzero_si512();          // of high bytes and of low ones in turn
  for (int quad = 0; quad < num_quads; quad += kLanes / 2) {
    sums = _mm512_dpbusd_epi32(sums, offset, _mm512_loadu_si512(x + quad));
  }
  return -_mm512_mask_reduce_add_epi32(0x5555, sums);
}
inline DotSums StartSums(int32_t start) {
  return {_mm512_set1_epi32(start), _mm512_setzero_si512()};
}

// What multipliers leave of q: 8 bits more of it, 0 .. 255.
inline constexpr float kFineUnits = 256.0f;
using FineMultiplier = int32_t;  // unsigned bytes of the four numbers for a quad's codes
using FineSums = __m512i;

inline FineSums NoFineSums() { return _mm512_setzero_si512(); }
inline FineSums AddFineProducts(FineSums sums, Quads codes, FineMultiplier x) {
  return _mm512_dpbusd_epi32(sums, _mm512_set1_epi32(x), codes);
}
inline Floats FineToFloats(FineSums sums) { return _mm512_cvtepi32_ps(sums); }
inline void StoreFineMultipliers(FineMultiplier* p, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}
// Collects the multipliers of quads that have any; returns how many. num_quads is a multiple of 16.
inline int CollectNonZero(const FineMultiplier* dense, int num_quads, FineMultiplier* fine,
                          int32_t* quads) {
  __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int count = 0;
  for (int quad = 0; quad < num_quads; quad += kLanes) {
    const __m512i x = _mm512_loadu_si512(dense + quad);
    const __mmask16 mask = _mm512_test_epi32_mask(x, x);
    _mm512_storeu_si512(fine + count, _mm512_maskz_compress_epi32(mask, x));
    _mm512_storeu_si512(quads + count, _mm512_maskz_compress_epi32(mask, index));
    index = _mm512_add_epi32(index, _mm512_set1_epi32(kLanes));
    count += __builtin_popcount(mask);
  }
  return count;
}

// A running maximum of absolute values, taken on their bits so that NaN counts as large.
using MaxBits = __m512i;
inline MaxBits NoBits() { return _mm512_setzero_si512(); }
inline MaxBits MaxOfBits(MaxBits bits, Floats x) {
  return _mm512_max_epu32(bits, _mm512_castps_si512(_mm512_abs_ps(x)));
}
inline uint32_t ReduceBits(MaxBits bits) { return _mm512_reduce_max_epu32(bits); }

}  // namespace
}  // namespace octavo::cpu

#endif  // OCTAVO_CPU_SIMD_AVX512_H_
