// CUDA's blocks, warps, barriers and shared memory on one CPU thread, and the order in which they run.
//
// Whoever runs, runs until it must wait: lane, warp and block alike. Hardware may let a warp race ahead to the next
// barrier, and a fair order hides just that: it found none of the removed barriers that this one finds.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "fibers.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr size_t count() const { return size_t(x) * y * z; }
};

namespace emulation {

// Small, so that a launcher which fills the device launches a grid that is emulated in a moment.
struct Device {
  int compute_capability = 90;
  int multiprocessors = 4;
  size_t shared_per_block = 227 << 10;  // opt-in
  size_t shared_per_multiprocessor = 228 << 10;
  int threads_per_multiprocessor = 2048;
  unsigned cluster_blocks = 8;
};
inline Device& device() {
  static Device it;
  return it;
}

// Blocks of a kernel that one multiprocessor holds, as far as threads and shared memory decide.
inline int blocks_per_multiprocessor(unsigned threads, size_t shared_bytes) {
  constexpr size_t kReserved = 1 << 10;  // of each block, by the system
  const size_t by_shared = device().shared_per_multiprocessor / (shared_bytes + kReserved);
  return int(std::min<size_t>({32, unsigned(device().threads_per_multiprocessor) / threads, by_shared}));
}

// 0: in order, 1: in reverse, above: shuffled by this seed - lanes, warps, blocks, and when asynchronous copies land.
inline int& current_schedule() {
  static int it = 0;
  return it;
}
inline void schedule(int order) { current_schedule() = order; }

constexpr size_t kStaticBytes = 48 << 10;  // where a block's dynamic shared memory begins: the same in every block
constexpr size_t kGuardBytes = 128;        // behind it: a write past its end is seen when the block ends
constexpr int kPoison = 0xff;              // NaN in every floating point format, -1 as an integer

struct Site {  // a line of a kernel
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& other) const { return line == other.line && !std::strcmp(file, other.file); }
  bool operator<(const Site& other) const {
    const int order = std::strcmp(file, other.file);
    return order ? order < 0 : line < other.line;
  }
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};

// Threads wait while the generation is the one in which they came.
struct Barrier {
  long generation = 0;
  size_t arrived = 0;
  int votes = 0, result = 0;  // of the generation that fills, of the one that was last full
  Site site{};

  void arrive(size_t needed, int vote = 0) {
    votes += vote;
    if (++arrived < needed) return;
    result = votes, votes = 0, arrived = 0, ++generation;
  }
};

// Lanes that name the same mask in a shuffle, a vote or __syncwarp: each gives a value and sees all of them.
struct Exchange {
  long generation = 0;
  unsigned arrived = 0, lanes = 0;
  const char* what = nullptr;
  uint64_t given[32], seen[32];

  void complete_if(unsigned needed) {
    if (!arrived || arrived != needed) return;
    std::memcpy(seen, given, sizeof seen);
    lanes = arrived, arrived = 0, ++generation;
  }
};

struct Warp {
  unsigned live = 0;                      // lanes that have not ended
  std::map<unsigned, Exchange> by_mask;
};

struct Block;

struct Copy {  // an asynchronous one that has not landed yet
  void* to;
  const void* from;
  size_t bytes, zeros, group;
};

struct Thread {
  Fiber* fiber;
  Block* block;
  Warp* warp;
  uint3 index;
  int lane;
  bool ended;
  const long* watched;  // the generation it waits to see the end of; nullptr: it can run
  long generation;
  const char* what;  // and where, for reports
  Site site;
  bool cluster_arrived;  // barrier_arrive without barrier_wait so far
  long cluster_generation;
  std::vector<Copy> copies;
  size_t committed;  // groups of them
  std::map<Site, int> passed;  // barriers, while they are watched

  bool runnable() const { return !ended && (!watched || *watched != generation); }
};

struct Cluster {
  Barrier barrier;
  std::vector<Block*> blocks;  // by rank
};

struct Block {
  uint3 index;
  unsigned rank;
  Cluster* cluster;
  std::byte* shared = nullptr;
  size_t shared_bytes = 0;
  Barrier barrier;
  size_t live;
  long mapped;  // generation of the cluster's barrier in which another block last took an address here, -1: none
  std::vector<Warp> warps;
  std::vector<Thread> threads;

