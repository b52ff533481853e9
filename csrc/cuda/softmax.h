// The state of a softmax over a part of the context, and how parts become one.
//
// Everything is in the logarithm to base 2. Weights in the sum count from a reference near the
// largest score, weights that meet V's codes from one near the largest score + log2(V scale): so
// the latter are 2^kReferenceSlack at most, whatever the scales, and may be rounded to FP16 times
// 2^kWeightShift. The second reference is kept as its distance from the first, in which the V scale
// is not lost however large the scores are. A reference moves only when a score exceeds it by
// kReferenceSlack: most tiles need no maximum. The online softmax is Milakov and Gimelshein's
// (2018), the merge of parts that of Flash-Decoding (Dao et al., 2023).

#ifndef OCTAVO_CUDA_SOFTMAX_H_
#define OCTAVO_CUDA_SOFTMAX_H_

#include "cuda/device.h"
#include "octavo/cuda_ops.h"

namespace octavo::cuda {

inline constexpr float kMinusInf = -INFINITY;
inline constexpr float kLargestFloat = 3.402823466e+38f;
inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// Together 15: the largest weight is 2^15, within FP16. Two FP16 terms then keep 22 bits of weights
// down to 2^-9 of the reference's, and all that is above 2^-31 of it.
inline constexpr float kReferenceSlack = 8.0f;
inline constexpr float kWeightShift = 7.0f;

// Scores are finite, whatever they were made of.
__device__ __forceinline__ float ClampScore(float x) {
  return fminf(fmaxf(x, -kLargestFloat), kLargestFloat);
}

// References over nothing: finite, so that a difference is never NaN, and below every other.
__device__ __forceinline__ SoftmaxState EmptyState() {
  return {-kLargestFloat, 0.0f, -kLargestFloat};
}

// Returns a state with its values as they are, counted from a larger reference.
__device__ __forceinline__ SoftmaxState CountedFrom(float max, const SoftmaxState& state) {
  const float distance = state.max - max;
  return {max, state.sum * Exp2(distance), fmaxf(state.value_max + distance, -kLargestFloat)};
}

// Joins another part to a state. The values of either are to be multiplied by ValueFactor.
__device__ __forceinline__ SoftmaxState Merged(const SoftmaxState& x, const SoftmaxState& y) {
  const float max = fmaxf(x.max, y.max);
  const SoftmaxState first = CountedFrom(max, x), second = CountedFrom(max, y);
  return {max, first.sum + second.sum, fmaxf(first.value_max, second.value_max)};
}

// What a part's values are multiplied by in the state that it was merged into.
__device__ __forceinline__ float ValueFactor(const SoftmaxState& part, const SoftmaxState& whole) {
  return Exp2(fminf(CountedFrom(whole.max, part).value_max - whole.value_max, 0.0f));
}

// What turns summed values into the answer: two factors, each of them within FP32 where their
// product might not be.
struct Normalizer {
  float first;
  float second;
};

// Args: sink: logit of the attention sink, or null.
__device__ __forceinline__ Normalizer NormalizerOf(const SoftmaxState& state, const float* sink) {
  if (state.sum == 0.0f) return {0.0f, 0.0f};
  const float sink_score = sink == nullptr ? kMinusInf : ClampScore(LoadGlobal(sink) * kLog2E);
  const SoftmaxState counted = CountedFrom(fmaxf(state.max, sink_score), state);
  const float half = Exp2(0.5f * (counted.value_max - kWeightShift));
  return {half / (counted.sum + Exp2(sink_score - counted.max)), half};
}

// The log-sum-exp, natural, without the sink.
__device__ __forceinline__ float LseOf(const SoftmaxState& state) {
  return state.sum == 0.0f ? kMinusInf : (state.max + Log2(state.sum)) * kLn2;
}

}  // namespace octavo::cuda

#endif  // OCTAVO_CUDA_SOFTMAX_H_
