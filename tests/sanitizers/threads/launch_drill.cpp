#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "drills.h"
#include "octavo/cpu_ops.h"
#include "octavo/offence.h"
#include "runtime.h"

namespace octavo::tests {
namespace {

constexpr int kNumThreads = 4;
constexpr int kNumLayers = 3;
constexpr int kNumKvHeads = 2;
constexpr int kNumQHeads = 8;
constexpr int kHeadDim = 64;
constexpr int kBlockSize = 16;
constexpr int kNumBlocks = 512;
constexpr float kTolerance = 1e-5f;  // of answers within +-1 whose spans were cut otherwise

// Contexts of the sessions: some are cut into spans that threads share, and two are skipped.
constexpr int kContexts[] = {1500, 0, 17, 900, 1, 600, 0, 33};
constexpr int kMaxContext = 1500;
constexpr int kNumSessions = std::size(kContexts);

// A model with pools of its own, zeroed.
struct Model {
  explicit Model(bool is_deterministic);

  static constexpr size_t kNumSlots = size_t{kNumBlocks} * kNumKvHeads * kBlockSize;
  std::vector<int8_t> codes = std::vector<int8_t>(kNumLayers * 2 * kNumSlots * kHeadDim);
  std::vector<uint16_t> scales = std::vector<uint16_t>(kNumLayers * 2 * kNumSlots);
  std::vector<PagedInt8Layer> layers;
  std::vector<LayerOptions> options =
      std::vector<LayerOptions>(kNumLayers, {0.125f, 0, 0, nullptr});
  PagedInt8Cache cache;
};

Model::Model(bool is_deterministic) {
  for (size_t i = 0; i < kNumLayers; ++i) {
    int8_t* k_codes = &codes[2 * i * kNumSlots * kHeadDim];
    uint16_t* k_scales = &scales[2 * i * kNumSlots];
    int8_t* v_codes = k_codes + kBlockSize * kHeadDim;  // K and V of a kv head follow each other
    layers.push_back({k_codes, v_codes, k_scales, k_scales + kNumSlots});
  }
  cache = {kNumLayers, kNumBlocks,       kNumQHeads,    kNumKvHeads,   kHeadDim,
           kBlockSize, is_deterministic, layers.data(), options.data()};
}

// A batch with one entry a session.
struct Batch {
  std::vector<int32_t> layers, start_pos, kv_lens, block_tables;
  std::vector<int32_t> token_starts = {0};
  std::vector<int64_t> slots;
  std::unique_ptr<bool[]> is_causal{new bool[kNumSessions]};

  void Add(int session, int num_tokens, int32_t first_block);
  RaggedBatch View() const;
};

constexpr int kMaxNumBlocks = (kMaxContext + kBlockSize - 1) / kBlockSize;

// Adds the last num_tokens tokens of a session, whose blocks go down from first_block.
void Batch::Add(int session, int num_tokens, int32_t first_block) {
  const int context = kContexts[session];
  is_causal[layers.size()] = true;
  layers.push_back(session % kNumLayers);
  start_pos.push_back(context - num_tokens);
  kv_lens.push_back(context);
  token_starts.push_back(token_starts.back() + num_tokens);
  for (int i = 0; i < kMaxNumBlocks; ++i) {
    block_tables.push_back(i * kBlockSize < context ? first_block - i : -1);
  }
  for (int position = context - num_tokens; position < context; ++position) {
    slots.push_back(int64_t{first_block - position / kBlockSize} * kBlockSize +
                    position % kBlockSize);
  }
}

RaggedBatch Batch::View() const {
  return {static_cast<int32_t>(layers.size()),
          kMaxNumBlocks,
          layers.data(),
          start_pos.data(),
          token_starts.data(),
          kv_lens.data(),
          is_causal.get(),
          block_tables.data(),
          slots.data()};
}

// Makes the batch of all sessions with at most max_tokens tokens each.
Batch MakeBatch(int max_tokens) {
  Batch batch;
  int32_t first_block = kNumBlocks - 1;
  for (int session = 0; session < kNumSessions; ++session) {
    batch.Add(session, std::min(max_tokens, kContexts[session]), first_block);
    first_block -= (kContexts[session] + kBlockSize - 1) / kBlockSize;
  }
  return batch;
}

// Draws values within +-1; one in rows_per_offence rows gets a NaN.
std::vector<float> Draw(std::mt19937& random, int num_rows, int rows_per_offence) {
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> values(size_t{1} * num_rows * kHeadDim);
  for (float& value : values) value = uniform(random);
  for (int row = 0; rows_per_offence > 0 && row < num_rows; ++row) {
    if (random() % rows_per_offence != 0) continue;
    values[size_t{1} * row * kHeadDim + random() % kHeadDim] =
        std::numeric_limits<float>::quiet_NaN();
  }
  return values;
}

// What one runtime made of a round's inputs.
struct Outcome {
  explicit Outcome(bool is_deterministic) : model(is_deterministic) {}

