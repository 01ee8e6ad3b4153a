// The CUDA driver as far as launching goes: loaded when first asked for, so that the extension needs no CUDA to be built
// or imported. The structures are cuda.h's CUlaunchConfig and CUlaunchAttribute, which do not change: they are its ABI.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <stdexcept>
#include <string>

namespace drsn::launch {

using Function = void*;  // CUfunction
using Stream = void*;    // CUstream
using Context = void*;   // CUcontext
using Result = int;      // CUresult, 0 is success

struct Attribute {  // CUlaunchAttribute: 64 bytes of value at an offset of 8
  int id;
  char pad[4];
  union {
    char bytes[64];
    struct {
      unsigned x, y, z;
    } cluster;
  } value;
};
static_assert(sizeof(Attribute) == 72);
constexpr int CLUSTER_DIMENSION = 4;  // CUlaunchAttributeID

struct Config {  // CUlaunchConfig
  unsigned grid[3], block[3], shared;
  Stream stream;
  Attribute* attributes;
  unsigned count;
};
static_assert(offsetof(Config, stream) == 32 && sizeof(Config) == 56);

// CUfunction_attribute
constexpr int MAX_THREADS_PER_BLOCK = 0, SHARED_SIZE_BYTES = 1, MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;

struct Driver {
  Result (*launch)(const Config*, Function, void** parameters, void** extra) = nullptr;
  Result (*current)(Context*) = nullptr;
  Result (*make_current)(Context) = nullptr;
  Result (*device)(int* device, int ordinal) = nullptr;
  Result (*retain_primary)(Context*, int device) = nullptr;
  Result (*attribute)(int* value, int attribute, Function) = nullptr;
  Result (*set_attribute)(Function, int attribute, int value) = nullptr;
  Result (*load)(void** module, const void* image) = nullptr;
  Result (*function)(Function*, void* module, const char* name) = nullptr;
  Result (*most_clusters)(int* count, Function, const Config*) = nullptr;
  Result (*error_name)(Result, const char**) = nullptr;
  Result (*error_string)(Result, const char**) = nullptr;
  std::string missing;  // why there is none, or empty

  // Throws where the driver is not there.
  static const Driver& get() {
    static const Driver driver = open();  // C++ makes other threads wait
    if (!driver.missing.empty()) throw std::runtime_error(driver.missing);
    return driver;
  }

  std::string describe(Result error) const {
    const char *name = nullptr, *text = nullptr;
    if (error_name(error, &name) != 0 || name == nullptr) return "error " + std::to_string(error);
    if (error_string(error, &text) != 0 || text == nullptr) return name;
    return std::string(name) + ": " + text;
  }

  void check(Result error, const char* call) const {
    if (error != 0) throw std::runtime_error(std::string(call) + " returned " + describe(error));
  }

  // Launching needs a current context. A thread of autograd's may have none yet: cudaSetDevice made none before CUDA 12.
  void ensure_context(int ordinal) const {
    Context context = nullptr;
    check(current(&context), "cuCtxGetCurrent");
    if (context != nullptr) return;
    int found = 0;
    check(device(&found, ordinal), "cuDeviceGet");
    check(retain_primary(&context, found), "cuDevicePrimaryCtxRetain");  // torch holds it as well, for good
    check(make_current(context), "cuCtxSetCurrent");
  }

 private:
  static Driver open() {
    Driver d;
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    if (library == nullptr) {
      const char* why = dlerror();
      d.missing = std::string("libcuda.so.1 does not load: ") + (why ? why : "unknown error");
      return d;
    }
    const auto find = [&](auto& pointer, const char* name) {
      *reinterpret_cast<void**>(&pointer) = dlsym(library, name);
      if (pointer == nullptr && d.missing.empty()) d.missing = std::string("libcuda.so.1 has no ") + name;
    };
    find(d.launch, "cuLaunchKernelEx");  // CUDA 11.8
    find(d.current, "cuCtxGetCurrent");
    find(d.make_current, "cuCtxSetCurrent");
    find(d.device, "cuDeviceGet");
    find(d.retain_primary, "cuDevicePrimaryCtxRetain");
    find(d.attribute, "cuFuncGetAttribute");
    find(d.set_attribute, "cuFuncSetAttribute");
    find(d.load, "cuModuleLoadData");
    find(d.function, "cuModuleGetFunction");
    find(d.most_clusters, "cuOccupancyMaxActiveClusters");
    find(d.error_name, "cuGetErrorName");
    find(d.error_string, "cuGetErrorString");
    return d;
  }
};

}  // namespace drsn::launch
