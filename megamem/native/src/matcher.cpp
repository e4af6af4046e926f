// Which request of the plan comes next.

#include <algorithm>

#include "arena.h"

namespace megamem {

int64_t Matcher::next(int64_t size) {
  if (plan_ == nullptr) return -1;
  int64_t at = -1;
  if (!lost_) {
    at = find_in_step(size);
    if (at < 0) {
      lost_ = true;
      since_ = 0;
      ++losses_;
    }
  }
  if (lost_) {
    recent_[static_cast<size_t>(since_) % kMostRun] = size;
    ++since_;
    if (looks_ > 0) at = find_way_back();
  }
  if (at >= 0) {
    lost_ = false;
    at_ = at + 1;
  }
  return at;
}

// The next request, or one after it where those between may also not come; of its size before one of any size.
int64_t Matcher::find_in_step(int64_t size) const {
  int64_t any = -1;
  for (int64_t at = at_; at < static_cast<int64_t>(plan_->size()); ++at) {
    const Planned& request = (*plan_)[static_cast<size_t>(at)];
    if (request.size == size) return at;
    if (request.size == 0 && any < 0) any = at;
    if (request.offset != MEGAMEM_OPTIONAL) break;
  }
  return any;
}

// Whether the last `length` sizes are the plan's up to `at`. Requests of any size prove nothing, so the run ends with a
// known one, and has another.
bool Matcher::ends_run(int64_t at, int64_t length) const {
  const auto recent = [this](int64_t back) { return recent_[static_cast<size_t>(since_ - 1 - back) % kMostRun]; };
  if ((*plan_)[static_cast<size_t>(at)].size != recent(0)) return false;
  int64_t known = 0;
  for (int64_t back = 0; back < length; ++back) {
    if (!takes(at - back, recent(back))) return false;
    known += !is_any(at - back);
  }
  return known >= 2;
}

int64_t Matcher::find_way_back() {
  const auto end = static_cast<int64_t>(plan_->size());
  const int64_t expected = at_ + since_ - 1;
  for (int64_t distance = 0; distance < kReach; ++distance) {
    const int64_t run = needed_run(distance);
    if (run > since_) {
      if (distance > 0) break;  // it only gets longer
      continue;
    }
    for (const int64_t at : {expected + distance, expected - distance}) {
      if (at >= end || at < run - 1) continue;
      --looks_;
      if (ends_run(at, run)) return at;
    }
    if (expected + distance >= end && expected - distance < 0) break;
  }
  return -1;
}

}  // namespace megamem
