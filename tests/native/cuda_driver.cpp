// The wrapper of the CUDA caching allocator over PyTorch's own libc10_cuda.so and the stub of a CUDA runtime.
// Built and run by test_cuda_front_end.py. Says what is wrong on stderr and ends with status 1, or prints "passed".

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "megamem.h"

extern "C" {
extern size_t stub_capacity, stub_used;
extern long stub_mallocs;
extern int stub_events_done;
megamem_arena* megamem_cuda_arena(int32_t device);
int32_t megamem_cuda_install(void);
void megamem_cuda_uninstall(void);
}

namespace c10::cuda::_internal {
void setHasPrimaryContext(bool (*)(c10::DeviceIndex));  // in no header; libtorch_cuda.so calls it when it is loaded
}

namespace {

namespace ca = c10::cuda::CUDACachingAllocator;
constexpr int64_t kMiB = 1 << 20;

void require_at(bool holds, const char* what, int line) {
  if (holds) return;
  std::fprintf(stderr, "line %d: not so: %s\n", line, what);
  std::exit(1);
}
#define REQUIRE(holds) require_at(holds, #holds, __LINE__)

int64_t counter(megamem_arena* arena, int which) {
  int64_t counters[MEGAMEM_NUM_COUNTERS];
  megamem_arena_counters(arena, counters);
  return counters[which];
}

int64_t allocated() { return ca::getDeviceStats(0).allocated_bytes[0].current; }

c10::DataPtr make(int64_t size) { return ca::get()->allocate(static_cast<size_t>(size)); }

void native_passes_through(megamem_arena* arena) {
  REQUIRE(ca::get()->name() == "native");
  const int64_t before = allocated();
  {
    c10::DataPtr one = make(3 * kMiB);
    REQUIRE(allocated() == before + 3 * kMiB && make(0).get() == nullptr);
    // CUDA-graph trees take a deleter off and put it on again.
    REQUIRE(one.compare_exchange_deleter(ca::get()->raw_deleter(), &c10::detail::deleteNothing));
    REQUIRE(one.compare_exchange_deleter(&c10::detail::deleteNothing, ca::get()->raw_deleter()));
  }
  REQUIRE(allocated() == before && megamem_arena_num_events(arena) == 0);
}

void steps_are_recorded(megamem_arena* arena) {
  megamem_arena_watch(arena, 1, 100);
  megamem_arena_begin(arena, -1, 0);
  {
    c10::DataPtr one = make(3 * kMiB);
    void* raw = ca::raw_alloc(5 * kMiB);
    ca::recordStream(one, c10::cuda::getStreamFromPool(false, 0));
    ca::raw_delete(raw);
    stub_events_done = 0;
  }
  megamem_event events[16];
  REQUIRE(megamem_arena_read_events(arena, events, 16) == 6);
  const int64_t kinds[] = {MEGAMEM_EVENT_STEP, MEGAMEM_EVENT_MALLOC, MEGAMEM_EVENT_MALLOC,
                           MEGAMEM_EVENT_USE,  MEGAMEM_EVENT_FREE,   MEGAMEM_EVENT_FREE};
  for (int i = 0; i < 6; ++i) REQUIRE(events[i].kind == kinds[i]);
  REQUIRE(events[1].size == 3 * kMiB && events[3].address == events[1].address && events[3].stream != 0);
  // The native allocator was told of the second stream: it does not hand the block out again yet.
  REQUIRE(reinterpret_cast<uint64_t>(make(3 * kMiB).get()) != events[1].address);
  stub_events_done = 1;
  megamem_arena_watch(arena, 0, 0);
  megamem_arena_end(arena);
}

void planned_requests_are_served(megamem_arena* arena) {
  const int64_t size[] = {4 * kMiB, 2 * kMiB, 8 * kMiB}, offset[] = {0, 4 * kMiB, MEGAMEM_NATIVE};
  REQUIRE(megamem_arena_load(arena, 0, 3, size, offset, kMiB) == MEGAMEM_OK);
  const int64_t before = allocated();
  REQUIRE(megamem_arena_begin(arena, 0, 0) == MEGAMEM_OK);
  REQUIRE(allocated() == before + 6 * kMiB);  // the arena is one block of the native allocator
  auto* base = static_cast<char*>(megamem_arena_base(arena));
  {
    const c10::DataPtr small = make(1000), one = make(size[0]), two = make(size[1]), three = make(size[2]);
    REQUIRE(one.get() == base && two.get() == base + 4 * kMiB);
    REQUIRE(small.get() < base || small.get() >= base + 6 * kMiB);
    REQUIRE(three.get() < base || three.get() >= base + 6 * kMiB);
    REQUIRE(two.device() == c10::Device(c10::DeviceType::CUDA, 0) && two.get() == two.get_context());
    REQUIRE(counter(arena, MEGAMEM_LIVE_BYTES) == 6 * kMiB);
    size_t whole = 0;
    REQUIRE(ca::getBaseAllocation(two.get(), &whole) == ca::getBaseAllocation(base, &whole) && whole >= 6 * kMiB);
  }
  REQUIRE(counter(arena, MEGAMEM_LIVE_BYTES) == 0 && counter(arena, MEGAMEM_SERVED) == 2);
  const long mallocs = stub_mallocs;
  for (int step = 0; step < 5; ++step) {
    megamem_arena_begin(arena, 0, 0);
    const c10::DataPtr one = make(size[0]), two = make(size[1]), three = make(size[2]);
    REQUIRE(one.get() == base);
  }
  REQUIRE(stub_mallocs == mallocs);  // none after the switch
  ca::emptyCache();
  REQUIRE(megamem_arena_begin(arena, 0, 0) == MEGAMEM_OK && make(size[0]).get() == base);
}

void a_second_stream_keeps_a_block(megamem_arena* arena) {
  megamem_arena_begin(arena, 0, 0);
  stub_events_done = 0;
  {
    const c10::DataPtr one = make(4 * kMiB);
    ca::recordStream(one, c10::cuda::getStreamFromPool(false, 0));
  }
  REQUIRE(counter(arena, MEGAMEM_LIVE_BYTES) == 4 * kMiB && counter(arena, MEGAMEM_DEFERRED) == 1);
  megamem_arena_begin(arena, 0, 0);
  REQUIRE(make(4 * kMiB).get() != megamem_arena_base(arena));
  stub_events_done = 1;
  megamem_arena_begin(arena, 0, 0);
  REQUIRE(make(4 * kMiB).get() == megamem_arena_base(arena));
}

void a_snapshot_shows_the_arena_s_blocks(megamem_arena* arena) {
  megamem_arena_begin(arena, 0, 0);
  const c10::DataPtr one = make(4 * kMiB), two = make(2 * kMiB);
  { const c10::DataPtr freed = std::move(const_cast<c10::DataPtr&>(one)); }
  const auto base = reinterpret_cast<size_t>(megamem_arena_base(arena));
  bool found = false;
  for (const auto& segment : ca::snapshot().segments) {
    size_t address = segment.address, allocated_size = 0;
    for (const auto& block : segment.blocks) {
      if (address == base) REQUIRE(!block.allocated && block.size == 4 * kMiB);
      if (address == base + 4 * kMiB) found = block.allocated && block.size == 2 * kMiB;
      address += block.size;
      allocated_size += block.allocated ? block.size : 0;
    }
    REQUIRE(address == segment.address + segment.total_size && allocated_size == segment.allocated_size);
  }
  REQUIRE(found);
}

void pools_are_the_native_allocator_s(megamem_arena* arena) {
  megamem_arena_begin(arena, 0, 0);
  ca::beginAllocateToPool(0, {0, 7}, [](cudaStream_t) { return true; });
  { REQUIRE(make(4 * kMiB).get() != megamem_arena_base(arena)); }
  ca::endAllocateToPool(0, {0, 7});
  REQUIRE(make(4 * kMiB).get() == megamem_arena_base(arena));
  ca::releasePool(0, {0, 7});
}

void an_idle_arena_gives_way(megamem_arena* arena) {
  megamem_arena_end(arena);
  ca::emptyCache();
  megamem_arena_watch(arena, 1, 10);  // as while steps of another kind are recorded
  stub_capacity = stub_used + 4 * kMiB;
  { const c10::DataPtr large = make(20 * kMiB); }
  REQUIRE(counter(arena, MEGAMEM_CAPACITY) == 0);
  bool failed = false;
  try {
    make(64 * kMiB);
  } catch (const c10::OutOfMemoryError&) {
    failed = true;
  }
  REQUIRE(failed);
  megamem_arena_watch(arena, 0, 0);
  stub_capacity = size_t{256} << 20;
  REQUIRE(megamem_arena_begin(arena, 0, 0) == MEGAMEM_OK);  // and comes back
  REQUIRE(make(4 * kMiB).get() == megamem_arena_base(arena));
  megamem_arena_end(arena);
  REQUIRE(megamem_arena_shrink(arena) == 1);
  ca::emptyCache();
  stub_capacity = stub_used + 2 * kMiB;
  REQUIRE(megamem_arena_begin(arena, 0, 0) == MEGAMEM_NO_ROOM);
  stub_capacity = size_t{256} << 20;
}

void blocks_outlive_the_wrapper(megamem_arena* arena) {
  REQUIRE(megamem_arena_begin(arena, 0, 0) == MEGAMEM_OK);
  {
    const c10::DataPtr one = make(4 * kMiB);
    std::memset(one.get(), 1, 4 * kMiB);
    megamem_arena_reset(arena);
    megamem_cuda_uninstall();
    REQUIRE(make(2 * kMiB).get_deleter() == ca::get()->raw_deleter());
    REQUIRE(counter(arena, MEGAMEM_RETIRED) == 1 && static_cast<char*>(one.get())[kMiB] == 1);
  }
  REQUIRE(counter(arena, MEGAMEM_RETIRED) == 0);
  ca::emptyCache();
  REQUIRE(stub_used == 0);
}

}  // namespace

int main() {
  c10::cuda::_internal::setHasPrimaryContext([](c10::DeviceIndex) { return true; });
  ca::init(1);
  megamem_arena* arena = megamem_cuda_arena(0);
  REQUIRE(arena != nullptr && megamem_cuda_arena(1) == nullptr);
  REQUIRE(megamem_cuda_install() == 1 && megamem_cuda_install() == 1);
  native_passes_through(arena);
  steps_are_recorded(arena);
  planned_requests_are_served(arena);
  a_second_stream_keeps_a_block(arena);
  a_snapshot_shows_the_arena_s_blocks(arena);
  pools_are_the_native_allocator_s(arena);
  an_idle_arena_gives_way(arena);
  blocks_outlive_the_wrapper(arena);
  std::puts("passed");
}
