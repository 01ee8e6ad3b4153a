// The kernels for any CPU.
#include "vec_portable.h"

#include "kernels.h"

namespace drsn {
const Kernels kernels_portable = {"portable", reduce, apply, grad};
}
