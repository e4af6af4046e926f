// The C interface of the arena. No exception leaves it.

#include <cstdlib>
#include <cstring>
#include <new>

#include "arena.h"

struct megamem_arena {
  megamem::Arena arena;
  explicit megamem_arena(const megamem_device& device) : arena(device) {}
};

megamem::Arena* megamem::arena_of(megamem_arena* handle) { return &handle->arena; }

namespace {

// What `call` returns, or `otherwise` where there was no memory for it.
template <class Call, class Value>
Value guarded(Value otherwise, Call call) noexcept {
  try {
    return call();
  } catch (...) {
    return otherwise;
  }
}

template <class Call>
void guarded(Call call) noexcept {
  guarded(0, [&] { return call(), 0; });
}

void* host_reserve(size_t nbytes) {
  void* at = nullptr;
  return posix_memalign(&at, 4096, nbytes) == 0 ? at : nullptr;
}

void host_release(void* at, size_t) { std::free(at); }

void host_fill(void* at, int value, size_t nbytes, uint64_t) { std::memset(at, value, nbytes); }

int32_t host_is_filled(const void* at, int value, size_t nbytes) {
  const auto* bytes = static_cast<const unsigned char*>(at);
  return nbytes == 0 || (bytes[0] == static_cast<unsigned char>(value) && std::memcmp(bytes, bytes + 1, nbytes - 1) == 0);
}

}  // namespace

extern "C" {

megamem_arena* megamem_arena_create(const megamem_device* device) {
  return new (std::nothrow) megamem_arena(*device);
}

megamem_arena* megamem_arena_create_host(void) {
  const megamem_device host{host_reserve, host_release, host_fill, host_is_filled, nullptr, nullptr};
  return megamem_arena_create(&host);
}

void megamem_arena_destroy(megamem_arena* arena) { delete arena; }

int32_t megamem_arena_load(megamem_arena* arena, int32_t plan, int32_t n, const int64_t* size, const int64_t* offset,
                           int64_t min_size) {
  return guarded<>(static_cast<int32_t>(MEGAMEM_NO_ROOM),
                   [&] { return arena->arena.load(plan, n, size, offset, min_size); });
}

int32_t megamem_arena_begin(megamem_arena* arena, int32_t plan, uint64_t stream) {
  return guarded<>(static_cast<int32_t>(MEGAMEM_NO_ROOM), [&] { return arena->arena.begin(plan, stream); });
}

void megamem_arena_end(megamem_arena* arena) {
  guarded([&] { arena->arena.end(); });
}

void megamem_arena_reset(megamem_arena* arena) {
  guarded([&] { arena->arena.reset(); });
}

int32_t megamem_arena_shrink(megamem_arena* arena) {
  return guarded<>(0, [&] { return arena->arena.shrink() ? 1 : 0; });
}

void* megamem_arena_malloc(megamem_arena* arena, size_t size, uint64_t stream) {
  return guarded<>(static_cast<void*>(nullptr), [&] { return arena->arena.malloc(size, stream); });
}

int32_t megamem_arena_free(megamem_arena* arena, void* at) {
  return guarded<>(1, [&] { return arena->arena.free(at) ? 1 : 0; });
}

int32_t megamem_arena_record_use(megamem_arena* arena, void* at, uint64_t stream) {
  return guarded<>(0, [&] { return arena->arena.record_use(at, stream) ? 1 : 0; });
}

void megamem_arena_watch(megamem_arena* arena, int32_t on, int64_t max_events) {
  guarded([&] { arena->arena.watch(on != 0, max_events); });
}

void megamem_arena_note_malloc(megamem_arena* arena, void* at, size_t size, uint64_t stream) {
  guarded([&] { arena->arena.note_malloc(at, size, stream); });
}

void megamem_arena_note_free(megamem_arena* arena, void* at) {
  guarded([&] { arena->arena.note_free(at); });
}

int64_t megamem_arena_num_events(megamem_arena* arena) { return arena->arena.num_events(); }

int64_t megamem_arena_read_events(megamem_arena* arena, megamem_event* out, int64_t max) {
  return arena->arena.read_events(out, max);
}

void megamem_arena_poison(megamem_arena* arena, int32_t on) {
  guarded([&] { arena->arena.set_poison(on != 0); });
}

void megamem_arena_counters(megamem_arena* arena, int64_t* out) { arena->arena.counters(out); }

int64_t megamem_arena_blocks(megamem_arena* arena, int64_t* offset, int64_t* size, int64_t max) {
  return guarded<>(int64_t{0}, [&] {
    const auto live = arena->arena.live_blocks();
    for (size_t i = 0; i < live.size() && static_cast<int64_t>(i) < max; ++i) {
      offset[i] = live[i].offset;
      size[i] = live[i].size;
    }
    return static_cast<int64_t>(live.size());
  });
}

void* megamem_arena_base(megamem_arena* arena) { return arena->arena.base(); }

int32_t megamem_align(int32_t num_reference, const int64_t* reference, int32_t num_other, const int64_t* other,
                      int32_t* index) {
  return guarded<>(static_cast<int32_t>(MEGAMEM_NO_ROOM), [&] {
    megamem::align(num_reference, reference, num_other, other, index);
    return static_cast<int32_t>(MEGAMEM_OK);
  });
}

}  // extern "C"
