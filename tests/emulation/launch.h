// emulation::launch: which blocks are there together, and who runs next.
#pragma once

#include <deque>

#include "scheduler.h"

namespace emulation {

inline void end_thread() {
  Thread& self = *running;
  if (!self.copies.empty()) misuse("a thread ends without waiting for its asynchronous copies");
  Warp& warp = *self.warp;
  warp.live &= ~(1u << self.lane);
  for (auto& [mask, met] : warp.by_mask) met.complete_if(mask & warp.live);
  Block& block = *self.block;
  if (--block.live) return;
  allow(block.shared, block.shared_bytes + kGuardBytes);
  const std::byte* guard = block.shared + block.shared_bytes;
  if (std::any_of(guard, guard + kGuardBytes, [](std::byte b) { return b != std::byte(kPoison); }))
    misuse("a write past the end of dynamic shared memory");
  if (block.mapped >= block.cluster->barrier.generation)
    misuse("a block ends while another of its cluster may still use its shared memory: no cluster barrier between");
  std::memset(block.shared, kPoison, block.shared_bytes);  // what is read from now on is wrong
  forbid(block.shared, block.shared_bytes + kGuardBytes);
}

inline std::string who_waits(const std::vector<Block*>& blocks) {
  std::map<std::string, int> at;
  int ended = 0;
  for (const Block* block : blocks)
    for (const Thread& t : block->threads) t.ended ? ++ended : ++at[std::string(t.what) + " (" + t.site.text() + ")"];
  std::string text = "deadlock: threads wait";
  for (const auto& [where, threads] : at) text += ", " + std::to_string(threads) + " at " + where;
  return text + "; " + std::to_string(ended) + " have ended";
}

// Runs lanes of a warp until all of them wait or have ended; false where none could run.
inline bool run_warp(Thread* lanes, unsigned count) {
  bool any = false;
  for (bool progress = true; progress;) {
    progress = false;
    const int order = current_schedule();
    const unsigned step = order > 1 ? 2 * launched->draw(16) + 1 : 1, start = order > 1 ? launched->draw(32) : 0;
    for (unsigned i = 0; i < 32; ++i) {
      const unsigned lane = order == 1 ? 31 - i : (i * step + start) % 32;  // an odd step comes to every lane
      if (lane >= count || !lanes[lane].runnable()) continue;
      progress = any = true;
      running = &lanes[lane];
      running->watched = nullptr;
      running->fiber->resume();
      running->ended = running->fiber->finished();
      running = nullptr;
      if (launched->error) return false;
    }
  }
  return any;
}

inline void arrange(std::vector<size_t>& order) {
  if (current_schedule() == 1) std::reverse(order.begin(), order.end());
  for (size_t i = order.size(); current_schedule() > 1 && i > 1; --i)
    std::swap(order[i - 1], order[launched->draw(unsigned(i))]);
}

inline std::vector<size_t> arranged(size_t count) {
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t(0));
  arrange(order);
  return order;
}

// Gives every warp a turn, in the order of the schedule; a shuffled one leaves some out. False where none could run.
inline bool run_block(Block& block) {
  bool progress = false;
  const size_t threads = block.threads.size();
  for (size_t warp : arranged(block.warps.size())) {
    if (current_schedule() > 1 && launched->draw(4) == 0) continue;
    progress |= run_warp(&block.threads[warp * 32], unsigned(std::min<size_t>(32, threads - warp * 32)));
    if (launched->error) return false;
  }
  return progress;
}

inline bool can_run(const std::vector<Block*>& blocks) {
  return std::any_of(blocks.begin(), blocks.end(), [](const Block* block) {
    return std::any_of(block->threads.begin(), block->threads.end(), [](const Thread& t) { return t.runnable(); });
  });
}

// Runs blocks that are on the device together, to their end.
inline void run_together(const std::vector<Block*>& blocks) {
  while (can_run(blocks)) {
    for (size_t i : arranged(blocks.size())) {
      // to a standstill, far ahead of the other blocks; a shuffled schedule also takes turns
      while (run_block(*blocks[i]) && (current_schedule() <= 1 || launched->draw(4))) {}
      if (launched->error) std::rethrow_exception(launched->error);
    }
  }
  for (const Block* block : blocks)
    if (block->live) throw Misuse(who_waits(blocks));
}

