// Append: quantises rows of K and V per (token, kv head) and scatters them to their slots.
//
// For a row x, in FP32: amax = max|x|; scale = amax / 127 rounded up to FP16, at least the smallest
// positive FP16; codes = x * (1 / scale) to nearest even, within [-127, 127]. A row of zeros has
// scale 0 and codes 0. The same bits on every instruction set.
//
// Tokens in neighbouring slots, as a prompt's are, go 16 at a time (group_kernels.h); those of a
// ragged end or a decode step, and a group with an offence, row by row.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "layout.h"
#include "octavo/batch_checks.h"
#include "octavo/cpu_ops.h"
#include "octavo/half.h"
#include "octavo/offence.h"
#include "runtime.h"

namespace octavo::cpu {
namespace {

constexpr int32_t kTokensPerItem = 64;

// Codes of a launch that cores' own caches do not hold until they are attended to: those go past
// the caches, which then need not read the lines that are overwritten.
constexpr int64_t kMinStreamedCodes = int64_t{4} << 20;
constexpr uintptr_t kCacheLine = 64;

// One append, as all of its items see it.
struct Launch {
  const AppendParams& params;
  const IsaKernels& kernels;
  bool is_streamed;
};

struct QuantizedRow {
  alignas(64) int8_t codes[kMaxHeadDim];
  uint16_t scale;  // float16 bits
};

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
const char* Source(const AppendParams& params, const RowPlace& place) {
  const void* source = kField == OffenceField::kK ? params.k : params.v;
  const PagedInt8Cache& cache = params.cache;
  const int64_t row_idx = static_cast<int64_t>(place.token) * cache.num_kv_heads + place.kv_head;
  return static_cast<const char*>(source) + row_idx * cache.head_dim * ElementBytes(params.dtype);
}

KvTile Target(const AppendParams& params, const RowPlace& place) {
  const PagedInt8Layer& layer = params.cache.layers[params.batch.layers[place.entry]];
  const int64_t block_id = params.batch.slot_mapping[place.token] / params.cache.block_size;
  return TileOf(params.cache, layer, block_id, place.kv_head);
}

template <OffenceField kField>
void AppendRow(const Launch& launch, const RowPlace& place) {
  const AppendParams& params = launch.params;
  QuantizedRow row;
  const uint32_t amax_bits = launch.kernels.quantize_row(
      params.dtype, Source<kField>(params, place), params.cache.head_dim, row.codes, &row.scale);
  if (row.scale >= kHalfInfBits) {
    const auto kind =
        amax_bits < kFloatInfBits ? OffenceKind::kScaleOverflow : OffenceKind::kNonFinite;
    const int32_t entry_token = place.token - params.batch.token_starts[place.entry];
    RecordOffence(&params.offences[place.entry],
                  PackOffence(kField, entry_token, place.kv_head, kind));
    return;
  }
  const int64_t offset = params.batch.slot_mapping[place.token] % params.cache.block_size;
  const auto store = kField == OffenceField::kK ? StoreK : StoreV;
  store(row, params.cache, Target(params, place), offset);
}

bool IsLine(const void* p) { return reinterpret_cast<uintptr_t>(p) % kCacheLine == 0; }

// The rows of a group in one kv head. The next kv head's follow; after the last, those of the
// token behind the group.
template <OffenceField kField>
void AppendRowGroup(const Launch& launch, const RowPlace& first) {
  const AppendParams& params = launch.params;
  const PagedInt8Cache& cache = params.cache;
  const KvTile tile = Target(params, first);
  const int64_t row_bytes = cache.head_dim * ElementBytes(params.dtype);
  const int64_t row_stride = cache.num_kv_heads * row_bytes;
  const bool is_last = first.kv_head + 1 == cache.num_kv_heads;
  const int64_t next_offset = row_bytes + (is_last ? (kGroupRows - 1) * row_stride : 0);
  const bool is_streamed = launch.is_streamed && IsLine(tile.k_codes) && IsLine(tile.v_codes);
  const RowGroup group = {
      params.dtype, cache.head_dim, cache.block_size, Source<kField>(params, first),
      row_stride,   next_offset,    is_streamed};
  const bool is_k = kField == OffenceField::kK;
  const auto store = is_k ? launch.kernels.store_k_group : launch.kernels.store_v_group;
  if (store(group, tile, params.batch.slot_mapping[first.token] % cache.block_size)) return;
  for (int32_t i = 0; i < kGroupRows; ++i) {
    AppendRow<kField>(launch, {first.entry, first.token + i, first.kv_head});
  }
}

int32_t EntryOf(const RaggedBatch& batch, int32_t token) {
  const int32_t* ends = batch.token_starts + 1;
  return static_cast<int32_t>(std::upper_bound(ends, ends + batch.num_entries, token) - ends);
}

// Tokens first .. end - 1, row by row. Heads go by, as neighbouring slots share lines of K.
void AppendSingly(const Launch& launch, int32_t first, int32_t end) {
  const RaggedBatch& batch = launch.params.batch;
  const int32_t first_entry = EntryOf(batch, first);
  for (int32_t kv_head = 0; kv_head < launch.params.cache.num_kv_heads; ++kv_head) {
    int32_t entry = first_entry;
    for (int32_t token = first; token < end; ++token) {
      while (token >= batch.token_starts[entry + 1]) ++entry;
      if (batch.slot_mapping[token] < 0) continue;
      AppendRow<OffenceField::kK>(launch, {entry, token, kv_head});
      AppendRow<OffenceField::kV>(launch, {entry, token, kv_head});
    }
  }
}

// All kv heads of the group that begins with token `first`.
void AppendGroup(const Launch& launch, int32_t first) {
  const int32_t entry = EntryOf(launch.params.batch, first);
  for (int32_t kv_head = 0; kv_head < launch.params.cache.num_kv_heads; ++kv_head) {
    AppendRowGroup<OffenceField::kK>(launch, {entry, first, kv_head});
    AppendRowGroup<OffenceField::kV>(launch, {entry, first, kv_head});
  }
}

// Whether the tokens from `first` on are a group: of one entry, in neighbouring slots that begin
// with a multiple of their number.
bool IsGroup(const RaggedBatch& batch, int32_t first) {
  const int64_t slot = batch.slot_mapping[first];
  if (slot < 0 || slot % kGroupRows != 0) return false;
  if (first + kGroupRows > batch.token_starts[EntryOf(batch, first) + 1]) return false;
  bool are_neighbours = true;
  for (int32_t i = 1; i < kGroupRows; ++i) {
    are_neighbours &= batch.slot_mapping[first + i] == slot + i;
  }
  return are_neighbours;
}

// The first token from `token` on that is not of a group that began before.
int32_t SkipGroupBegunBefore(const RaggedBatch& batch, int32_t token) {
  const int64_t slot = batch.slot_mapping[token];
  if (slot < 0) return token;
  const auto first = static_cast<int32_t>(token - slot % kGroupRows);
  if (first < 0 || first == token || !IsGroup(batch, first)) return token;
  return first + kGroupRows;
}

// The groups that begin in tokens first .. end - 1, and the tokens there that are in none.
void AppendTokens(const Launch& launch, int32_t first, int32_t end) {
  const RaggedBatch& batch = launch.params.batch;
  int32_t token = SkipGroupBegunBefore(batch, first);
  while (token < end) {
    int32_t group = token;
    while (group < end && !IsGroup(batch, group)) ++group;
    if (token < group) AppendSingly(launch, token, group);
    if (group < end) AppendGroup(launch, group);
    token = group + kGroupRows;
  }
  if (launch.is_streamed) launch.kernels.finish_streams();
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
  const int64_t num_items = (num_rows + kTokensPerItem - 1) / kTokensPerItem;
  const Launch launch = {params, runtime.kernels, num_codes >= kMinStreamedCodes};
  runtime.threads.ForEach(num_items, num_codes >= kMinSharedCodes, [&](int64_t item) {
    const auto first = static_cast<int32_t>(item * kTokensPerItem);
    AppendTokens(launch, first, std::min(num_rows, first + kTokensPerItem));
  });
  return Status::kOk;
}

}  // namespace octavo::cpu
