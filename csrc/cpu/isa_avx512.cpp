// The kernels in AVX-512 with VNNI.
//
// Headers shared with other translation units come before the target changes: an inline function
// compiled for AVX-512 here could otherwise be the copy that the linker keeps for all.

// GCC 12 takes the undefined vectors of its own intrinsics for mistakes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "isa.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "layout.h"
#include "octavo/half.h"
#include "octavo/paged_cache.h"
#include "row_scale.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")

// clang-format off: the vocabulary comes before what is written in it
#include "simd_avx512.h"
#include "vector_math.h"
#include "context_tile.h"
#include "float_attention.h"
#include "integer_attention.h"
#include "row_kernels.h"
#include "group_kernels.h"
// clang-format on

#pragma GCC pop_options

namespace octavo::cpu {
namespace {

bool IsSupported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

}  // namespace

const IsaKernels* Avx512Kernels() {
  static constexpr IsaKernels kKernels = {"avx512",      LoadRow,           StoreRow,
                                          QuantizeRow,   StoreKeyGroup,     StoreValueGroup,
                                          FinishStreams, AttendSpanInFloat, AttendSpanInIntegers};
  static const bool is_supported = IsSupported();
  return is_supported ? &kKernels : nullptr;
}

}  // namespace octavo::cpu

#else

namespace octavo::cpu {

const IsaKernels* Avx512Kernels() { return nullptr; }

}  // namespace octavo::cpu

#endif
