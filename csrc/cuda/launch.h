// Launching a kernel: every error becomes one exception that names the kernel, the shape and the cause.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/args.h"
#include "platform.h"

namespace drsn {

constexpr int kMaxDevices = 64;

struct Launch {
  const char* kernel;
  const Walk& walk;
  int64_t blocks;
  unsigned threads;
  size_t shared = 0;  // bytes
  unsigned cluster = 1;
  bool cooperative = false;
};

[[noreturn]] inline void fail(const Launch& at, const std::string& cause) {
  throw std::runtime_error("drsn_kernels: the CUDA kernel " + std::string(at.kernel) + " for x of " + std::to_string(at.walk.n) +
                           " samples, " + std::to_string(at.walk.c) + " channels, length " + std::to_string(at.walk.l) + ": " + cause);
}

#if defined(DRSN_EMULATION)

inline std::vector<std::string> launches;  // names, for the tests of the budgets
inline bool launches_run = true;           // or not, to time the host alone

template <auto kKernel, class... Args> void launch(const Launch& at, cudaStream_t, const Args&... args) {
  if (!at.blocks) return;
  if (!launches_run) return;
  launches.push_back(at.kernel);
  try {
    emulation::launch(kKernel, dim3(unsigned(at.blocks)), dim3(at.threads), at.shared, at.cluster, at.cooperative, args...);
  } catch (const std::exception& error) {
    fail(at, error.what());
  }
}

#else

inline void check(const Launch& at, cudaError_t error) {
  if (error != cudaSuccess) fail(at, cudaGetErrorString(error));
}

template <auto kKernel, class... Args> void launch(const Launch& at, cudaStream_t stream, const Args&... args) {
  if (!at.blocks) return;  // an empty tensor
  if (at.blocks > 0x7fffffff) fail(at, "more than 2^31 - 1 blocks");
  if (at.shared > 48 << 10) {  // more than that a kernel has to be allowed, once on each device
    static std::atomic<size_t> allowed[kMaxDevices];
    int device = 0;
    check(at, cudaGetDevice(&device));
    if (device >= kMaxDevices || allowed[device] < at.shared) {
      check(at, cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(at.shared)));
      if (device < kMaxDevices) allowed[device] = at.shared;
    }
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(at.blocks));
  config.blockDim = dim3(at.threads);
  config.dynamicSmemBytes = at.shared;
  config.stream = stream;
  config.attrs = attributes;
  if (at.cluster > 1) {
    auto& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = at.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  if (at.cooperative) {
    auto& cooperative = attributes[config.numAttrs++];
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
  }
  check(at, cudaLaunchKernelEx(&config, kKernel, args...));
}

#endif

}  // namespace drsn
