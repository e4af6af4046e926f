// PyTorch's CPU allocator with the arena before it. Compiled on the user's machine against the installed PyTorch.
//
// What the arena does not serve goes to the allocator that was there before. A thread stands for a stream: the thread
// that begins steps is the one whose requests are planned.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>

#include <atomic>
#include <cstdint>

#include "../arena.h"

namespace {

megamem::Arena* arena_here = nullptr;   // made once and never unmade: tensors may outlive everything
c10::Allocator* native_here = nullptr;  // the allocator from before

uint64_t thread_number() {
  static std::atomic<uint64_t> last{0};
  thread_local const uint64_t own = ++last;
  return own;
}

void release(void* at) {
  if (at == nullptr) return;
  if (arena_here->free(at)) {
    c10::profiledCPUMemoryReporter().Delete(at);
    return;
  }
  if (arena_here->is_watching()) arena_here->note_free(at);
  native_here->raw_deallocate(at);
}

struct ArenaAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    void* at = arena_here->is_active() ? arena_here->malloc(nbytes, thread_number()) : nullptr;
    if (at != nullptr) {
      c10::profiledCPUMemoryReporter().New(at, nbytes);
    } else {
      c10::DataPtr made = native_here->allocate(nbytes);
      if (made.get() == nullptr || made.get_context() != made.get()) return made;
      at = made.release_context();
      if (arena_here->is_watching()) arena_here->note_malloc(at, nbytes, thread_number());
    }
    return {at, at, &release, c10::Device(c10::DeviceType::CPU)};  // always: who asks for raw_deleter relies on it
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t nbytes) const override {
    default_copy_data(to, from, nbytes);
  }
};

ArenaAllocator& allocator_here() {
  static ArenaAllocator instance;
  return instance;
}

}  // namespace

extern "C" {

// The arena before the CPU allocator. NULL without memory.
megamem_arena* megamem_cpu_arena(void) {
  static megamem_arena* const arena = megamem_arena_create_host();
  if (arena != nullptr && arena_here == nullptr) {
    arena_here = megamem::arena_of(arena);
    pthread_atfork([] { arena_here->before_fork(); }, [] { arena_here->after_fork(false); },
                   [] { arena_here->after_fork(true); });
  }
  return arena;
}

// The arena is asked first from now on; `megamem_cpu_arena` must have made it.
void megamem_cpu_install(void) {
  c10::Allocator* now = c10::GetCPUAllocator();
  if (now == &allocator_here()) return;
  native_here = now;
  c10::SetCPUAllocator(&allocator_here(), 255);  // the highest priority, which only we can take off again
}

// The allocator from before takes new requests again; blocks of the arena stay valid.
void megamem_cpu_uninstall(void) {
  if (c10::GetCPUAllocator() == &allocator_here()) c10::SetCPUAllocator(native_here, 255);
}

// What `megamem_arena_begin` takes for the stream of the calling thread.
uint64_t megamem_cpu_stream(void) { return thread_number(); }

}  // extern "C"
