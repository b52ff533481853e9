// The first fault since the last clearing, as text; and where in a kernel's source it came about.

#ifndef OCTAVO_CUDA_EMULATOR_FAULTS_H_
#define OCTAVO_CUDA_EMULATOR_FAULTS_H_

#include <cstdarg>

namespace octavo::emulator {

// A call of a primitive in a kernel's source.
struct Site {
  const char* primitive;
  const char* file;
  int line;
};

// As a default argument of a primitive: where that was called.
constexpr Site Here(const char* primitive, const char* file = __builtin_FILE(),
                    int line = __builtin_LINE()) {
  return {primitive, file, line};
}

bool SameSite(const Site& a, const Site& b);

// The file's name without its directories.
const char* FileName(const Site& site);

// Keeps the text unless there is a fault already.
[[gnu::format(printf, 1, 2)]] void ReportFault(const char* format, ...);

bool HasFault();
const char* FaultText();
void ClearFault();

}  // namespace octavo::emulator

#endif  // OCTAVO_CUDA_EMULATOR_FAULTS_H_
