// A libcuda.so.1 that launches nothing and writes down what it is given: for tests of two launchers and for timing them,
// without a GPU. Triton's driver.c and csrc/launch find it by its soname. Addresses are those of CPU tensors.
#include <cuda.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

std::mutex guard;
std::atomic<bool> recording{false};
std::atomic<long> launches{0};
std::string log;                          // a line a launch
std::map<CUfunction, std::vector<size_t>> sizes;  // of each function's parameters, in bytes
std::atomic<int> failing{-1}, failing_with{0};    // launch number and result
std::atomic<int> primary{0}, wanted_device{-1};
std::atomic<int> shared_limit{232448};
thread_local CUcontext current = nullptr;

}  // namespace

extern "C" {

// ---- what a test asks and sets

long stub_launches(void) { return launches; }
int stub_primaries(void) { return primary; }       // contexts that were retained
int stub_device(void) { return wanted_device; }    // of the last one
void stub_fail(int launch, int result) { failing = launch, failing_with = result, launches = 0; }
void stub_shared_limit(int bytes) { shared_limit = bytes; }
void stub_context(void* context) { current = static_cast<CUcontext>(context); }
void stub_record(int on) { recording = on; }
// Sizes of a function's parameters, which the driver would know from its code: without them parameters are not read.
void stub_sizes(void* function, const size_t* of, int count) {
  std::lock_guard<std::mutex> held(guard);
  sizes[static_cast<CUfunction>(function)].assign(of, of + count);
}
// What was recorded; it is forgotten.
const char* stub_log(void) {
  static std::string taken;
  std::lock_guard<std::mutex> held(guard);
  taken.swap(log);
  log.clear();
  return taken.c_str();
}

// ---- the driver

CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** parameters, void** extra) {
  const long number = launches++;
  if (number == failing) return static_cast<CUresult>(failing_with.load());
  if (current == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  if (!recording) return CUDA_SUCCESS;
  std::lock_guard<std::mutex> held(guard);
  char text[256];
  snprintf(text, sizeof text, "%p grid %u %u %u block %u %u %u shared %u stream %p extra %p attributes", (void*)f,
           c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ, c->sharedMemBytes,
           (void*)c->hStream, (void*)extra);
  log += text;
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    snprintf(text, sizeof text, " %d=%d", c->attrs[i].id, c->attrs[i].value.programmaticStreamSerializationAllowed);
    log += text;
  }
  log += " parameters";
  const auto& known = sizes[f];
  for (size_t i = 0; i < known.size(); ++i) {
    log += ' ';
    for (size_t k = 0; k < known[i]; ++k) {
      snprintf(text, sizeof text, "%02x", static_cast<const unsigned char*>(parameters[i])[k]);
      log += text;
    }
  }
  log += '\n';
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult e, const char** s) {
  *s = e == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : nullptr;
  return *s ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuGetErrorString(CUresult, const char** s) { return *s = "invalid argument", CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* d, int i) { return *d = i, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice) {
  return *v = a == CU_DEVICE_ATTRIBUTE_WARP_SIZE ? 32 : 232448, CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* c) { return *c = current, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext c) { return current = c, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice d) {
  ++primary, wanted_device = d;
  return *c = reinterpret_cast<CUcontext>(size_t{0x1000} + d), CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* m, const void*) {
  static std::atomic<size_t> count{0};
  return *m = reinterpret_cast<CUmodule>(0x2000 + 16 * count++), CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* f, CUmodule m, const char*) {
  return *f = reinterpret_cast<CUfunction>(m), CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* v, CUfunction_attribute a, CUfunction) {
  return *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK           ? 1024
              : a == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES ? shared_limit.load()
                                                                     : 0,
         CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* v, CUlimit) { return *v = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* v) { return *v = 13000, CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void* v, CUpointer_attribute, CUdeviceptr p) {
  return *static_cast<CUdeviceptr*>(v) = p, CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) { return *n = 3, CUDA_SUCCESS; }
CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuTensorMapEncodeIm2col(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const int*, const int*, cuuint32_t, cuuint32_t, const cuuint32_t*,
                                 CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
}
