#include "bench.h"

#include <chrono>
#include <memory>
#include <string>

#include "bandwidth.h"
#include "host_step.h"
#include "resident_step.h"

namespace octavo::cuda {
namespace {

constexpr int64_t kVectorBytes = 16;

thread_local std::string last_error;

// Runs a call and turns what it throws into a result.
template <typename Call>
int32_t Guarded(Call call) {
  try {
    call();
    return kDone;
  } catch (const Failure& failure) {
    last_error = failure.text;
    return failure.result;
  }
}

template <typename Call>
double MicrosecondsOf(Call call) {
  const auto start = std::chrono::steady_clock::now();
  call();
  const std::chrono::duration<double, std::micro> elapsed =
      std::chrono::steady_clock::now() - start;
  return elapsed.count();
}

int64_t NumVectors(int64_t num_bytes) {
  if (num_bytes % kVectorBytes != 0) throw Failure{kInvalid, "num_bytes is no multiple of 16"};
  return num_bytes / kVectorBytes;
}

void LaunchOne(const ResidentStep& step, int32_t kernel, cudaStream_t stream) {
  if (kernel == kThreePass) {
    step.LaunchThreePass(stream);
  } else {
    step.LaunchKernels(stream);
  }
}

}  // namespace
}  // namespace octavo::cuda

using octavo::cuda::BenchPlan;
using octavo::cuda::BenchStep;
using octavo::cuda::Check;
using octavo::cuda::Guarded;
using octavo::cuda::HostStep;
using octavo::cuda::ResidentStep;

const char* octavo_bench_error() { return octavo::cuda::last_error.c_str(); }

int32_t octavo_bench_read(const void* source, int64_t num_bytes, uint32_t* sink, int32_t num_blocks,
                          cudaStream_t stream) {
  return Guarded([&] {
    const int64_t num_vectors = octavo::cuda::NumVectors(num_bytes);
    Check(octavo::cuda::ReadMemory(source, num_vectors, sink, num_blocks, stream), "read");
  });
}

int32_t octavo_bench_copy(void* target, const void* source, int64_t num_bytes, int32_t num_blocks,
                          cudaStream_t stream) {
  return Guarded([&] {
    const int64_t num_vectors = octavo::cuda::NumVectors(num_bytes);
    Check(octavo::cuda::CopyMemory(target, source, num_vectors, num_blocks, stream), "copy");
  });
}

int32_t octavo_bench_make_resident(const BenchStep* step, ResidentStep** resident,
                                   BenchPlan* plan) {
  return Guarded([&] {
    auto made = std::make_unique<ResidentStep>(*step);
    *plan = made->plan();
    *resident = made.release();
  });
}

void octavo_bench_free_resident(ResidentStep* resident) { delete resident; }

int32_t octavo_bench_launch(ResidentStep* const* steps, int32_t num_steps, int64_t first,
                            int32_t count, int32_t kernel, cudaStream_t stream) {
  return Guarded([&] {
    for (int64_t idx = first; idx < first + count; ++idx) {
      octavo::cuda::LaunchOne(*steps[idx % num_steps], kernel, stream);
    }
  });
}

int32_t octavo_bench_take_out(ResidentStep* resident, uint16_t* out, cudaStream_t stream) {
  return Guarded([&] { resident->TakeOut(out, stream); });
}

int32_t octavo_bench_run_resident(ResidentStep* resident, cudaStream_t stream, double* us) {
  return Guarded([&] { *us = octavo::cuda::MicrosecondsOf([&] { resident->Run(stream); }); });
}

int32_t octavo_bench_make_host(const BenchStep* step, int32_t device_idx, HostStep** host) {
  return Guarded([&] { *host = std::make_unique<HostStep>(*step, device_idx).release(); });
}

void octavo_bench_free_host(HostStep* host) { delete host; }

int32_t octavo_bench_run_host(HostStep* host, double* us) {
  return Guarded([&] { *us = octavo::cuda::MicrosecondsOf([&] { host->Run(); }); });
}
