// Tests the arena's core from C++, so that sanitizers see it. Built and run by test_arena_core.py and ci/bench/arena.py.
//
//   arena_driver fuzz SEED COUNT       random traces, mutated between plan and replay; malformed plans among them
//   arena_driver threads SEED COUNT    four threads ask one arena at once
//   arena_driver bench LIVE PAIRS      nanoseconds per malloc/free pair, with LIVE blocks live at a time
//
// Each mode prints one line of JSON. A fault is said on stderr, with the seed of the trace, and ends it with status 1.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "megamem.h"

namespace {

using Random = std::mt19937_64;

uint64_t seed_now = 0;

void require(bool holds, const char* law) {
  if (holds) return;
  std::fprintf(stderr, "seed %llu: violated: %s\n", static_cast<unsigned long long>(seed_now), law);
  std::exit(1);
}

int64_t below(Random& random, int64_t end) { return static_cast<int64_t>(random() % static_cast<uint64_t>(end)); }
bool chance(Random& random, int64_t in) { return below(random, in) == 0; }
int64_t aligned(int64_t size) { return (size + 511) / 512 * 512; }

// -- a device of host memory, whose streams end when the test says so ------------------------------------------------

std::atomic<int64_t> reserved{0};
std::set<void*> running;  // marks of work that has not ended

void* reserve(size_t nbytes) {
  if (nbytes > (size_t{64} << 20)) return nullptr;
  void* at = nullptr;
  if (posix_memalign(&at, 4096, nbytes) != 0) return nullptr;
  reserved += static_cast<int64_t>(nbytes);
  return at;
}

void release(void* at, size_t nbytes) {
  reserved -= static_cast<int64_t>(nbytes);
  std::free(at);
}

void fill(void* at, int value, size_t nbytes, uint64_t) { std::memset(at, value, nbytes); }

int32_t is_filled(const void* at, int value, size_t nbytes) {
  const auto* bytes = static_cast<const unsigned char*>(at);
  return std::all_of(bytes, bytes + nbytes, [=](unsigned char byte) { return byte == value; });
}

uintptr_t last_mark = 0;

void* mark(uint64_t) {
  void* made = reinterpret_cast<void*>(++last_mark);
  running.insert(made);
  return made;
}

int32_t is_done(void* mark) { return running.count(mark) == 0; }

const megamem_device kDevice{reserve, release, fill, is_filled, mark, is_done};

// -- the arena under test, and what is known of it without it ---------------------------------------------------------

struct Block {
  int64_t size;
  unsigned char stamp;
  bool is_used_elsewhere = false;
};

// Blocks by address. Whatever the arena hands out must not touch one of them.
class Shadow {
 public:
  void add(char* at, int64_t size, unsigned char stamp) {
    check_apart(live_, at, size);
    for (auto it = waiting_.begin(); it != waiting_.end();) {
      const bool touches = it->first < at + size && at < it->first + it->second.size;
      if (touches) require(is_done(it->second.mark) != 0, "no block is reused while a second stream uses it");
      it = touches ? waiting_.erase(it) : std::next(it);
    }
    live_[at] = {size, stamp};
    std::memset(at, stamp, static_cast<size_t>(size));
  }

  // Before it is freed.
  void remove(char* at) {
    const Block block = live_.at(at);
    for (int64_t i = 0; i < block.size; ++i) {
      require(static_cast<unsigned char>(at[i]) == block.stamp, "a block keeps what was written to it");
    }
    live_.erase(at);
    if (block.is_used_elsewhere) waiting_[at] = {block.size, reinterpret_cast<void*>(last_mark + 1)};
  }

  void use(char* at) { live_.at(at).is_used_elsewhere = true; }
  bool empty() const { return live_.empty(); }
  size_t size() const { return live_.size(); }
  char* pick(Random& random) const {
    return std::next(live_.begin(), below(random, static_cast<int64_t>(live_.size())))->first;
  }

 private:
  static void check_apart(const std::map<char*, Block>& blocks, char* at, int64_t size) {
    const auto above = blocks.lower_bound(at);
    require(above == blocks.end() || above->first >= at + size, "two blocks share no byte");
    if (above == blocks.begin()) return;
    const auto below = std::prev(above);
    require(below->first + below->second.size <= at, "two blocks share no byte");
  }