  Block() = default;
  Block(const Block&) = delete;
  ~Block() {
    allow(shared, shared_bytes + kGuardBytes);
    std::free(shared);
  }
};

struct Launch {
  dim3 grid, block;
  size_t dynamic_bytes = 0;
  unsigned cluster = 1;
  bool cooperative = false;
  Barrier grid_barrier;
  std::map<const void*, std::pair<size_t, size_t>> statics;  // offset and bytes by key: one layout for all blocks
  size_t static_bytes = 0;
  uint32_t random = 0;
  std::exception_ptr error;

  unsigned draw(unsigned below) {
    random = random * 1664525u + 1013904223u;
    return (random >> 8) % below;
  }
};

inline Launch* launched = nullptr;  // there is one launch at a time
inline Thread* running = nullptr;

struct Misuse : std::runtime_error {
  using runtime_error::runtime_error;
};

[[noreturn]] inline void misuse(const std::string& text) {
  if (!running) throw Misuse(text);
  const auto triple = [](uint3 i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
  };
  throw Misuse(text + " [block " + triple(running->block->index) + ", thread " + triple(running->index) + "]");
}

inline void wait(const long& generation, long seen, const char* what, Site site) {
  if (generation != seen) return;
  Thread* self = running;
  self->watched = &generation, self->generation = seen, self->what = what, self->site = site;
  Fiber::suspend();
}

// ---- barriers taken out of a kernel as it stands, to see that tests notice ------------------------------------------

struct Removal {
  bool watching = false;
  std::map<Site, int> seen;  // how often a thread came to a barrier in one launch, at most
  std::string file;          // which is taken out: the nth time that a thread comes to this line
  int line = 0, nth = 0;
};
inline Removal& removal() {
  static Removal it;
  return it;
}
inline bool is_removed(Site site) {
  Removal& out = removal();
  if (!out.watching) return false;
  const int nth = running->passed[site]++;
  int& most = out.seen[site];
  most = std::max(most, nth + 1);
  return site.line == out.line && nth == out.nth && out.file == site.file;
}

// ---- the barriers ---------------------------------------------------------------------------------------------------
// Every thread has to come to each of them, those that have ended included: kernels here return together or not at all.

inline int block_barrier(int vote, const char* what, Site site) {
  if (is_removed(site)) return vote;
  Barrier& barrier = running->block->barrier;
  if (barrier.arrived && !(barrier.site == site))
    misuse("divergent barrier: threads of a block are at " + barrier.site.text() + " and at " + site.text());
  barrier.site = site;
  const long generation = barrier.generation;
  barrier.arrive(launched->block.count(), vote);
  wait(barrier.generation, generation, what, site);
  return barrier.result;
}

inline void grid_barrier(Site site) {
  if (!launched->cooperative) misuse("grid.sync() in a launch that is not cooperative");
  if (is_removed(site)) return;
  Barrier& barrier = launched->grid_barrier;
  const long generation = barrier.generation;
  barrier.arrive(launched->grid.count() * launched->block.count());
  wait(barrier.generation, generation, "grid.sync()", site);
}

inline void cluster_arrive() {
  if (running->cluster_arrived) misuse("barrier_arrive() twice without barrier_wait() between");
  Barrier& barrier = running->block->cluster->barrier;
  running->cluster_arrived = true;
  running->cluster_generation = barrier.generation;
  barrier.arrive(launched->cluster * launched->block.count());
}

inline void cluster_wait(const char* what, Site site, bool removed = false) {
  if (!running->cluster_arrived) misuse("barrier_wait() without barrier_arrive()");
  running->cluster_arrived = false;
  if (!removed) wait(running->block->cluster->barrier.generation, running->cluster_generation, what, site);
}

inline const Exchange& exchange(unsigned mask, uint64_t value, const char* what, Site site) {
  Warp& warp = *running->warp;
  const unsigned self = 1u << running->lane;
  if (!(mask & self)) misuse(std::string(what) + ": the calling lane is not in the mask");
  Exchange& met = warp.by_mask[mask];
  if (met.arrived && std::strcmp(met.what, what))
    misuse(std::string("divergent warp: lanes of one mask are at ") + met.what + " and at " + what);
  met.what = what;
  met.given[running->lane] = value;
  met.arrived |= self;
  const long generation = met.generation;
  met.complete_if(mask & warp.live);
  wait(met.generation, generation, what, site);
  return met;
}

