// A small caching allocator for what the arena does not serve, where PyTorch's own is not to be had: behind its
// pluggable allocator. Best fit with splitting and merging, one pool a stream; segments are kept until memory runs out.

#ifndef MEGAMEM_CACHING_HEAP_H_
#define MEGAMEM_CACHING_HEAP_H_

#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "megamem.h"

namespace megamem {

class CachingHeap {
 public:
  explicit CachingHeap(const megamem_device& device) : device_(device) {}
  ~CachingHeap();
  CachingHeap(const CachingHeap&) = delete;
  CachingHeap& operator=(const CachingHeap&) = delete;

  void* malloc(int64_t size, uint64_t stream);  // null where there is no memory, cached segments included
  bool free(void* at);                          // false where no block begins
  bool record_use(void* at, uint64_t stream);   // kept after its free until that use is over
  int64_t reserved() const { return reserved_; }

 private:
  struct Block {
    int64_t size;
    uint64_t stream;
    bool is_free = false, begins = false;  // begins: a segment
    std::vector<uint64_t> used_by{};
  };
  using Blocks = std::map<char*, Block>;

  char* grow(int64_t size, uint64_t stream);
  void release_free_segments();
  void settle(Blocks::iterator at);
  void poll();
  std::set<std::pair<int64_t, char*>>& pool(uint64_t stream) { return free_[stream]; }

  const megamem_device device_;
  std::mutex lock_;
  Blocks blocks_;
  std::unordered_map<uint64_t, std::set<std::pair<int64_t, char*>>> free_;
  std::vector<std::pair<char*, std::vector<void*>>> deferred_;
  int64_t reserved_ = 0;
};

}  // namespace megamem

#endif  // MEGAMEM_CACHING_HEAP_H_
