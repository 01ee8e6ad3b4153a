// One stack for each CUDA thread, and switching between them: makecontext begins a fiber, _setjmp and _longjmp switch
// from then on, which takes no system call. Fibers and their stacks are kept for the next launch.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstddef>
#include <functional>
#include <new>

#if defined(__USE_FORTIFY_LEVEL) && __USE_FORTIFY_LEVEL > 0
#error "compile with -U_FORTIFY_SOURCE: the fortified longjmp refuses to jump from one stack to another"
#endif

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATION_ASAN
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define EMULATION_ASAN
#endif

#ifdef EMULATION_ASAN  // it has to know which stack is in use, and what of the memory is nobody's
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

#ifdef EMULATION_ASAN
constexpr size_t kStackBytes = 512 << 10;
inline void forbid(const void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
inline void allow(const void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }
#else
constexpr size_t kStackBytes = 128 << 10;
inline void forbid(const void*, size_t) {}
inline void allow(const void*, size_t) {}
#endif

class Fiber {
 public:
  Fiber() {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    void* p = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    stack_ = static_cast<std::byte*>(p);
    mprotect(stack_, page, PROT_NONE);  // an overflow faults instead of running into the next stack
  }
  Fiber(const Fiber&) = delete;
  ~Fiber() { munmap(stack_, kStackBytes); }

  // The next resume() begins the task. What the fiber was left in the middle of, after an error, is forgotten.
  void assign(const std::function<void()>& task) {
    if (!finished_) {
      begun_ = false;
      allow(stack_, kStackBytes);
    }
    task_ = &task;
    finished_ = false;
  }

  bool finished() const { return finished_; }

  // Called by the scheduler: runs the task until it suspends or ends.
  void resume() {
    running_ = this;
    if (!_setjmp(scheduler_)) {
      leave_stack(&scheduler_fake_stack_, stack_, kStackBytes);
      if (begun_) _longjmp(here_, 1);
      begun_ = true;
      getcontext(&context_);
      context_.uc_stack.ss_sp = stack_;
      context_.uc_stack.ss_size = kStackBytes;
      context_.uc_link = nullptr;
      makecontext(&context_, run_tasks, 0);
      setcontext(&context_);
    }
    enter_stack(scheduler_fake_stack_, nullptr, nullptr);
  }

  // Called by the running task: back to the scheduler, until the next resume().
  static void suspend() {
    Fiber* self = running_;
    if (!_setjmp(self->here_)) {
      leave_stack(&self->fake_stack_, scheduler_stack_, scheduler_stack_bytes_);
      _longjmp(scheduler_, 1);
    }
    enter_stack(self->fake_stack_, &scheduler_stack_, &scheduler_stack_bytes_);
  }

 private:
  static void run_tasks() {
    enter_stack(nullptr, &scheduler_stack_, &scheduler_stack_bytes_);
    Fiber* self = running_;
    for (;;) {
      (*self->task_)();
      self->finished_ = true;
      suspend();
    }
  }

#ifdef EMULATION_ASAN
  static void leave_stack(void** fake, const void* next, size_t bytes) {
    __sanitizer_start_switch_fiber(fake, next, bytes);
  }
  static void enter_stack(void* fake, const void** last, size_t* bytes) {
    __sanitizer_finish_switch_fiber(fake, last, bytes);
  }
#else
  static void leave_stack(void**, const void*, size_t) {}
  static void enter_stack(void*, const void**, size_t*) {}
#endif

  std::byte* stack_;
  ucontext_t context_;
  jmp_buf here_;
  const std::function<void()>* task_ = nullptr;
  bool begun_ = false, finished_ = true;
  void* fake_stack_ = nullptr;

  // Of the launch that runs: there is one at a time.
  static inline Fiber* running_ = nullptr;
  static inline jmp_buf scheduler_;
  static inline void* scheduler_fake_stack_ = nullptr;
  static inline const void* scheduler_stack_ = nullptr;
  static inline size_t scheduler_stack_bytes_ = 0;
};

}  // namespace emulation
