// PyTorch's CUDA caching allocator with the arena before it. Compiled on the user's machine against the installed PyTorch.
//
// The arena is one block of the native allocator: memory fractions, statistics, snapshots and out-of-memory errors are
// the native ones and count it as allocated. What the arena does not serve is the native allocator's, and so is
// everything while a pool or a CUDA graph is being filled.

#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <cstdint>
#include <limits>
#include <utility>

#include "../arena.h"
#include "cuda_forwarding.h"

namespace {

using namespace megamem;

void release(void* at);

uint64_t number_of(cudaStream_t stream) { return reinterpret_cast<uintptr_t>(stream); }
cudaStream_t stream_of(uint64_t number) { return reinterpret_cast<cudaStream_t>(static_cast<uintptr_t>(number)); }

class ArenaAllocator final : public ForwardingAllocator {
 public:
  ArenaAllocator(CUDAAllocator* native, Arena* arena, DeviceIndex device)
      : ForwardingAllocator(native), arena_(*arena), device_(device) {}

  // Always with our own deleter: who asks for `raw_deleter` may rely on it (CUDA-graph trees do).
  DataPtr allocate(size_t nbytes) override {
    const bool asked = is_asked(nbytes);
    const cudaStream_t stream = asked ? c10::cuda::getCurrentCUDAStream(device_).stream() : nullptr;
    if (void* at = asked ? serve(nbytes, stream) : nullptr) {
      return {at, at, &release, c10::Device(c10::DeviceType::CUDA, device_)};
    }
    DataPtr made = with_room([&] { return native_->allocate(nbytes); });
    if (made.get() == nullptr || made.get_context() != made.get()) return made;
    if (asked && arena_.is_watching()) arena_.note_malloc(made.get(), nbytes, number_of(stream));
    const c10::Device device = made.device();
    void* at = made.release_context();
    return {at, at, &release, device};
  }

  void* raw_alloc(size_t nbytes) override {
    return nbytes == 0 ? nullptr : raw_alloc_with_stream(nbytes, c10::cuda::getCurrentCUDAStream().stream());
  }

  void* raw_alloc_with_stream(size_t nbytes, cudaStream_t stream) override {
    if (!is_asked(nbytes)) return native_->raw_alloc_with_stream(nbytes, stream);
    void* at = serve(nbytes, stream);
    return at != nullptr ? at : raw_native(nbytes, stream);
  }

  void raw_delete(void* at) override {
    if (at != nullptr && !give_back(at)) native_->raw_delete(at);
  }

