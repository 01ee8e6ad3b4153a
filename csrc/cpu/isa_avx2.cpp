// The kernels for avx2, with the compiler flags of that instruction set.
#include "vec_avx2.h"

#include "standard.h"

namespace drsn {
const Kernels kernels_avx2 = {"avx2", reduce, apply, grad, standard_forward, standard_backward};
}
