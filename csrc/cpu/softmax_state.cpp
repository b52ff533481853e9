#include <algorithm>
#include <cmath>
#include <limits>

#include "isa.h"

namespace octavo::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// exp(x - max), where nothing was attended to (both -inf) is no weight rather than NaN.
float WeightAgainst(float x, float max) { return x == -kInf ? 0.0f : std::exp(x - max); }

}  // namespace

void SoftmaxState::Merge(const SoftmaxState& other, float* own_factor, float* other_factor) {
  const float merged_max = std::max(max, other.max);
  *own_factor = WeightAgainst(max, merged_max);
  *other_factor = WeightAgainst(other.max, merged_max);
  sum = sum * *own_factor + other.sum * *other_factor;
  max = merged_max;
}

float SoftmaxState::Normalize(const float* sink) const {
  if (sum == 0.0f) return 0.0f;
  if (sink == nullptr) return 1.0f / sum;
  const float reference = std::max(max, *sink);
  const float own_factor = WeightAgainst(max, reference);
  return own_factor / (sum * own_factor + WeightAgainst(*sink, reference));
}

float SoftmaxState::Lse() const { return sum == 0.0f ? -kInf : max + std::log(sum); }

}  // namespace octavo::cpu
