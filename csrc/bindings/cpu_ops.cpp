// torch.ops.octavo_cpu: checks tensors, fills the params structs and calls the launchers.
//
// A runtime (kernels and threads) and a cache (a model's pools and options) are made once and then
// named by a handle: torch converts an integer argument in a tenth of the time that an object
// takes.

#include "octavo/cpu_ops.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "isa.h"
#include "layout.h"
#include "pool_memory.h"
#include "runtime.h"
#include "thread_pool.h"

namespace octavo {
namespace {

using at::Tensor;
using Shape = std::vector<int64_t>;

std::string ShapeText(at::IntArrayRef shape) {
  std::string text = "[";
  for (const int64_t extent : shape) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(extent);
  }
  return text + "]";
}

// Checks a tensor; every message about one comes from here.
void check_tensor(const char* name, const Tensor& tensor, at::ScalarType dtype,
                  const Shape& shape) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype && tensor.sizes() == at::IntArrayRef(shape), name,
                    " must be ", ShapeText(shape), " ", dtype, ", got ", ShapeText(tensor.sizes()),
                    " ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.is_cpu() && tensor.is_contiguous(), name,
                    " must be contiguous in host memory");
}

void check_status(const char* op, Status status) {
  TORCH_CHECK_VALUE(status == Status::kOk, op, ": ", StatusMessage(status));
}

DataType ToDataType(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DataType::kFloat32;
    case at::kHalf:
      return DataType::kFloat16;
    case at::kBFloat16:
      return DataType::kBfloat16;
    default:
      TORCH_CHECK_VALUE(false, name, " must be float32, float16 or bfloat16, got ",
                        tensor.scalar_type());
  }
}

// Objects of one kind by their handles.
template <typename T>
class Registry {
 public:
  explicit Registry(const char* kind) : kind_(kind) {}

  int64_t Add(std::shared_ptr<T> object) {
    std::lock_guard<std::mutex> lock(mutex_);
    objects_.emplace(++last_handle_, std::move(object));
    return last_handle_;
  }

  // The object lives at least as long as what is returned.
  std::shared_ptr<T> Get(int64_t handle) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(handle);
    TORCH_CHECK_VALUE(found != objects_.end(), "no open ", kind_, " has the handle ", handle);
    return found->second;
  }

  void Remove(int64_t handle) {
    std::shared_ptr<T> object = Get(handle);  // destroyed last, outside the lock
    std::lock_guard<std::mutex> lock(mutex_);
    objects_.erase(handle);
  }

 private:
  const char* kind_;
  std::mutex mutex_;
  int64_t last_handle_ = 0;
  std::unordered_map<int64_t, std::shared_ptr<T>> objects_;
};

// Kernels and threads; calls take turns.
struct SharedRuntime {
  SharedRuntime(const cpu::IsaKernels& kernels, int num_threads, std::vector<int> cores)
      : runtime(kernels, num_threads, std::move(cores)) {}

  cpu::Runtime runtime;
  std::mutex mutex;
};

// Never destroyed: at exit, threads may outlive static objects.
Registry<SharedRuntime>& Runtimes() {
  static auto* registry = new Registry<SharedRuntime>("runtime");
  return *registry;
}

// num_threads: 0 = one for each core that this thread may run on.
// pin_threads: bind thread i to the i-th of those cores.
int64_t make_runtime(int64_t num_threads, const std::string& isa, bool pin_threads) {
  const cpu::IsaKernels* kernels = cpu::FindKernels(isa.c_str());
  TORCH_CHECK_VALUE(kernels != nullptr, "this machine has no instruction set ", isa);
  TORCH_CHECK_VALUE(num_threads >= 0, "num_threads must not be negative, got ", num_threads);
  std::vector<int> cores = cpu::AvailableCores();
  const auto num_cores = static_cast<int64_t>(cores.size());
  const int64_t count = num_threads > 0 ? num_threads : num_cores;
  TORCH_CHECK_VALUE(!pin_threads || count <= num_cores,
                    "pin_threads gives each thread a core of its own: num_threads is ", count,
                    ", and this process may use ", num_cores,
                    " cores; lower num_threads, or leave pin_threads out");
  if (!pin_threads) cores.clear();
  return Runtimes().Add(
      std::make_shared<SharedRuntime>(*kernels, static_cast<int>(count), std::move(cores)));
}

