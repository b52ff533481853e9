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

inline Floats LoadCodes(const int8_t* p) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
}
// The 8 codes that a row of a head_dim that 16 does not divide ends with; the other lanes are zero.
inline Floats LoadRemainingCodes(const int8_t* p) {
  const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
}
inline void StoreCodes(int8_t* p, Floats x) {
  const __m128i codes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), codes);
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
