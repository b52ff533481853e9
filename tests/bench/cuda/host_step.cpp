#include "host_step.h"

namespace octavo::cuda {
namespace {

std::vector<uint16_t> Copied(const uint16_t* elements, int64_t num_elements) {
  if (elements == nullptr) return {};
  return {elements, elements + num_elements};
}

}  // namespace

HostStep::HostStep(const BenchStep& step, int32_t device_idx)
    : batch_(step), spec_(step), device_(device_idx), cache_(spec_.spec(), device_.stream()) {
  const int64_t num_rows = int64_t{step.num_entries} * step.num_tokens;
  const int64_t q_elements = num_rows * step.num_q_heads * step.head_dim;
  const int64_t kv_elements = num_rows * step.num_kv_heads * step.head_dim;
  q_ = Copied(step.q, q_elements);
  k_ = Copied(step.k, kv_elements);
  v_ = Copied(step.v, kv_elements);
  out_.resize(q_elements);
  offences_.resize(step.num_entries);
  step_.batch = batch_.batch();
  step_.dtype = static_cast<int32_t>(DataType::kFloat16);
  step_.q = step.q == nullptr ? nullptr : q_.data();
  step_.k = step.k == nullptr ? nullptr : k_.data();
  step_.v = step.v == nullptr ? nullptr : v_.data();
  step_.out = out_.data();
  step_.offences = offences_.data();
}

}  // namespace octavo::cuda
