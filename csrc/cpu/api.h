// What the binding calls and each instruction set implements.
#pragma once

#include "../common/args.h"

namespace drsn {

struct StandardForwardArgs {
  ReduceArgs reduce;  // out is gate.pooled
  ApplyArgs apply;    // tau (N, C), or (N, 1) with tau_c 0, is written first; absent where nobody wants it
  GateArgs gate;
  int64_t block;  // samples that are pooled, gated and shrunk together; 0, and with batch statistics: the whole batch
};

struct StandardBackwardArgs {
  GradArgs dtau, dx;  // dx.dx may be absent
  GateArgs gate;
  const void* tau_grad;  // (N, C) or (N, 1) like tau, or absent
  void *dw1, *db1, *dgamma, *dbeta, *dw2, *db2;  // each absent where nobody wants it
};

struct Kernels {
  const char* name;
  void (*reduce)(const ReduceArgs&);
  void (*apply)(const ApplyArgs&);
  void (*grad)(const GradArgs&);
  void (*standard_forward)(const StandardForwardArgs&);
  void (*standard_backward)(const StandardBackwardArgs&);
};

extern const Kernels kernels_portable;
#if defined(DRSN_X86)
extern const Kernels kernels_avx2, kernels_avx512;
#endif

// torch's own thread pool, through its stable C ABI (torch_parallel_for, libtorch_cpu 2.10 and later). Null: serial.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody, void* context);
extern ParallelFor parallel_for;

[[noreturn]] void out_of_memory();  // throws: Python's MemoryError

}  // namespace drsn
