// The arena behind PyTorch's `CUDAPluggableAllocator`: a C interface that stays the same from one PyTorch to the next and
// needs none of its headers, at the price of its statistics, snapshots and CUDA-graph pools. It must be put in before the
// first use of the device.

#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "arena.h"
#include "caching_heap.h"

namespace megamem::pluggable {  // names of C linkage are not part of it

namespace {

// The functions of the CUDA runtime that are needed, by address: the core is built without CUDA.
struct CudaRuntime {
  int (*malloc)(void**, size_t);
  int (*free)(void*);
  int (*memset_async)(void*, int, size_t, void*);
  int (*event_create)(void**, unsigned);
  int (*event_record)(void*, void*);
  int (*event_query)(void*);
  int (*event_destroy)(void*);
  int (*last_error)();
};

constexpr int kNotReady = 600;
constexpr unsigned kDisableTiming = 2;

CudaRuntime cuda;

void* reserve(size_t nbytes) {
  void* at = nullptr;
  if (cuda.malloc(&at, nbytes) == 0) return at;
  cuda.last_error();  // or the next kernel reports it
  return nullptr;
}

void release(void* at, size_t) { cuda.free(at); }

void* as_stream(uint64_t number) { return reinterpret_cast<void*>(static_cast<uintptr_t>(number)); }

void fill(void* at, int value, size_t nbytes, uint64_t stream) {
  cuda.memset_async(at, value, nbytes, as_stream(stream));
}

void* mark(uint64_t stream) {
  void* event = nullptr;
  if (cuda.event_create(&event, kDisableTiming) != 0) return nullptr;
  if (cuda.event_record(event, as_stream(stream)) == 0) return event;
  cuda.event_destroy(event);
  return nullptr;
}

int32_t is_done(void* event) {
  const int status = cuda.event_query(event);
  if (status == kNotReady) cuda.last_error();
  if (status != 0) return 0;
  cuda.event_destroy(event);
  return 1;
}

struct Pluggable {
  megamem_arena* arena;
  CachingHeap heap;
  int32_t device;
};

Pluggable* pluggable_here = nullptr;  // made once and never unmade: tensors may outlive everything

Arena& arena_here() { return *arena_of(pluggable_here->arena); }

}  // namespace

extern "C" {

// Make the arena and the heap of device number `device`; `runtime` are the addresses of CudaRuntime's functions, in its
// order. NULL where that has been done, or without memory.
megamem_arena* megamem_pluggable_setup(const void* runtime, int32_t device) {
  if (pluggable_here != nullptr) return nullptr;
  std::memcpy(&cuda, runtime, sizeof cuda);
  const megamem_device functions{reserve, release, fill, nullptr, mark, is_done};
  megamem_arena* arena = megamem_arena_create(&functions);
  if (arena == nullptr) return nullptr;
  pluggable_here = new (std::nothrow) Pluggable{arena, CachingHeap(functions), device};
  return pluggable_here == nullptr ? nullptr : arena;
}

// The arena that was set up, or NULL.
megamem_arena* megamem_pluggable_arena(void) { return pluggable_here == nullptr ? nullptr : pluggable_here->arena; }

int64_t megamem_pluggable_reserved(void) { return pluggable_here == nullptr ? 0 : pluggable_here->heap.reserved(); }

// What PyTorch calls. Raises where there is no memory, since PyTorch takes what is returned for memory: the one place
// where an exception crosses the interface.
void* megamem_pluggable_malloc(ptrdiff_t size, int device, void* stream) {
  if (size <= 0) return nullptr;
  const auto number = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(stream));
  Arena& arena = arena_here();
  void* at = nullptr;
  if (device == pluggable_here->device && arena.is_active()) at = arena.malloc(static_cast<size_t>(size), number);
  if (at != nullptr) return at;
  if (device == pluggable_here->device) {
    at = pluggable_here->heap.malloc(size, number);
    if (at == nullptr && arena.shrink()) at = pluggable_here->heap.malloc(size, number);
  }
  if (at == nullptr) {
    throw std::runtime_error("CUDA out of memory: " + std::to_string(size) + " bytes for device " +
                             std::to_string(device) + " were asked for, and megamem's allocator has " +
                             std::to_string(pluggable_here->heap.reserved()) + " outside of the arena");
  }
  if (arena.is_watching()) arena.note_malloc(at, static_cast<size_t>(size), number);
  return at;
}

void megamem_pluggable_free(void* at, ptrdiff_t, int, void*) {
  if (at == nullptr || arena_here().free(at)) return;
  if (arena_here().is_watching()) arena_here().note_free(at);
  pluggable_here->heap.free(at);
}

void megamem_pluggable_record_stream(void* at, void* stream) {
  const auto number = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(stream));
  if (arena_here().record_use(at, number)) return;
  if (arena_here().is_watching()) arena_here().note_use(at, number);
  pluggable_here->heap.record_use(at, number);
}

}  // extern "C"

}  // namespace megamem::pluggable
