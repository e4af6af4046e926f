// First fit and best fit over a given order: greedy placement, fast enough for 10^5 requests.
//
// A buffer has to look at those placed before that share a section with it, by rising offset. `Shelves` keeps them
// that way: a shelf holds what touches a window of sections. On level k windows are 2 h wide and begin every h
// sections, h = kStep * 4^k, so an interval of at most h sections lies within one window of level k, and only that
// shelf is read.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

#include "megamem.h"

namespace {

constexpr int64_t kStep = 64;      // narrowest step; smaller reads less and writes more
constexpr int32_t kPlacementsPerPoll = 256;

struct Placed {
  int64_t offset, end;
  int32_t first, last;

  bool operator<(const Placed& other) const { return offset < other.offset; }
};

// Sorted by offset up to `sorted`; what came since is merged in when the shelf is read, so that writing stays cheap
// for a long-lived buffer, which lies on many shelves.
struct Shelf {
  std::vector<Placed> placed;
  size_t sorted = 0;

  const std::vector<Placed>& by_offset() {
    if (sorted < placed.size()) {
      const auto middle = placed.begin() + static_cast<std::ptrdiff_t>(sorted);
      std::sort(middle, placed.end());
      std::inplace_merge(placed.begin(), middle, placed.end());
      sorted = placed.size();
    }
    return placed;
  }
};

class Shelves {
 public:
  explicit Shelves(int64_t sections) {
    for (int64_t step = kStep;; step *= 4) {
      levels_.push_back({step, std::vector<Shelf>(static_cast<size_t>(sections / step + 1))});
      if (step >= sections) break;
    }
  }

  void put(const Placed& item) {
    for (Level& level : levels_) {
      const int64_t lowest = std::max<int64_t>(item.first / level.step - 1, 0);
      for (int64_t window = lowest; window <= (item.last - 1) / level.step; ++window) {
        level.shelves[static_cast<size_t>(window)].placed.push_back(item);
      }
    }
  }

  const std::vector<Placed>& touching(int32_t first, int32_t last) {
    for (Level& level : levels_) {
      if (last - first <= level.step) return level.shelves[static_cast<size_t>(first / level.step)].by_offset();
    }
    return levels_.back().shelves[0].by_offset();  // not reached: the last level is as wide as all sections
  }

 private:
  struct Level {
    int64_t step;
    std::vector<Shelf> shelves;
  };
  std::vector<Level> levels_;
};

int64_t find_gap(const std::vector<Placed>& placed, int32_t first, int32_t last, int64_t size, bool best_fit) {
  int64_t top = 0, best = -1, smallest = std::numeric_limits<int64_t>::max();
  for (const Placed& other : placed) {
    if (other.first >= last || other.last <= first) continue;
    const int64_t gap = other.offset - top;
    if (gap >= size && gap < smallest) {
      if (!best_fit || gap == size) return top;
      smallest = gap;
      best = top;
    }
    top = std::max(top, other.end);
  }
  return best >= 0 ? best : top;
}

}  // namespace

extern "C" int32_t megamem_abi(void) { return MEGAMEM_ABI; }

extern "C" int32_t megamem_first_fit(int32_t n, const int32_t* first, const int32_t* last, const int64_t* size,
                                     const int32_t* order, int32_t best_fit, int64_t* offset, megamem_poll poll) {
  try {
    Shelves shelves(n > 0 ? *std::max_element(last, last + n) : 1);
    for (int32_t step = 0; step < n; ++step) {
      if (step % kPlacementsPerPoll == kPlacementsPerPoll - 1 && poll != nullptr && poll(static_cast<uint64_t>(step))) {
        return MEGAMEM_STOPPED;
      }
      const int32_t i = order[step];
      offset[i] = find_gap(shelves.touching(first[i], last[i]), first[i], last[i], size[i], best_fit != 0);
      shelves.put({offset[i], offset[i] + size[i], first[i], last[i]});
    }
    return MEGAMEM_FOUND;
  } catch (const std::bad_alloc&) {
    return MEGAMEM_NO_MEMORY;
  }
}
