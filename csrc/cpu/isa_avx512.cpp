// The kernels for avx512, with the compiler flags of that instruction set.
#include "vec_avx512.h"

#include "gated.h"
#include "norm.h"

namespace drsn {
const Kernels kernels_avx512 = {"avx512", reduce, map, grad, gated_forward, gated_backward, norm, norm_grad};
}
