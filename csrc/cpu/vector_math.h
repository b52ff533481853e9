// Bounds, exp and tanh over vectors, the latter two to about 1e-7 relative. Include after a
// simd_*.h.
//
// Range reduction and minimax coefficients are those of expf and tanhf in the Cephes library
// (S. L. Moshier, netlib.org/cephes, single precision).

#ifndef OCTAVO_CPU_VECTOR_MATH_H_
#define OCTAVO_CPU_VECTOR_MATH_H_

namespace octavo::cpu {
namespace {

// Below this, exp is taken as zero: the end of FP32's normal range, as subnormal numbers are slow.
inline constexpr float kLowestExponent = -87.0f;

// Bounds x by -limit and limit; NaN stays.
inline Floats Clamp(Floats x, float limit) {
  return Min(Broadcast(limit), Max(Broadcast(-limit), x));
}

// c[0] x^n + c[1] x^(n-1) + ... + c[n], by Horner's rule.
template <int kNumTerms>
inline Floats Polynomial(const float (&c)[kNumTerms], Floats x) {
  Floats y = Broadcast(c[0]);
#pragma GCC unroll 8
  for (int i = 1; i < kNumTerms; ++i) y = Fma(y, x, Broadcast(c[i]));
  return y;
}

// exp(x) for x <= 0, -inf included.
inline Floats ExpOfNonPositive(Floats x) {
  constexpr float kTerms[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                              4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  const Floats bounded = Max(x, Broadcast(kLowestExponent));
  const Floats n = Round(Mul(bounded, Broadcast(1.44269504088896341f)));
  // ln 2 in two parts, so that bounded - n ln 2 keeps its low bits.
  Floats r = Fma(n, Broadcast(-0.693359375f), bounded);
  r = Fma(n, Broadcast(2.12194440e-4f), r);
  const Floats tail = Fma(Polynomial(kTerms, r), Mul(r, r), r);
  const Floats exp = ScaleByPowerOfTwo(Add(tail, Broadcast(1.0f)), n);
  return Select(Less(x, Broadcast(kLowestExponent)), Zero(), exp);
}

// 2^x for x <= 0; 0 below -126, the end of the normal range. To 2e-7; coefficients by Remez'
// algorithm for the relative error on [-1/2, 1/2].
inline Floats Exp2OfNonPositive(Floats x) {
  constexpr float kTerms[] = {1.3276471979e-3f, 9.6755413342e-3f, 5.5507132735e-2f,
                              2.4022119724e-1f, 6.9314696706e-1f, 1.0000000717f};
  const Floats lowest = Broadcast(-126.0f);
  const Floats bounded = Max(x, lowest);
  const Floats n = Round(bounded);
  const Floats power = ScaleByPowerOfTwo(Polynomial(kTerms, Sub(bounded, n)), n);
  return Select(Less(x, lowest), Zero(), power);
}

inline Floats Tanh(Floats x) {
  constexpr float kTerms[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f,
                              1.33314422036e-1f, -3.33332819422e-1f};
  const Floats magnitude = Abs(x);
  const Floats square = Mul(x, x);
  const Floats near_zero = Fma(Mul(Polynomial(kTerms, square), square), x, x);
  const Floats decay = ExpOfNonPositive(Mul(magnitude, Broadcast(-2.0f)));
  const Floats one = Broadcast(1.0f);
  const Floats elsewhere = CopySign(Div(Sub(one, decay), Add(one, decay)), x);
  return Select(Less(magnitude, Broadcast(0.625f)), near_zero, elsewhere);
}

}  // namespace
}  // namespace octavo::cpu

#endif  // OCTAVO_CPU_VECTOR_MATH_H_
