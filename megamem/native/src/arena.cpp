// Plans, matcher and regions behind one lock.

#include "arena.h"

#include <algorithm>
#include <chrono>
#include <new>

namespace megamem {

namespace {

constexpr int kPoison = 0xFF;  // as a floating-point number of any width: NaN
constexpr int64_t kMost = int64_t{1} << 62;

int64_t rounded(int64_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::system_clock::now().time_since_epoch())
      .count();
}

bool is_possible(int64_t size, int64_t offset) {
  if (offset == MEGAMEM_NATIVE || offset == MEGAMEM_OPTIONAL) return size >= 0 && size < kMost;
  return size > 0 && size < kMost && offset >= 0 && offset < kMost && offset % kAlignment == 0;
}

}  // namespace

Arena::~Arena() {
  if (region_) release(*region_);
  for (const auto& region : retired_) release(*region);
}

int32_t Arena::load(int32_t plan, int32_t n, const int64_t* size, const int64_t* offset, int64_t min_size) {
  if (plan < 0 || n < 0 || min_size < 0) return MEGAMEM_BAD_PLAN;
  Plan made;
  made.min_size = min_size;
  made.requests.resize(static_cast<size_t>(n));
  for (int32_t i = 0; i < n; ++i) {
    if (!is_possible(size[i], offset[i])) return MEGAMEM_BAD_PLAN;
    made.requests[static_cast<size_t>(i)] = {size[i], offset[i], 0, 0};
    if (offset[i] >= 0) made.peak = std::max(made.peak, offset[i] + rounded(size[i]));
  }
  const Guard guard(lock_);
  if (current_ == plan) {
    current_ = -1;
    plan_ = nullptr;
    update_active();
  }
  plans_[plan] = std::move(made);
  cut_region();
  return MEGAMEM_OK;
}

int32_t Arena::begin(int32_t plan, uint64_t stream) {
  const Guard guard(lock_);
  current_ = -1;
  plan_ = nullptr;
  int32_t status = MEGAMEM_OK;
  poll();
  if (plan >= 0) {
    const auto found = plans_.find(plan);
    status = found == plans_.end() ? static_cast<int32_t>(MEGAMEM_BAD_PLAN) : fit_region();
    if (status == MEGAMEM_OK) {
      current_ = plan;
      plan_ = &found->second;
    }
  }
  stream_ = stream;
  if (plan_ != nullptr) {
    counters_[MEGAMEM_LOSSES] += static_cast<int64_t>(matcher_.losses());
    matcher_ = Matcher(&plan_->requests);
  }
  log(MEGAMEM_EVENT_STEP, nullptr, plan, stream);
  update_active();
  return status;
}

void Arena::end() {
  const Guard guard(lock_);
  current_ = -1;
  plan_ = nullptr;
  poll();
  update_active();
}

void Arena::reset() {
  const Guard guard(lock_);
  current_ = -1;
  plan_ = nullptr;
  plans_.clear();
  counters_[MEGAMEM_PEAK_BYTES] = 0;
  poll();
  retire();
  update_active();
}

bool Arena::shrink() {
  const Guard guard(lock_);
  poll();
  if (!region_ || !region_->is_empty() || plan_ != nullptr) return false;
  retire();
  return true;
}

// A region for the largest of the plans, which share it.
int32_t Arena::fit_region() {
  int64_t needed = kAlignment;
  for (const auto& [_, plan] : plans_) needed = std::max(needed, plan.peak);
  if (region_ && region_->capacity() >= needed) return MEGAMEM_OK;
  retire();
  void* base = device_.reserve(static_cast<size_t>(needed));
  if (base == nullptr) return MEGAMEM_NO_ROOM;
  region_ = std::make_unique<Region>(static_cast<char*>(base), needed);
  if (poison_ && device_.fill != nullptr) device_.fill(base, kPoison, static_cast<size_t>(needed), stream_);
  cut_region();
  return MEGAMEM_OK;
}

void Arena::cut_region() {
  if (!region_) return;
  std::vector<int64_t> places;
  for (const auto& [_, plan] : plans_) {
    if (plan.peak > region_->capacity()) continue;  // before it is served the region grows
    for (const Planned& request : plan.requests) {
      if (request.offset < 0) continue;
      places.push_back(request.offset);
      places.push_back(request.offset + rounded(request.size));
    }
  }
  region_->cut(std::move(places));
  for (auto& [_, plan] : plans_) {
    if (plan.peak > region_->capacity()) continue;
    for (Planned& request : plan.requests) {
      if (request.offset < 0) continue;
      request.first = region_->cell(request.offset);
      request.last = region_->cell(request.offset + rounded(request.size));
    }
  }
}

