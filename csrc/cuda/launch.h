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

inline int current_device(const Launch& at) {
  int device = 0;
  check(at, cudaGetDevice(&device));
  return device;
}
inline int attribute(const Launch& at, int device, cudaDeviceAttr which) {
  int value = 0;
  check(at, cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// A kernel has to be allowed more than 48 KiB, once on each device. All there is, so that threads cannot take it back.
template <auto kKernel> void allow_all_shared_memory(const Launch& at) {
  static std::atomic<bool> allowed[kMaxDevices];
  const int device = current_device(at);
  if (device < kMaxDevices && allowed[device]) return;
  const int all = attribute(at, device, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  check(at, cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, all));
  if (device < kMaxDevices) allowed[device] = true;
}

// The blocks of a cooperative grid have to be on the device at once. The plans count on that; where the device holds fewer
// (a part of it, or under a tool), fewer do the same work, because every loop goes by the size of the grid.
template <auto kKernel> int64_t blocks_at_once(const Launch& at) {
  static std::atomic<uint64_t> known[kMaxDevices];  // shared memory and blocks of the last launch
  const int device = current_device(at);
  uint64_t found = device < kMaxDevices ? known[device].load() : 0;
  if (!found || found >> 32 != at.shared) {
    int each = 0;
    check(at, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kKernel, int(at.threads), at.shared));
    const uint64_t most = uint64_t(each) * uint64_t(attribute(at, device, cudaDevAttrMultiProcessorCount));
    if (!most) fail(at, "no block of it fits this device");
    found = uint64_t(at.shared) << 32 | most;
    if (device < kMaxDevices) known[device] = found;
  }
  const int64_t most = int64_t(found & 0xffffffffu);
  return at.blocks < most ? at.blocks : most;
}

template <auto kKernel, class... Args> void launch(const Launch& at, cudaStream_t stream, const Args&... args) {
  if (!at.blocks) return;  // an empty tensor
  if (at.blocks > 0x7fffffff) fail(at, "more than 2^31 - 1 blocks");
  if (at.shared > 48 << 10) allow_all_shared_memory<kKernel>(at);
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(at.cooperative ? blocks_at_once<kKernel>(at) : at.blocks));
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
