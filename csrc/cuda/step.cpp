#include "cuda/step.h"

#include <cstdio>
#include <cstring>

#include "octavo/batch_checks.h"
#include "octavo/offence.h"

namespace octavo::cuda {
namespace {

constexpr int kLeastComputeMajor = 8;  // asynchronous copies, and products of 16 x 8 x 16

void CheckStatus(Status status) {
  if (status != Status::kOk) throw Failure{kInvalid, StatusMessage(status)};
}

std::string VersionText(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// The driver's refusals as sentences that say what to do.
void CheckDriver(cudaError_t error) {
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (driver == 0) throw Failure{kUnsupported, "this machine has no NVIDIA driver"};
    throw Failure{kUnsupported, "the NVIDIA driver runs CUDA " + VersionText(driver) +
                                    ", these kernels need " + VersionText(runtime) +
                                    "; install a newer driver"};
  }
  if (error == cudaErrorNoDevice) throw Failure{kUnsupported, "this machine has no NVIDIA GPU"};
  Check(error, "ask for devices");
}

void CheckCompute(const DeviceProperties& properties) {
  if (properties.compute_major >= kLeastComputeMajor) return;
  throw Failure{kUnsupported, std::string(properties.name) + " has compute capability " +
                                  std::to_string(properties.compute_major) + "." +
                                  std::to_string(properties.compute_minor) +
                                  ", the kernels need 8.0 or more"};
}

int32_t Log2OfBlockSize(int32_t block_size) {
  int32_t shift = 0;
  while ((1 << shift) < block_size) ++shift;
  return shift;
}

// Copies an array into a buffer; returns the offset behind it, which is a multiple of 16 again.
int64_t Put(const void* source, int64_t num_bytes, int64_t offset, char* target) {
  std::memcpy(target + offset, source, num_bytes);
  return offset + (num_bytes + 15) / 16 * 16;
}

}  // namespace

// ---- Cache --------------------------------------------------------------------------------------

Cache::Cache(const CacheSpec& spec, cudaStream_t stream)
    : windows_(spec.window, spec.window + spec.num_layers) {
  Check(PrepareDecode(spec.head_dim, &occupancy_), "load the decode kernels");
  const int64_t sinks_bytes =
      spec.sinks == nullptr ? 0 : int64_t{spec.num_layers} * spec.num_q_heads * 4;
  const int64_t layers_bytes = int64_t{spec.num_layers} * sizeof(PagedInt8Layer);
  const int64_t options_bytes = int64_t{spec.num_layers} * sizeof(LayerOptions);
  tables_.Reserve(layers_bytes + options_bytes + sinks_bytes + 32);
  const int64_t options_offset = (layers_bytes + 15) / 16 * 16;
  const int64_t sinks_offset = options_offset + (options_bytes + 15) / 16 * 16;
  std::vector<LayerOptions> options(spec.num_layers);
  for (int32_t layer = 0; layer < spec.num_layers; ++layer) {
    options[layer] = {spec.sm_scale[layer], spec.soft_cap[layer], spec.window[layer], nullptr};
    if (spec.sinks == nullptr) continue;
    options[layer].sinks = tables_.At<float>(sinks_offset) + int64_t{layer} * spec.num_q_heads;
  }
  std::vector<char> tables(sinks_offset + sinks_bytes);
  Put(spec.layers, layers_bytes, 0, tables.data());
  Put(options.data(), options_bytes, options_offset, tables.data());
  if (sinks_bytes > 0) std::memcpy(tables.data() + sinks_offset, spec.sinks, sinks_bytes);
  Check(cudaMemcpyAsync(tables_.At(), tables.data(), tables.size(), cudaMemcpyHostToDevice, stream),
        "copy the cache's tables");
  Check(cudaStreamSynchronize(stream), "copy the cache's tables");
  on_device_.num_layers = spec.num_layers;
  on_device_.num_blocks = spec.num_blocks;
  on_device_.num_q_heads = spec.num_q_heads;
  on_device_.num_kv_heads = spec.num_kv_heads;
  on_device_.head_dim = spec.head_dim;
  on_device_.block_size = spec.block_size;
  on_device_.is_deterministic = spec.is_deterministic != 0;
  on_device_.layers = tables_.At<PagedInt8Layer>();
  on_device_.options = tables_.At<LayerOptions>(options_offset);
}

// ---- Device -------------------------------------------------------------------------------------

Device::Device(int device_idx) : device_idx_(device_idx) {
  int num_devices = 0;
  CheckDriver(cudaGetDeviceCount(&num_devices));
  if (device_idx < 0 || device_idx >= num_devices) {
    throw Failure{kUnsupported, "there is no GPU " + std::to_string(device_idx) + ", only " +
                                    std::to_string(num_devices)};
  }
  CheckCompute(Properties());
  Use();
  Check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "create a stream");
  Check(cudaEventCreateWithFlags(&done_, cudaEventDisableTiming), "create an event");
}