// ---- shared memory --------------------------------------------------------------------------------------------------

inline void* dynamic_shared() { return running->block->shared + kStaticBytes; }

template <class T> T* static_shared(const void* key, size_t count) {
  constexpr size_t kApart = 16;  // AddressSanitizer sees what is written past the end
  Launch& launch = *launched;
  auto [at, fresh] = launch.statics.try_emplace(key, launch.static_bytes, sizeof(T) * count);
  const auto [offset, bytes] = at->second;
  if (fresh) {
    static_assert(alignof(T) <= kApart);
    launch.static_bytes = (offset + bytes + kApart) / kApart * kApart;
    if (launch.static_bytes > kStaticBytes) misuse("more than 48 KiB of static shared memory");
    if (offset + bytes + launch.dynamic_bytes > device().shared_per_block)
      misuse("static and dynamic shared memory together are more than a block may have");
  }
  allow(running->block->shared + offset, bytes);
  return reinterpret_cast<T*>(running->block->shared + offset);
}

// The same address in another block of the cluster. That block must not end before the next barrier of the cluster
// that the caller comes to: this is checked here, and when it ends.
inline void* in_block(const void* p, unsigned rank) {
  Block& self = *running->block;
  const ptrdiff_t offset = static_cast<const std::byte*>(p) - self.shared;
  if (offset < 0 || size_t(offset) >= self.shared_bytes) misuse("map_shared_rank: not an address of shared memory");
  if (rank >= self.cluster->blocks.size()) misuse("map_shared_rank: no block of rank " + std::to_string(rank));
  Block& other = *self.cluster->blocks[rank];
  if (&other == &self) return self.shared + offset;
  if (!other.live) misuse("map_shared_rank: the block of rank " + std::to_string(rank) + " has ended");
  const long now = self.cluster->barrier.generation;
  // after barrier_arrive it is the next barrier that comes too early
  other.mapped = std::max(other.mapped, running->cluster_arrived && running->cluster_generation == now ? now + 1 : now);
  for (const auto& [key, at] : launched->statics) allow(other.shared + at.first, at.second);  // it may be behind
  return other.shared + offset;
}

inline void check_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) misuse("misaligned access of " + std::to_string(bytes) + " bytes");
}

// ---- asynchronous copies --------------------------------------------------------------------------------------------
// A copy may land at any time between its start and the wait of the thread that started it. Late shows a missing wait,
// early shows that the memory was still in use.

inline void land(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes - copy.zeros);
  std::memset(static_cast<std::byte*>(copy.to) + copy.bytes - copy.zeros, 0, copy.zeros);
}

inline void copy_async(void* to, const void* from, size_t bytes, size_t zeros) {
  if (bytes != 4 && bytes != 8 && bytes != 16) misuse("an asynchronous copy moves 4, 8 or 16 bytes");
  if (zeros > bytes) misuse("an asynchronous copy fills no more zeros than it has bytes");
  check_aligned(to, bytes);
  check_aligned(from, bytes);
  const ptrdiff_t offset = static_cast<std::byte*>(to) - running->block->shared;
  if (offset < 0 || size_t(offset) + bytes > running->block->shared_bytes)
    misuse("an asynchronous copy writes to the block's own shared memory");
  const Copy copy{to, from, bytes, zeros, running->committed};
  const int order = current_schedule();
  if (order == 1 || (order > 1 && launched->draw(2))) land(copy);
  else running->copies.push_back(copy);
}

inline void commit_copies() { ++running->committed; }

// Until at most the newest groups are under way.
inline void wait_for_copies(size_t newest, Site site) {
  if (is_removed(site)) return;
  std::vector<Copy>& copies = running->copies;
  const auto pending = std::find_if(copies.begin(), copies.end(), [newest](const Copy& copy) {
    return copy.group + newest >= running->committed;
  });
  std::for_each(copies.begin(), pending, land);
  copies.erase(copies.begin(), pending);
}

}  // namespace emulation