  Model model;
  std::vector<int64_t> append_offences = std::vector<int64_t>(kNumSessions);
  std::vector<int64_t> decode_offences = std::vector<int64_t>(kNumSessions);
  std::vector<float> out, lse;
};

// The batches and tensors of a round.
struct Inputs {
  explicit Inputs(std::mt19937& random, int rows_per_offence);

  Batch prompt = MakeBatch(kMaxContext);
  Batch step = MakeBatch(4);
  std::vector<float> k, v, q;
};

Inputs::Inputs(std::mt19937& random, int rows_per_offence)
    : k(Draw(random, prompt.token_starts.back() * kNumKvHeads, rows_per_offence)),
      v(Draw(random, prompt.token_starts.back() * kNumKvHeads, rows_per_offence)),
      q(Draw(random, step.token_starts.back() * kNumQHeads, rows_per_offence)) {}

void Append(const Inputs& inputs, cpu::Runtime& runtime, Outcome* outcome) {
  const cpu::AppendParams params = {outcome->model.cache, inputs.prompt.View(),
                                    DataType::kFloat32,   inputs.k.data(),
                                    inputs.v.data(),      outcome->append_offences.data()};
  Check(AppendPagedInt8(params, runtime) == Status::kOk, "an append is taken");
}

void Decode(const Inputs& inputs, cpu::Runtime& runtime, Outcome* outcome) {
  outcome->out.resize(inputs.q.size());
  outcome->lse.resize(inputs.q.size() / kHeadDim);
  const cpu::DecodeParams params = {outcome->model.cache,
                                    inputs.step.View(),
                                    DataType::kFloat32,
                                    inputs.q.data(),
                                    outcome->out.data(),
                                    outcome->lse.data(),
                                    outcome->decode_offences.data()};
  Check(DecodePagedInt8(params, runtime) == Status::kOk, "a decode is taken");
}

// Zeroes the answers of entries with an offence, which may be anything.
void Discard(const Batch& batch, Outcome* outcome) {
  for (int entry = 0; entry < kNumSessions; ++entry) {
    if (outcome->decode_offences[entry] == kNoOffence) continue;
    const size_t first = size_t{kNumQHeads} * batch.token_starts[entry];
    const size_t end = size_t{kNumQHeads} * batch.token_starts[entry + 1];
    std::fill(&outcome->out[first * kHeadDim], &outcome->out[end * kHeadDim], 0.0f);
    std::fill(&outcome->lse[first], &outcome->lse[end], 0.0f);
  }
}

// The copies follow each other: the first's target is the second's source.
void Copy(cpu::Runtime& runtime, Outcome* outcome) {
  const int64_t copies[][2] = {{kNumBlocks - 1, 0}, {0, 1}, {kNumBlocks - 2, 2}};
  const Status status = CopyBlocks(outcome->model.cache, copies, std::size(copies), runtime);
  Check(status == Status::kOk, "copies are taken");
}

Outcome Run(const Inputs& inputs, bool is_deterministic, cpu::Runtime& runtime) {
  Outcome outcome(is_deterministic);
  Append(inputs, runtime, &outcome);
  Decode(inputs, runtime, &outcome);
  Discard(inputs.step, &outcome);
  Copy(runtime, &outcome);
  return outcome;
}

template <typename T>
bool HaveSameBits(const std::vector<T>& x, const std::vector<T>& y) {
  return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.size() * sizeof(T)) == 0;
}

// The lse of an entry without context is -inf in both.
bool AreClose(const std::vector<float>& x, const std::vector<float>& y) {
  const auto are_close = [](float a, float b) { return a == b || std::fabs(a - b) <= kTolerance; };
  return std::equal(x.begin(), x.end(), y.begin(), y.end(), are_close);
}

void CheckSame(const Outcome& many, const Outcome& one) {
  Check(HaveSameBits(many.model.codes, one.model.codes), "threads store the same codes");
  Check(HaveSameBits(many.model.scales, one.model.scales), "threads store the same scales");
  Check(many.append_offences == one.append_offences, "threads find the same offences of k and v");
  Check(many.decode_offences == one.decode_offences, "threads find the same offences of q");
  const bool is_deterministic = one.model.cache.is_deterministic;
  const auto are_same = is_deterministic ? HaveSameBits<float> : AreClose;
  Check(are_same(many.out, one.out), "threads give the same answers");
  Check(are_same(many.lse, one.lse), "threads give the same lse");
}

}  // namespace

void DrillLaunches(int num_rounds) {
  const cpu::IsaKernels& kernels = *cpu::FindKernels("");
  cpu::Runtime many(kernels, kNumThreads), one(kernels, 1);
  std::mt19937 random(1);
  for (int round = 0; round < num_rounds; ++round) {
    const Inputs inputs(random, round % 3 == 2 ? 5 : 0);
    for (const bool is_deterministic : {false, true}) {
      CheckSame(Run(inputs, is_deterministic, many), Run(inputs, is_deterministic, one));
    }
  }
}

}  // namespace octavo::tests
