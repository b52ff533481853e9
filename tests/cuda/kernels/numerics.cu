// Each primitive that computes on one thread's own values.
//
// Grid: a thread per item. Input [num_items, 3] uint32, output [num_items] uint32, FP32 as its
// bits; option: which primitive, by its place in Compute.

#include "harness.h"

namespace octavo::cuda {
namespace {

constexpr int kBlockThreads = 128;

__device__ uint32_t Compute(int primitive, uint32_t x, uint32_t y, uint32_t z) {
  switch (primitive) {
    case 0:
      return FloatToHalf(BitsFloat(x));
    case 1:
      return FloatBits(HalfToFloat(static_cast<uint16_t>(x)));
    case 2:
      return FloatToBfloat16(BitsFloat(x));
    case 3:
      return FloatBits(Bfloat16ToFloat(static_cast<uint16_t>(x)));
    case 4:
      return SubtractHalves(x, y);
    case 5:
      return PackHalves(BitsFloat(x), BitsFloat(y));
    case 6:
      return PermuteBytes(x, y, z);
    case 7:
      return static_cast<uint32_t>(RoundToInt(BitsFloat(x)));
    case 8:
      return FloatBits(Divide(BitsFloat(x), BitsFloat(y)));
    case 9:
      return FloatBits(Multiply(BitsFloat(x), BitsFloat(y)));
    case 10:
      return FloatBits(Exp2(BitsFloat(x)));
    case 11:
      return FloatBits(Log2(BitsFloat(x)));
    default:
      return FloatBits(Tanh(BitsFloat(x)));
  }
}

__global__ void compute_kernel(const TestParams params) {
  const int item = static_cast<int>(blockIdx.x) * kBlockThreads + static_cast<int>(threadIdx.x);
  const uint32_t* operands = InputAs<uint32_t>(params) + 3 * item;
  StoreGlobal(OutputAs<uint32_t>(params) + item,
              Compute(params.option, LoadGlobal(operands), LoadGlobal(operands + 1),
                      LoadGlobal(operands + 2)));
}

const NamedKernel kKernels[] = {{"compute", compute_kernel, kBlockThreads, 0}};

}  // namespace
}  // namespace octavo::cuda

OCTAVO_TEST_EXPORT int run_numerics(const char* name, const octavo::cuda::TestJob* job) {
  return octavo::cuda::RunNamed(octavo::cuda::kKernels, name, *job);
}
