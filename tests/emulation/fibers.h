// One stack for each CUDA thread, and switching between them: makecontext begins a fiber, _setjmp and _longjmp switch
// from then on, which takes no system call. Fibers and their stacks are kept for the next launch.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <functional>
#include <new>

#if defined(__USE_FORTIFY_LEVEL) && __USE_FORTIFY_LEVEL > 0
#error "compile with -U_FORTIFY_SOURCE: the fortified longjmp refuses to jump from one stack to another"
#endif

namespace emulation {

class Fiber {
 public:
  Fiber() {
    stack_ = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(stack_, 4096, PROT_NONE);  // an overflow faults instead of running into the next stack
  }
  Fiber(const Fiber&) = delete;
  ~Fiber() { munmap(stack_, kStackBytes); }

  // The next resume() begins the task. What the fiber was left in the middle of, after an error, is forgotten.
  void assign(const std::function<void()>& task) { begun_ = begun_ && finished_, task_ = &task, finished_ = false; }
  bool finished() const { return finished_; }

  void resume() {  // called by the scheduler: runs the task until it suspends or ends
    running_ = this;
    if (_setjmp(scheduler_)) return;
    if (begun_) _longjmp(here_, 1);
    begun_ = true;
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_, context_.uc_stack.ss_size = kStackBytes, context_.uc_link = nullptr;
    makecontext(&context_, run_tasks, 0);
    setcontext(&context_);
  }

  static void suspend() {  // called by the running task: back to the scheduler, until the next resume()
    if (!_setjmp(running_->here_)) _longjmp(scheduler_, 1);
  }

 private:
  static void run_tasks() {
    for (Fiber* self = running_;;) {
      (*self->task_)();
      self->finished_ = true;
      suspend();
    }
  }

  static constexpr size_t kStackBytes = 128 << 10;
  void* stack_;
  ucontext_t context_;
  jmp_buf here_;
  const std::function<void()>* task_ = nullptr;
  bool begun_ = false, finished_ = true;
  static inline Fiber* running_ = nullptr;
  static inline jmp_buf scheduler_;
};

}  // namespace emulation
