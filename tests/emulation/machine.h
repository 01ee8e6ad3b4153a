// CUDA's threads, warps, blocks and clusters on one CPU thread: barriers, shuffles, shared memory, and who runs next.
//
// Whoever runs, runs until it must wait: lane, warp and block alike. Hardware may let a warp race ahead to the next
// barrier, and a fair order would hide just that. Schedule 0 goes in order, 1 in reverse, others are shuffled by seed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "fibers.h"

namespace emulation {

constexpr int kPoison = 0xff;            // NaN as a float, -1 as an integer
constexpr size_t kGuardBytes = 128;      // behind shared memory: a write past its end is seen when the block ends
constexpr size_t kMostShared = 227 << 10;

struct Site {  // a line of the kernel
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  std::string name(const char* what) const {
    const char* slash = std::strrchr(file, '/');
    return std::string(what) + " @" + (slash ? slash + 1 : file) + ":" + std::to_string(line);
  }
  bool operator==(const Site& other) const { return line == other.line && !std::strcmp(file, other.file); }
};

struct Misuse : std::runtime_error {
  using runtime_error::runtime_error;
};

struct Barrier {  // threads wait while the generation is the one in which they came
  long generation = 0;
  size_t arrived = 0;
  Site site{};
};

struct Exchange {  // of the lanes of a warp
  long generation = 0;
  int arrived = 0;
  float given[32], seen[32];
};

struct Block;
struct Copy;

struct Thread {
  Fiber* fiber;
  Block* block;
  unsigned index;
  bool ended;
  const long* watched;  // waits to see it change; nullptr: it can run
  long seen;
  std::string at;  // for reports
  std::vector<Copy*> stores;               // bulk stores that it has not waited for
  std::map<const void*, long> observed;    // phases of barriers in shared memory that it has seen completed
  std::vector<size_t> unfenced;            // chunks of shared memory that it has written since its last proxy fence
  std::vector<Site> passed;                // barriers

  bool first_time(Site site) {
    if (std::find(passed.begin(), passed.end(), site) != passed.end()) return false;
    passed.push_back(site);
    return true;
  }

  bool runnable() const { return !ended && (!watched || *watched != seen); }
};

struct Cluster {
  Barrier barrier;
  std::vector<Block*> blocks;  // by rank
};

struct Asynchronous;  // asynchronous.h

struct Block {
  unsigned index, rank;
  Cluster* cluster;
  unsigned char* shared;
  size_t live;
  Barrier barrier;
  long mapped;  // generation of the cluster's barrier in which another block last took an address here; -1: none
  std::vector<Exchange> warps;
  std::vector<Thread> threads;
  std::shared_ptr<Asynchronous> asynchronous;
};

struct Launch {
  unsigned grid, threads, cluster;
  size_t shared_bytes;
  int schedule;
  uint32_t random;
  std::exception_ptr error;

  unsigned draw(unsigned below) { return ((random = random * 1664525u + 1013904223u) >> 8) % below; }
};

inline Launch* launched = nullptr;
inline Thread* running = nullptr;

[[noreturn]] inline void misuse(const std::string& text) {
  if (!running) throw Misuse(text);
  const std::string block = std::to_string(running->block->index), thread = std::to_string(running->index);
  throw Misuse(text + " [block " + block + ", thread " + thread + "]");
}

// ---- mutations: one way of making a call at one line of the kernel wrong, to see that it is noticed ------------------

inline std::vector<std::pair<Site, const char*>> possible;  // that the launch came to: where, and what is done there
inline std::string mutation;                                // "what @file:line"

inline bool mutated(const char* what, Site site) {
  const std::pair here{site, what};
  if (std::find(possible.begin(), possible.end(), here) == possible.end()) possible.push_back(here);
  return !mutation.empty() && site.name(what) == mutation;
}

inline unsigned char* dynamic_shared() { return running->block->shared; }

// ---- barriers and shuffles ------------------------------------------------------------------------------------------

inline void wait(const long& generation, long seen, const std::string& at) {
  if (generation != seen) return;
  running->watched = &generation, running->seen = seen, running->at = at;
  Fiber::suspend();
}

// Every thread comes to each barrier, at the same line: kernels here return together.
inline void meet(Barrier& barrier, size_t needed, const char* what, Site site) {
  const std::string at = site.name(what);
  if (barrier.arrived && !(barrier.site == site))
    misuse("divergent barrier: threads are at " + barrier.site.name(what) + " and at " + at);
  barrier.site = site;
  const long generation = barrier.generation;
  if (++barrier.arrived == needed) barrier.arrived = 0, ++barrier.generation;
  wait(barrier.generation, generation, at);
}

inline float shuffle_xor(float value, int bits) {
  Exchange& met = running->block->warps[running->index / 32];
  const int lane = int(running->index % 32);
  met.given[lane] = value;
  const long generation = met.generation;
  if (++met.arrived == 32) std::copy_n(met.given, 32, met.seen), met.arrived = 0, ++met.generation;
  wait(met.generation, generation, "a shuffle");
  return met.seen[lane ^ bits];
}

// The same address in another block of the cluster, which must not end before the next barrier of the cluster.
inline void* in_block(void* p, unsigned rank) {
  Block &self = *running->block, &other = *self.cluster->blocks.at(rank);
  if (!other.live) misuse("map_shared_rank: the block has ended");
  const long now = self.cluster->barrier.generation;
  if (&other != &self && !now) misuse("map_shared_rank: no cluster barrier says that the block has begun");
  if (&other != &self) other.mapped = now;
  return other.shared + (static_cast<unsigned char*>(p) - self.shared);
}

// ---- running --------------------------------------------------------------------------------------------------------

void begin_asynchronous(Block& block);
void end_asynchronous(Block& block);
bool land_something(Block& block);  // of what is on its way; false: nothing is

inline void end_thread() {
  Block& block = *running->block;
  if (--block.live) return;
  end_asynchronous(block);
  const unsigned char* guard = block.shared + launched->shared_bytes;
  if (std::any_of(guard, guard + kGuardBytes, [](unsigned char b) { return b != kPoison; }))
    misuse("a write past the end of shared memory");
  if (block.mapped >= block.cluster->barrier.generation)
    misuse("a block ends while another may still use its shared memory");
  std::memset(block.shared, kPoison, launched->shared_bytes);  // what is read from now on is wrong
}

inline std::vector<size_t> arranged(size_t count) {
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t(0));
  if (launched->schedule == 1) std::reverse(order.begin(), order.end());
  for (size_t i = count; launched->schedule > 1 && i > 1; --i)
    std::swap(order[i - 1], order[launched->draw(unsigned(i))]);
  return order;
}

