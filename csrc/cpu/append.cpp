// Append: quantises rows of K and V per (token, kv head) and scatters them to their slots.
//
// For a row x, in FP32: amax = max|x|; scale = amax / 127 rounded up to FP16, at least the smallest
// positive FP16; codes = x * (1 / scale) to nearest even, within [-127, 127]. A row of zeros has
// scale 0 and codes 0. The same bits on every instruction set.

#include <algorithm>
#include <cstring>

#include "layout.h"
#include "octavo/batch_checks.h"
#include "octavo/cpu_ops.h"
#include "octavo/half.h"
#include "octavo/offence.h"
#include "runtime.h"

namespace octavo::cpu {
namespace {

constexpr int32_t kRowsPerItem = 16;  // neighbouring slots share cache lines of K
constexpr float kMaxCode = 127.0f;

// A quantised row, or why there is none.
struct QuantizedRow {
  alignas(64) int8_t codes[kMaxHeadDim];
  uint16_t scale;  // float16 bits
  bool is_ok;
  OffenceKind offence;  // where not ok
};

void Quantize(const AppendParams& params, const IsaKernels& kernels, const void* source,
              QuantizedRow* quantized) {
  alignas(64) float row[kMaxHeadDim];
  const int32_t head_dim = params.cache.head_dim;
  const uint32_t amax_bits = kernels.load_row(params.dtype, source, head_dim, row);
  quantized->is_ok = amax_bits < kFloatInfBits;
  quantized->offence = OffenceKind::kNonFinite;
  if (!quantized->is_ok) return;
  if (amax_bits == 0) {
    quantized->scale = 0;
    std::memset(quantized->codes, 0, head_dim);
    return;
  }
  quantized->scale = RoundUpToHalf(BitsFloat(amax_bits) / kMaxCode);
  quantized->is_ok = quantized->scale < kHalfInfBits;
  quantized->offence = OffenceKind::kScaleOverflow;
  if (!quantized->is_ok) return;
  kernels.quantize_row(row, 1.0f / HalfToFloat(quantized->scale), head_dim, quantized->codes);
}

void StoreK(const QuantizedRow& row, const PagedInt8Cache& cache, const KvTile& tile,
            int64_t offset) {
  int8_t* target = tile.k_codes + offset * kQuad;
  for (int32_t d = 0; d < cache.head_dim; d += kQuad, target += cache.block_size * kQuad) {
    std::memcpy(target, row.codes + d, kQuad);
  }
  tile.k_scales[offset] = row.scale;
}

void StoreV(const QuantizedRow& row, const PagedInt8Cache& cache, const KvTile& tile,
            int64_t offset) {
  for (int32_t column = 0; column < cache.head_dim; column += kValueColumn) {
    const int32_t width = std::min(kValueColumn, cache.head_dim - column);
    int8_t* target = tile.v_codes + column * cache.block_size + offset / kQuad * kQuad * width;
    for (int32_t d = 0; d < width; ++d) target[d * kQuad + offset % kQuad] = row.codes[column + d];
  }
  tile.v_scales[offset] = row.scale;
}

// Where one (token, kv head) comes from and goes to.
struct RowPlace {
  int32_t entry;
  int32_t token;  // of the batch
  int32_t kv_head;
};

template <OffenceField kField>
void AppendRow(const AppendParams& params, const IsaKernels& kernels, const RowPlace& place) {
  const PagedInt8Cache& cache = params.cache;
  const void* source = kField == OffenceField::kK ? params.k : params.v;
  const int64_t row_idx = static_cast<int64_t>(place.token) * cache.num_kv_heads + place.kv_head;
  const int64_t row_bytes = cache.head_dim * ElementBytes(params.dtype);
  QuantizedRow row;
  Quantize(params, kernels, static_cast<const char*>(source) + row_idx * row_bytes, &row);
  if (!row.is_ok) {
    const int32_t entry_token = place.token - params.batch.token_starts[place.entry];
    RecordOffence(&params.offences[place.entry],
                  PackOffence(kField, entry_token, place.kv_head, row.offence));
    return;
  }
  const int64_t slot = params.batch.slot_mapping[place.token];
  const PagedInt8Layer& layer = cache.layers[params.batch.layers[place.entry]];
  const KvTile tile = TileOf(cache, layer, slot / cache.block_size, place.kv_head);
  const auto store = kField == OffenceField::kK ? StoreK : StoreV;
  store(row, cache, tile, slot % cache.block_size);
}

int32_t EntryOf(const RaggedBatch& batch, int32_t token) {
  const int32_t* ends = batch.token_starts + 1;
  return static_cast<int32_t>(std::upper_bound(ends, ends + batch.num_entries, token) - ends);
}

void AppendRows(const AppendParams& params, const IsaKernels& kernels, int32_t first, int32_t end) {
  const int32_t first_entry = EntryOf(params.batch, first);
  for (int32_t kv_head = 0; kv_head < params.cache.num_kv_heads; ++kv_head) {
    int32_t entry = first_entry;
    for (int32_t token = first; token < end; ++token) {
      while (token >= params.batch.token_starts[entry + 1]) ++entry;
      if (params.batch.slot_mapping[token] < 0) continue;
      AppendRow<OffenceField::kK>(params, kernels, {entry, token, kv_head});
      AppendRow<OffenceField::kV>(params, kernels, {entry, token, kv_head});
    }
  }
}

}  // namespace

Status AppendPagedInt8(const AppendParams& params, Runtime& runtime) {
  const Status status = CheckAppendBatch(params.cache, params.batch);
  if (status != Status::kOk) return status;
  const ScopedFloatEnvironment environment;
  std::fill_n(params.offences, params.batch.num_entries, kNoOffence);
  const int32_t num_rows = params.batch.TotalTokens();
  const int64_t num_codes =
      int64_t{2} * num_rows * params.cache.num_kv_heads * params.cache.head_dim;
  const int64_t num_items = (num_rows + kRowsPerItem - 1) / kRowsPerItem;
  runtime.threads.ForEach(num_items, num_codes >= kMinSharedCodes, [&](int64_t item) {
    const auto first = static_cast<int32_t>(item * kRowsPerItem);
    AppendRows(params, runtime.kernels, first, std::min(num_rows, first + kRowsPerItem));
  });
  return Status::kOk;
}

}  // namespace octavo::cpu
