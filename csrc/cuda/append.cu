// Append: quantises rows of K and V per (token, kv head) and scatters them to their slots.
//
// For a row x, in FP32: amax = max|x|; scale = amax / 127 rounded up to FP16, at least the smallest
// positive FP16; codes = x * (1 / scale) to nearest even, within [-127, 127]. A row of zeros has
// scale 0 and codes 0. The same bits as on every other backend.
//
// One warp takes one (token, kv head): its lower 16 lanes the row of K, its upper 16 that of V. A
// lane holds 8 neighbouring elements, and 8 more 128 further on where head_dim is above 128. Per
// token and kv head that reads 2 * head_dim elements and writes 2 * head_dim bytes of codes and 4
// of scales.

#include "cuda/device.h"
#include "cuda/elements.h"
#include "octavo/cuda_ops.h"
#include "octavo/half.h"
#include "octavo/offence.h"

namespace octavo::cuda {
namespace {

constexpr int kBlockWarps = 4;
constexpr int kRowLanes = 16;
constexpr int kPassElements = kRowLanes * kVectorElements;
constexpr int kMaxPasses = kMaxHeadDim / kPassElements;
constexpr float kMaxCode = 127.0f;

// One row of K or V, spread over 16 lanes.
struct Row {
  float elements[kMaxPasses][kVectorElements];
};

// Where a lane's row comes from and goes to.
struct Place {
  OffenceField field;
  int32_t token;
  int32_t kv_head;
  int32_t first_element;  // of this lane, in the first pass
};

__device__ Place PlaceOf(const AppendParams& params, int64_t row) {
  const auto lane = static_cast<int32_t>(threadIdx.x % kWarpThreads);
  Place place;
  place.field = lane < kRowLanes ? OffenceField::kK : OffenceField::kV;
  place.token = static_cast<int32_t>(row / params.cache.num_kv_heads);
  place.kv_head = static_cast<int32_t>(row % params.cache.num_kv_heads);
  place.first_element = lane % kRowLanes * kVectorElements;
  return place;
}

// Loads a lane's elements, zeros past head_dim; returns the largest magnitude's bits in the row.
__device__ uint32_t LoadRow(const AppendParams& params, const Place& place, Row* row) {
  const int64_t head_dim = params.cache.head_dim;
  const int64_t first =
      (int64_t{place.token} * params.cache.num_kv_heads + place.kv_head) * head_dim;
  const void* source = place.field == OffenceField::kK ? params.k : params.v;
  uint32_t max_bits = 0;
#pragma unroll
  for (int pass = 0; pass < kMaxPasses; ++pass) {
    const int64_t element = place.first_element + pass * kPassElements;
    float (&elements)[kVectorElements] = row->elements[pass];
    LoadElements(params.dtype, source, first + element, element < head_dim, elements);
#pragma unroll
    for (float x : elements) max_bits = max(max_bits, FloatBits(x) & 0x7fffffffu);
  }
#pragma unroll
  for (int mask = kRowLanes / 2; mask > 0; mask /= 2) {
    max_bits = max(max_bits, ShuffleXor(max_bits, mask));
  }
  return max_bits;
}

__device__ void RecordOffence(const AppendParams& params, const Place& place, OffenceKind kind) {
  const int32_t entry = LoadGlobal(params.row_entries + place.token);
  const int32_t token = place.token - LoadGlobal(params.batch.token_starts + entry);
  AtomicMin(params.offences + entry, PackOffence(place.field, token, place.kv_head, kind));
}

// Returns a row's scale, FP16. A row that cannot be stored is recorded, and has none: it is stored
// as zeros, so that attention over it in the same launch, whose answer is thrown away, reads no
// chaos.
__device__ uint16_t ScaleOf(const AppendParams& params, const Place& place, uint32_t amax_bits) {
  if (amax_bits == 0) return 0;
  if (amax_bits >= kFloatInfBits) {
    RecordOffence(params, place, OffenceKind::kNonFinite);
    return 0;
  }
  const uint16_t scale = RoundUpToHalf(Divide(BitsFloat(amax_bits), kMaxCode));
  if (scale < kHalfInfBits) return scale;
  RecordOffence(params, place, OffenceKind::kScaleOverflow);
  return 0;
}

__device__ uint32_t PackCodes(const float* elements, float inverse_scale) {
  uint32_t packed = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int32_t code = RoundToInt(Multiply(elements[i], inverse_scale));
    packed |= (static_cast<uint32_t>(code) & 0xffu) << (8 * i);
  }
  return packed;
}

// Stores a lane's codes, and the row's scale from its first lane.
__device__ void StoreRow(const AppendParams& params, const Place& place, int64_t slot,
                         uint16_t scale, const Row& row) {
  const PagedInt8Cache& cache = params.cache;
  const int32_t entry = LoadGlobal(params.row_entries + place.token);
  const int32_t layer = LoadGlobal(params.batch.layers + entry);
  const KvTile tile = cache.Tile(LoadLayer(cache, layer), slot / cache.block_size, place.kv_head);
  const int64_t offset = slot % cache.block_size;
  const bool is_k = place.field == OffenceField::kK;
  int8_t* codes = (is_k ? tile.k_codes : tile.v_codes) + offset * cache.head_dim;
  const float inverse_scale = scale == 0 ? 0.0f : Divide(1.0f, HalfToFloat(scale));
#pragma unroll
  for (int pass = 0; pass < kMaxPasses; ++pass) {
    const int32_t element = place.first_element + pass * kPassElements;
    if (element >= cache.head_dim) break;
    Bytes8 packed = {};
    if (scale != 0) {
      packed.words[0] = PackCodes(row.elements[pass], inverse_scale);
      packed.words[1] = PackCodes(row.elements[pass] + 4, inverse_scale);
    }
    StoreGlobal(reinterpret_cast<Bytes8*>(codes + element), packed);
  }
  if (place.first_element == 0) StoreGlobal((is_k ? tile.k_scales : tile.v_scales) + offset, scale);
}

// Grid: a warp per (token, kv head), kv heads of a token side by side.
__global__ void __launch_bounds__(kBlockWarps* kWarpThreads)
    append_paged_int8_kernel(AppendParams params) {
  const int64_t row = int64_t{blockIdx.x} * kBlockWarps + threadIdx.x / kWarpThreads;
  if (row >= int64_t{params.num_rows} * params.cache.num_kv_heads) return;
  const Place place = PlaceOf(params, row);
  const int64_t slot = LoadGlobal(params.batch.slot_mapping + place.token);
  if (slot < 0) return;
  Row elements;
  const uint32_t amax_bits = LoadRow(params, place, &elements);
  StoreRow(params, place, slot, ScaleOf(params, place, amax_bits), elements);
}

}  // namespace

cudaError_t AppendPagedInt8(const AppendParams& params, cudaStream_t stream) {
  const int64_t num_warps = int64_t{params.num_rows} * params.cache.num_kv_heads;
  if (num_warps == 0) return cudaSuccess;
  const auto num_blocks = static_cast<unsigned>((num_warps + kBlockWarps - 1) / kBlockWarps);
  return Launch(append_paged_int8_kernel, dim3(num_blocks), dim3(kBlockWarps * kWarpThreads),
                params, 0, stream);
}

}  // namespace octavo::cuda
