// An entry's first value that cannot be stored or attended with, packed so that the smallest is the
// first in the order field, token, head: field << 60 | token << 24 | head << 8 | kind.

#ifndef OCTAVO_OFFENCE_H_
#define OCTAVO_OFFENCE_H_

#include <cstdint>

#include "octavo/host_device.h"

namespace octavo {

inline constexpr int64_t kNoOffence = INT64_MAX;

enum class OffenceField : int64_t { kK = 0, kV = 1, kQ = 2 };
enum class OffenceKind : int64_t { kNonFinite = 0, kScaleOverflow = 1 };

OCTAVO_HOST_DEVICE inline int64_t PackOffence(OffenceField field, int64_t token, int64_t head,
                                              OffenceKind kind) {
  return static_cast<int64_t>(field) << 60 | token << 24 | head << 8 | static_cast<int64_t>(kind);
}

}  // namespace octavo

#endif  // OCTAVO_OFFENCE_H_