void Arena::retire() {
  if (region_) retired_.push_back(std::move(region_));
  drop_empty();
}

void Arena::drop_empty() {
  const auto is_done = [this](const std::unique_ptr<Region>& region) {
    if (!region->is_empty()) return false;
    release(*region);
    return true;
  };
  retired_.erase(std::remove_if(retired_.begin(), retired_.end(), is_done), retired_.end());
}

void Arena::release(Region& region) {
  device_.release(region.base(), static_cast<size_t>(region.capacity()));
}

void* Arena::malloc(size_t wanted, uint64_t stream) {
  const Guard guard(lock_);
  if (plan_ == nullptr || wanted == 0 || wanted >= static_cast<size_t>(kMost)) return nullptr;
  const auto size = static_cast<int64_t>(wanted);
  if (stream != stream_) return count(MEGAMEM_ELSEWHERE, size), nullptr;
  if (size < plan_->min_size) return count(MEGAMEM_SMALL, size), nullptr;
  const int64_t place = matcher_.next(size);
  if (place < 0) return count(MEGAMEM_MISSED, size), nullptr;
  return serve(plan_->requests[static_cast<size_t>(place)], size, stream);
}

void* Arena::serve(const Planned& wanted, int64_t size, uint64_t stream) {
  if (wanted.offset < 0) return count(MEGAMEM_UNPLANNED, size), nullptr;
  if (!region_->take(wanted.first, wanted.last)) {
    poll();  // a second stream may have ended its use by now
    if (!region_->take(wanted.first, wanted.last)) return count(MEGAMEM_CONFLICT, size), nullptr;
  }
  void* at = region_->base() + wanted.offset;
  if (poison_) stain_check(at, size);
  count(MEGAMEM_SERVED, size);
  counters_[MEGAMEM_PEAK_BYTES] = std::max(counters_[MEGAMEM_PEAK_BYTES], region_->live_bytes());
  if (is_watching()) log(MEGAMEM_EVENT_MALLOC, at, size, stream);
  return at;
}

void Arena::stain_check(const void* at, int64_t size) {
  if (device_.is_filled != nullptr && !device_.is_filled(at, kPoison, static_cast<size_t>(rounded(size)))) {
    ++counters_[MEGAMEM_STAINED];
  }
}

void Arena::count(int32_t which, int64_t size) {
  ++counters_[which];
  counters_[MEGAMEM_NUM_FATES + which] += size;
}

Region* Arena::owner(const void* at) {
  if (region_ && region_->holds(at)) return region_.get();
  for (const auto& region : retired_) {
    if (region->holds(at)) return region.get();
  }
  return nullptr;
}

bool Arena::free(void* at, int64_t* size) {
  const Guard guard(lock_);
  Region* region = owner(at);
  if (region == nullptr) return false;
  const int64_t held = region->size_of(at);
  if (size != nullptr) *size = held;
  if (held == 0) {
    ++counters_[MEGAMEM_UNKNOWN];
    return true;
  }
  if (is_watching()) log(MEGAMEM_EVENT_FREE, at, 0, 0);
  if (!used_by_.empty()) {
    const auto found = used_by_.find(at);
    if (found != used_by_.end()) {
      Deferred kept{region, at, {}};
      for (const uint64_t stream : found->second) {
        kept.events.push_back(device_.mark != nullptr ? device_.mark(stream) : nullptr);
      }
      used_by_.erase(found);
      deferred_.push_back(std::move(kept));
      ++counters_[MEGAMEM_DEFERRED];
      return true;
    }
  }
  settle(*region, at);
  return true;
}

// The block's bytes are free from now on.
void Arena::settle(Region& region, void* at) {
  int64_t size = 0;
  region.give(at, &size);
  if (poison_ && device_.fill != nullptr) device_.fill(at, kPoison, static_cast<size_t>(size), stream_);
  if (&region != region_.get()) drop_empty();
}

