// The kernels for any CPU.
#include "vec_portable.h"

#include "gated.h"
#include "norm.h"

namespace drsn {
const Kernels kernels_portable = {"portable", reduce, map, grad, gated_forward, gated_backward, norm, norm_grad};
}
