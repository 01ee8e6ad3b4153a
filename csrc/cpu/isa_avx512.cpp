// The kernels for avx512, with the compiler flags of that instruction set.
#include "vec_avx512.h"

#include "standard.h"

namespace drsn {
const Kernels kernels_avx512 = {"avx512", reduce, apply, grad, standard_forward, standard_backward};
}
