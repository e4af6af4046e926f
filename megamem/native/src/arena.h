// The static allocator's core: planned requests from one reserved range of addresses, each at its place.
//
//   Matcher    which request of the plan this one is: by sequence and size, finding its way back after a difference
//   Region     the reserved bytes, and which of them are taken; two blocks never share a byte
//   Arena      plans, matcher and regions behind one lock; counters and a log. Front ends call it (see front_end.h)
//
// A plan is a guess about the next step; nothing here trusts it. Whatever the matcher says, a range is handed out only
// while none of its bytes is, so that a wrong guess costs a request to the native allocator and never memory.
//
// Nothing here knows a device: `megamem_device` brings the memory, the poison and the events of streams.

#ifndef MEGAMEM_ARENA_H_
#define MEGAMEM_ARENA_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "megamem.h"

namespace megamem {

constexpr int64_t kAlignment = 512;  // of offsets; what the CUDA caching allocator rounds requests up to

// One request of a plan. `size` 0 takes any size; it is then the native allocator's.
struct Planned {
  int64_t size = 0;
  int64_t offset = MEGAMEM_NATIVE;
  int32_t first = 0, last = 0;  // the cells [first, last) of its region
};

// The place of a sequence of sizes in a plan. While in step, request n of the step is request n of the plan. After a
// difference, the sizes that come are compared with those around the place where the plan would be if as many requests
// had been others; the farther from there, the more of them in a row must agree to put it back in step.
class Matcher {
 public:
  static constexpr int64_t kReach = 8192;           // how far from the expected place it looks
  static constexpr int64_t kLooks = int64_t{1} << 22;  // places to look at in a step; then the rest is left alone
  static constexpr size_t kMostRun = 16;

  explicit Matcher(const std::vector<Planned>* plan = nullptr) : plan_(plan) {}

  // The index of the request in the plan, or -1.
  int64_t next(int64_t size);
  uint64_t losses() const { return losses_; }

 private:
  bool takes(int64_t at, int64_t size) const { return (*plan_)[static_cast<size_t>(at)].size == size || is_any(at); }
  bool is_any(int64_t at) const { return (*plan_)[static_cast<size_t>(at)].size == 0; }
  static int64_t needed_run(int64_t distance) { return distance == 0 ? 2 : distance <= 256 ? 4 : kMostRun; }
  int64_t find_in_step(int64_t size) const;
  int64_t find_way_back();
  bool ends_run(int64_t at, int64_t length) const;

  const std::vector<Planned>* plan_;
  int64_t at_ = 0;    // the next request of the plan; while lost, the one where it was lost
  bool lost_ = false;
  int64_t since_ = 0;  // requests since it was lost
  int64_t looks_ = kLooks;
  int64_t recent_[kMostRun] = {};  // sizes since it was lost, by their number modulo kMostRun
  uint64_t losses_ = 0;
};

// Reserved bytes, cut into cells at the places where planned blocks begin and end. A bit says that a cell is taken.
class Region {
 public:
  Region(char* base, int64_t capacity) : base_(base), capacity_(capacity) {}

  char* base() const { return base_; }
  int64_t capacity() const { return capacity_; }
  int64_t live_bytes() const { return live_bytes_; }
  bool is_empty() const { return num_live_ == 0; }
  bool holds(const void* at) const {
    const auto address = reinterpret_cast<uintptr_t>(at), base = reinterpret_cast<uintptr_t>(base_);
    return address >= base && address - base < static_cast<uintptr_t>(capacity_);
  }

  // Cut into cells at these places, and at those of the blocks that are live.
  void cut(std::vector<int64_t> places);
  int32_t cell(int64_t place) const;  // the cell that begins there

  bool take(int32_t first, int32_t last);  // false, and nothing happens, where a cell is taken
  bool give(const void* at, int64_t* size);  // false where no live block begins
  int64_t size_of(const void* at) const;     // of the live block that begins there; 0 where there is none

  struct Block {
    int64_t offset, size;
  };
  std::vector<Block> blocks() const;  // the live ones, by offset

