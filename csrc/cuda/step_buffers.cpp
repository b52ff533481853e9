#include "cuda/step_buffers.h"

#include <algorithm>

#include "octavo/batch_checks.h"
#include "octavo/offence.h"

namespace octavo::cuda {
namespace {

void CheckStatus(Status status) {
  if (status != Status::kOk) throw Failure{kInvalid, StatusMessage(status)};
}

int32_t Log2OfBlockSize(int32_t block_size) {
  int32_t shift = 0;
  while ((1 << shift) < block_size) ++shift;
  return shift;
}

// Copies an array into a buffer.
template <typename T>
void Put(const T* source, int64_t count, T* target) {
  std::copy_n(source, count, target);
}

}  // namespace

void StepBuffers::Prepare(const Cache& cache, const Step& step, cudaStream_t stream) {
  Plan(cache, step);
  Reserve(stream);
  Stage(step);
}

// Checks a step, plans its attention, and lays its arrays out.
void StepBuffers::Plan(const Cache& cache, const Step& step) {
  const PagedInt8Cache& model = cache.on_device();
  plan_.items.clear();
  if (step.k != nullptr) CheckStatus(CheckAppendBatch(model, step.batch));
  if (step.q != nullptr) {
    CheckStatus(CheckDecodeBatch(model, step.batch));
    PlanDecode(model, cache.windows(), step.batch, cache.occupancy(), &plan_);
  }
  dtype_ = static_cast<DataType>(step.dtype);
  shape_.num_entries = step.batch.num_entries;
  shape_.max_num_blocks = step.batch.max_num_blocks;
  shape_.total_tokens = step.batch.TotalTokens();
  shape_.num_items = static_cast<int64_t>(plan_.items.size());
  shape_.num_q_heads = model.num_q_heads;
  shape_.num_kv_heads = model.num_kv_heads;
  shape_.head_dim = model.head_dim;
  shape_.element_bytes = ElementBytes(dtype_);
  shape_.appends = step.k != nullptr;
  shape_.attends = step.q != nullptr;
  shape_.returns_lse = step.lse != nullptr;
  layout_ = LayOutStaging(shape_);
}

// Grows the buffers to what this step needs.
void StepBuffers::Reserve(cudaStream_t stream) {
  pinned_.Reserve(layout_.total_bytes);
  staging_.Reserve(layout_.total_bytes);
  if (plan_.items.empty()) return;
  const int64_t num_rows = int64_t{plan_.num_partials} * shape_.num_kv_heads * kTileRows;
  partials_.Reserve(num_rows * static_cast<int64_t>(sizeof(SoftmaxState)));
  partial_values_.Reserve(num_rows * shape_.head_dim * static_cast<int64_t>(sizeof(float)));
  const int64_t num_counters = int64_t{plan_.num_counters} * shape_.num_kv_heads;
  if (counters_.Reserve(num_counters * static_cast<int64_t>(sizeof(int32_t)))) {
    Check(cudaMemsetAsync(counters_.At(), 0, counters_.capacity(), stream), "clear counters");
  }
}

// Copies a step's arrays into the pinned buffer.
void StepBuffers::Stage(const Step& step) {
  const RaggedBatch& batch = step.batch;
  const int64_t num_entries = shape_.num_entries;
  Put(batch.layers, num_entries, pinned_.At<int32_t>(layout_.layers));
  Put(batch.start_pos, num_entries, pinned_.At<int32_t>(layout_.start_pos));
  Put(batch.token_starts, num_entries + 1, pinned_.At<int32_t>(layout_.token_starts));
  Put(batch.kv_lens, num_entries, pinned_.At<int32_t>(layout_.kv_lens));
  Put(batch.is_causal, num_entries, pinned_.At<bool>(layout_.is_causal));
  Put(batch.block_tables, num_entries * shape_.max_num_blocks,
      pinned_.At<int32_t>(layout_.block_tables));
  Put(plan_.items.data(), shape_.num_items, pinned_.At<DecodeItem>(layout_.items));
  std::fill_n(pinned_.At<int64_t>(layout_.offences), num_entries, kNoOffence);
  StageRows(step);
}

// Copies what there is of q, k and v, and for the latter where each row goes.
void StepBuffers::StageRows(const Step& step) {
  const int64_t head_bytes = shape_.total_tokens * shape_.head_dim * shape_.element_bytes;
  const auto bytes = [](const void* source) { return static_cast<const char*>(source); };
  if (shape_.attends) Put(bytes(step.q), head_bytes * shape_.num_q_heads, pinned_.At(layout_.q));
  if (!shape_.appends) return;
  Put(bytes(step.k), head_bytes * shape_.num_kv_heads, pinned_.At(layout_.k));
  Put(bytes(step.v), head_bytes * shape_.num_kv_heads, pinned_.At(layout_.v));
  const RaggedBatch& batch = step.batch;
  Put(batch.slot_mapping, shape_.total_tokens, pinned_.At<int64_t>(layout_.slot_mapping));
  auto* row_entries = pinned_.At<int32_t>(layout_.row_entries);
  for (int32_t entry = 0; entry < batch.num_entries; ++entry) {
    std::fill_n(row_entries + batch.token_starts[entry], batch.NumTokens(entry), entry);
  }
}

void StepBuffers::CopyIn(cudaStream_t stream) {
  Check(cudaMemcpyAsync(staging_.At(), pinned_.At(), layout_.InBytes(), cudaMemcpyHostToDevice,
                        stream),
        "copy a step in");
}

void StepBuffers::Launch(const Cache& cache, cudaStream_t stream) const {
  if (shape_.appends) LaunchAppend(cache, stream);
  if (shape_.attends) LaunchDecode(cache, stream);
}

void StepBuffers::CopyOut(cudaStream_t stream) {
  Check(cudaMemcpyAsync(pinned_.At(layout_.offences), staging_.At(layout_.offences),
                        layout_.OutBytes(), cudaMemcpyDeviceToHost, stream),
        "copy an answer out");
}

void StepBuffers::Finish(const Step& step) const {
  Put(pinned_.At<int64_t>(layout_.offences), shape_.num_entries, step.offences);
  if (!shape_.attends) return;
  const int64_t num_rows = shape_.total_tokens * shape_.num_q_heads;
  Put(pinned_.At(layout_.out), num_rows * shape_.head_dim * shape_.element_bytes,
      static_cast<char*>(step.out));
  if (shape_.returns_lse) Put(pinned_.At<float>(layout_.lse), num_rows, step.lse);
}

RaggedBatch StepBuffers::BatchOnDevice() const {
  RaggedBatch batch = {};
  batch.num_entries = static_cast<int32_t>(shape_.num_entries);
  batch.max_num_blocks = static_cast<int32_t>(shape_.max_num_blocks);
  batch.layers = staging_.At<int32_t>(layout_.layers);
  batch.start_pos = staging_.At<int32_t>(layout_.start_pos);
  batch.token_starts = staging_.At<int32_t>(layout_.token_starts);
  batch.kv_lens = staging_.At<int32_t>(layout_.kv_lens);
  batch.is_causal = staging_.At<bool>(layout_.is_causal);
  batch.block_tables = staging_.At<int32_t>(layout_.block_tables);
  batch.slot_mapping = staging_.At<int64_t>(layout_.slot_mapping);
  return batch;
}

void StepBuffers::LaunchAppend(const Cache& cache, cudaStream_t stream) const {
  AppendParams params = {};
  params.cache = cache.on_device();
  params.batch = BatchOnDevice();
  params.dtype = dtype_;
  params.num_rows = static_cast<int32_t>(shape_.total_tokens);
  params.row_entries = staging_.At<int32_t>(layout_.row_entries);
  params.k = staging_.At(layout_.k);
  params.v = staging_.At(layout_.v);
  params.offences = staging_.At<int64_t>(layout_.offences);
  Check(AppendPagedInt8(params, stream), "launch the append kernel");
}

void StepBuffers::LaunchDecode(const Cache& cache, cudaStream_t stream) const {
  DecodeParams params = {};
  params.cache = cache.on_device();
  params.batch = BatchOnDevice();
  params.dtype = dtype_;
  params.block_shift = Log2OfBlockSize(params.cache.block_size);
  params.num_items = static_cast<int32_t>(shape_.num_items);
  params.items = staging_.At<DecodeItem>(layout_.items);
  params.q = staging_.At(layout_.q);
  params.out = staging_.At(layout_.out);
  params.lse = shape_.returns_lse ? staging_.At<float>(layout_.lse) : nullptr;
  params.offences = staging_.At<int64_t>(layout_.offences);
  params.partials = partials_.At<SoftmaxState>();
  params.partial_values = partial_values_.At<float>();
  params.counters = counters_.At<int32_t>();
  Check(DecodePagedInt8(params, stream), "launch the decode kernel");
}

}  // namespace octavo::cuda
