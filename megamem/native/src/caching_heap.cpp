// Best fit over cached segments.

#include "caching_heap.h"

#include <algorithm>
#include <iterator>

namespace megamem {

namespace {

constexpr int64_t kUnit = 512;                     // sizes are rounded up to it
constexpr int64_t kSegment = int64_t{2} << 20;     // and segments to this
constexpr int64_t kLargeSegment = int64_t{20} << 20;  // what requests of 1 to 10 MiB share

int64_t rounded_to(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

int64_t segment_for(int64_t size) {
  if (size <= kSegment / 2) return kSegment;
  return size < kLargeSegment / 2 ? kLargeSegment : rounded_to(size, kSegment);
}

}  // namespace

CachingHeap::~CachingHeap() {
  for (auto at = blocks_.begin(); at != blocks_.end();) {
    auto end = std::next(at);
    int64_t size = at->second.size;
    for (; end != blocks_.end() && !end->second.begins; ++end) size += end->second.size;
    device_.release(at->first, static_cast<size_t>(size));
    at = end;
  }
}

void* CachingHeap::malloc(int64_t size, uint64_t stream) {
  const std::lock_guard<std::mutex> guard(lock_);
  poll();
  size = rounded_to(std::max<int64_t>(size, 1), kUnit);
  auto& free = pool(stream);
  auto found = free.lower_bound({size, nullptr});
  if (found == free.end()) {
    char* fresh = grow(size, stream);
    if (fresh == nullptr) return nullptr;
    found = free.find({blocks_.at(fresh).size, fresh});
  }
  char* at = found->second;
  free.erase(found);
  Block& block = blocks_.at(at);
  block.is_free = false;
  if (block.size > size) {
    blocks_[at + size] = {block.size - size, stream, true, false, {}};
    free.insert({block.size - size, at + size});
    block.size = size;
  }
  return at;
}

char* CachingHeap::grow(int64_t size, uint64_t stream) {
  for (const int64_t wanted : {segment_for(size), rounded_to(size, kSegment)}) {
    void* at = device_.reserve(static_cast<size_t>(wanted));
    if (at == nullptr) {
      release_free_segments();
      at = device_.reserve(static_cast<size_t>(wanted));
    }
    if (at == nullptr) continue;
    reserved_ += wanted;
    blocks_[static_cast<char*>(at)] = {wanted, stream, true, true, {}};
    pool(stream).insert({wanted, static_cast<char*>(at)});
    return static_cast<char*>(at);
  }
  return nullptr;
}

void CachingHeap::release_free_segments() {
  for (auto at = blocks_.begin(); at != blocks_.end();) {
    const auto next = std::next(at);
    const Block& block = at->second;
    if (block.is_free && block.begins && (next == blocks_.end() || next->second.begins)) {
      pool(block.stream).erase({block.size, at->first});
      device_.release(at->first, static_cast<size_t>(block.size));
      reserved_ -= block.size;
      blocks_.erase(at);
    }
    at = next;
  }
}

bool CachingHeap::free(void* at) {
  const std::lock_guard<std::mutex> guard(lock_);
  const auto found = blocks_.find(static_cast<char*>(at));
  if (found == blocks_.end() || found->second.is_free) return false;
  std::vector<uint64_t>& streams = found->second.used_by;
  if (streams.empty()) {
    settle(found);
    return true;
  }
  std::vector<void*> marks;
  for (const uint64_t stream : streams) marks.push_back(device_.mark != nullptr ? device_.mark(stream) : nullptr);
  streams.clear();
  deferred_.emplace_back(found->first, std::move(marks));
  return true;
}

bool CachingHeap::record_use(void* at, uint64_t stream) {
  const std::lock_guard<std::mutex> guard(lock_);
  const auto found = blocks_.find(static_cast<char*>(at));
  if (found == blocks_.end() || found->second.is_free) return false;
  std::vector<uint64_t>& streams = found->second.used_by;
  const bool is_known = std::find(streams.begin(), streams.end(), stream) != streams.end();
  if (stream != found->second.stream && !is_known) streams.push_back(stream);
  return true;
}

void CachingHeap::poll() {
  for (size_t i = 0; i < deferred_.size();) {
    std::vector<void*>& marks = deferred_[i].second;
    while (!marks.empty() && marks.back() != nullptr && device_.is_done(marks.back()) != 0) marks.pop_back();
    if (!marks.empty()) {
      ++i;
      continue;
    }
    settle(blocks_.find(deferred_[i].first));
    deferred_.erase(deferred_.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

// The block is free, and one with its free neighbours in the segment.
void CachingHeap::settle(Blocks::iterator at) {
  auto& free = pool(at->second.stream);
  const auto next = std::next(at);
  if (next != blocks_.end() && next->second.is_free && !next->second.begins) {
    free.erase({next->second.size, next->first});
    at->second.size += next->second.size;
    blocks_.erase(next);
  }
  if (!at->second.begins) {
    const auto before = std::prev(at);
    if (before->second.is_free) {
      free.erase({before->second.size, before->first});
      before->second.size += at->second.size;
      blocks_.erase(at);
      at = before;
    }
  }
  at->second.is_free = true;
  free.insert({at->second.size, at->first});
}

}  // namespace megamem
