// A CUDA allocator that does what another one does. Its virtual functions are not the same from one PyTorch to the next;
// MEGAMEM_TORCH_VERSION (2.13: 213) says which. Known are 2.6 to 2.13.

#ifndef MEGAMEM_CUDA_FORWARDING_H_
#define MEGAMEM_CUDA_FORWARDING_H_

#include <c10/cuda/CUDACachingAllocator.h>

#include <memory>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace megamem {

using namespace c10::cuda::CUDACachingAllocator;
using c10::DataPtr;
using c10::DeviceIndex;
using c10::cuda::CUDAStream;
using c10::cuda::MempoolId_t;

class ForwardingAllocator : public CUDAAllocator {
 public:
  // From c10::Allocator.
  DataPtr allocate(size_t nbytes) override { return native_->allocate(nbytes); }
  c10::DeleterFnPtr raw_deleter() const override { return native_->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t nbytes) const override { native_->copy_data(to, from, nbytes); }

  void* raw_alloc(size_t nbytes) override { return native_->raw_alloc(nbytes); }
  void* raw_alloc_with_stream(size_t nbytes, cudaStream_t stream) override {
    return native_->raw_alloc_with_stream(nbytes, stream);
  }
  void raw_delete(void* at) override { native_->raw_delete(at); }
  void init(int device_count) override { native_->init(device_count); }
  bool initialized() override { return native_->initialized(); }
  double getMemoryFraction(DeviceIndex device) override { return native_->getMemoryFraction(device); }
  void setMemoryFraction(double fraction, DeviceIndex device) override { native_->setMemoryFraction(fraction, device); }
  void enable(bool value) override { native_->enable(value); }
  bool isEnabled() const override { return native_->isEnabled(); }
  void cacheInfo(DeviceIndex device, size_t* largest) override { native_->cacheInfo(device, largest); }
  void* getBaseAllocation(void* at, size_t* size) override { return native_->getBaseAllocation(at, size); }
  void recordStream(const DataPtr& data, CUDAStream stream) override { native_->recordStream(data, stream); }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    return native_->getDeviceStats(device);
  }
  void resetAccumulatedStats(DeviceIndex device) override { native_->resetAccumulatedStats(device); }
  void resetPeakStats(DeviceIndex device) override { native_->resetPeakStats(device); }
  void beginAllocateToPool(DeviceIndex device, MempoolId_t pool, std::function<bool(cudaStream_t)> filter) override {
    native_->beginAllocateToPool(device, pool, std::move(filter));
  }
  void endAllocateToPool(DeviceIndex device, MempoolId_t pool) override { native_->endAllocateToPool(device, pool); }
  void releasePool(DeviceIndex device, MempoolId_t pool) override { native_->releasePool(device, pool); }
  int getPoolUseCount(DeviceIndex device, MempoolId_t pool) override { return native_->getPoolUseCount(device, pool); }
  bool checkPoolLiveAllocations(DeviceIndex device, MempoolId_t pool,
                                const std::unordered_set<void*>& expected) override {
    return native_->checkPoolLiveAllocations(device, pool, expected);
  }
  ShareableHandle shareIpcHandle(void* at) override { return native_->shareIpcHandle(at); }
  std::shared_ptr<void> getIpcDevPtr(std::string handle) override { return native_->getIpcDevPtr(std::move(handle)); }
  bool isHistoryEnabled() override { return native_->isHistoryEnabled(); }
  void recordAnnotation(const std::vector<std::pair<std::string, std::string>>& data) override {
    native_->recordAnnotation(data);
  }
  void attachOutOfMemoryObserver(OutOfMemoryObserver observer) override {
    native_->attachOutOfMemoryObserver(std::move(observer));
  }
  void attachAllocatorTraceTracker(AllocatorTraceTracker tracker) override {
    native_->attachAllocatorTraceTracker(std::move(tracker));
  }
  void enablePeerAccess(DeviceIndex device, DeviceIndex other) override { native_->enablePeerAccess(device, other); }
  cudaError_t memcpyAsync(void* to, int to_device, const void* from, int from_device, size_t count, cudaStream_t stream,
                          bool p2p_enabled) override {
    return native_->memcpyAsync(to, to_device, from, from_device, count, stream, p2p_enabled);
  }
  std::shared_ptr<AllocatorState> getCheckpointState(DeviceIndex device, MempoolId_t pool) override {
    return native_->getCheckpointState(device, pool);
  }
  CheckpointDelta setCheckpointPoolState(DeviceIndex device, std::shared_ptr<AllocatorState> state) override {
    return native_->setCheckpointPoolState(device, std::move(state));
  }
  std::string name() override { return native_->name(); }

