// Streams and events. All work is done when it is asked for, so that there is never any to wait
// for.

#include <set>

#include "runtime.h"

struct CUstream_st {
  unsigned flags;
};

struct CUevent_st {
  unsigned flags;
};

namespace octavo::emulator {
namespace {

// The live objects of one kind.
template <typename Object>
std::set<Object*>& Live() {
  static std::set<Object*> live;
  return live;
}

template <typename Object>
bool IsLive(Object* object) {
  return Live<Object>().count(object) > 0;
}

template <typename Object>
cudaError_t Create(Object** created, unsigned flags) {
  return DoCall([&] {
    *created = new Object{};
    (*created)->flags = flags;
    Live<Object>().insert(*created);
    return cudaSuccess;
  });
}

template <typename Object>
cudaError_t Destroy(Object* object) {
  return DoCall([&] {
    if (Live<Object>().erase(object) == 0) return cudaErrorInvalidResourceHandle;
    delete object;
    return cudaSuccess;
  });
}

cudaError_t RequireAll(bool are_live) {
  return DoCall([&] { return are_live ? cudaSuccess : cudaErrorInvalidResourceHandle; });
}

}  // namespace

bool IsStream(cudaStream_t stream) { return stream == nullptr || IsLive(stream); }

}  // namespace octavo::emulator

using namespace octavo::emulator;  // NOLINT: the definitions of a C API

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return Create(stream, flags);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) { return Destroy(stream); }

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return RequireAll(IsStream(stream)); }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  return Create(event, flags);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) { return Destroy(event); }

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return RequireAll(IsLive(event) && IsStream(stream));
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) { return RequireAll(IsLive(event)); }

cudaError_t cudaEventQuery(cudaEvent_t event) { return RequireAll(IsLive(event)); }