  std::map<char*, Block> live_;
  struct Waiting {
    int64_t size;
    void* mark;
  };
  std::map<char*, Waiting> waiting_;
};

// -- random plans -------------------------------------------------------------------------------------------------------

struct Request {
  int64_t size, offset, life;  // life: requests until it is freed
};

// First fit in the order of birth: a valid plan. Then, now and then, one that is not.
std::vector<Request> random_trace(Random& random) {
  std::vector<Request> trace(static_cast<size_t>(1 + below(random, 60)));
  std::vector<int64_t> palette(static_cast<size_t>(1 + below(random, 6)));
  for (int64_t& size : palette) size = 1 + below(random, chance(random, 3) ? 6000 : 1500);
  for (size_t i = 0; i < trace.size(); ++i) {
    Request& request = trace[i];
    request.size = palette[static_cast<size_t>(below(random, static_cast<int64_t>(palette.size())))];
    request.life = 1 + below(random, chance(random, 4) ? 60 : 8);
    std::vector<std::pair<int64_t, int64_t>> taken;
    for (size_t j = 0; j < i; ++j) {
      if (trace[j].offset >= 0 && static_cast<int64_t>(j) + trace[j].life > static_cast<int64_t>(i)) {
        taken.emplace_back(trace[j].offset, trace[j].offset + aligned(trace[j].size));
      }
    }
    std::sort(taken.begin(), taken.end());
    int64_t at = 0;
    for (const auto& [begin, end] : taken) {
      if (begin - at >= aligned(request.size)) break;
      at = std::max(at, end);
    }
    request.offset = at;
    if (chance(random, 12)) request.offset = chance(random, 2) ? MEGAMEM_NATIVE : MEGAMEM_OPTIONAL;
  }
  if (chance(random, 4)) {  // overlapping places: the arena must find out by itself
    for (Request& request : trace) {
      if (request.offset >= 0) request.offset = 512 * below(random, 12);
    }
  }
  return trace;
}

int32_t load(megamem_arena* arena, int32_t plan, const std::vector<Request>& trace, Random& random) {
  std::vector<int64_t> size, offset;
  for (const Request& request : trace) {
    size.push_back(request.offset < 0 && chance(random, 2) ? 0 : request.size);
    offset.push_back(request.offset);
  }
  return megamem_arena_load(arena, plan, static_cast<int32_t>(trace.size()), size.data(), offset.data(),
                            chance(random, 8) ? 300 : 0);
}

void load_nonsense(megamem_arena* arena, Random& random) {
  const int64_t odd[] = {INT64_MIN, INT64_MAX, -1, -2, -3, 0, 1, 511, 512, int64_t{1} << 61, int64_t{1} << 62, 1 << 20};
  std::vector<int64_t> size(static_cast<size_t>(1 + below(random, 5))), offset(size.size());
  for (int64_t& cell : size) cell = odd[below(random, 12)];
  for (int64_t& cell : offset) cell = odd[below(random, 12)];
  const auto plan = static_cast<int32_t>(below(random, 3) - 1);
  const int32_t status = megamem_arena_load(arena, plan, static_cast<int32_t>(size.size()), size.data(), offset.data(),
                                            chance(random, 4) ? -1 : 0);
  if (plan < 0) require(status == MEGAMEM_BAD_PLAN, "a plan has a number of 0 or more");
  megamem_arena_begin(arena, static_cast<int32_t>(below(random, 5) - 1), 1);
}

// -- modes --------------------------------------------------------------------------------------------------------------

struct Tally {
  int64_t served = 0, native = 0;
};

class Replay {
 public:
  Replay(megamem_arena* arena, Random& random) : arena_(arena), random_(random) {}

  // One step; with `mutations`, requests are left out, put in, changed and freed at other times.
  void step(const std::vector<Request>& trace, bool mutated) {
    for (size_t i = 0; i < trace.size(); ++i) {
      free_due();
      ++clock_;
      int64_t size = trace[i].size;
      if (mutated && chance(random_, 10)) {
        if (chance(random_, 3)) continue;
        if (chance(random_, 2)) request(1 + below(random_, 4000), 1 + below(random_, 6), 1);
        if (chance(random_, 2)) size += below(random_, 700);
      }
      int64_t life = trace[i].life;
      if (mutated && chance(random_, 6)) life = 1 + below(random_, 80);
      request(size, life, chance(random_, 40) ? 2 : 1);
      if (mutated && chance(random_, 30)) disturb();
    }
  }

  void free_all() {
    due_.clear();
    while (!shadow_.empty()) free_block(shadow_.pick(random_));
  }

  Tally tally;

