// The reserved bytes, and which of them are taken.

#include <algorithm>

#include "arena.h"

namespace megamem {

namespace {

uint64_t scattered(int64_t place) {
  return static_cast<uint64_t>(place / kAlignment) * 0x9E3779B97F4A7C15ull >> 20;
}

constexpr uint64_t bits_from(int32_t bit) { return ~uint64_t{0} << bit; }
constexpr uint64_t bits_below(int32_t bit) { return bit == 0 ? 0 : ~uint64_t{0} >> (64 - bit); }

}  // namespace

void Region::cut(std::vector<int64_t> places) {
  const std::vector<Block> live = blocks();
  places.push_back(0);
  places.push_back(capacity_);
  for (const Block& block : live) {
    places.push_back(block.offset);
    places.push_back(block.offset + block.size);
  }
  std::sort(places.begin(), places.end());
  places.erase(std::unique(places.begin(), places.end()), places.end());
  places_ = std::move(places);
  taken_.assign(places_.size() / 64 + 1, 0);
  until_.assign(places_.size(), 0);
  index();
  for (const Block& block : live) {
    const int32_t first = cell(block.offset), last = cell(block.offset + block.size);
    mark(first, last, true);
    until_[static_cast<size_t>(first)] = last;
  }
}

void Region::index() {
  uint64_t size = 16;
  while (size < 2 * places_.size()) size *= 2;
  mask_ = size - 1;
  slots_.assign(size, 0);
  for (size_t i = 0; i < places_.size(); ++i) {
    uint64_t slot = scattered(places_[i]) & mask_;
    while (slots_[slot] != 0) slot = (slot + 1) & mask_;
    slots_[slot] = static_cast<int32_t>(i) + 1;
  }
}

int32_t Region::cell(int64_t place) const {
  if (slots_.empty()) return -1;
  for (uint64_t slot = scattered(place) & mask_; slots_[slot] != 0; slot = (slot + 1) & mask_) {
    const int32_t found = slots_[slot] - 1;
    if (places_[static_cast<size_t>(found)] == place) return found;
  }
  return -1;
}

bool Region::take(int32_t first, int32_t last) {
  const auto begin = static_cast<size_t>(first / 64), end = static_cast<size_t>((last - 1) / 64);
  for (size_t word = begin; word <= end; ++word) {
    uint64_t bits = taken_[word];
    if (word == begin) bits &= bits_from(first % 64);
    if (word == end) bits &= bits_below((last - 1) % 64 + 1);
    if (bits != 0) return false;
  }
  mark(first, last, true);
  until_[static_cast<size_t>(first)] = last;
  live_bytes_ += width(first);
  ++num_live_;
  return true;
}

void Region::mark(int32_t first, int32_t last, bool taken) {
  const auto begin = static_cast<size_t>(first / 64), end = static_cast<size_t>((last - 1) / 64);
  for (size_t word = begin; word <= end; ++word) {
    uint64_t bits = ~uint64_t{0};
    if (word == begin) bits &= bits_from(first % 64);
    if (word == end) bits &= bits_below((last - 1) % 64 + 1);
    taken_[word] = taken ? taken_[word] | bits : taken_[word] & ~bits;
  }
}

int32_t Region::find(const void* at) const {
  const int32_t first = cell(static_cast<int64_t>(static_cast<const char*>(at) - base_));
  return first >= 0 && until_[static_cast<size_t>(first)] != 0 ? first : -1;
}

bool Region::give(const void* at, int64_t* size) {
  const int32_t first = find(at);
  if (first < 0) return false;
  *size = width(first);
  live_bytes_ -= *size;
  --num_live_;
  mark(first, until_[static_cast<size_t>(first)], false);
  until_[static_cast<size_t>(first)] = 0;
  return true;
}

int64_t Region::size_of(const void* at) const {
  const int32_t first = find(at);
  return first < 0 ? 0 : width(first);
}

std::vector<Region::Block> Region::blocks() const {
  std::vector<Block> found;
  for (size_t i = 0; i < until_.size(); ++i) {
    if (until_[i] != 0) found.push_back({places_[i], width(static_cast<int32_t>(i))});
  }
  return found;
}

}  // namespace megamem
