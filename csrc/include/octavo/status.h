// Error codes of the launchers.

#ifndef OCTAVO_STATUS_H_
#define OCTAVO_STATUS_H_

namespace octavo {

enum class Status {
  kOk,
  kBadTokenStarts,
  kLayerOutOfRange,
  kLengthOutOfRange,
  kBlockOutOfRange,
  kSlotOutOfRange,
  kOutOfMemory,
};

// Returns what went wrong, in words.
const char* StatusMessage(Status status);

}  // namespace octavo

#endif  // OCTAVO_STATUS_H_
