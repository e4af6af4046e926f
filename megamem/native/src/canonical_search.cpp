// Exact search for a placement within a capacity: depth first over canonical solutions.
//
// The algorithm is that of MiniMalloc (Moffitt, ASPLOS 2023), written from the paper's description; the Python twin
// in planner/allocation/python_core.py visits the same nodes in the same order. In words:
//
//   * A buffer is only put on its floor: the highest end of a placed buffer that it shares a section with.
//   * Placements go by rising (offset, preorder). Every feasible problem has such a canonical solution, as lowering
//     buffers one after the other ends in one.
//   * A placement at an offset at which some other buffer would fit entirely below is skipped (dominance).
//   * A section whose unplaced buffers cannot fit above their lowest floor ends the branch.
//   * When nothing unplaced shares a section with the buffer just placed, no alternative to it need be tried.
//   * Where no unplaced buffer crosses the border between two sections any more, both sides are solved for themselves.
//   * With `fullest_first`, buffers of the sections in which most is still unplaced come first, and this is looked at
//     anew for every part that the problem falls into.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

#include "megamem.h"

namespace {

constexpr uint64_t kPollEvery = 1 << 12;  // nodes between two polls
constexpr int64_t kInfinity = std::numeric_limits<int64_t>::max();

enum class Result { kFound, kNone, kAborted };

class Search {
 public:
  Search(int32_t n, const int32_t* first, const int32_t* last, const int64_t* size, int64_t capacity,
         const int32_t* preorder, bool fullest_first, uint64_t max_nodes, int64_t* offset, megamem_poll poll)
      : first_(first), last_(last), size_(size), capacity_(capacity), fullest_first_(fullest_first),
        max_nodes_(max_nodes), offset_(offset), poll_(poll), unplaced_(preorder, preorder + n), tie_(n), floor_(n, 0), reach_(n, 0), placed_(n, 0),
        neighbours_(n), members_(n > 0 ? *std::max_element(last, last + n) : 0), waiting_(members_.size(), 0),
        crossing_(members_.size() + 1, 0) {
    for (int32_t step = 0; step < n; ++step) {
      const int32_t i = preorder[step];
      tie_[i] = step;
      for (int32_t s = first[i]; s < last[i]; ++s) {
        members_[s].push_back(i);
        waiting_[s] += size[i];
      }
      for (int32_t s = first[i] + 1; s < last[i]; ++s) ++crossing_[s];
      for (int32_t j = 0; j < n; ++j) {
        if (i != j && first[i] < last[j] && first[j] < last[i]) neighbours_[i].push_back(j);
      }
    }
    rank_ = tie_;
  }

  int32_t run() {
    for (const int64_t total : waiting_) {
      if (total > capacity_) return MEGAMEM_NONE;
    }
    switch (descend(unplaced_, -1, 0, static_cast<int32_t>(members_.size()), {0, -1})) {
      case Result::kFound: return MEGAMEM_FOUND;
      case Result::kNone: return MEGAMEM_NONE;
      default: return stopped_ ? MEGAMEM_STOPPED : MEGAMEM_LIMIT;
    }
  }

  uint64_t nodes() const { return nodes_; }

 private:
  // Position in the canonical order: every further placement comes after it.
  struct Place {
    int64_t offset;
    int32_t rank;

    bool operator<(const Place& other) const {
      return offset != other.offset ? offset < other.offset : rank < other.rank;
    }
  };

  struct Candidate {
    Place place;
    int32_t buffer;

    bool operator<(const Candidate& other) const { return place < other.place; }
  };

  struct Undo {
    int32_t buffer;
    int64_t floor;
  };

