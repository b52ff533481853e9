#include "resident_step.h"

#include <algorithm>

#include "three_pass.h"

namespace octavo::cuda {
namespace {

constexpr int kNanByte = 0xff;
constexpr int64_t kElementBytes = 2;

// The step as the C ABI takes it; its answer goes nowhere.
Step StepOf(const BenchStep& step, const RaggedBatch& batch) {
  Step arrays = {};
  arrays.batch = batch;
  arrays.dtype = static_cast<int32_t>(DataType::kFloat16);
  arrays.k = step.k;
  arrays.v = step.v;
  arrays.q = step.q;
  return arrays;
}

}  // namespace

ResidentStep::ResidentStep(const BenchStep& step)
    : batch_(step), spec_(step), cache_(spec_.spec(), nullptr) {
  buffers_.Prepare(cache_, StepOf(step, batch_.batch()), nullptr);
  max_kv_len_ = *std::max_element(step.kv_lens, step.kv_lens + step.num_entries);
  is_one_token_each_ = step.q != nullptr && step.num_tokens == 1;
  num_out_elements_ =
      int64_t{step.num_entries} * step.num_tokens * step.num_q_heads * step.head_dim;
  const Buffer& device = buffers_.on_device();
  Check(cudaMemsetAsync(device.At(), kNanByte, device.capacity(), nullptr), "poison outputs");
  buffers_.CopyIn(nullptr);
  Check(cudaStreamSynchronize(nullptr), "copy a step in");
  Check(cudaEventCreateWithFlags(&done_, cudaEventDisableTiming), "create an event");
}

ResidentStep::~ResidentStep() { cudaEventDestroy(done_); }

BenchPlan ResidentStep::plan() const {
  BenchPlan plan = {};
  plan.num_items = static_cast<int32_t>(buffers_.plan().items.size());
  plan.num_partials = buffers_.plan().num_partials;
  for (const DecodeItem& item : buffers_.plan().items) {
    plan.longest_span = std::max(plan.longest_span, item.end - item.begin);
  }
  plan.resident_blocks = cache_.occupancy().resident_blocks;
  plan.num_multiprocessors = cache_.occupancy().num_multiprocessors;
  return plan;
}

void ResidentStep::LaunchKernels(cudaStream_t stream) const { buffers_.Launch(cache_, stream); }

void ResidentStep::LaunchThreePass(cudaStream_t stream) const {
  if (!is_one_token_each_) {
    throw Failure{kInvalid, "the three-pass kernel takes one query token an entry"};
  }
  ThreePassParams params = {};
  params.cache = cache_.on_device();
  params.batch = buffers_.BatchOnDevice();
  params.max_kv_len = max_kv_len_;
  params.q = buffers_.on_device().At<uint16_t>(buffers_.layout().q);
  params.out = buffers_.on_device().At<uint16_t>(buffers_.layout().out);
  Check(DecodeInThreePasses(params, stream), "launch the three-pass kernel");
}

int64_t ResidentStep::OutBytes() const { return num_out_elements_ * kElementBytes; }

void ResidentStep::TakeOut(uint16_t* out, cudaStream_t stream) {
  char* source = buffers_.on_device().At(buffers_.layout().out);
  Check(cudaMemcpyAsync(out, source, OutBytes(), cudaMemcpyDeviceToHost, stream), "copy out");
  Check(cudaMemsetAsync(source, kNanByte, OutBytes(), stream), "poison outputs");
  Check(cudaStreamSynchronize(stream), "finish a step");
}

void ResidentStep::Run(cudaStream_t stream) {
  buffers_.CopyIn(stream);
  LaunchKernels(stream);
  buffers_.CopyOut(stream);
  Check(cudaEventRecord(done_, stream), "record an event");
  Check(cudaEventSynchronize(done_), "finish a step");
}

}  // namespace octavo::cuda
