// The kernels for any CPU.
#include "vec_portable.h"

#include "standard.h"

namespace drsn {
const Kernels kernels_portable = {"portable", reduce, apply, grad, standard_forward, standard_backward};
}