void free_runtime(int64_t handle) { Runtimes().Remove(handle); }

std::string runtime_isa(int64_t handle) { return Runtimes().Get(handle)->runtime.kernels.name; }

int64_t runtime_threads(int64_t handle) {
  return Runtimes().Get(handle)->runtime.threads.num_threads();
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const auto* kernels : {cpu::Avx512Kernels(), cpu::Avx2Kernels(), cpu::PortableKernels()}) {
    if (kernels != nullptr) names.emplace_back(kernels->name);
  }
  return names;
}

// Returns zeroed memory for a pool, [num_bytes] int8, which lives as long as the tensor.
Tensor alloc_pool(int64_t runtime_handle, int64_t num_bytes) {
  TORCH_CHECK_VALUE(num_bytes > 0, "num_bytes must be positive, got ", num_bytes);
  const int num_threads = Runtimes().Get(runtime_handle)->runtime.threads.num_threads();
  const auto size = static_cast<size_t>(num_bytes);
  void* pool = cpu::MapPool(size, num_threads);
  TORCH_CHECK(pool != nullptr, "the system has no ", num_bytes, " bytes of memory");
  return at::from_blob(
      pool, {num_bytes}, [size](void* memory) { cpu::UnmapPool(memory, size); }, at::kChar);
}

// The pools and options of one model, with the tensors that they point into.
struct BoundCache {
  std::vector<Tensor> tensors;
  std::vector<PagedInt8Layer> layers;
  std::vector<LayerOptions> options;
  PagedInt8Cache cache;
};

Registry<BoundCache>& Caches() {
  static auto* registry = new Registry<BoundCache>("cache");
  return *registry;
}

// Checks the tensors of a layer, and that K and V of a (block, kv head) follow each other.
PagedInt8Layer MakeLayer(const Tensor* pools, const PagedInt8Cache& cache) {
  const int64_t blocks = cache.num_blocks, heads = cache.num_kv_heads;
  const int64_t tile_bytes = cpu::TileBytes(cache);
  check_tensor("codes", pools[0], at::kChar, {blocks, heads, 2, tile_bytes});
  check_tensor("k_scales", pools[1], at::kHalf, {blocks, heads, cache.block_size});
  check_tensor("v_scales", pools[2], at::kHalf, {blocks, heads, cache.block_size});
  auto* codes = static_cast<int8_t*>(pools[0].data_ptr());
  return {codes, codes + tile_bytes, static_cast<uint16_t*>(pools[1].data_ptr()),
          static_cast<uint16_t*>(pools[2].data_ptr())};
}

void CheckShape(const PagedInt8Cache& cache) {
  TORCH_CHECK_VALUE(
      cache.head_dim > 0 && cache.head_dim <= kMaxHeadDim && cache.head_dim % kHeadDimStep == 0,
      "head_dim must be a multiple of ", kHeadDimStep, " up to ", kMaxHeadDim, ", got ",
      cache.head_dim);
  TORCH_CHECK_VALUE(cache.block_size == 16 || cache.block_size == 32 || cache.block_size == 64 ||
                        cache.block_size == 128,
                    "block_size must be 16, 32, 64 or 128, got ", cache.block_size);
  TORCH_CHECK_VALUE(cache.num_kv_heads > 0 && cache.num_q_heads % cache.num_kv_heads == 0,
                    "num_q_heads must be a multiple of num_kv_heads, got ", cache.num_q_heads,
                    " and ", cache.num_kv_heads);
}

