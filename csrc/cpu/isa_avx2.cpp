// The kernels for avx2, with the compiler flags of that instruction set.
#include "vec_avx2.h"

#include "gated.h"
#include "norm.h"

namespace drsn {
const Kernels kernels_avx2 = {"avx2", reduce, map, grad, gated_forward, gated_backward, norm, norm_grad};
}