Device::~Device() {
  if (done_ != nullptr) cudaEventDestroy(done_);
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

DeviceProperties Device::Properties() const {
  cudaDeviceProp found;
  Check(cudaGetDeviceProperties(&found, device_idx_), "read the GPU's properties");
  DeviceProperties properties = {};
  std::snprintf(properties.name, sizeof(properties.name), "%s", found.name);
  properties.compute_major = found.major;
  properties.compute_minor = found.minor;
  properties.num_multiprocessors = found.multiProcessorCount;
  Check(cudaDriverGetVersion(&properties.driver_version), "read the driver's version");
  return properties;
}

int64_t Device::FreeBytes() const {
  Use();
  size_t num_free = 0, num_total = 0;
  Check(cudaMemGetInfo(&num_free, &num_total), "read the GPU's free memory");
  return static_cast<int64_t>(num_free);
}

void Device::Use() const { Check(cudaSetDevice(device_idx_), "use the GPU"); }

void Device::Run(const Cache& cache, const Step& step) {
  Use();
  Plan(cache, step);
  Reserve(cache);
  Stage(step);
  Check(cudaMemcpyAsync(staging_.At(), pinned_.At(), layout_.InBytes(), cudaMemcpyHostToDevice,
                        stream_),
        "copy a step in");
  Launch(cache, step);
  Check(cudaMemcpyAsync(pinned_.At(layout_.offences), staging_.At(layout_.offences),
                        layout_.OutBytes(), cudaMemcpyDeviceToHost, stream_),
        "copy an answer out");
  Wait();
  Unstage(step);
}

// Checks a step, plans its attention, and lays its arrays out.
void Device::Plan(const Cache& cache, const Step& step) {
  const PagedInt8Cache& shape = cache.on_device();
  plan_.items.clear();
  if (step.k != nullptr) CheckStatus(CheckAppendBatch(shape, step.batch));
  if (step.q != nullptr) {
    CheckStatus(CheckDecodeBatch(shape, step.batch));
    PlanDecode(shape, cache.windows(), step.batch, cache.occupancy(), &plan_);
  }
  shape_.num_entries = step.batch.num_entries;
  shape_.max_num_blocks = step.batch.max_num_blocks;
  shape_.total_tokens = step.batch.TotalTokens();
  shape_.num_items = static_cast<int64_t>(plan_.items.size());
  shape_.num_q_heads = shape.num_q_heads;
  shape_.num_kv_heads = shape.num_kv_heads;
  shape_.head_dim = shape.head_dim;
  shape_.element_bytes = ElementBytes(static_cast<DataType>(step.dtype));
  shape_.appends = step.k != nullptr;
  shape_.attends = step.q != nullptr;
  shape_.returns_lse = step.lse != nullptr;
  layout_ = LayOutStaging(shape_);
}

// Grows the buffers to what this step needs.
void Device::Reserve(const Cache& cache) {
  pinned_.Reserve(layout_.total_bytes);
  staging_.Reserve(layout_.total_bytes);
  if (plan_.items.empty()) return;
  const PagedInt8Cache& shape = cache.on_device();
  const int64_t num_rows = int64_t{plan_.num_partials} * shape.num_kv_heads * kTileRows;
  partials_.Reserve(num_rows * static_cast<int64_t>(sizeof(SoftmaxState)));
  partial_values_.Reserve(num_rows * shape.head_dim * static_cast<int64_t>(sizeof(float)));
  if (counters_.Reserve(int64_t{plan_.num_counters} * shape.num_kv_heads * 4)) {
    Check(cudaMemsetAsync(counters_.At(), 0, counters_.capacity(), stream_), "clear counters");
  }
}

// Copies a step's arrays into the pinned buffer.
void Device::Stage(const Step& step) {
  const auto put = [this](int64_t offset, const void* source, int64_t num_bytes) {
    if (num_bytes > 0) std::memcpy(pinned_.At(offset), source, num_bytes);
  };
  const RaggedBatch& batch = step.batch;
  const int64_t num_entries = shape_.num_entries;
  put(layout_.layers, batch.layers, num_entries * 4);
  put(layout_.start_pos, batch.start_pos, num_entries * 4);
  put(layout_.token_starts, batch.token_starts, (num_entries + 1) * 4);
  put(layout_.kv_lens, batch.kv_lens, num_entries * 4);
  put(layout_.is_causal, batch.is_causal, num_entries);
  put(layout_.block_tables, batch.block_tables, num_entries * shape_.max_num_blocks * 4);
  put(layout_.items, plan_.items.data(),
      shape_.num_items * static_cast<int64_t>(sizeof(DecodeItem)));
  const int64_t row_bytes = shape_.head_dim * shape_.element_bytes;
  if (shape_.attends) put(layout_.q, step.q, shape_.total_tokens * shape_.num_q_heads * row_bytes);
  auto* offences = pinned_.At<int64_t>(layout_.offences);
  for (int64_t entry = 0; entry < num_entries; ++entry) offences[entry] = kNoOffence;
  if (!shape_.appends) return;
  const int64_t kv_bytes = shape_.total_tokens * shape_.num_kv_heads * row_bytes;
  put(layout_.k, step.k, kv_bytes);
  put(layout_.v, step.v, kv_bytes);
  put(layout_.slot_mapping, batch.slot_mapping, shape_.total_tokens * 8);
  auto* row_entries = pinned_.At<int32_t>(layout_.row_entries);
  for (int32_t entry = 0; entry < batch.num_entries; ++entry) {
    for (int32_t row = batch.token_starts[entry]; row < batch.token_starts[entry + 1]; ++row) {
      row_entries[row] = entry;
    }
  }
}

RaggedBatch Device::BatchOnDevice(const RaggedBatch& batch) const {
  RaggedBatch on_device = batch;
  on_device.layers = staging_.At<int32_t>(layout_.layers);
  on_device.start_pos = staging_.At<int32_t>(layout_.start_pos);
  on_device.token_starts = staging_.At<int32_t>(layout_.token_starts);
  on_device.kv_lens = staging_.At<int32_t>(layout_.kv_lens);
  on_device.is_causal = staging_.At<bool>(layout_.is_causal);
  on_device.block_tables = staging_.At<int32_t>(layout_.block_tables);
  on_device.slot_mapping = staging_.At<int64_t>(layout_.slot_mapping);
  return on_device;
}

void Device::Launch(const Cache& cache, const Step& step) {
  const RaggedBatch batch = BatchOnDevice(step.batch);
  const auto dtype = static_cast<DataType>(step.dtype);
  auto* offences = staging_.At<int64_t>(layout_.offences);
  if (shape_.appends) {
    AppendParams params = {};
    params.cache = cache.on_device();
    params.batch = batch;
    params.dtype = dtype;
    params.num_rows = static_cast<int32_t>(shape_.total_tokens);
    params.row_entries = staging_.At<int32_t>(layout_.row_entries);
    params.k = staging_.At(layout_.k);
    params.v = staging_.At(layout_.v);
    params.offences = offences;
    Check(AppendPagedInt8(params, stream_), "launch the append kernel");
  }
  if (!shape_.attends) return;
  DecodeParams params = {};
  params.cache = cache.on_device();
  params.batch = batch;
  params.dtype = dtype;
  params.block_shift = Log2OfBlockSize(params.cache.block_size);
  params.num_items = static_cast<int32_t>(shape_.num_items);
  params.items = staging_.At<DecodeItem>(layout_.items);
  params.q = staging_.At(layout_.q);
  params.out = staging_.At(layout_.out);
  params.lse = shape_.returns_lse ? staging_.At<float>(layout_.lse) : nullptr;
  params.offences = offences;
  params.partials = partials_.At<SoftmaxState>();
  params.partial_values = partial_values_.At<float>();
  params.counters = counters_.At<int32_t>();
  Check(DecodePagedInt8(params, stream_), "launch the decode kernel");
}

void Device::Wait() {
  Check(cudaEventRecord(done_, stream_), "record an event");
  Check(cudaEventSynchronize(done_), "finish a step");
}

// Copies the answer out of the pinned buffer.
void Device::Unstage(const Step& step) const {
  std::memcpy(step.offences, pinned_.At(layout_.offences), shape_.num_entries * 8);
  if (!shape_.attends) return;
  const int64_t num_rows = shape_.total_tokens * shape_.num_q_heads;
  std::memcpy(step.out, pinned_.At(layout_.out), num_rows * shape_.head_dim * shape_.element_bytes);
  if (shape_.returns_lse) std::memcpy(step.lse, pinned_.At(layout_.lse), num_rows * 4);
}

void Device::CopyBlocks(const Cache& cache, const int64_t (*pairs)[2], int64_t num_pairs) {
  Use();
  const int64_t num_blocks = cache.on_device().num_blocks;
  for (int64_t i = 0; i < num_pairs; ++i) {
    for (const int64_t block : pairs[i]) {
      if (block < 0 || block >= num_blocks) CheckStatus(Status::kBlockOutOfRange);
    }
  }
  for (int64_t i = 0; i < num_pairs; ++i) {
    const auto source = static_cast<int32_t>(pairs[i][0]),
               target = static_cast<int32_t>(pairs[i][1]);
    Check(CopyBlock(cache.on_device(), source, target, stream_), "launch the copy kernel");
  }
  Wait();
}

}  // namespace octavo::cuda