 private:
  int32_t find(const void* at) const;
  int64_t width(int32_t cell) const { return places_[static_cast<size_t>(until_[static_cast<size_t>(cell)])] -
                                             places_[static_cast<size_t>(cell)]; }
  void mark(int32_t first, int32_t last, bool taken);
  void index();

  char* base_;
  int64_t capacity_;
  std::vector<int64_t> places_;                // sorted, distinct; cell i is [places_[i], places_[i + 1])
  std::vector<uint64_t> taken_;                // one bit a cell
  std::vector<int32_t> until_;                 // where a live block begins: its last cell + 1; else 0
  std::vector<int32_t> slots_;                 // hash table of the places: cell + 1, or 0
  uint64_t mask_ = 0;
  int64_t live_bytes_ = 0, num_live_ = 0;
};

class Arena {
 public:
  explicit Arena(const megamem_device& device) : device_(device) {}
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  int32_t load(int32_t plan, int32_t n, const int64_t* size, const int64_t* offset, int64_t min_size);
  int32_t begin(int32_t plan, uint64_t stream);
  void end();
  void reset();
  bool shrink();

  // Null where the request is the native allocator's.
  void* malloc(size_t size, uint64_t stream);
  // False where the block is none of the arena's. `size` is set to the block's.
  bool free(void* at, int64_t* size = nullptr);
  // Another stream uses the block: its bytes stay taken after the free until that use is over.
  bool record_use(void* at, uint64_t stream);

  void watch(bool on, int64_t max_events);
  void note_malloc(void* at, size_t size, uint64_t stream);
  void note_free(void* at);
  void note_use(void* at, uint64_t stream);
  int64_t num_events();
  int64_t read_events(megamem_event* out, int64_t max);

  void set_poison(bool on);
  void counters(int64_t* out);
  std::vector<Region::Block> live_blocks();
  void* base();
  void* base_of(const void* at);  // of the arena, present or former, that holds the address; null where none does

  // Around fork(): the child inherits the lock free and serves nothing.
  void before_fork() { lock_.lock(); }
  void after_fork(bool is_child);

  // Whether anything is to be served or noted; else front ends need not ask.
  bool is_active() const { return active_.load(std::memory_order_relaxed); }
  bool is_watching() const { return watching_.load(std::memory_order_relaxed); }

 private:
  struct Plan {
    std::vector<Planned> requests;
    int64_t peak = 0, min_size = 0;
  };
  struct Deferred {
    Region* region;
    void* at;
    std::vector<void*> events;
  };
  using Guard = std::lock_guard<std::mutex>;

  int32_t fit_region();
  void cut_region();
  void retire();
  void release(Region& region);
  void drop_empty();
  void* serve(const Planned& wanted, int64_t size, uint64_t stream);
  void settle(Region& region, void* at);
  void poll();
  void log(int32_t kind, const void* at, int64_t size, uint64_t stream);
  void update_active() { active_.store(current_ >= 0 || watching_, std::memory_order_relaxed); }
  Region* owner(const void* at);
  void count(int32_t which, int64_t size);
  void stain_check(const void* at, int64_t size);

  const megamem_device device_;
  std::mutex lock_;
  std::atomic<bool> active_{false}, watching_{false};
  bool poison_ = false;
  std::unordered_map<int32_t, Plan> plans_;
  int32_t current_ = -1;
  Plan* plan_ = nullptr;
  uint64_t stream_ = 0;
  Matcher matcher_;
  std::unique_ptr<Region> region_;
  std::vector<std::unique_ptr<Region>> retired_;  // with live blocks; released with the last of them
  std::unordered_map<void*, std::vector<uint64_t>> used_by_;
  std::vector<Deferred> deferred_;
  std::vector<megamem_event> events_;
  size_t max_events_ = 0;
  int64_t counters_[MEGAMEM_NUM_COUNTERS] = {};
};

// The arena behind a handle of the C interface.
Arena* arena_of(megamem_arena* handle);

// Where `other` follows `reference`: index[i] is the place of other[i] in it, rising, or -1 for what was put in.
// A place may have another size: it is then the same request as far as its neighbours tell.
void align(int32_t num_reference, const int64_t* reference, int32_t num_other, const int64_t* other, int32_t* index);

}  // namespace megamem

#endif  // MEGAMEM_ARENA_H_