  // Place all of `unplaced`, which are what is unplaced in the sections begin .. end - 1, after `current`.
  Result solve(const std::vector<int32_t>& unplaced, int32_t begin, int32_t end, Place current) {
    int64_t lowest_end = kInfinity;
    std::vector<Candidate> candidates;
    for (const int32_t i : unplaced) {
      const Place place{floor_[i], rank_[i]};
      lowest_end = std::min(lowest_end, floor_[i] + size_[i]);
      if (current < place) candidates.push_back({place, i});
    }
    std::sort(candidates.begin(), candidates.end());
    const int64_t fullest = *std::max_element(waiting_.begin() + begin, waiting_.begin() + end);
    for (const Candidate& candidate : candidates) {
      const int64_t at = candidate.place.offset;
      if (at >= lowest_end || at + fullest > capacity_) break;
      if (is_over()) return Result::kAborted;
      const int32_t i = candidate.buffer;
      const size_t undo_from = undo_.size();
      Result result = Result::kNone;
      if (place(i, at) && has_room(unplaced, begin, end, candidate.place)) {
        result = descend(unplaced, i, begin, end, candidate.place);
      }
      const bool is_alone = !has_unplaced_neighbour(i);
      take_back(i, undo_from);
      if (result == Result::kFound) offset_[i] = at;
      if (result != Result::kNone) return result;
      if (is_alone) break;
    }
    return Result::kNone;
  }

  // Solve what is left without `placed`, one part after the other where it falls into parts that share no section.
  Result descend(const std::vector<int32_t>& unplaced, int32_t placed, int32_t begin, int32_t end, Place current) {
    const auto free_border = std::find(crossing_.begin() + begin + 1, crossing_.begin() + end, 0);
    const bool is_new_part = placed < 0 || free_border != crossing_.begin() + end;
    std::vector<int32_t> part;
    for (int32_t from = begin, to = begin + 1; to <= end; ++to) {
      if (to < end && crossing_[to] > 0) continue;
      part.clear();
      for (const int32_t j : unplaced) {
        if (j != placed && first_[j] >= from && last_[j] <= to) part.push_back(j);
      }
      if (!part.empty()) {
        const Result result = fullest_first_ && is_new_part ? solve_fullest_first(part, from, to, current.offset)
                                                            : solve(part, from, to, current);
        if (result != Result::kFound) return result;
      }
      from = to;
    }
    return Result::kFound;
  }

  // Solve a part with ranks of its own. All that is unplaced lies at `offset` or above, whatever the order among equals.
  Result solve_fullest_first(const std::vector<int32_t>& part, int32_t begin, int32_t end, int64_t offset) {
    struct Key {
      int64_t waiting;  // in the fullest section that the buffer is live in
      int32_t buffer;
      int32_t before;  // its rank so far
    };
    std::vector<Key> keys;
    for (const int32_t i : part) {
      keys.push_back({*std::max_element(waiting_.begin() + first_[i], waiting_.begin() + last_[i]), i, rank_[i]});
    }
    std::sort(keys.begin(), keys.end(), [this](const Key& one, const Key& other) {
      return one.waiting != other.waiting ? one.waiting > other.waiting : tie_[one.buffer] < tie_[other.buffer];
    });
    for (size_t rank = 0; rank < keys.size(); ++rank) rank_[keys[rank].buffer] = static_cast<int32_t>(rank);
    const Result result = solve(part, begin, end, {offset, -1});
    for (const Key& key : keys) rank_[key.buffer] = key.before;
    return result;
  }

  bool is_over() {
    if (++nodes_ > max_nodes_) return true;
    stopped_ = nodes_ % kPollEvery == 0 && poll_ != nullptr && poll_(nodes_);
    return stopped_;
  }

  // Put i on its floor and raise those of its neighbours; false where one of them no longer fits.
  bool place(int32_t i, int64_t at) {
    const int64_t top = at + size_[i];
    placed_[i] = 1;
    for (int32_t s = first_[i]; s < last_[i]; ++s) waiting_[s] -= size_[i];
    for (int32_t s = first_[i] + 1; s < last_[i]; ++s) --crossing_[s];
    for (const int32_t j : neighbours_[i]) {
      if (placed_[j] || floor_[j] >= top) continue;
      if (top + size_[j] > capacity_) return false;
      undo_.push_back({j, floor_[j]});
      floor_[j] = top;
    }
    return true;
  }