// Binds the pools of all layers.
//
// pools: codes, k_scales, v_scales of layer 0, then of layer 1, ...
// options: sm_scale, soft_cap [num_layers] float32; window [num_layers] int32; sinks
//     [num_layers, num_q_heads] float32, or with no rows.
int64_t make_cache(std::vector<Tensor> pools, int64_t num_q_heads, int64_t head_dim,
                   const Tensor& sm_scale, const Tensor& soft_cap, const Tensor& window,
                   const Tensor& sinks, bool is_deterministic) {
  const auto num_layers = static_cast<int64_t>(pools.size()) / 3;
  TORCH_CHECK_VALUE(num_layers > 0 && pools.size() % 3 == 0 && pools[1].dim() == 3,
                    "pools must be three tensors a layer");
  auto bound = std::make_shared<BoundCache>();
  bound->tensors = std::move(pools);
  bound->tensors.push_back(sinks);
  const Tensor& k_scales = bound->tensors[1];
  PagedInt8Cache& cache = bound->cache;
  cache.num_layers = static_cast<int32_t>(num_layers);
  cache.num_blocks = static_cast<int32_t>(k_scales.size(0));
  cache.num_q_heads = static_cast<int32_t>(num_q_heads);
  cache.num_kv_heads = static_cast<int32_t>(k_scales.size(1));
  cache.head_dim = static_cast<int32_t>(head_dim);
  cache.block_size = static_cast<int32_t>(k_scales.size(2));
  cache.is_deterministic = is_deterministic;
  CheckShape(cache);
  check_tensor("sm_scale", sm_scale, at::kFloat, {num_layers});
  check_tensor("soft_cap", soft_cap, at::kFloat, {num_layers});
  check_tensor("window", window, at::kInt, {num_layers});
  const bool has_sinks = sinks.numel() > 0;
  if (has_sinks) check_tensor("sinks", sinks, at::kFloat, {num_layers, num_q_heads});
  for (int64_t i = 0; i < num_layers; ++i) {
    bound->layers.push_back(MakeLayer(&bound->tensors[3 * i], cache));
    const float* layer_sinks =
        has_sinks ? sinks.const_data_ptr<float>() + i * num_q_heads : nullptr;
    bound->options.push_back({sm_scale.const_data_ptr<float>()[i],
                              soft_cap.const_data_ptr<float>()[i],
                              window.const_data_ptr<int32_t>()[i], layer_sinks});
  }
  cache.layers = bound->layers.data();
  cache.options = bound->options.data();
  return Caches().Add(std::move(bound));
}

void free_cache(int64_t handle) { Caches().Remove(handle); }

// Checks the arrays of a batch, in RaggedBatch's order: layers, start_pos, token_starts, kv_lens,
// is_causal, block_tables, slot_mapping. total_tokens is what q, k and v hold.
RaggedBatch MakeBatch(const std::vector<Tensor>& arrays, int64_t total_tokens) {
  TORCH_CHECK_VALUE(arrays.size() == 7, "batch must be 7 arrays, got ", arrays.size());
  const int64_t num_entries = arrays[0].numel();
  const int64_t max_num_blocks = arrays[5].dim() == 2 ? arrays[5].size(1) : 0;
  check_tensor("layers", arrays[0], at::kInt, {num_entries});
  check_tensor("start_pos", arrays[1], at::kInt, {num_entries});
  check_tensor("token_starts", arrays[2], at::kInt, {num_entries + 1});
  check_tensor("kv_lens", arrays[3], at::kInt, {num_entries});
  check_tensor("is_causal", arrays[4], at::kBool, {num_entries});
  check_tensor("block_tables", arrays[5], at::kInt, {num_entries, max_num_blocks});
  check_tensor("slot_mapping", arrays[6], at::kLong, {total_tokens});
  RaggedBatch batch;
  batch.num_entries = static_cast<int32_t>(num_entries);
  batch.max_num_blocks = static_cast<int32_t>(max_num_blocks);
  batch.layers = arrays[0].const_data_ptr<int32_t>();
  batch.start_pos = arrays[1].const_data_ptr<int32_t>();
  batch.token_starts = arrays[2].const_data_ptr<int32_t>();
  batch.kv_lens = arrays[3].const_data_ptr<int32_t>();
  batch.is_causal = arrays[4].const_data_ptr<bool>();
  batch.block_tables = arrays[5].const_data_ptr<int32_t>();
  batch.slot_mapping = arrays[6].const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(batch.TotalTokens() == total_tokens, "token_starts must end with ",
                    total_tokens, ", got ", batch.TotalTokens());
  return batch;
}

