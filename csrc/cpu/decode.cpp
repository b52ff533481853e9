// Decode: plans a ragged batch into items for the threads, and puts their results together.
//
// The rows of a kv head (query token, query head of the group) are cut into tiles of up to 8, which
// share each read of K and V; of few rows, a tile has those of several kv heads. A tile attends to
// one run of context, cut into spans; each span ends in partial softmax states, which merge in span
// order, whoever computed them. In a deterministic model the spans are 1024 positions each, so the
// answer depends on the entry and its context alone; else a tile is cut where it is a large part of
// a thread's work.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <new>

#include "octavo/batch_checks.h"
#include "octavo/cpu_ops.h"
#include "octavo/half.h"
#include "octavo/offence.h"
#include "runtime.h"

namespace octavo::cpu {
namespace {

constexpr int32_t kDeterministicSpan = 1024;
constexpr int32_t kMinSpan = 256;
constexpr int32_t kLongSpan = 1024;  // what starts a span is lost in it
constexpr int32_t kMaxRowsOfManyHeads = 4;
constexpr int64_t kMinSharedCost = 900'000;  // what one core does in about 20 us
// A tile that costs more than one of this many shares of a thread's work is cut into spans of the
// other; a span costs some 3 us beside its work.
constexpr int64_t kSharesToCut = 4;
constexpr int64_t kSharesOfSpans = 16;

// Rows of q that reach kHugeQuery, whose products with codes could leave FP32, are worked on as
// this fraction of themselves. It is a power of two: no other row's bits may change, and none of
// theirs.
constexpr float kHugeQuery = 0x1p64f;
constexpr float kHugeQueryFraction = 0x1p-64f;

int64_t CeilDivide(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Positions [begin, end) that a row of an entry attends to.
struct Range {
  int32_t begin;
  int32_t end;
};

Range AttendedRange(const DecodeParams& params, int32_t entry, int32_t row) {
  const RaggedBatch& batch = params.batch;
  const int32_t kv_len = batch.kv_lens[entry];
  if (!batch.is_causal[entry]) return {0, kv_len};
  const int32_t window = params.cache.options[batch.layers[entry]].window;
  const int32_t end = batch.start_pos[entry] + row / params.cache.GroupSize() + 1;
  return {window > 0 ? std::max(0, end - window) : 0, std::min(end, kv_len)};
}

// Puts the entries that have a context in order, the longest work first: the threads end together
// if what they do last is short.
void OrderEntries(const RaggedBatch& batch, std::vector<int32_t>* order) {
  const auto cost = [&batch](int32_t entry) {
    return int64_t{batch.NumTokens(entry)} * batch.kv_lens[entry];
  };
  order->clear();
  for (int32_t entry = 0; entry < batch.num_entries; ++entry) {
    if (batch.kv_lens[entry] > 0) order->push_back(entry);
  }
  std::sort(order->begin(), order->end(), [&cost](int32_t a, int32_t b) {
    const int64_t a_cost = cost(a), b_cost = cost(b);
    return a_cost != b_cost ? a_cost > b_cost : a < b;
  });
}

// Appends the tiles of some kv heads of an entry; rows are shared out evenly over as few as will
// do.
void PlanTiles(const DecodeParams& params, int32_t entry, int32_t kv_head, int32_t num_kv_heads,
               std::vector<RowTile>* tiles) {
  const int32_t num_rows = params.batch.NumTokens(entry) * params.cache.GroupSize();
  const auto num_tiles = static_cast<int32_t>(CeilDivide(num_rows, kMaxTileRows));
  for (int32_t i = 0; i < num_tiles; ++i) {
    RowTile tile = {};
    tile.entry = entry;
    tile.kv_head = kv_head;
    tile.num_kv_heads = num_kv_heads;
    tile.first_row = static_cast<int32_t>(static_cast<int64_t>(num_rows) * i / num_tiles);
    const int64_t end_row = static_cast<int64_t>(num_rows) * (i + 1) / num_tiles;
    tile.num_rows = static_cast<int32_t>(end_row) - tile.first_row;
    // Both ends of a row's range grow with its position.
    tile.begin = AttendedRange(params, entry, tile.first_row).begin;
    tile.end = AttendedRange(params, entry, tile.first_row + tile.num_rows - 1).end;
    tiles->push_back(tile);
  }
}

// Kv heads that entries of few rows walk together: as many as leave each thread pieces enough
// without cutting the context short.
int32_t HeadsPerTile(const DecodeParams& params, int num_threads) {
  int64_t num_positions = 0;
  for (int32_t i = 0; i < params.batch.num_entries; ++i) num_positions += params.batch.kv_lens[i];
  const int64_t num_pieces = num_positions * params.cache.num_kv_heads / kLongSpan;
  const int64_t num_heads = num_pieces / (num_threads * kSharesOfSpans);
  return static_cast<int32_t>(std::clamp<int64_t>(num_heads, 1, kMaxSpanHeads));
}

// Appends the tiles of an entry. Few rows wait for memory: they walk several kv heads together.
// Many rows wait for their own arithmetic, and do better with what one head needs near.
void PlanEntry(const DecodeParams& params, int32_t entry, int32_t heads_per_tile,
               std::vector<RowTile>* tiles) {
  const int32_t num_heads = params.cache.num_kv_heads;
  const int32_t num_rows = params.batch.NumTokens(entry) * params.cache.GroupSize();
  const int32_t step = num_rows <= kMaxRowsOfManyHeads ? heads_per_tile : 1;
  for (int32_t kv_head = 0; kv_head < num_heads; kv_head += step) {
    PlanTiles(params, entry, kv_head, std::min(step, num_heads - kv_head), tiles);
  }
}

// What a tile costs, in units of one code of K and V for one row: to read and unpack a code is
// about as much work as one row's product with it.
int64_t CostPerPosition(const PagedInt8Cache& cache, const RowTile& tile) {
  return int64_t{cache.head_dim} * tile.num_kv_heads * (1 + tile.num_rows);
}

int64_t Cost(const PagedInt8Cache& cache, const RowTile& tile) {
  return CostPerPosition(cache, tile) * (tile.end - tile.begin);
}

// Positions of one span of a tile: fixed, or what costs `share`.
int32_t SpanLength(const PagedInt8Cache& cache, const RowTile& tile, int64_t share) {
  if (cache.is_deterministic) return kDeterministicSpan;
  const int64_t num_positions = std::max<int64_t>(share / CostPerPosition(cache, tile), kMinSpan);
  const int64_t rounded = CeilDivide(num_positions, kTileTokens) * kTileTokens;
  return static_cast<int32_t>(std::min<int64_t>(rounded, 1 << 30));
}

// Cuts the tiles into items. A tile's spans become items of their own only where the tile is a
// large part of `work`, what a thread has to do.
void PlanItems(const PagedInt8Cache& cache, int64_t work, DecodeWorkspace* workspace) {
  for (size_t i = 0; i < workspace->tiles.size(); ++i) {
    RowTile& tile = workspace->tiles[i];
    tile.span_len = SpanLength(cache, tile, work / kSharesOfSpans);
    tile.num_spans =
        static_cast<int32_t>(CeilDivide(tile.end, tile.span_len)) - tile.begin / tile.span_len;
    tile.is_shared = tile.num_spans > 1 && Cost(cache, tile) > work / kSharesToCut;
    tile.first_state = workspace->num_states;
    if (tile.is_shared) workspace->num_states += tile.num_spans * tile.num_kv_heads;
    const int32_t num_items = tile.is_shared ? tile.num_spans : 1;
    for (int32_t span = 0; span < num_items; ++span) {
      workspace->items.push_back({static_cast<int32_t>(i), span});
    }
  }
}

void ReserveStates(DecodeWorkspace* workspace) {
  if (workspace->num_states > workspace->states_capacity) {
    workspace->states_capacity = 0;
    workspace->states.reset(new SpanState[workspace->num_states]);
    workspace->states_capacity = workspace->num_states;
  }
  const auto num_tiles = static_cast<int64_t>(workspace->tiles.size());
  if (num_tiles > workspace->counts_capacity) {
    workspace->counts_capacity = 0;
    workspace->num_spans_done.reset(new std::atomic<int32_t>[num_tiles]);
    workspace->counts_capacity = num_tiles;
  }
  for (int64_t i = 0; i < num_tiles; ++i) workspace->num_spans_done[i] = 0;
}

// A tile's rows of q, in FP32.
struct Queries {
  // [num_kv_heads, num_rows, kMaxHeadDim]
  alignas(64) float rows[kMaxSpanHeads * kMaxTileRows * kMaxHeadDim];
  // [num_kv_heads, num_rows] what rows are to be multiplied by
  float factors[kMaxSpanHeads * kMaxTileRows];
};

// Returns the factor that the row is to be multiplied by from here on: 1 unless it is huge.
float TameQuery(uint32_t amax_bits, int32_t head_dim, float* row) {
  if (amax_bits < FloatBits(kHugeQuery)) return 1.0f;
  for (int32_t d = 0; d < head_dim; ++d) row[d] *= kHugeQueryFraction;
  return 1.0f / kHugeQueryFraction;
}

// One launch of decode: its parameters, its plan, and the steps that a thread takes.
class DecodeLaunch {
 public:
  DecodeLaunch(const DecodeParams& params, Runtime& runtime)
      : params_(params), runtime_(runtime), workspace_(runtime.workspace) {}

  void Plan();
  void Run();
  void ClearSkippedEntries();

 private:
  int64_t OutRow(const RowTile& tile, int32_t head_idx, int32_t row) const;
  void AttendSpan(const SpanParams& span, SpanState* states) const;
  void LoadQuery(const RowTile& tile, int64_t out_row, bool is_checked, float* row,
                 float* factor) const;
  void LoadQueries(const RowTile& tile, bool is_checked, Queries* queries) const;
  SpanParams MakeSpanParams(const RowTile& tile, const Queries& queries) const;
  ContextRun SpanRun(const RowTile& tile, int32_t span_idx) const;
  ContextRun RunAfter(int64_t item_idx) const;
  void RunItem(int64_t item_idx) const;
  void AttendAllSpans(const RowTile& tile, const ContextRun& after, SpanParams* span) const;
  void AttendOneSpan(const DecodeItem& item, SpanParams* span) const;
  void MergeSpans(const RowTile& tile, const SpanState* others, SpanState* states) const;
  void MergeRows(const RowTile& tile, const SpanState& other, SpanState* state) const;
  void StoreSpan(const RowTile& tile, const SpanState* states) const;
  void StoreRow(const RowTile& tile, int64_t out_row, const SpanState& state, int32_t row) const;

  const DecodeParams& params_;
  Runtime& runtime_;
  DecodeWorkspace& workspace_;
  bool is_parallel_ = false;
  int64_t num_sharing_ = 1;  // threads
};

void DecodeLaunch::Plan() {
  workspace_.tiles.clear();
  workspace_.items.clear();
  workspace_.num_states = 0;
  const int32_t heads_per_tile = HeadsPerTile(params_, runtime_.threads.num_threads());
  OrderEntries(params_.batch, &workspace_.entry_order);
  for (const int32_t entry : workspace_.entry_order) {
    PlanEntry(params_, entry, heads_per_tile, &workspace_.tiles);
  }
  int64_t cost = 0;
  for (const RowTile& tile : workspace_.tiles) cost += Cost(params_.cache, tile);
  is_parallel_ = cost >= kMinSharedCost;
  num_sharing_ = is_parallel_ ? runtime_.threads.num_threads() : 1;
  // A thread alone has nothing to share out: no tile is cut.
  const int64_t work = num_sharing_ == 1 ? cost * kSharesOfSpans : CeilDivide(cost, num_sharing_);
  PlanItems(params_.cache, work, &workspace_);
  ReserveStates(&workspace_);
}

void DecodeLaunch::Run() {
  const auto num_items = static_cast<int64_t>(workspace_.items.size());
  runtime_.threads.ForEach(num_items, is_parallel_,
                           [this](int64_t item_idx) { RunItem(item_idx); });
}

// An entry without context has no answer: zeros, and the log of an empty sum.
void DecodeLaunch::ClearSkippedEntries() {
  const RaggedBatch& batch = params_.batch;
  const int64_t num_heads = params_.cache.num_q_heads;
  const int64_t row_bytes = params_.cache.head_dim * ElementBytes(params_.dtype);
  for (int32_t entry = 0; entry < batch.num_entries; ++entry) {
    if (batch.kv_lens[entry] != 0) continue;
    const int64_t first_row = batch.token_starts[entry] * num_heads;
    const int64_t num_rows = batch.NumTokens(entry) * num_heads;
    std::memset(static_cast<char*>(params_.out) + first_row * row_bytes, 0, num_rows * row_bytes);
    if (params_.lse == nullptr) continue;
    std::fill_n(params_.lse + first_row, num_rows, -std::numeric_limits<float>::infinity());
  }
}

// The index of a row of a tile's head into [total_tokens, num_q_heads].
int64_t DecodeLaunch::OutRow(const RowTile& tile, int32_t head_idx, int32_t row) const {
  const int32_t group_size = params_.cache.GroupSize();
  const int32_t entry_row = tile.first_row + row;
  const int64_t token = params_.batch.token_starts[tile.entry] + entry_row / group_size;
  return token * params_.cache.num_q_heads + (tile.kv_head + head_idx) * group_size +
         entry_row % group_size;
}

void DecodeLaunch::LoadQuery(const RowTile& tile, int64_t out_row, bool is_checked, float* row,
                             float* factor) const {
  const int32_t head_dim = params_.cache.head_dim;
  const char* source =
      static_cast<const char*>(params_.q) + out_row * head_dim * ElementBytes(params_.dtype);
  const uint32_t amax_bits = runtime_.kernels.load_row(params_.dtype, source, head_dim, row);
  std::fill(row + head_dim, row + CeilDivide(head_dim, kQueryPadding) * kQueryPadding, 0.0f);
  *factor = TameQuery(amax_bits, head_dim, row);
  if (!is_checked || amax_bits < kFloatInfBits) return;
  const int64_t num_q_heads = params_.cache.num_q_heads;
  const int64_t token = out_row / num_q_heads - params_.batch.token_starts[tile.entry];
  RecordOffence(
      &params_.offences[tile.entry],
      PackOffence(OffenceField::kQ, token, out_row % num_q_heads, OffenceKind::kNonFinite));
}

void DecodeLaunch::LoadQueries(const RowTile& tile, bool is_checked, Queries* queries) const {
  int32_t i = 0;
  for (int32_t head_idx = 0; head_idx < tile.num_kv_heads; ++head_idx) {
    for (int32_t row = 0; row < tile.num_rows; ++row, ++i) {
      LoadQuery(tile, OutRow(tile, head_idx, row), is_checked, queries->rows + i * kMaxHeadDim,
                &queries->factors[i]);
    }
  }
}

SpanParams DecodeLaunch::MakeSpanParams(const RowTile& tile, const Queries& queries) const {
  const int32_t layer = params_.batch.layers[tile.entry];
  SpanParams span = {};
  span.cache = &params_.cache;
  span.options = &params_.cache.options[layer];
  span.kv_len = params_.batch.kv_lens[tile.entry];
  span.num_rows = tile.num_rows;
  span.q = queries.rows;
  span.q_factors = queries.factors;
  for (int32_t row = 0; row < tile.num_rows; ++row) {
    const Range range = AttendedRange(params_, tile.entry, tile.first_row + row);
    span.row_begin[row] = range.begin;
    span.row_end[row] = range.end;
  }
  return span;
}

// Span i of a tile is the i-th run of span_len positions that holds some of the tile's.
ContextRun DecodeLaunch::SpanRun(const RowTile& tile, int32_t span_idx) const {
  const int64_t first = (tile.begin / tile.span_len + int64_t{span_idx}) * tile.span_len;
  ContextRun run = {};
  run.layer = &params_.cache.layers[params_.batch.layers[tile.entry]];
  run.block_table = params_.batch.BlockTable(tile.entry);
  run.kv_head = tile.kv_head;
  run.num_kv_heads = tile.num_kv_heads;
  run.begin = static_cast<int32_t>(std::max<int64_t>(tile.begin, first));
  run.end = static_cast<int32_t>(std::min<int64_t>(tile.end, first + tile.span_len));
  return run;
}

// What this thread reads first after an item, if all threads go at the same speed.
ContextRun DecodeLaunch::RunAfter(int64_t item_idx) const {
  const int64_t next_idx = item_idx + num_sharing_;
  if (next_idx >= static_cast<int64_t>(workspace_.items.size())) return {};
  const DecodeItem& next = workspace_.items[next_idx];
  return SpanRun(workspace_.tiles[next.tile_idx], next.span_idx);
}

void DecodeLaunch::RunItem(int64_t item_idx) const {
  const DecodeItem& item = workspace_.items[item_idx];
  const RowTile& tile = workspace_.tiles[item.tile_idx];
  Queries queries;
  LoadQueries(tile, item.span_idx == 0, &queries);
  SpanParams span = MakeSpanParams(tile, queries);
  if (tile.is_shared) {
    span.next = RunAfter(item_idx);
    AttendOneSpan(item, &span);
  } else {
    AttendAllSpans(tile, RunAfter(item_idx), &span);
  }
}

void DecodeLaunch::AttendSpan(const SpanParams& span, SpanState* states) const {
  const IsaKernels& kernels = runtime_.kernels;
  const bool is_exact = params_.dtype == DataType::kFloat32;
  (is_exact ? kernels.attend_span : kernels.attend_span_for_halves)(span, states);
}

void DecodeLaunch::AttendAllSpans(const RowTile& tile, const ContextRun& after,
                                  SpanParams* span) const {
  SpanState states[kMaxSpanHeads], next[kMaxSpanHeads];
  for (int32_t span_idx = 0; span_idx < tile.num_spans; ++span_idx) {
    span->run = SpanRun(tile, span_idx);
    span->next = span_idx + 1 < tile.num_spans ? SpanRun(tile, span_idx + 1) : after;
    AttendSpan(*span, span_idx == 0 ? states : next);
    if (span_idx > 0) MergeSpans(tile, next, states);
  }
  StoreSpan(tile, states);
}

// The thread that finishes a tile's last span merges them all.
void DecodeLaunch::AttendOneSpan(const DecodeItem& item, SpanParams* span) const {
  const RowTile& tile = workspace_.tiles[item.tile_idx];
  SpanState* states = &workspace_.states[tile.first_state];
  span->run = SpanRun(tile, item.span_idx);
  AttendSpan(*span, states + item.span_idx * tile.num_kv_heads);
  if (workspace_.num_spans_done[item.tile_idx].fetch_add(1) + 1 < tile.num_spans) return;
  for (int32_t i = 1; i < tile.num_spans; ++i) {
    MergeSpans(tile, states + i * tile.num_kv_heads, states);
  }
  StoreSpan(tile, states);
}

void DecodeLaunch::MergeSpans(const RowTile& tile, const SpanState* others,
                              SpanState* states) const {
  for (int32_t head_idx = 0; head_idx < tile.num_kv_heads; ++head_idx) {
    MergeRows(tile, others[head_idx], &states[head_idx]);
  }
}

void DecodeLaunch::MergeRows(const RowTile& tile, const SpanState& other, SpanState* state) const {
  for (int32_t row = 0; row < tile.num_rows; ++row) {
    float own_factor, other_factor;
    state->softmax[row].Merge(other.softmax[row], &own_factor, &other_factor);
    float* values = state->values + row * kMaxHeadDim;
    const float* other_values = other.values + row * kMaxHeadDim;
    for (int32_t d = 0; d < params_.cache.head_dim; ++d) {
      values[d] = values[d] * own_factor + other_values[d] * other_factor;
    }
  }
}

void DecodeLaunch::StoreSpan(const RowTile& tile, const SpanState* states) const {
  for (int32_t head_idx = 0; head_idx < tile.num_kv_heads; ++head_idx) {
    for (int32_t row = 0; row < tile.num_rows; ++row) {
      StoreRow(tile, OutRow(tile, head_idx, row), states[head_idx], row);
    }
  }
}

void DecodeLaunch::StoreRow(const RowTile& tile, int64_t out_row, const SpanState& state,
                            int32_t row) const {
  const PagedInt8Cache& cache = params_.cache;
  const float* sinks = cache.options[params_.batch.layers[tile.entry]].sinks;
  const float* sink = sinks == nullptr ? nullptr : sinks + out_row % cache.num_q_heads;
  const SoftmaxState& softmax = state.softmax[row];
  const int64_t row_bytes = cache.head_dim * ElementBytes(params_.dtype);
  runtime_.kernels.store_row(params_.dtype, state.values + row * kMaxHeadDim,
                             softmax.Normalize(sink), cache.head_dim,
                             static_cast<char*>(params_.out) + out_row * row_bytes);
  if (params_.lse != nullptr) params_.lse[out_row] = softmax.Lse();
}

}  // namespace

Status DecodePagedInt8(const DecodeParams& params, Runtime& runtime) {
  const Status status = CheckDecodeBatch(params.cache, params.batch);
  if (status != Status::kOk) return status;
  const ScopedFloatEnvironment environment;
  std::fill_n(params.offences, params.batch.num_entries, kNoOffence);
  DecodeLaunch launch(params, runtime);
  try {
    launch.Plan();
  } catch (const std::bad_alloc&) {
    return Status::kOutOfMemory;
  }
  launch.ClearSkippedEntries();
  launch.Run();
  return Status::kOk;
}

}  // namespace octavo::cpu