inline bool run_warp(Thread* lanes) {  // until all of them wait or have ended; false: none could run
  bool any = false;
  for (bool progress = true; progress && !launched->error;) {
    progress = false;
    const unsigned start = launched->schedule > 1 ? launched->draw(32) : 0;
    for (unsigned i = 0; i < 32 && !launched->error; ++i) {
      Thread& thread = lanes[launched->schedule == 1 ? 31 - i : (i + start) % 32];
      if (!thread.runnable()) continue;
      progress = any = true;
      running = &thread, thread.watched = nullptr;
      thread.fiber->resume();
      thread.ended = thread.fiber->finished(), running = nullptr;
    }
  }
  return any;
}

inline bool run_block(Block& block) {  // a turn for every warp; a shuffled schedule leaves some out
  bool progress = false;
  for (size_t warp : arranged(block.warps.size())) {
    if (launched->schedule > 1 && launched->draw(4) == 0) continue;
    progress |= run_warp(&block.threads[warp * 32]);
    if (launched->error) return false;
    while (launched->schedule > 1 && launched->draw(2) && land_something(block)) {}
  }
  return progress;
}

inline void run_together(const std::vector<Block*>& blocks) {  // to their end
  const auto any = [&](auto test) {
    for (const Block* block : blocks)
      if (std::any_of(block->threads.begin(), block->threads.end(), test)) return true;
    return false;
  };
  for (;;) {
    while (any([](const Thread& t) { return t.runnable(); }))
      for (size_t i : arranged(blocks.size())) {  // to a standstill, far ahead of the others; shuffled, in turns
        while (run_block(*blocks[i]) && (launched->schedule <= 1 || launched->draw(4))) {}
        if (launched->error) std::rethrow_exception(launched->error);
      }
    if (!any([](const Thread& t) { return !t.ended; })) return;
    if (!std::any_of(blocks.begin(), blocks.end(), [](Block* b) { return land_something(*b); })) break;
  }
  std::map<std::string, int> waiting;
  for (const Block* block : blocks)
    for (const Thread& t : block->threads) ++waiting[t.ended ? "the end" : t.at];
  std::string text = "deadlock: threads wait";
  for (const auto& [at, threads] : waiting) text += ", " + std::to_string(threads) + " at " + at;
  throw Misuse(text);
}

// Runs a kernel to its end, one cluster after another (shuffled: two at a time). Throws what went wrong.
template <class Kernel> void launch(Kernel kernel, Launch shape) {
  static std::vector<std::unique_ptr<Fiber>> fibers;
  Launch& it = shape;
  if (it.shared_bytes > kMostShared) throw Misuse("more than 227 KiB of shared memory");
  if (it.threads % 32 || it.threads > 512 || it.grid % it.cluster || it.cluster > 8 || !it.grid)
    throw Misuse("no launch has this shape");
  it.random = uint32_t(it.schedule), launched = &it, possible.clear();
  struct Reset {
    ~Reset() { launched = nullptr, running = nullptr; }
  } reset;
  const std::function<void()> task = [&] {
    try {
      kernel();
      end_thread();
    } catch (...) {
      if (!it.error) it.error = std::current_exception();
    }
  };
  const size_t clusters = it.grid / it.cluster, together = it.schedule > 1 ? 2 : 1;
  while (fibers.size() < together * it.cluster * it.threads) fibers.push_back(std::make_unique<Fiber>());
  const std::vector<size_t> order = arranged(clusters);
  for (size_t top = 0; top < clusters; top += together) {
    std::vector<Cluster> in(std::min(together, clusters - top));
    std::vector<Block> owned(in.size() * it.cluster);
    std::vector<std::vector<unsigned char>> memory(owned.size());
    std::vector<Block*> blocks;
    for (size_t i = 0; i < owned.size(); ++i) {
      Block& block = owned[i];
      Cluster& cluster = in[i / it.cluster];
      memory[i].assign(it.shared_bytes + 2 * kGuardBytes, kPoison);
      block.shared = memory[i].data() + (kGuardBytes - uintptr_t(memory[i].data()) % kGuardBytes) % kGuardBytes;
      block.rank = unsigned(i % it.cluster);
      block.index = unsigned(order[top + i / it.cluster] * it.cluster) + block.rank;
      block.cluster = &cluster, block.live = it.threads, block.mapped = -1;
      cluster.blocks.push_back(&block);
      block.warps.resize(it.threads / 32), block.threads.resize(it.threads);
      for (unsigned t = 0; t < it.threads; ++t) {
        block.threads[t] = Thread{fibers[i * it.threads + t].get(), &block, t, false, nullptr, 0, "", {}, {}, {}, {}};
        block.threads[t].fiber->assign(task);
      }
      begin_asynchronous(block);
      blocks.push_back(&block);
    }
    run_together(blocks);
  }
}

}  // namespace emulation