 private:
  void request(int64_t size, int64_t life, uint64_t stream) {
    auto* at = static_cast<char*>(megamem_arena_malloc(arena_, static_cast<size_t>(size), stream));
    if (at == nullptr) {
      ++tally.native;
      return;
    }
    ++tally.served;
    require(stream == 1, "only the planned stream is served");
    shadow_.add(at, size, static_cast<unsigned char>(1 + below(random_, 254)));
    due_.emplace(clock_ + life, at);
    if (chance(random_, 25)) {
      require(megamem_arena_record_use(arena_, at, 2) != 0, "a live block can be used by a second stream");
      shadow_.use(at);
    }
  }

  void free_due() {
    while (!due_.empty() && due_.begin()->first <= clock_) {
      char* at = due_.begin()->second;
      due_.erase(due_.begin());
      free_block(at);
    }
  }

  void free_block(char* at) {
    shadow_.remove(at);
    require(megamem_arena_free(arena_, at) != 0, "the arena knows its blocks");
  }

  void disturb() {
    int outside = 0;
    int64_t counters[MEGAMEM_NUM_COUNTERS], offset[8], size[8];
    megamem_event events[16];
    switch (below(random_, 8)) {
      case 0: running.clear(); break;
      case 1: require(megamem_arena_free(arena_, &outside) == 0, "an address elsewhere is not the arena's"); break;
      case 2: megamem_arena_watch(arena_, chance(random_, 2), below(random_, 100)); break;
      case 3: megamem_arena_read_events(arena_, events, 16); break;
      case 4: megamem_arena_counters(arena_, counters); break;
      case 5: megamem_arena_blocks(arena_, offset, size, 8); break;
      case 6: megamem_arena_note_malloc(arena_, &outside, 4, 1); break;
      case 7: megamem_arena_shrink(arena_); break;
    }
  }

