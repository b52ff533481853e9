// Each collective of a warp. Grid: one warp a block, all blocks alike.

#include "harness.h"

namespace octavo::cuda {
namespace {

__device__ int Lane() { return static_cast<int>(threadIdx.x); }

// Input and output [32] float; option: the lane mask.
__global__ void shuffle_xor_kernel(const TestParams params) {
  const float value = LoadGlobal(InputAs<float>(params) + Lane());
  StoreGlobal(OutputAs<float>(params) + Lane(), ShuffleXor(value, params.option));
}

// Input and output [32] int64; each lane asks the one that is `option` further, around.
__global__ void shuffle_from_kernel(const TestParams params) {
  const auto value = LoadGlobal(InputAs<long long>(params) + Lane());
  StoreGlobal(OutputAs<long long>(params) + Lane(),
              ShuffleFrom(value, (Lane() + params.option) % kWarpThreads));
}

// Input and output [32] int32.
__global__ void any_kernel(const TestParams params) {
  const bool is_set = LoadGlobal(InputAs<int32_t>(params) + Lane()) != 0;
  StoreGlobal(OutputAs<int32_t>(params) + Lane(), AnyOfWarp(is_set) ? 1 : 0);
}

// Input and output [32] uint32: pairs of 16-bit elements.
__global__ void transpose_kernel(const TestParams params) {
  const uint32_t pair = LoadGlobal(InputAs<uint32_t>(params) + Lane());
  StoreGlobal(OutputAs<uint32_t>(params) + Lane(), TransposeTile(pair));
}

// What a lane brings to a tile's product, as the test lays it out.
struct Fragments {
  uint32_t a[4];
  uint32_t b[2];
  float d[4];
};

__device__ Fragments LoadFragments(const TestParams& params) {
  constexpr int kNumWords = sizeof(Fragments) / sizeof(uint32_t);
  const uint32_t* words = InputAs<uint32_t>(params) + kNumWords * Lane();
  Fragments own;
  for (int idx = 0; idx < 4; ++idx) own.a[idx] = LoadGlobal(words + idx);
  for (int idx = 0; idx < 2; ++idx) own.b[idx] = LoadGlobal(words + 4 + idx);
  for (int idx = 0; idx < 4; ++idx) own.d[idx] = BitsFloat(LoadGlobal(words + 6 + idx));
  return own;
}

// Input [32] Fragments, output [32, 4] float. The planted bug swaps two registers of A.
__global__ void multiply_kernel(const TestParams params) {
  Fragments own = LoadFragments(params);
  if (params.option != 0) {
    const uint32_t second = own.a[1];
    own.a[1] = own.a[2];
    own.a[2] = second;
  }
  MultiplyTile(own.d, own.a, own.b);
  float* output = OutputAs<float>(params) + 4 * Lane();
  for (int idx = 0; idx < 4; ++idx) StoreGlobal(output + idx, own.d[idx]);
}

const NamedKernel kKernels[] = {
    {"shuffle_xor", shuffle_xor_kernel, kWarpThreads, 0},
    {"shuffle_from", shuffle_from_kernel, kWarpThreads, 0},
    {"any", any_kernel, kWarpThreads, 0},
    {"transpose", transpose_kernel, kWarpThreads, 0},
    {"multiply", multiply_kernel, kWarpThreads, 0},
};

}  // namespace
}  // namespace octavo::cuda

OCTAVO_TEST_EXPORT int run_collectives(const char* name, const octavo::cuda::TestJob* job) {
  return octavo::cuda::RunNamed(octavo::cuda::kKernels, name, *job);
}
