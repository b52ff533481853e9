#include "isa.h"

#include <cstring>
#include <initializer_list>

namespace octavo::cpu {

const IsaKernels* FindKernels(const char* name) {
  for (const IsaKernels* kernels : {Avx512Kernels(), Avx2Kernels(), PortableKernels()}) {
    if (kernels == nullptr) continue;
    if (name[0] == '\0' || std::strcmp(name, kernels->name) == 0) return kernels;
  }
  return nullptr;
}

}  // namespace octavo::cpu
