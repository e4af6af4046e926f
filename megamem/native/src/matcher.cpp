// Which request of the plan comes next.

#include <algorithm>

#include "arena.h"

namespace megamem {

int64_t Matcher::next(int64_t size) {
  if (plan_ == nullptr) return -1;
  if (!lost_) {
    size_t at = at_;
    while (at < plan_->size() && !takes(at, size) && (*plan_)[at].offset == MEGAMEM_OPTIONAL) ++at;
    if (at < plan_->size() && takes(at, size)) {
      at_ = at + 1;
      return static_cast<int64_t>(at);
    }
    lost_ = true;
    ++losses_;
    recent_.clear();
  }
  if (looks_ == 0) return -1;
  --looks_;
  if (recent_.size() == kRun) recent_.erase(recent_.begin());
  recent_.push_back(size);
  return recent_.size() == kRun ? find_way_back() : -1;
}

// Whether the recent sizes are the plan's up to `at`. Requests of any size prove nothing, so the run begins and ends
// with known ones.
bool Matcher::ends_run(size_t at) const {
  const size_t begin = at + 1 - kRun;
  if ((*plan_)[at].size != recent_.back() || (*plan_)[begin].size != recent_.front()) return false;
  for (size_t i = 1; i + 1 < kRun; ++i) {
    if (!takes(begin + i, recent_[i])) return false;
  }
  return true;
}

int64_t Matcher::find_way_back() {
  const size_t end = std::min(plan_->size(), at_ + kReach);
  for (size_t at = at_ + kRun - 1; at < end; ++at) {
    if (!ends_run(at)) continue;
    at_ = at + 1;
    lost_ = false;
    hindsight_ = kRun - 1;
    return static_cast<int64_t>(at);
  }
  return -1;
}

void align(const std::vector<Planned>& reference, const int64_t* other, int32_t n, int32_t* index) {
  std::fill(index, index + n, -1);
  Matcher matcher(&reference);
  bool was_lost = false;
  int32_t last = -1, last_place = -1;  // the match before
  for (int32_t i = 0; i < n; ++i) {
    const auto place = static_cast<int32_t>(matcher.next(other[i]));
    if (place < 0) {
      was_lost = true;
      continue;
    }
    index[i] = place;
    if (was_lost) {
      const auto behind = static_cast<int32_t>(matcher.hindsight());
      for (int32_t back = 1; back <= behind; ++back) index[i - back] = place - back;
      const int32_t first = i - behind, first_place = place - behind;
      if (first - last == first_place - last_place) {  // as many on both sides: their sizes vary
        for (int32_t k = 1; k < first - last; ++k) index[last + k] = last_place + k;
      }
      was_lost = false;
    }
    last = i;
    last_place = place;
  }
}

}  // namespace megamem