bool Arena::record_use(void* at, uint64_t stream) {
  const Guard guard(lock_);
  Region* region = owner(at);
  if (region == nullptr || region->size_of(at) == 0) return false;
  std::vector<uint64_t>& streams = used_by_[at];
  if (stream != stream_ && std::find(streams.begin(), streams.end(), stream) == streams.end()) {
    streams.push_back(stream);
  }
  if (streams.empty()) used_by_.erase(at);
  if (is_watching()) log(MEGAMEM_EVENT_USE, at, 0, stream);
  return true;
}

// Give back the blocks whose use on other streams is over.
void Arena::poll() {
  for (size_t i = 0; i < deferred_.size();) {
    std::vector<void*>& events = deferred_[i].events;
    while (!events.empty() && events.back() != nullptr && device_.is_done != nullptr &&
           device_.is_done(events.back()) != 0) {
      events.pop_back();
    }
    if (!events.empty()) {
      ++i;
      continue;
    }
    const Deferred over = std::move(deferred_[i]);
    deferred_.erase(deferred_.begin() + static_cast<std::ptrdiff_t>(i));
    settle(*over.region, over.at);
  }
}

void Arena::watch(bool on, int64_t max_events) {
  const Guard guard(lock_);
  if (on) {
    events_.clear();
    max_events_ = static_cast<size_t>(std::max<int64_t>(max_events, 0));
  }
  watching_ = on;
  update_active();
}

void Arena::note_malloc(void* at, size_t size, uint64_t stream) {
  const Guard guard(lock_);
  if (is_watching()) log(MEGAMEM_EVENT_MALLOC, at, static_cast<int64_t>(size), stream);
}

void Arena::note_free(void* at) {
  const Guard guard(lock_);
  if (is_watching()) log(MEGAMEM_EVENT_FREE, at, 0, 0);
}

void Arena::note_use(void* at, uint64_t stream) {
  const Guard guard(lock_);
  if (is_watching()) log(MEGAMEM_EVENT_USE, at, 0, stream);
}

void Arena::log(int32_t kind, const void* at, int64_t size, uint64_t stream) {
  if (!is_watching()) return;
  if (events_.size() >= max_events_) {
    ++counters_[MEGAMEM_DROPPED];
    return;
  }
  try {
    events_.push_back({kind, reinterpret_cast<uintptr_t>(at), size, stream, now_ns()});
  } catch (const std::bad_alloc&) {
    ++counters_[MEGAMEM_DROPPED];
  }
}

int64_t Arena::num_events() {
  const Guard guard(lock_);
  return static_cast<int64_t>(events_.size());
}

int64_t Arena::read_events(megamem_event* out, int64_t max) {
  const Guard guard(lock_);
  const auto n = std::min<int64_t>(std::max<int64_t>(max, 0), static_cast<int64_t>(events_.size()));
  std::copy_n(events_.begin(), n, out);
  return n;
}

void Arena::set_poison(bool on) {
  const Guard guard(lock_);
  if (on && !poison_ && region_ && device_.fill != nullptr) {
    int64_t free_from = 0;
    std::vector<Region::Block> live = region_->blocks();
    live.push_back({region_->capacity(), 0});
    for (const Region::Block& block : live) {
      const auto gap = static_cast<size_t>(block.offset - free_from);
      if (gap > 0) device_.fill(region_->base() + free_from, kPoison, gap, stream_);
      free_from = block.offset + block.size;
    }
  }
  poison_ = on;
}

void Arena::counters(int64_t* out) {
  const Guard guard(lock_);
  std::copy(counters_, counters_ + MEGAMEM_NUM_COUNTERS, out);
  out[MEGAMEM_LOSSES] += static_cast<int64_t>(matcher_.losses());
  out[MEGAMEM_LIVE_BYTES] = region_ ? region_->live_bytes() : 0;
  out[MEGAMEM_CAPACITY] = region_ ? region_->capacity() : 0;
  out[MEGAMEM_RETIRED] = static_cast<int64_t>(retired_.size());
}

std::vector<Region::Block> Arena::live_blocks() {
  const Guard guard(lock_);
  return region_ ? region_->blocks() : std::vector<Region::Block>();
}

void* Arena::base_of(const void* at) {
  const Guard guard(lock_);
  const Region* region = owner(at);
  return region == nullptr ? nullptr : region->base();
}

void Arena::after_fork(bool is_child) {
  if (is_child) {
    current_ = -1;
    plan_ = nullptr;
    watching_ = false;
    update_active();
  }
  lock_.unlock();
}

void* Arena::base() {
  const Guard guard(lock_);
  return region_ ? region_->base() : nullptr;
}

}  // namespace megamem