  // The end of what `allocate` returned: by the native deleter, which knows whether the block was cached.
  void end(void* at) {
    if (at != nullptr && !give_back(at)) native_->raw_deleter()(at);
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void recordStream(const DataPtr& data, CUDAStream stream) override {
    if (data.get() == nullptr || arena_.record_use(data.get(), number_of(stream.stream()))) return;
    if (data.get_deleter() != &release) return native_->recordStream(data, stream);
    if (arena_.is_watching()) arena_.note_use(data.get(), number_of(stream.stream()));
    // The native allocator records only what has its own deleter.
    DataPtr as_native(data.get(), data.get(), native_->raw_deleter(), data.device());
    native_->recordStream(as_native, stream);
    as_native.release_context();
  }

  void beginAllocateToPool(DeviceIndex device, MempoolId_t pool, std::function<bool(cudaStream_t)> filter) override {
    ++open_pools_;
    native_->beginAllocateToPool(device, pool, std::move(filter));
  }
  void endAllocateToPool(DeviceIndex device, MempoolId_t pool) override {
    native_->endAllocateToPool(device, pool);
    --open_pools_;
  }
  bool fills_a_pool() const { return open_pools_ > 0; }

  // The native allocator knows the arena, and no block in it.
  void* getBaseAllocation(void* at, size_t* size) override {
    void* base = base_of(at);
    return native_->getBaseAllocation(base == nullptr ? at : base, size);
  }
  ShareableHandle shareIpcHandle(void* at) override {
    void* base = base_of(at);
    if (base == nullptr) return native_->shareIpcHandle(at);
    ShareableHandle handle = native_->shareIpcHandle(base);
    handle.offset += static_cast<char*>(at) - static_cast<char*>(base);
    return handle;
  }

#if MEGAMEM_TORCH_VERSION >= 211
  SnapshotInfo snapshot(MempoolId_t pool = {0, 0}, bool include_traces = true) override {
    return opened(native_->snapshot(pool, include_traces));
  }
#elif MEGAMEM_TORCH_VERSION >= 208
  SnapshotInfo snapshot(MempoolId_t pool = {0, 0}) override { return opened(native_->snapshot(pool)); }
#else
  SnapshotInfo snapshot() override { return opened(native_->snapshot()); }
#endif

  CUDAAllocator* native() const { return native_; }
  DeviceIndex device() const { return device_; }

 private:
  bool is_asked(size_t nbytes) const {
    return nbytes != 0 && arena_.is_active() && open_pools_ == 0 && c10::cuda::current_device() == device_;
  }

  void* serve(size_t nbytes, cudaStream_t stream) {
    void* at = arena_.malloc(nbytes, number_of(stream));
    if (at != nullptr) report(at, static_cast<int64_t>(nbytes));
    return at;
  }

  void* raw_native(size_t nbytes, cudaStream_t stream) {
    void* at = with_room([&] { return native_->raw_alloc_with_stream(nbytes, stream); });
    if (arena_.is_watching()) arena_.note_malloc(at, nbytes, number_of(stream));
    return at;
  }

  // What the native allocator says; where it has no memory and the arena lies idle, once more without the arena.
  template <class Call>
  auto with_room(Call call) -> decltype(call()) {
    try {
      return call();
    } catch (const c10::OutOfMemoryError&) {
      if (!arena_.shrink()) throw;
    }
    native_->emptyCache();
    return call();
  }

  // Whether the block was the arena's.
  bool give_back(void* at) {
    int64_t size = 0;
    if (arena_.free(at, &size)) {
      report(at, -size);
      return true;
    }
    if (arena_.is_watching()) arena_.note_free(at);
    return false;
  }

  void report(void* at, int64_t size) const {
    int64_t counters[MEGAMEM_NUM_COUNTERS];
    if (!c10::memoryProfilingEnabled()) return;
    arena_.counters(counters);
    c10::reportMemoryUsageToProfiler(at, size, static_cast<size_t>(counters[MEGAMEM_LIVE_BYTES]),
                                     static_cast<size_t>(counters[MEGAMEM_CAPACITY]),
                                     c10::Device(c10::DeviceType::CUDA, device_));
  }

  void* base_of(const void* at) const { return arena_.base_of(at); }

  // A snapshot with the live blocks of the arena in place of the one block that the native allocator sees.
  SnapshotInfo opened(SnapshotInfo taken) const {
    const auto base = reinterpret_cast<size_t>(arena_.base());
    if (base == 0) return taken;
    for (auto& segment : taken.segments) {
      if (base < segment.address || base >= segment.address + segment.total_size) continue;
      size_t address = segment.address;
      for (size_t i = 0; i < segment.blocks.size(); address += segment.blocks[i++].size) {
        if (address != base || !segment.blocks[i].allocated) continue;
        open_block(segment, i);
        return taken;
      }
    }
    return taken;
  }

  template <class Segment>
  void open_block(Segment& segment, size_t index) const {
    const auto whole = segment.blocks[index];
    std::vector<std::remove_const_t<decltype(whole)>> parts;
    size_t end = 0;
    const auto add = [&](size_t size, bool is_live) {
      auto part = whole;
      part.size = size;
      part.requested_size = is_live ? size : 0;
      part.allocated = part.active = is_live;
      if (size > 0) parts.push_back(std::move(part));
    };
    int64_t live = 0;
    for (const Region::Block& block : arena_.live_blocks()) {
      add(static_cast<size_t>(block.offset) - end, false);
      add(static_cast<size_t>(block.size), true);
      end = static_cast<size_t>(block.offset + block.size);
      live += block.size;
    }
    add(whole.size - end, false);
    segment.blocks.erase(segment.blocks.begin() + static_cast<std::ptrdiff_t>(index));
    segment.blocks.insert(segment.blocks.begin() + static_cast<std::ptrdiff_t>(index), parts.begin(), parts.end());
    segment.allocated_size -= whole.size - static_cast<size_t>(live);
    segment.active_size -= whole.size - static_cast<size_t>(live);
    segment.requested_size -= whole.requested_size - static_cast<size_t>(live);
  }

  Arena& arena_;
  const DeviceIndex device_;
  std::atomic<int> open_pools_{0};
};

// One device in a process, and one allocator for ever: tensors may outlive everything.
ArenaAllocator* allocator_here = nullptr;

void release(void* at) { allocator_here->end(at); }

void* reserve_block(size_t nbytes) {
  const c10::cuda::CUDAGuard guard(allocator_here->device());
  try {
    return allocator_here->native()->raw_alloc_with_stream(nbytes, c10::cuda::getCurrentCUDAStream().stream());
  } catch (const c10::OutOfMemoryError&) {
    return nullptr;
  }
}

void release_block(void* at, size_t) { allocator_here->native()->raw_delete(at); }

void fill(void* at, int value, size_t nbytes, uint64_t stream) { cudaMemsetAsync(at, value, nbytes, stream_of(stream)); }

void* mark(uint64_t stream) {
  if (allocator_here->fills_a_pool()) return nullptr;  // an event here would become part of a graph
  cudaEvent_t event = nullptr;
  if (cudaEventCreateWithFlags(&event, cudaEventDisableTiming) != cudaSuccess) return nullptr;
  if (cudaEventRecord(event, stream_of(stream)) == cudaSuccess) return event;
  cudaEventDestroy(event);
  return nullptr;
}

int32_t is_done(void* mark) {
  const cudaError_t status = cudaEventQuery(static_cast<cudaEvent_t>(mark));
  if (status == cudaErrorNotReady) cudaGetLastError();  // that is no error
  if (status != cudaSuccess) return 0;
  cudaEventDestroy(static_cast<cudaEvent_t>(mark));
  return 1;
}

}  // namespace

extern "C" {

// The arena before the CUDA allocator, for one device. NULL without memory, or for a second device.
megamem_arena* megamem_cuda_arena(int32_t device) {
  static const megamem_device functions{reserve_block, release_block, fill, nullptr, mark, is_done};
  static megamem_arena* const arena = megamem_arena_create(&functions);
  if (arena == nullptr) return nullptr;
  if (allocator_here == nullptr) {
    allocator_here = new ArenaAllocator(c10::cuda::CUDACachingAllocator::get(), megamem::arena_of(arena),
                                        static_cast<c10::DeviceIndex>(device));
  }
  return allocator_here->device() == device ? arena : nullptr;
}

// The arena is asked first from now on; `megamem_cuda_arena` must have made it. 0 where another allocator has been put
// in since.
int32_t megamem_cuda_install(void) {
  CUDAAllocator* now = c10::cuda::CUDACachingAllocator::get();
  if (now == allocator_here) return 1;
  if (now != allocator_here->native()) return 0;
  c10::cuda::CUDACachingAllocator::allocator.store(allocator_here);
  c10::SetAllocator(c10::DeviceType::CUDA, allocator_here);
  return 1;
}

// The native allocator takes new requests again; blocks of the arena stay valid.
void megamem_cuda_uninstall(void) {
  if (c10::cuda::CUDACachingAllocator::get() != allocator_here) return;
  c10::cuda::CUDACachingAllocator::allocator.store(allocator_here->native());
  c10::SetAllocator(c10::DeviceType::CUDA, allocator_here->native());
}

}  // extern "C"
