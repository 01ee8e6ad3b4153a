// Memory for large outputs that outlives them: a freed block is kept and handed out again, still mapped.
//
// The first touch of a fresh page costs more than the kernel that writes it, and glibc hands large freed blocks back to the
// system: a training step on 16 MiB pays 8,000 page faults for it. Tensors take
// their memory from here through DLPack, whose deleter returns it when the last owner of the storage is gone.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace drsn {

class Arena {
 public:
  // Null where the system has no memory.
  void* acquire(size_t bytes) {
    const size_t size = round(bytes);
    if (void* p = take(size)) return p;
    void* p = map(size);
    if (!p) {  // what is kept may be what is missing
      trim(0);
      p = map(size);
    }
    return p;
  }

  void release(void* p, size_t bytes) {
    const size_t size = round(bytes);
    // Never wait: in a child forked while another thread held the lock, it stays locked for ever.
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock() || size > limit_ || free_.size() == free_.capacity()) {  // growing might throw
      munmap(p, size);
      return;
    }
    free_.push_back({p, size});
    cached_ += size;
    shrink(limit_);
  }

  void set_limit(size_t bytes) {
    limit_ = bytes;
    trim(bytes);
  }
  void trim(size_t bytes) {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (lock.owns_lock()) shrink(bytes);
  }
  size_t cached() const { return cached_; }
  Arena() { free_.reserve(kMostBlocks); }

 private:
  struct Block {
    void* p;
    size_t size;
  };
  static constexpr size_t kHuge = 2 << 20;    // alignment, so that huge pages fit
  static constexpr size_t kGranule = 64 << 10;  // whole huge pages would double the memory of a tensor of 2.1 MiB
  static constexpr size_t kMostBlocks = 1024;

  static size_t round(size_t bytes) { return (bytes + kGranule - 1) & ~(kGranule - 1); }

  void* take(size_t size) {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return nullptr;
    for (size_t i = free_.size(); i-- > 0;) {  // the latest freed first: it may still be in the cache
      if (free_[i].size != size) continue;
      void* p = free_[i].p;
      free_.erase(free_.begin() + std::ptrdiff_t(i));
      cached_ -= size;
      return p;
    }
    return nullptr;
  }

  void shrink(size_t bytes) {  // the oldest go first
    size_t drop = 0;
    for (; cached_ > bytes; ++drop) {
      munmap(free_[drop].p, free_[drop].size);
      cached_ -= free_[drop].size;
    }
    free_.erase(free_.begin(), free_.begin() + std::ptrdiff_t(drop));
  }

  static void* map(size_t size) {  // aligned, so that huge pages fit
    char* p = static_cast<char*>(mmap(nullptr, size + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (p == MAP_FAILED) return nullptr;
    char* const start = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + kHuge - 1) & ~(kHuge - 1));
    if (start > p) munmap(p, size_t(start - p));
    if (const size_t behind = size_t(p + kHuge - start)) munmap(start + size, behind);
#ifdef MADV_HUGEPAGE
    madvise(start, size, MADV_HUGEPAGE);  // a hint: failing is fine
#endif
    return start;
  }

  std::mutex mutex_;
  std::vector<Block> free_;
  std::atomic<size_t> cached_{0};
  std::atomic<size_t> limit_{0};
};

}  // namespace drsn
