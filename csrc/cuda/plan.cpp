// Rows of an entry (query token, query head of the group) are cut into tiles of 8 that share each
// read of K and V. A tile attends to one run of context, and is cut into spans where the launch
// would leave multiprocessors idle: as many as fill them once, and none shorter than kMinSpan. In a
// deterministic model spans are kDeterministicSpan positions, whatever the device and the batch; an
// entry of many tiles is not split there, for it fills a device by itself, and its partial results
// would fill the memory.

#include "cuda/plan.h"

#include <algorithm>

namespace octavo::cuda {
namespace {

constexpr int32_t kMinSpan = 256;
constexpr int32_t kDeterministicSpan = 1024;
constexpr int32_t kMaxDeterministicTiles = 16;
constexpr int32_t kSpanStep = 64;  // a tile of 16 tokens for each of a block's 4 warps
constexpr int32_t kMaxSpan = 1 << 30;

int64_t CeilDivide(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Positions [begin, end) that rows of one entry attend to between them.
struct Range {
  int32_t begin;
  int32_t end;
};

Range AttendedRange(const RaggedBatch& batch, int32_t entry, int32_t window, int32_t first_token,
                    int32_t last_token) {
  const int32_t kv_len = batch.kv_lens[entry];
  if (!batch.is_causal[entry] || kv_len == 0) return {0, kv_len};
  const int64_t start = batch.start_pos[entry];
  const auto end = static_cast<int32_t>(std::min<int64_t>(kv_len, start + last_token + 1));
  const int64_t first = window > 0 ? start + first_token + 1 - window : 0;
  return {static_cast<int32_t>(std::clamp<int64_t>(first, 0, end)), end};
}

// Adds the tiles of an entry, each as one item over all of its context.
void AddTiles(const PagedInt8Cache& cache, const int32_t* windows, const RaggedBatch& batch,
              int32_t entry, std::vector<DecodeItem>* tiles) {
  const int32_t group_size = cache.GroupSize();
  const int32_t num_rows = batch.NumTokens(entry) * group_size;
  const int32_t window = batch.kv_lens[entry] == 0 ? 0 : windows[batch.layers[entry]];
  for (int32_t row = 0; row < num_rows; row += kTileRows) {
    DecodeItem tile = {};
    tile.entry = entry;
    tile.first_row = row;
    tile.num_rows = std::min(kTileRows, num_rows - row);
    const int32_t last_row = row + tile.num_rows - 1;
    const Range range =
        AttendedRange(batch, entry, window, row / group_size, last_row / group_size);
    tile.begin = range.begin;
    tile.end = range.end;
    tile.num_splits = 1;
    tiles->push_back(tile);
  }
}

int32_t NumSpans(const DecodeItem& tile, int32_t span_len) {
  if (tile.begin == tile.end) return 1;
  return static_cast<int32_t>(CeilDivide(tile.end, span_len)) - tile.begin / span_len;
}

int64_t NumItems(const std::vector<DecodeItem>& tiles, int32_t span_len) {
  int64_t num_items = 0;
  for (const DecodeItem& tile : tiles) num_items += NumSpans(tile, span_len);
  return num_items;
}

// The shortest span, in steps, with which all items run at once; or the longest context, which
// splits nothing, where the tiles alone are more than that.
int32_t SpanThatFills(const std::vector<DecodeItem>& tiles, int64_t max_items) {
  int32_t longest = 0;
  for (const DecodeItem& tile : tiles) longest = std::max(longest, tile.end);
  auto low = static_cast<int64_t>(kMinSpan) / kSpanStep;
  int64_t high = std::max(low, CeilDivide(longest, kSpanStep));
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    const auto span_len = static_cast<int32_t>(middle * kSpanStep);
    if (NumItems(tiles, span_len) <= max_items) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return static_cast<int32_t>(std::min<int64_t>(high * kSpanStep, kMaxSpan));
}

// Spans of an entry in a deterministic model: by what the entry itself brings.
int32_t DeterministicSpan(const PagedInt8Cache& cache, const RaggedBatch& batch, int32_t entry) {
  const int64_t num_rows = int64_t{batch.NumTokens(entry)} * cache.GroupSize();
  return CeilDivide(num_rows, kTileRows) > kMaxDeterministicTiles ? kMaxSpan : kDeterministicSpan;
}

// Adds a tile's items, one a span.
void AddItems(const DecodeItem& tile, int32_t span_len, DecodePlan* plan) {
  DecodeItem item = tile;
  item.num_splits = NumSpans(tile, span_len);
  if (item.num_splits > 1) {
    item.first_partial = plan->num_partials;
    item.counter = plan->num_counters++;
    plan->num_partials += item.num_splits;
  }
  const int64_t first_span = tile.begin / span_len;
  for (item.split_idx = 0; item.split_idx < item.num_splits; ++item.split_idx) {
    const int64_t start = (first_span + item.split_idx) * span_len;
    item.begin = static_cast<int32_t>(std::max<int64_t>(tile.begin, start));
    item.end = static_cast<int32_t>(std::min<int64_t>(tile.end, start + span_len));
    plan->items.push_back(item);
  }
}

}  // namespace

void PlanDecode(const PagedInt8Cache& cache, const int32_t* windows, const RaggedBatch& batch,
                const DecodeOccupancy& occupancy, DecodePlan* plan) {
  std::vector<DecodeItem> tiles;
  for (int32_t entry = 0; entry < batch.num_entries; ++entry) {
    AddTiles(cache, windows, batch, entry, &tiles);
  }
  const int64_t max_items = int64_t{occupancy.num_multiprocessors} * occupancy.resident_blocks /
                            std::max(cache.num_kv_heads, 1);
  plan->items.clear();
  plan->num_partials = plan->num_counters = 0;
  const int32_t shared_span = cache.is_deterministic ? 0 : SpanThatFills(tiles, max_items);
  for (const DecodeItem& tile : tiles) {
    const int32_t span_len =
        cache.is_deterministic ? DeterministicSpan(cache, batch, tile.entry) : shared_span;
    AddItems(tile, span_len, plan);
  }
}

}  // namespace octavo::cuda
