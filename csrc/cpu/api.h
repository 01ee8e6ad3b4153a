// What the binding calls and each instruction set implements.
#pragma once

#include "args.h"

namespace drsn {

struct GatedForwardArgs {
  ReduceArgs reduce;  // out is gate.pooled
  MapArgs map;        // t is tau, (N, C), or (N, 1) with t_c 0, and written first; absent where nobody wants it
  GateArgs gate;
  int64_t block = 0;  // samples that are pooled, gated and shrunk together; 0, and with batch statistics: the whole batch
};

struct GatedBackwardArgs {
  GradArgs dtau, dx;  // dx.dx may be absent
  GateArgs gate;
  const void* tau_grad = nullptr;  // (N, C) or (N, 1) like tau, or absent
  // each absent where nobody wants it
  void *dw1 = nullptr, *db1 = nullptr, *dgamma = nullptr, *dbeta = nullptr, *dw2 = nullptr, *db2 = nullptr;
};

struct Kernels {
  const char* name;
  void (*reduce)(const ReduceArgs&);
  void (*map)(const MapArgs&);
  void (*grad)(const GradArgs&);
  void (*gated_forward)(const GatedForwardArgs&);
  void (*gated_backward)(const GatedBackwardArgs&);
  void (*norm)(const NormArgs&);
  void (*norm_grad)(const NormGradArgs&);
};

extern const Kernels kernels_portable;
#if defined(DRSN_X86)
extern const Kernels kernels_avx2, kernels_avx512;
#endif

extern const Kernels* kernels;  // of the instruction set in use

// torch's own thread pool, through its stable C ABI (torch_parallel_for, libtorch_cpu 2.10 and later). Null: serial.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody, void* context);
extern ParallelFor parallel_for;

[[noreturn]] void out_of_memory();  // throws: Python's MemoryError

}  // namespace drsn
