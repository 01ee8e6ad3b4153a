// From the binding's dtypes to kernels of C++ types.
#pragma once

#include "lanes.h"

namespace drsn {
namespace {

template <auto kValue> struct Constant {
  static constexpr auto value = kValue;
};

// float64 is for checking gradients: it has no wide accesses and no on-chip plans, which would only take time to compile.
template <class T> constexpr int kWidest = std::is_same_v<T, double> ? 1 : 16 / sizeof(T);

template <class F> void for_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(float());
    case DType::f64: return f(double());
    case DType::bf16: return f(bf16());
    case DType::f16: return f(f16());
  }
}
template <class F> void for_on_chip_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(float());
    case DType::bf16: return f(bf16());
    case DType::f16: return f(f16());
    case DType::f64: throw std::invalid_argument("drsn_kernels: there is no on-chip kernel for float64");
  }
}
template <class F> void for_sums(DType dtype, const F& f) { dtype == DType::f64 ? f(double()) : f(float()); }

// Whether rows of x can be moved 16 bytes at a time.
template <class T> bool is_wide(const Walk& w, const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && (w.channels_last ? w.c : w.l) * int64_t(sizeof(T)) % 16 == 0;
}

}  // namespace
}  // namespace drsn