inline void prepare(Block& block, uint3 index, Cluster& cluster, Fiber** fibers, const std::function<void()>& task) {
  const Launch& launch = *launched;
  const size_t threads = launch.block.count(), shared_bytes = kStaticBytes + launch.dynamic_bytes;
  if (!block.shared) {
    block.shared_bytes = shared_bytes;
    const size_t whole = (shared_bytes + 2 * kGuardBytes - 1) / kGuardBytes * kGuardBytes;
    block.shared = static_cast<std::byte*>(std::aligned_alloc(kGuardBytes, whole));
    if (!block.shared) throw std::bad_alloc();
  }
  allow(block.shared, shared_bytes + kGuardBytes);
  std::memset(block.shared, kPoison, shared_bytes + kGuardBytes);
  forbid(block.shared, kStaticBytes);  // static_shared gives it out
  forbid(block.shared + shared_bytes, kGuardBytes);
  block.index = index;
  block.rank = unsigned(cluster.blocks.size());
  block.cluster = &cluster;
  cluster.blocks.push_back(&block);
  block.barrier = {};
  block.live = threads;
  block.mapped = -1;
  block.warps.assign((threads + 31) / 32, Warp{});
  block.threads.resize(threads);
  for (unsigned t = 0; t < threads; ++t) {
    Thread& thread = block.threads[t];
    thread = Thread{};
    thread.fiber = fibers[t];
    thread.block = &block;
    thread.warp = &block.warps[t / 32];
    thread.lane = int(t % 32);
    thread.warp->live |= 1u << thread.lane;
    thread.index = {t % launch.block.x, t / launch.block.x % launch.block.y, t / (launch.block.x * launch.block.y)};
    thread.fiber->assign(task);
  }
}

inline void check_launch(const Launch& launch) {
  const auto refuse = [](const std::string& text) { throw Misuse("launch: " + text); };
  const Device& on = device();
  const size_t threads = launch.block.count();
  if (!launch.grid.count() || !threads) refuse("an empty grid or block");
  if (threads > 1024 || launch.block.z > 64) refuse("more than 1024 threads in a block, or more than 64 along z");
  if (launch.grid.x > 0x7fffffffu || launch.grid.y > 65535 || launch.grid.z > 65535) refuse("the grid is too large");
  if (launch.dynamic_bytes > on.shared_per_block)
    refuse(std::to_string(launch.dynamic_bytes) + " bytes of shared memory, a block may have " +
           std::to_string(on.shared_per_block));
  if (launch.cluster < 1 || launch.cluster > on.cluster_blocks)
    refuse("a cluster of " + std::to_string(launch.cluster) + " blocks, the device takes 1 to " +
           std::to_string(on.cluster_blocks));
  if (launch.cluster > 1 && on.compute_capability < 90) refuse("clusters need compute capability 9.0");
  if (launch.grid.x % launch.cluster) refuse("the grid is not a multiple of the cluster");
  if (!launch.cooperative) return;
  const size_t held = size_t(blocks_per_multiprocessor(unsigned(threads), launch.dynamic_bytes)) * on.multiprocessors;
  if (launch.grid.count() > held)
    refuse("a cooperative grid of " + std::to_string(launch.grid.count()) + " blocks, the device holds " +
           std::to_string(held) + " at a time");
}

inline Fiber** fibers_for(size_t threads) {
  static std::vector<std::unique_ptr<Fiber>> owned;
  static std::vector<Fiber*> all;
  for (; all.size() < threads; all.push_back(owned.back().get())) owned.push_back(std::make_unique<Fiber>());
  return all.data();
}

inline void run_grid(const std::function<void()>& task) {
  Launch& launch = *launched;
  const size_t blocks = launch.grid.count(), threads = launch.block.count();
  // Clusters that are there together: all of a cooperative launch; else one, or two in a shuffled schedule.
  const size_t clusters = blocks / launch.cluster;
  const size_t together = std::min<size_t>(clusters, launch.cooperative ? clusters : current_schedule() > 1 ? 2 : 1);
  std::deque<Block> there(together * launch.cluster);
  Fiber** fibers = fibers_for(there.size() * threads);
  const std::vector<size_t> order = arranged(clusters);
  for (size_t first = 0; first < clusters; first += together) {
    const size_t count = std::min(together, clusters - first);
    std::vector<Cluster> in(count);
    std::vector<Block*> now;
    for (size_t i = 0; i < count * launch.cluster; ++i) {
      const size_t id = order[first + i / launch.cluster] * launch.cluster + i % launch.cluster;
      const size_t row = id / launch.grid.x;
      const uint3 index{unsigned(id % launch.grid.x), unsigned(row % launch.grid.y), unsigned(row / launch.grid.y)};
      prepare(there[i], index, in[i / launch.cluster], fibers + i * threads, task);
      now.push_back(&there[i]);
    }
    run_together(now);
  }
}

// Runs the kernel to its end. Throws what went wrong; the launches of other threads wait meanwhile.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, bool cooperative,
            A... arguments) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  Launch launch;
  launch.grid = grid, launch.block = block;
  launch.dynamic_bytes = shared_bytes, launch.cluster = cluster, launch.cooperative = cooperative;
  launch.random = uint32_t(current_schedule());
  check_launch(launch);
  const std::function<void()> task = [&] {
    try {
      kernel(arguments...);
      end_thread();
    } catch (...) {
      if (!launch.error) launch.error = std::current_exception();
    }
  };
  launched = &launch;
  struct Reset {
    ~Reset() { launched = nullptr, running = nullptr; }
  } reset;
  run_grid(task);
}

}  // namespace emulation
