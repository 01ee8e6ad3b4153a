// What a kernel of any compiled backend is given: pointers, the walk over them, strides.
#pragma once

#include <cstdint>

namespace drsn {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

constexpr int kMaxDims = 6;  // spatial dimensions

// Strides in elements. Spatial dimensions in walking order, size-1 ones dropped and neighbours merged where possible.
struct Strides {
  int64_t n = 0, c = 0;
  int dims = 0;
  int64_t size[kMaxDims] = {}, stride[kMaxDims] = {};
};

// How a tensor is walked: see drsn_kernels/planes.py for the order and the layout of the planes.
struct Walk {
  int64_t n = 0, c = 0, l = 0;
  bool channels_last = false;
  int64_t row_bytes = 0;  // bytes of one row in a plane
};

// What reduce adds up: |x| or x for their means, x * times for its sum.
enum class Sum : int { magnitudes, values, products };

// What apply makes of x and t, its threshold or factor: soft_threshold(x, t), piecewise(x, t, ...), or x * t.
enum class Map : int { soft, pieces, scale };

struct ReduceArgs {  // out = mean |x|, or another Sum; planes optional (both or none), with |x| only
  DType dtype;
  Walk walk;
  const void* x;
  Strides xs;
  void* out;  // (N, C), float or double
  uint8_t *sign, *nonzero;
  Sum sum = Sum::magnitudes;
  const void* times = nullptr;  // of x's shape
  Strides ts = {};
};

struct ApplyArgs {  // y = map(x, tau) [+ residual] [+ shift / L]; kept optional, sign only with kept; neither where it scales
  DType dtype;
  Walk walk;
  const void* x;
  Strides xs;
  void* y;
  Strides ys;
  const void* tau;  // float or double, strides in elements, 0 where broadcast
  int64_t tau_n, tau_c;
  const void* residual;
  Strides rs;
  uint8_t *kept, *sign;
  Map map = Map::soft;
  double inside = 0, offset = 1;  // of pieces
  const void* shift = nullptr;    // (N, C), float or double, contiguous; where it scales, without a residual
};

struct GradArgs {
  // dx = kept * g + s * da / L    where dx is given; g or da may be absent
  // dtau = - sum_L s * kept * g   where dtau is given
  // by other pieces, inside * g is in the place of 0 where it is not kept, and dtau is offset times that
  DType dtype;
  Walk walk;
  const void* g;
  Strides gs;
  const void* da;  // (N, C), float or double, contiguous
  void* dx;
  Strides ds;
  void* dtau;  // (N, C), float or double
  const uint8_t *kept, *sign, *nonzero;
  double inside = 0, offset = 1;
};

enum class Average : int { channel = 0, sample = 1, none = 2 };

// The standard gate: u = A w1' + b1, v = relu(norm(u)), alpha = sigmoid(v w2' + b2). float, or double for f64.
struct GateArgs {
  int64_t n, c, h, o;
  Average average;
  bool norm, batch_stats;
  double eps, momentum;
  const void *w1, *b1, *gamma, *beta, *w2, *b2;
  void *running_mean, *running_var;
  int64_t* batches;
  void *pooled, *hidden, *alpha;  // A (N, C), u (N, H), alpha (N, O)
  void *mean, *var;               // (H,): what normalises u; written where they are of the batch
};

}  // namespace drsn
