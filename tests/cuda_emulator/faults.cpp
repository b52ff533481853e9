#include "faults.h"

#include <cstdio>
#include <cstring>

namespace octavo::emulator {
namespace {

char g_text[1024] = "";

bool SameText(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

}  // namespace

bool SameSite(const Site& a, const Site& b) {
  return a.line == b.line && SameText(a.primitive, b.primitive) && SameText(a.file, b.file);
}

const char* FileName(const Site& site) {
  const char* slash = std::strrchr(site.file, '/');
  return slash == nullptr ? site.file : slash + 1;
}

void ReportFault(const char* format, ...) {
  if (HasFault()) return;
  va_list args;
  va_start(args, format);
  std::vsnprintf(g_text, sizeof g_text, format, args);
  va_end(args);
}

bool HasFault() { return g_text[0] != '\0'; }
const char* FaultText() { return g_text; }
void ClearFault() { g_text[0] = '\0'; }

}  // namespace octavo::emulator
