// The standard gate of the whole batch in one cooperative launch each way, between reduce and apply, or grad and grad.
#include "gate.h"

#include "dispatch.h"
#include "launch.h"

namespace drsn {
namespace {

struct GridBarrier {
  __device__ void operator()() const { cooperative_groups::this_grid().sync(); }
};

template <class S>
__global__ void __launch_bounds__(kThreads, 2) gate_forward_kernel(const __grid_constant__ GateArgs a, S* tau, S* means) {
  DRSN_SHARED(S, scratch);
  gate_forward(a, tau, means, blockIdx.x, gridDim.x, scratch, GridBarrier());
}
template <class S>
__global__ void __launch_bounds__(kThreads, 2) gate_backward_kernel(const __grid_constant__ GateArgs a, const __grid_constant__ GateGrads to) {
  DRSN_SHARED(S, scratch);
  gate_backward(a, to, blockIdx.x, gridDim.x, scratch, GridBarrier());
}

}  // namespace

void gate_forward(DType dtype, const Walk& w, const GateArgs& a, void* tau, void* means, int blocks, cudaStream_t stream) {
  for_sums(dtype, [&](auto number) {
    using S = decltype(number);
    launch<gate_forward_kernel<S>>({"gate_forward", w, blocks, kThreads, kGateScratch * sizeof(S), 1, true}, stream, a,
                                   static_cast<S*>(tau), static_cast<S*>(means));
  });
}

void gate_backward(DType dtype, const Walk& w, const GateArgs& a, const GateGrads& to, int blocks, cudaStream_t stream) {
  for_sums(dtype, [&](auto number) {
    using S = decltype(number);
    launch<gate_backward_kernel<S>>({"gate_backward", w, blocks, kThreads, kGateScratch * sizeof(S), 1, true}, stream, a, to);
  });
}

}  // namespace drsn
