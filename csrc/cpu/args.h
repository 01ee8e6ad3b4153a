// What a compiled kernel is given: pointers, the walk over them, strides. Fields are set by name; what is not set is absent.
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

// How a tensor is walked: see drsn_kernels/layout.py for the order and the layout of the planes.
struct Walk {
  int64_t n = 0, c = 0, l = 0;
  bool channels_last = false;
  int64_t row_bytes = 0;  // bytes of one row in a plane
};

// What reduce adds up: |x| or x for their means, x * times for its sum.
enum class Sum : int { magnitudes, values, products };

// What map makes of x and t, its threshold or factor: soft_threshold(x, t), piecewise(x, t, ...), or x * t.
enum class Map : int { soft, pieces, scale };

struct ReduceArgs {  // out = mean |x|, or another Sum; planes optional (both or none), with |x| only
  DType dtype = DType::f32;
  Walk walk;
  Sum sum = Sum::magnitudes;
  const void* x = nullptr;
  Strides xs;
  const void* times = nullptr;  // of x's shape
  Strides ts;
  void* out = nullptr;  // (N, C), float or double
  uint8_t *sign = nullptr, *nonzero = nullptr;
};

// y = map(x, t) [+ residual] [+ shift / L]. A threshold writes the planes kept and sign, or all three, or none.
struct MapArgs {
  DType dtype = DType::f32;
  Walk walk;
  Map map = Map::soft;
  double inside = 0, offset = 1;  // of pieces
  const void* x = nullptr;
  Strides xs;
  void* y = nullptr;
  Strides ys;
  const void* t = nullptr;  // float or double, strides in elements, 0 where broadcast
  int64_t t_n = 0, t_c = 0;
  const void* residual = nullptr;
  Strides rs;
  const void* shift = nullptr;  // (N, C), float or double, contiguous; where it scales, without a residual
  uint8_t *kept = nullptr, *sign = nullptr, *nonzero = nullptr;
};

struct GradArgs {
  // dx = kept * g + s * da / L    where dx is given; g or da may be absent
  // dtau = - sum_L s * kept * g   where dtau is given
  // by other pieces, inside * g is in the place of 0 where it is not kept, and dtau is offset times that
  DType dtype = DType::f32;
  Walk walk;
  double inside = 0, offset = 1;
  const void* g = nullptr;
  Strides gs;
  const void* da = nullptr;  // (N, C), float or double, contiguous
  void* dx = nullptr;
  Strides ds;
  void* dtau = nullptr;  // (N, C), float or double
  const uint8_t *kept = nullptr, *sign = nullptr, *nonzero = nullptr;
};

// y = act(weight (x - mean) rstd + bias), by channel; norm.h. Parameters and statistics are float, or double for f64.
struct NormArgs {
  DType dtype = DType::f32;
  Walk walk;
  bool batch = true;  // statistics of the batch
  double slope = 0, eps = 0, factor = 0;
  const void* x = nullptr;
  Strides xs;
  void* y = nullptr;  // absent: statistics only
  Strides ys;
  const void *weight = nullptr, *bias = nullptr, *given_mean = nullptr, *given_var = nullptr;  // (C,)
  void* stats = nullptr;                                                                       // (2, C): mean and rstd; without y, mean and M2
  void *running_mean = nullptr, *running_var = nullptr;  // moved by `factor` towards the batch's
  int64_t* batches = nullptr;
};

struct NormGradArgs {
  DType dtype = DType::f32;
  Walk walk;
  bool batch = true, given = false;  // given: `sums` and `count` are of all processes, and read
  double slope = 0, count = 0;
  const void *g = nullptr, *x = nullptr;
  Strides gs, xs;
  void* dx = nullptr;
  Strides ds;
  const void *weight = nullptr, *bias = nullptr, *stats = nullptr;
  void* sums = nullptr;  // (2, C): dbias and dweight; absent where nobody needs them
};

enum class Average : int { channel = 0, sample = 1, none = 2 };

// The standard gate: u = A w1' + b1, v = relu(norm(u)), alpha = sigmoid(v w2' + b2). float, or double for f64.
struct GateArgs {
  int64_t n = 0, c = 0, h = 0, o = 0;
  Average average = Average::channel;
  bool norm = false, batch_stats = false;
  double eps = 0, momentum = 0;
  const void *w1 = nullptr, *b1 = nullptr, *gamma = nullptr, *beta = nullptr, *w2 = nullptr, *b2 = nullptr;
  void *running_mean = nullptr, *running_var = nullptr;
  int64_t* batches = nullptr;
  void *pooled = nullptr, *hidden = nullptr, *alpha = nullptr;  // A (N, C), u (N, H), alpha (N, O)
  void *mean = nullptr, *var = nullptr;  // (H,): what normalises u; written where they are of the batch

  // The state, one after the other in `state`: hidden, alpha and, of the batch, mean and var. item: bytes of a number.
  void lay_out(void* state, int64_t item) {
    char* const start = static_cast<char*>(state);
    hidden = start;
    alpha = start + n * h * item;
    if (!batch_stats) return;
    mean = start + n * (h + o) * item;
    var = start + (n * (h + o) + h) * item;
  }
  int64_t state() const { return n * (h + o) + (batch_stats ? 2 * h : 0); }  // numbers in it
};

}  // namespace drsn