#if MEGAMEM_TORCH_VERSION >= 208
  void emptyCache(MempoolId_t pool = {0, 0}) override { native_->emptyCache(pool); }
  void pushCompileContext(std::string& text) override { native_->pushCompileContext(text); }
  void popCompileContext() override { native_->popCompileContext(); }
#else
  void emptyCache() override { native_->emptyCache(); }
  SnapshotInfo snapshot() override { return native_->snapshot(); }
  void ensureExistsAndIncrefPool(DeviceIndex device, MempoolId_t pool) override {
    native_->ensureExistsAndIncrefPool(device, pool);
  }
  void recordHistory(bool enabled, CreateContextFn recorder, size_t max_entries, RecordContext when) override {
    native_->recordHistory(enabled, recorder, max_entries, when);
  }
#endif

#if MEGAMEM_TORCH_VERSION >= 208 && MEGAMEM_TORCH_VERSION < 211
  SnapshotInfo snapshot(MempoolId_t pool = {0, 0}) override { return native_->snapshot(pool); }
  void createOrIncrefPool(DeviceIndex device, MempoolId_t pool, CUDAAllocator* allocator = nullptr) override {
    native_->createOrIncrefPool(device, pool, allocator);
  }
  void setUseOnOOM(DeviceIndex device, MempoolId_t pool) override { native_->setUseOnOOM(device, pool); }
  void recordHistory(bool enabled, CreateContextFn recorder, size_t max_entries, RecordContext when,
                     bool clear) override {
    native_->recordHistory(enabled, recorder, max_entries, when, clear);
  }
#endif

#if MEGAMEM_TORCH_VERSION >= 210
  std::vector<StreamSegmentSize> getExpandableSegmentSizes(DeviceIndex device) override {
    return native_->getExpandableSegmentSizes(device);
  }
  void setNoSplit(DeviceIndex device, MempoolId_t pool) override { native_->setNoSplit(device, pool); }
  void setUserMetadata(const std::string& text) override { native_->setUserMetadata(text); }
  std::string getUserMetadata() override { return native_->getUserMetadata(); }
#endif

#if MEGAMEM_TORCH_VERSION >= 211
  SnapshotInfo snapshot(MempoolId_t pool = {0, 0}, bool include_traces = true) override {
    return native_->snapshot(pool, include_traces);
  }
  void createOrIncrefPool(DeviceIndex device, MempoolId_t pool,
                          std::shared_ptr<CUDAAllocator> allocator = nullptr) override {
    native_->createOrIncrefPool(device, pool, std::move(allocator));
  }
  void setUseOnOOM(DeviceIndex device, MempoolId_t pool, bool use_on_oom) override {
    native_->setUseOnOOM(device, pool, use_on_oom);
  }
  void recordHistory(bool enabled, CreateContextFn recorder, size_t max_entries, RecordContext when, bool clear,
                     const std::vector<std::string>& skipped) override {
    native_->recordHistory(enabled, recorder, max_entries, when, clear, skipped);
  }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override { return native_->getMemoryInfo(device); }
#endif

#if MEGAMEM_TORCH_VERSION >= 212
  std::shared_ptr<c10::GatheredContext> getContextForPointer(const void* at) override {
    return native_->getContextForPointer(at);
  }
  void attachOomRejectionObserver(OomRejectionObserver observer) override {
    native_->attachOomRejectionObserver(std::move(observer));
  }
#endif

#if MEGAMEM_TORCH_VERSION >= 213
  void markCaptureBegin(DeviceIndex device) override { native_->markCaptureBegin(device); }
  void markCaptureEnd(DeviceIndex device) override { native_->markCaptureEnd(device); }
  DataPtr allocateWithAddress(size_t size, void* at) override { return native_->allocateWithAddress(size, at); }
#endif

 protected:
  explicit ForwardingAllocator(CUDAAllocator* native) : native_(native) {}

  CUDAAllocator* const native_;
};

}  // namespace megamem

#endif  // MEGAMEM_CUDA_FORWARDING_H_
