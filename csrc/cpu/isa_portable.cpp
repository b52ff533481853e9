// The kernels in vector extensions that every machine has.

#include "isa.h"
// clang-format off: the vocabulary comes before what is written in it
#include "simd_portable.h"
#include "vector_math.h"
#include "context_tile.h"
#include "float_attention.h"
#include "row_kernels.h"
#include "group_kernels.h"
// clang-format on

namespace octavo::cpu {

const IsaKernels* PortableKernels() {
  static constexpr IsaKernels kKernels = {"portable",    LoadRow,           StoreRow,
                                          QuantizeRow,   StoreKeyGroup,     StoreValueGroup,
                                          FinishStreams, AttendSpanInFloat, AttendSpanInFloat};
  return &kKernels;
}

}  // namespace octavo::cpu
