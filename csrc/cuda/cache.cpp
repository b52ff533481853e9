#include "cuda/cache.h"

#include <cstring>

namespace octavo::cuda {
namespace {

// Collects arrays for one copy to the device, each at a multiple of 16 bytes.
class Tables {
 public:
  // Returns the array's offset.
  int64_t Add(const void* source, int64_t num_bytes) {
    const auto offset = static_cast<int64_t>(bytes_.size());
    bytes_.resize(offset + (num_bytes + 15) / 16 * 16);
    if (num_bytes > 0) std::memcpy(bytes_.data() + offset, source, num_bytes);
    return offset;
  }

  const std::vector<char>& bytes() const { return bytes_; }

 private:
  std::vector<char> bytes_;
};

// Args: sinks: [num_layers, num_q_heads] on the device, or null.
std::vector<LayerOptions> OptionsOf(const CacheSpec& spec, const float* sinks) {
  std::vector<LayerOptions> options(spec.num_layers);
  for (int32_t layer = 0; layer < spec.num_layers; ++layer) {
    const float* own = sinks == nullptr ? nullptr : sinks + int64_t{layer} * spec.num_q_heads;
    options[layer] = {spec.sm_scale[layer], spec.soft_cap[layer], spec.window[layer], own};
  }
  return options;
}

}  // namespace

Cache::Cache(const CacheSpec& spec, cudaStream_t stream)
    : windows_(spec.window, spec.window + spec.num_layers) {
  Check(PrepareDecode(spec.head_dim, &occupancy_), "load the decode kernels");
  const int64_t num_sinks = spec.sinks == nullptr ? 0 : int64_t{spec.num_layers} * spec.num_q_heads;
  const int64_t sinks_bytes = num_sinks * static_cast<int64_t>(sizeof(float));
  const int64_t layers_bytes = spec.num_layers * static_cast<int64_t>(sizeof(PagedInt8Layer));
  const int64_t options_bytes = spec.num_layers * static_cast<int64_t>(sizeof(LayerOptions));
  tables_.Reserve(sinks_bytes + layers_bytes + options_bytes + 48);
  Tables tables;
  const int64_t sinks_offset = tables.Add(spec.sinks, sinks_bytes);
  const int64_t layers_offset = tables.Add(spec.layers, layers_bytes);
  const float* sinks = num_sinks == 0 ? nullptr : tables_.At<float>(sinks_offset);
  const int64_t options_offset = tables.Add(OptionsOf(spec, sinks).data(), options_bytes);
  Check(cudaMemcpyAsync(tables_.At(), tables.bytes().data(), tables.bytes().size(),
                        cudaMemcpyHostToDevice, stream),
        "copy the cache's tables");
  Check(cudaStreamSynchronize(stream), "copy the cache's tables");
  on_device_.num_layers = spec.num_layers;
  on_device_.num_blocks = spec.num_blocks;
  on_device_.num_q_heads = spec.num_q_heads;
  on_device_.num_kv_heads = spec.num_kv_heads;
  on_device_.head_dim = spec.head_dim;
  on_device_.block_size = spec.block_size;
  on_device_.is_deterministic = spec.is_deterministic != 0;
  on_device_.layers = tables_.At<PagedInt8Layer>(layers_offset);
  on_device_.options = tables_.At<LayerOptions>(options_offset);
}

}  // namespace octavo::cuda
