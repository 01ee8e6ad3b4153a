// The CUDA driver as far as launching goes: loaded when first asked for, so that the extension needs no CUDA to be built
// or imported. Types and numbers are those of cuda.h, which are its ABI and do not change.
#pragma once

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace drsn::launch {

using Function = void*;  // CUfunction
using Stream = void*;    // CUstream
using Context = void*;   // CUcontext
using Result = int;      // CUresult, 0 is success

// CUfunction_attribute
constexpr int MAX_THREADS_PER_BLOCK = 0, MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;

// CUlaunchAttributeID
constexpr int PROGRAMMATIC_STREAM_SERIALIZATION = 6;

struct alignas(8) LaunchAttribute {  // CUlaunchAttribute
  int id;
  char padding[4];
  int value[16];  // of a union of 64 bytes
};

struct LaunchConfig {  // CUlaunchConfig
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
  Stream stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

struct Driver {
  Result (*launch)(const LaunchConfig*, Function, void** parameters, void** extra) = nullptr;
  Result (*current)(Context*) = nullptr;
  Result (*make_current)(Context) = nullptr;
  Result (*device)(int* device, int ordinal) = nullptr;
  Result (*retain_primary)(Context*, int device) = nullptr;
  Result (*attribute)(int* value, int attribute, Function) = nullptr;
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

  // Launching needs a current context, and a thread that has made no CUDA call yet has none.
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
    find(d.launch, "cuLaunchKernelEx");
    find(d.current, "cuCtxGetCurrent");
    find(d.make_current, "cuCtxSetCurrent");
    find(d.device, "cuDeviceGet");
    find(d.retain_primary, "cuDevicePrimaryCtxRetain");
    find(d.attribute, "cuFuncGetAttribute");
    find(d.error_name, "cuGetErrorName");
    find(d.error_string, "cuGetErrorString");
    return d;
  }
};

}  // namespace drsn::launch