  void take_back(int32_t i, size_t undo_from) {
    for (; undo_.size() > undo_from; undo_.pop_back()) floor_[undo_.back().buffer] = undo_.back().floor;
    placed_[i] = 0;
    for (int32_t s = first_[i]; s < last_[i]; ++s) waiting_[s] += size_[i];
    for (int32_t s = first_[i] + 1; s < last_[i]; ++s) ++crossing_[s];
  }

  bool has_unplaced_neighbour(int32_t i) const {
    return std::any_of(waiting_.begin() + first_[i], waiting_.begin() + last_[i], [](int64_t size) { return size > 0; });
  }

  // Whether every section could still take what waits for it above the lowest offset that any of it can reach.
  //
  // A buffer whose floor was passed by has to be raised by an unplaced neighbour, which itself lies at `current` or
  // above, so it cannot lie lower than the lowest end of a neighbour. (Not in the paper; it halves the nodes or better.)
  bool has_room(const std::vector<int32_t>& unplaced, int32_t begin, int32_t end, Place current) {
    for (const int32_t j : unplaced) {
      if (placed_[j]) continue;
      reach_[j] = floor_[j];
      if (current < Place{floor_[j], rank_[j]}) continue;
      reach_[j] = kInfinity;
      for (const int32_t k : neighbours_[j]) {
        if (!placed_[k]) reach_[j] = std::min(reach_[j], std::max(floor_[k], current.offset) + size_[k]);
      }
      if (reach_[j] > capacity_ - size_[j]) return false;
    }
    for (int32_t s = begin; s < end; ++s) {
      if (waiting_[s] == 0) continue;
      int64_t lowest = kInfinity;
      for (const int32_t j : members_[s]) {
        if (!placed_[j]) lowest = std::min(lowest, reach_[j]);
      }
      if (lowest > capacity_ - waiting_[s]) return false;
    }
    return true;
  }

  const int32_t *first_, *last_;
  const int64_t* size_;
  const int64_t capacity_;
  const bool fullest_first_;
  const uint64_t max_nodes_;
  int64_t* offset_;
  const megamem_poll poll_;

  const std::vector<int32_t> unplaced_;  // at the root: all, in preorder
  std::vector<int32_t> tie_;             // per buffer, its place in the preorder
  std::vector<int32_t> rank_;            // per buffer, its place in the order of its part; without that, tie_
  std::vector<int64_t> floor_;           // per buffer, the highest end of a placed neighbour
  std::vector<int64_t> reach_;           // per unplaced buffer, scratch of has_room
  std::vector<char> placed_;
  std::vector<std::vector<int32_t>> neighbours_;  // per buffer, those that share a section with it
  std::vector<std::vector<int32_t>> members_;     // per section, the buffers that are live in it
  std::vector<int64_t> waiting_;                  // per section, the size of its unplaced members
  std::vector<int32_t> crossing_;                 // unplaced buffers that are live in both section s - 1 and section s
  std::vector<Undo> undo_;
  uint64_t nodes_ = 0;
  bool stopped_ = false;
};

}  // namespace

extern "C" int32_t megamem_canonical_search(int32_t n, const int32_t* first, const int32_t* last, const int64_t* size,
                                            int64_t capacity, const int32_t* preorder, int32_t fullest_first,
                                            uint64_t max_nodes, int64_t* offset, uint64_t* nodes, megamem_poll poll) {
  try {
    Search search(n, first, last, size, capacity, preorder, fullest_first != 0, max_nodes, offset, poll);
    const int32_t status = search.run();
    *nodes = search.nodes();
    return status;
  } catch (const std::bad_alloc&) {
    return MEGAMEM_NO_MEMORY;
  }
}
