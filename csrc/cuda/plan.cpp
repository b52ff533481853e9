// Rows of an entry (query token, query head of the group) are cut into tiles of 8 that share each
// read of K and V. A tile attends to one run of context, and is cut into spans, each a thread block
// for every kv head. One length of span serves a launch: that of some candidates with which the
// multiprocessors are predicted to be done first, among those that give them enough blocks to hide
// latency. A prediction takes a multiprocessor's blocks one after the other, for however many share
// it, they share its bandwidth; whole spans go first, the rest fills what they leave.
//
// In a deterministic model an entry's spans depend on its own length alone. There an entry of many
// tiles is not split, for it fills a device by itself, and its partial results would fill the
// memory.

#include "cuda/plan.h"

#include <algorithm>

#include "cuda/tile_shape.h"

namespace octavo::cuda {
namespace {

constexpr int32_t kMinSpan = 128;
constexpr int32_t kSpanStep = 64;    // a tile of 16 tokens for each of a block's 4 warps
constexpr int32_t kBlockCost = 128;  // of a block besides its span, in positions that it could read
constexpr int32_t kMergeCost = 256;  // of merging splits, likewise
constexpr int32_t kMaxSpan = 1 << 30;
constexpr int32_t kMinDeterministicSpan = 1024;
constexpr int32_t kMaxDeterministicSplits = 8;
constexpr int32_t kMaxDeterministicTiles = 16;

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

// Where a tile's spans are counted from: its first position, or the few before it that are copied
// along with it.
int32_t OriginOf(const DecodeItem& tile) { return tile.begin / kTileTokens * kTileTokens; }

int32_t RoundUpToStep(int64_t num_positions) {
  return static_cast<int32_t>(
      std::min<int64_t>(CeilDivide(num_positions, kSpanStep) * kSpanStep, kMaxSpan));
}

// What one length of span makes of a launch.
struct Prediction {
  int64_t num_blocks;
  int64_t cost;  // in positions that a multiprocessor reads
};

Prediction Predict(const std::vector<DecodeItem>& tiles, int32_t span_len, int64_t num_kv_heads,
                   int64_t num_multiprocessors) {
  int64_t num_whole = 0, num_rests = 0, rest_positions = 0, longest_rest = 0;
  for (const DecodeItem& tile : tiles) {
    const int32_t length = tile.end - OriginOf(tile), rest = length % span_len;
    num_whole += length / span_len;
    num_rests += rest > 0 || length == 0;
    rest_positions += rest;
    longest_rest = std::max<int64_t>(longest_rest, rest);
  }
  const int64_t whole_cost = span_len + kBlockCost;
  const int64_t num_whole_blocks = num_whole * num_kv_heads;
  const int64_t num_rounds = CeilDivide(num_whole_blocks, num_multiprocessors);
  const int64_t idle = (num_rounds * num_multiprocessors - num_whole_blocks) * whole_cost;
  const int64_t rest_cost = (rest_positions + num_rests * kBlockCost) * num_kv_heads;
  const int64_t more = CeilDivide(std::max<int64_t>(rest_cost - idle, 0), num_multiprocessors);
  const int64_t cost = num_rounds * whole_cost + more;
  return {num_whole_blocks + num_rests * num_kv_heads, std::max(cost, longest_rest + kBlockCost)};
}

// The best length of span among those that cut the longest context evenly.
int32_t SpanFor(const std::vector<DecodeItem>& tiles, int32_t num_kv_heads,
                const DecodeOccupancy& occupancy) {
  int64_t longest = 1;
  for (const DecodeItem& tile : tiles)
    longest = std::max<int64_t>(longest, tile.end - OriginOf(tile));
  const int64_t num_slots = int64_t{occupancy.num_multiprocessors} * occupancy.resident_blocks;
  const int64_t max_splits = std::clamp<int64_t>(longest / kMinSpan, 1, kMaxSplits);
  int32_t best_span = 0;
  Prediction best = {};
  for (int64_t num_splits = 1; num_splits <= max_splits; num_splits += 1 + num_splits / 8) {
    const int32_t span_len = RoundUpToStep(CeilDivide(longest, num_splits));
    Prediction prediction = Predict(tiles, span_len, num_kv_heads, occupancy.num_multiprocessors);
    if (num_splits > 1) prediction.cost += kMergeCost;
    const bool had_enough = best.num_blocks >= num_slots * 3 / 4;
    if (best_span != 0 && had_enough && prediction.cost >= best.cost) continue;
    if (best_span != 0 && !had_enough && prediction.cost > best.cost * 9 / 8) continue;
    best_span = span_len;
    best = prediction;
  }
  return best_span;
}

// The length of an entry's spans in a deterministic model.
int32_t DeterministicSpan(const PagedInt8Cache& cache, const RaggedBatch& batch, int32_t entry) {
  const int64_t num_rows = int64_t{batch.NumTokens(entry)} * cache.GroupSize();
  if (CeilDivide(num_rows, kTileRows) > kMaxDeterministicTiles) return kMaxSpan;
  const int64_t share = CeilDivide(batch.kv_lens[entry], kMaxDeterministicSplits);
  return std::max(RoundUpToStep(share), kMinDeterministicSpan);
}

// Adds a tile's items, one a span: whole ones to the plan, where they come first, others to
// `rests`.
void AddItems(const DecodeItem& tile, int32_t span_len, DecodePlan* plan) {
  DecodeItem item = tile;
  const int64_t origin = OriginOf(tile);
  item.num_splits = std::max(static_cast<int32_t>(CeilDivide(tile.end - origin, span_len)), 1);
  if (item.num_splits > 1) {
    item.first_partial = plan->num_partials;
    item.counter = plan->num_counters++;
    plan->num_partials += item.num_splits;
  }
  for (item.split_idx = 0; item.split_idx < item.num_splits; ++item.split_idx) {
    const int64_t start = origin + int64_t{item.split_idx} * span_len, end = start + span_len;
    item.begin = static_cast<int32_t>(std::max<int64_t>(tile.begin, start));
    item.end = static_cast<int32_t>(std::min<int64_t>(tile.end, end));
    (end <= tile.end ? plan->items : plan->rests).push_back(item);
  }
}

}  // namespace

void PlanDecode(const PagedInt8Cache& cache, const int32_t* windows, const RaggedBatch& batch,
                const DecodeOccupancy& occupancy, DecodePlan* plan) {
  plan->tiles.clear();
  for (int32_t entry = 0; entry < batch.num_entries; ++entry) {
    AddTiles(cache, windows, batch, entry, &plan->tiles);
  }
  plan->items.clear();
  plan->rests.clear();
  plan->num_partials = plan->num_counters = 0;
  const bool is_own = cache.is_deterministic;
  const int32_t shared_span = is_own ? 0 : SpanFor(plan->tiles, cache.num_kv_heads, occupancy);
  for (const DecodeItem& tile : plan->tiles) {
    AddItems(tile, is_own ? DeterministicSpan(cache, batch, tile.entry) : shared_span, plan);
  }
  plan->items.insert(plan->items.end(), plan->rests.begin(), plan->rests.end());
}

}  // namespace octavo::cuda