void append(int64_t runtime_handle, int64_t cache_handle, const std::vector<Tensor>& batch,
            const Tensor& k, const Tensor& v, Tensor offences) {
  const std::shared_ptr<BoundCache> bound = Caches().Get(cache_handle);
  const PagedInt8Cache& cache = bound->cache;
  const Shape shape = {k.size(0), cache.num_kv_heads, cache.head_dim};
  cpu::AppendParams params;
  params.cache = cache;
  params.batch = MakeBatch(batch, k.size(0));
  params.dtype = ToDataType("k", k);
  check_tensor("k", k, k.scalar_type(), shape);
  check_tensor("v", v, k.scalar_type(), shape);
  check_tensor("offences", offences, at::kLong, {params.batch.num_entries});
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
  params.offences = offences.data_ptr<int64_t>();
  const std::shared_ptr<SharedRuntime> shared = Runtimes().Get(runtime_handle);
  std::lock_guard<std::mutex> lock(shared->mutex);
  check_status("int8_kv_append_paged", cpu::AppendPagedInt8(params, shared->runtime));
}

// lse: [total_tokens, num_q_heads] float32, or empty when it is not asked for.
void decode(int64_t runtime_handle, int64_t cache_handle, const std::vector<Tensor>& batch,
            const Tensor& q, Tensor out, Tensor lse, Tensor offences) {
  const std::shared_ptr<BoundCache> bound = Caches().Get(cache_handle);
  const PagedInt8Cache& cache = bound->cache;
  const Shape shape = {q.size(0), cache.num_q_heads, cache.head_dim};
  cpu::DecodeParams params;
  params.cache = cache;
  params.batch = MakeBatch(batch, q.size(0));
  params.dtype = ToDataType("q", q);
  check_tensor("q", q, q.scalar_type(), shape);
  check_tensor("out", out, q.scalar_type(), shape);
  check_tensor("offences", offences, at::kLong, {params.batch.num_entries});
  if (lse.numel() > 0) check_tensor("lse", lse, at::kFloat, {shape[0], shape[1]});
  params.q = q.const_data_ptr();
  params.out = out.data_ptr();
  params.lse = lse.numel() > 0 ? lse.data_ptr<float>() : nullptr;
  params.offences = offences.data_ptr<int64_t>();
  const std::shared_ptr<SharedRuntime> shared = Runtimes().Get(runtime_handle);
  std::lock_guard<std::mutex> lock(shared->mutex);
  check_status("int8_paged_decode_attention", cpu::DecodePagedInt8(params, shared->runtime));
}

// copies: [num_copies, 2] int64 block ids, source then target.
void copy_blocks(int64_t runtime_handle, int64_t cache_handle, const Tensor& copies) {
  const std::shared_ptr<BoundCache> bound = Caches().Get(cache_handle);
  const PagedInt8Cache& cache = bound->cache;
  const int64_t num_copies = copies.numel() / 2;
  check_tensor("copies", copies, at::kLong, {num_copies, 2});
  const auto* pairs = reinterpret_cast<const int64_t (*)[2]>(copies.const_data_ptr<int64_t>());
  const std::shared_ptr<SharedRuntime> shared = Runtimes().Get(runtime_handle);
  std::lock_guard<std::mutex> lock(shared->mutex);
  check_status("copy_blocks", cpu::CopyBlocks(cache, pairs, num_copies, shared->runtime));
}

}  // namespace

TORCH_LIBRARY(octavo_cpu, m) {
  m.def("make_runtime", &make_runtime);
  m.def("free_runtime", &free_runtime);
  m.def("runtime_isa", &runtime_isa);
  m.def("runtime_threads", &runtime_threads);
  m.def("available_isas", &available_isas);
  m.def("alloc_pool", &alloc_pool);
  m.def("make_cache", &make_cache);
  m.def("free_cache", &free_cache);
  m.def("append", &append);
  m.def("decode", &decode);
  m.def("copy_blocks", &copy_blocks);
}

}  // namespace octavo