  megamem_arena* arena_;
  Random& random_;
  Shadow shadow_;
  std::multimap<int64_t, char*> due_;
  int64_t clock_ = 0;
};

void fuzz_one(uint64_t seed, Tally& total) {
  seed_now = seed;
  Random random(seed);
  running.clear();
  const int64_t reserved_before = reserved;
  megamem_arena* arena = megamem_arena_create(&kDevice);
  require(arena != nullptr, "an arena can be made");
  if (chance(random, 2)) megamem_arena_poison(arena, 1);
  {
    Replay replay(arena, random);
    const std::vector<Request> traces[2] = {random_trace(random), random_trace(random)};
    const bool is_valid = load(arena, 0, traces[0], random) == MEGAMEM_OK && load(arena, 1, traces[1], random) == MEGAMEM_OK;
    require(is_valid, "a well-formed plan can be loaded");
    const int64_t steps = 1 + below(random, 3);
    for (int64_t step = 0; step < steps; ++step) {
      const auto plan = static_cast<int32_t>(below(random, 2));
      require(megamem_arena_begin(arena, plan, 1) == MEGAMEM_OK, "a plan that is loaded can be served");
      replay.step(traces[chance(random, 5) ? 1 - plan : plan], !chance(random, 4));
      if (chance(random, 6)) megamem_arena_end(arena);
      if (chance(random, 10)) load(arena, plan, traces[plan], random);
      if (chance(random, 12)) load_nonsense(arena, random);
      if (chance(random, 15)) megamem_arena_reset(arena);
      if (chance(random, 3)) running.clear();
      load(arena, 0, traces[0], random);
      load(arena, 1, traces[1], random);
    }
    replay.free_all();
    total.served += replay.tally.served;
    total.native += replay.tally.native;
  }
  running.clear();
  megamem_arena_begin(arena, -1, 1);  // what waited for a second stream is free now
  int64_t counters[MEGAMEM_NUM_COUNTERS];
  megamem_arena_counters(arena, counters);
  require(counters[MEGAMEM_LIVE_BYTES] == 0 && counters[MEGAMEM_RETIRED] == 0, "no block is left over");
  require(counters[MEGAMEM_STAINED] == 0 && counters[MEGAMEM_UNKNOWN] == 0, "what is free keeps its poison");
  if (chance(random, 2)) {
    megamem_arena_reset(arena);
    require(reserved == reserved_before, "a reset arena holds no memory");
  }
  megamem_arena_destroy(arena);
  require(reserved == reserved_before, "a destroyed arena holds no memory");
}

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

void fuzz(uint64_t seed, int64_t count) {
  const auto begin = std::chrono::steady_clock::now();
  Tally total;
  for (int64_t i = 0; i < count; ++i) fuzz_one(seed + static_cast<uint64_t>(i), total);
  std::printf("{\"traces\": %lld, \"first_seed\": %llu, \"served\": %lld, \"native\": %lld, \"seconds\": %.3f}\n",
              static_cast<long long>(count), static_cast<unsigned long long>(seed), static_cast<long long>(total.served),
              static_cast<long long>(total.native), seconds_since(begin));
}

// Each thread stamps its blocks and looks whether the stamps stay.
void threads(uint64_t seed, int64_t count) {
  Random random(seed);
  megamem_arena* arena = megamem_arena_create(&kDevice);
  const std::vector<Request> trace = random_trace(random);
  load(arena, 0, trace, random);
  std::atomic<int64_t> served{0};
  const auto work = [&](uint64_t own) {
    Random mine(seed + own);
    for (int64_t round = 0; round < count; ++round) {
      if (own == 1) megamem_arena_begin(arena, 0, 1);
      std::vector<std::pair<char*, int64_t>> held;
      for (const Request& request : trace) {
        auto* at = static_cast<char*>(megamem_arena_malloc(arena, static_cast<size_t>(request.size), 1));
        if (at != nullptr) {
          std::memset(at, static_cast<int>(own), static_cast<size_t>(request.size));
          held.emplace_back(at, request.size);
          ++served;
        }
        if (!held.empty() && chance(mine, 2)) {
          const auto [block, size] = held.back();
          held.pop_back();
          require(std::all_of(block, block + size, [&](char byte) { return byte == static_cast<char>(own); }),
                  "a block belongs to one thread");
          megamem_arena_free(arena, block);
        }
      }
      for (const auto& [block, size] : held) megamem_arena_free(arena, block);
    }
  };
  std::vector<std::thread> workers;
  for (uint64_t own = 1; own <= 4; ++own) workers.emplace_back(work, own);
  for (std::thread& worker : workers) worker.join();
  int64_t counters[MEGAMEM_NUM_COUNTERS];
  megamem_arena_counters(arena, counters);
  require(counters[MEGAMEM_LIVE_BYTES] == 0, "no block is left over");
  megamem_arena_destroy(arena);
  std::printf("{\"served\": %lld}\n", static_cast<long long>(served));
}

// A step of 20,000 requests whose blocks are freed `live` requests later, as activations are, and of short-lived ones.
void bench(int64_t live, int64_t pairs) {
  constexpr int64_t kRequests = 20000;
  std::vector<int64_t> size, offset;
  for (int64_t i = 0; i < kRequests; ++i) {
    size.push_back(1 << 20);
    offset.push_back((i % (live + 1)) * int64_t{512});  // one cell a block, and the arena small
    size.back() = 512;
  }
  megamem_arena* arena = megamem_arena_create(&kDevice);
  megamem_arena_load(arena, 0, kRequests, size.data(), offset.data(), 0);
  std::vector<void*> held(static_cast<size_t>(live), nullptr);
  int64_t done = 0;
  const auto begin = std::chrono::steady_clock::now();
  while (done < pairs) {
    megamem_arena_begin(arena, 0, 1);
    for (int64_t i = 0; i < kRequests; ++i) {
      void*& slot = held[static_cast<size_t>(i % live)];
      if (slot != nullptr) megamem_arena_free(arena, slot);
      slot = megamem_arena_malloc(arena, 512, 1);
    }
    for (void*& slot : held) {
      megamem_arena_free(arena, slot);
      slot = nullptr;
    }
    done += kRequests;
  }
  const double seconds = seconds_since(begin);
  int64_t counters[MEGAMEM_NUM_COUNTERS];
  megamem_arena_counters(arena, counters);
  require(counters[MEGAMEM_SERVED] == done, "all requests are served");
  megamem_arena_destroy(arena);
  std::printf("{\"live\": %lld, \"pairs\": %lld, \"ns_per_pair\": %.2f}\n", static_cast<long long>(live),
              static_cast<long long>(done), 1e9 * seconds / static_cast<double>(done));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc == 4 ? argv[1] : "";
  if (mode == "fuzz") {
    fuzz(std::strtoull(argv[2], nullptr, 10), std::atoll(argv[3]));
  } else if (mode == "threads") {
    threads(std::strtoull(argv[2], nullptr, 10), std::atoll(argv[3]));
  } else if (mode == "bench") {
    bench(std::atoll(argv[2]), std::atoll(argv[3]));
  } else {
    std::fprintf(stderr, "usage: arena_driver fuzz SEED COUNT | threads SEED COUNT | bench LIVE PAIRS\n");
    return 2;
  }
  return 0;
}
