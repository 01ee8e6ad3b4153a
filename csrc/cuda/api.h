// What the binding calls. Nothing here waits for the GPU; every call launches on `stream` of the current device.
#pragma once

#include <string>

#include "../common/args.h"
#include "platform.h"

namespace drsn {

// ---- tensors.cu: any size, any layout. `parts`: blocks that share a row (channels_last: a sample); more than one leave as
// many partial sums in `partial`.
void reduce(const ReduceArgs&, int parts, void* partial, cudaStream_t);
void apply(const ApplyArgs&, cudaStream_t);
void grad(const GradArgs&, int parts, void* partial, cudaStream_t);

std::string no_code_for_this_device();  // empty where the kernels were compiled for the current device

// ---- gate.cu: the standard gate over the whole batch, one cooperative launch each way

struct GateGrads {  // numbers of the gate's dtype; each of dw1 .. db2 absent where nobody wants it
  const void *dtau, *tau_grad;
  void *dz, *around, *du, *centre;  // (N, O), (N, C), (N, H), (C): workspace; `around` ends as dA
  void* partial;                    // shares times (H, C) and (O, H)
  int shares;                       // of the batch, in the weights' gradients
  bool summed;                      // dz, and dv behind relu's derivative in du, are there already; no dA is wanted
  void *dw1, *db1, *dgamma, *dbeta, *dw2, *db2;
};

// tau, (N, C) or (N, 1), is written; `means`: N numbers of workspace.
void gate_forward(DType, const Walk&, const GateArgs&, void* tau, void* means, int blocks, cudaStream_t);
void gate_backward(DType, const Walk&, const GateArgs&, const GateGrads&, int blocks, cudaStream_t);

// ---- one_pass.cu, training.cu: step and gate in one launch. x, y, residual, g and dx are dense.

struct Slices {
  int parts;       // of a sample: blocks of its cluster, or items of the grid
  int64_t rows;    // of a part: channels; channels_last: positions
  int64_t stride;  // bytes on chip for one part, a multiple of 16
  int held;        // training.cu: parts that each block keeps on chip
  int blocks;      // training.cu: of the grid
};

struct StepArgs {
  DType dtype;
  Walk walk;
  const void* x;
  void* y;
  const void* residual;
  uint8_t *sign, *nonzero, *kept;  // all or none
  GateArgs gate;
  void* tau;            // one_pass.cu: absent where nobody wants it
  void *means, *parts;  // training.cu: workspace (N) and, for channels_last with several parts, (parts, N, C)
};
struct StepGradArgs {
  DType dtype;
  Walk walk;
  const void* g;
  void* dx;
  const uint8_t *sign, *nonzero, *kept;
  GateArgs gate;
  GateGrads grads;  // one_pass.cu reads tau_grad and writes dz and du; the other gradients are gate_backward's
  void *dtau, *parts;  // training.cu: workspace
};

void one_pass_forward(const StepArgs&, const Slices&, cudaStream_t);
void one_pass_backward(const StepGradArgs&, const Slices&, cudaStream_t);
void training_forward(const StepArgs&, const Slices&, cudaStream_t);
void training_backward(const StepGradArgs&, const Slices&, cudaStream_t);

}  // namespace drsn
