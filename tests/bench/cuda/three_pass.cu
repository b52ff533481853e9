// Decode attention as it is written first: one thread block per q head and entry, in three passes.
//
//   1. scores: a warp takes a token, its lanes the dims; the score goes to shared memory
//   2. softmax: the largest score, then weights and their sum; V scales join the weights
//   3. values: a thread takes a dim and walks over all tokens
//
// The context has to fit shared memory, one float a token; q heads that share a kv head each read
// all of its K and V. Sums are FP32.

#include "cuda/device.h"
#include "cuda/elements.h"
#include "three_pass.h"

namespace octavo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kNumWarps = kThreads / kWarpThreads;
constexpr int kLaneDims = kMaxHeadDim / kWarpThreads;
constexpr float kLog2E = 1.4426950408889634f;

// One block's work.
struct Head {
  PagedInt8Layer layer;
  const int32_t* block_table;
  int32_t kv_head;
  int32_t kv_len;
  int64_t first;  // element of q and out
  float sm_scale;
};

__device__ Head ThisHead(const ThreePassParams& params) {
  const auto q_head = static_cast<int32_t>(blockIdx.x), entry = static_cast<int32_t>(blockIdx.y);
  Head head;
  head.layer = LoadLayer(params.cache, 0);
  head.block_table = params.batch.BlockTable(entry);
  head.kv_head = q_head / params.cache.GroupSize();
  head.kv_len = LoadGlobal(params.batch.kv_lens + entry);
  head.first = (int64_t{entry} * params.cache.num_q_heads + q_head) * params.cache.head_dim;
  head.sm_scale = LoadGlobal(&params.cache.options->sm_scale);
  return head;
}

// One token's tile, and its slot there.
struct Token {
  KvTile tile;
  int64_t offset;
};

__device__ __forceinline__ Token TokenAt(const PagedInt8Cache& cache, const Head& head,
                                         int32_t position) {
  const int32_t block_id = LoadGlobal(head.block_table + position / cache.block_size);
  return {cache.Tile(head.layer, block_id, head.kv_head), position % cache.block_size};
}

// Joins a value of each thread; every thread gets the result.
template <typename Join>
__device__ float ReduceBlock(float value, float* scratch, Join join) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) {
    value = join(value, ShuffleXor(value, mask));
  }
  SyncBlock();  // what was in scratch has been read
  if (threadIdx.x % kWarpThreads == 0) StoreShared(scratch + warp, value);
  SyncBlock();
  float joined = LoadShared(scratch);
  for (int i = 1; i < kNumWarps; ++i) joined = join(joined, LoadShared(scratch + i));
  return joined;
}

__device__ void ComputeScores(const ThreePassParams& params, const Head& head, float* scores) {
  const auto lane = static_cast<int32_t>(threadIdx.x % kWarpThreads);
  const int32_t head_dim = params.cache.head_dim;
  float q[kLaneDims];
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) {
    const int32_t dim = lane + i * kWarpThreads;
    q[i] = dim < head_dim ? HalfToFloat(LoadGlobal(params.q + head.first + dim)) : 0.0f;
  }
  for (auto position = static_cast<int32_t>(threadIdx.x / kWarpThreads); position < head.kv_len;
       position += kNumWarps) {
    const Token token = TokenAt(params.cache, head, position);
    const int8_t* codes = token.tile.k_codes + token.offset * head_dim;
    float score = 0.0f;
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) {
      const int32_t dim = lane + i * kWarpThreads;
      if (dim < head_dim) score += q[i] * static_cast<float>(LoadGlobal(codes + dim));
    }
    for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) score += ShuffleXor(score, mask);
    const float k_scale = HalfToFloat(LoadGlobal(token.tile.k_scales + token.offset));
    if (lane == 0) StoreShared(scores + position, score * k_scale * head.sm_scale);
  }
}

// Turns scores into weights times V scales; returns the sum of the weights.
__device__ float ComputeWeights(const ThreePassParams& params, const Head& head, float* scores,
                                float* scratch) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  float largest = -INFINITY;
  for (int32_t i = thread; i < head.kv_len; i += kThreads) {
    largest = fmaxf(largest, LoadShared(scores + i));
  }
  largest = ReduceBlock(largest, scratch, [](float x, float y) { return fmaxf(x, y); });
  float sum = 0.0f;
  for (int32_t i = thread; i < head.kv_len; i += kThreads) {
    const float weight = Exp2((LoadShared(scores + i) - largest) * kLog2E);
    sum += weight;
    const Token token = TokenAt(params.cache, head, i);
    const float v_scale = HalfToFloat(LoadGlobal(token.tile.v_scales + token.offset));
    StoreShared(scores + i, weight * v_scale);
  }
  return ReduceBlock(sum, scratch, [](float x, float y) { return x + y; });
}

__device__ void SumValues(const ThreePassParams& params, const Head& head, const float* weights,
                          float sum) {
  const int32_t head_dim = params.cache.head_dim;
  for (auto dim = static_cast<int32_t>(threadIdx.x); dim < head_dim; dim += kThreads) {
    float value = 0.0f;
    for (int32_t i = 0; i < head.kv_len; ++i) {
      const Token token = TokenAt(params.cache, head, i);
      const int8_t code = LoadGlobal(token.tile.v_codes + token.offset * head_dim + dim);
      value += LoadShared(weights + i) * static_cast<float>(code);
    }
    StoreGlobal(params.out + head.first + dim, FloatToHalf(value / sum));
  }
}

// Grid: x over q heads, y over entries. Shared memory: a float a warp, then one a token.
__global__ void __launch_bounds__(kThreads) three_pass_kernel(ThreePassParams params) {
  auto* scratch = reinterpret_cast<float*>(DynamicShared());
  float* scores = scratch + kNumWarps;
  const Head head = ThisHead(params);
  ComputeScores(params, head, scores);
  SyncBlock();
  const float sum = ComputeWeights(params, head, scores, scratch);
  SumValues(params, head, scores, sum);
}

}  // namespace

cudaError_t DecodeInThreePasses(const ThreePassParams& params, cudaStream_t stream) {
  if (params.max_kv_len > kMaxThreePassTokens) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(params.cache.num_q_heads),
                  static_cast<unsigned>(params.batch.num_entries));
  const size_t shared_bytes = (kNumWarps + params.max_kv_len) * sizeof(float);
  return Launch(three_pass_kernel, grid, dim3(kThreads), params, shared_bytes, stream);
}

}  // namespace octavo::cuda
