// The parts of a pre-activation unit on tensors (C, L, N), the batch last: float32, N a multiple of 16.
//
// Every loop runs over the batch in vectors, so that 4 channels are as fast as 64. A convolution has three taps and a
// padding of 1; its weights are read as (C_in, 3, C_out), four output channels at a time.

#include <torch/extension.h>

#include <vector>

namespace {

typedef float Vector __attribute__((vector_size(32), aligned(4)));
constexpr int64_t LANES = 8, STEP = 2 * LANES, BLOCK = 4;

inline Vector& at(float* p) { return *reinterpret_cast<Vector*>(p); }
inline Vector at(const float* p) { return *reinterpret_cast<const Vector*>(p); }

inline double sum(Vector v) {
  double total = 0;
  for (int i = 0; i < LANES; ++i) total += v[i];
  return total;
}

void check(const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 3 && x.scalar_type() == at::kFloat && x.is_contiguous() && x.size(2) % STEP == 0,
              "x must be contiguous float32 (C, L, N) with N a multiple of ", STEP);
}

// Four output channels of one position: y[b] += sum over channels of w (channel, b) * x (channel), N at a time.
inline void accumulate(Vector (&y)[BLOCK][2], const float* w, int64_t w_step, const float* x, int64_t x_step,
                       int64_t channels) {
  for (int64_t c = 0; c < channels; ++c, w += w_step, x += x_step) {
    const Vector low = at(x), high = at(x + LANES);
    for (int b = 0; b < BLOCK; ++b) {
      y[b][0] += w[b] * low;
      y[b][1] += w[b] * high;
    }
  }
}

at::Tensor convolution(const at::Tensor& padded, const at::Tensor& weight, const at::Tensor& bias, int64_t stride) {
  check(padded);
  const int64_t in = padded.size(0), length = padded.size(1), batch = padded.size(2), out = weight.size(0);
  TORCH_CHECK(weight.size(1) == in && weight.size(2) == 3 && out % BLOCK == 0, "weight must be (4 k, C_in, 3)");
  const at::Tensor ordered = weight.permute({1, 2, 0}).contiguous();
  const int64_t outputs = (length - 3) / stride + 1;
  at::Tensor y = at::empty({out, outputs, batch}, padded.options());
  const float *w = ordered.const_data_ptr<float>(), *x = padded.const_data_ptr<float>();
  const float* first = bias.const_data_ptr<float>();
  float* result = y.data_ptr<float>();
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t n = 0; n < batch; n += STEP)
      for (int64_t c = 0; c < out; c += BLOCK) {
        Vector sums[BLOCK][2];
        for (int b = 0; b < BLOCK; ++b) sums[b][0] = sums[b][1] = Vector{} + first[c + b];
        for (int k = 0; k < 3; ++k)
          accumulate(sums, w + k * out + c, 3 * out, x + (o * stride + k) * batch + n, length * batch, in);
        for (int b = 0; b < BLOCK; ++b) {
          float* to = result + ((c + b) * outputs + o) * batch + n;
          at(to) = sums[b][0];
          at(to + LANES) = sums[b][1];
        }
      }
  return y;
}

// Gradients of the weight (C_out, C_in, 3) and of the bias.
std::vector<at::Tensor> convolution_weight(const at::Tensor& grad, const at::Tensor& padded, int64_t stride) {
  check(grad);
  const int64_t out = grad.size(0), outputs = grad.size(1), batch = grad.size(2);
  const int64_t in = padded.size(0), length = padded.size(1);
  at::Tensor weight = at::empty({out, in, 3}, grad.options()), bias = at::empty({out}, grad.options());
  const float *g = grad.const_data_ptr<float>(), *x = padded.const_data_ptr<float>();
  float *w = weight.data_ptr<float>(), *b = bias.data_ptr<float>();
  for (int64_t c = 0; c < out; c += BLOCK)
    for (int64_t i = 0; i < in; ++i) {
      Vector sums[BLOCK][3] = {};
      for (int64_t o = 0; o < outputs; ++o)
        for (int64_t n = 0; n < batch; n += LANES) {
          const float* seen = x + (i * length + o * stride) * batch + n;
          const Vector taps[3] = {at(seen), at(seen + batch), at(seen + 2 * batch)};
          for (int r = 0; r < BLOCK; ++r) {
            const Vector row = at(g + ((c + r) * outputs + o) * batch + n);
            for (int k = 0; k < 3; ++k) sums[r][k] += row * taps[k];
          }
        }
      for (int r = 0; r < BLOCK; ++r)
        for (int k = 0; k < 3; ++k) w[((c + r) * in + i) * 3 + k] = sum(sums[r][k]);
    }
  for (int64_t c = 0; c < out; ++c) {
    Vector total = {};
    for (int64_t n = 0; n < outputs * batch; n += LANES) total += at(g + c * outputs * batch + n);
    b[c] = sum(total);
  }
  return {weight, bias};
}

// relu(batch_norm(x)) between zeros (C, L + 2, N); mean and 1 / std of the channels. Moves the running statistics.
std::vector<at::Tensor> norm_relu(const at::Tensor& x, const at::Tensor& gamma, const at::Tensor& beta, double eps,
                                  at::Tensor running_mean, at::Tensor running_var, double momentum) {
  check(x);
  const int64_t channels = x.size(0), batch = x.size(2), count = x.size(1) * batch;
  at::Tensor padded = at::empty({channels, x.size(1) + 2, batch}, x.options());
  at::Tensor mean = at::empty({channels}, x.options()), rstd = at::empty_like(mean);
  float *kept_mean = running_mean.data_ptr<float>(), *kept_var = running_var.data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    const float* from = x.const_data_ptr<float>() + c * count;
    float* to = padded.data_ptr<float>() + c * (count + 2 * batch);
    Vector total = {}, squares = {};
    for (int64_t n = 0; n < count; n += LANES) total += at(from + n);
    const float middle = sum(total) / count;
    for (int64_t n = 0; n < count; n += LANES) {
      const Vector centred = at(from + n) - middle;
      squares += centred * centred;
    }
    const double var = sum(squares) / count, scale = 1 / std::sqrt(var + eps);
    mean.data_ptr<float>()[c] = middle;
    kept_mean[c] += momentum * (middle - kept_mean[c]);
    kept_var[c] += momentum * (var * count / (count - 1) - kept_var[c]);
    rstd.data_ptr<float>()[c] = scale;
    const float slope = scale * gamma.const_data_ptr<float>()[c];
    const float offset = beta.const_data_ptr<float>()[c];
    std::fill_n(to, batch, 0.f);
    std::fill_n(to + batch + count, batch, 0.f);
    for (int64_t n = 0; n < count; n += LANES) {
      const Vector value = (at(from + n) - middle) * slope + offset;
      at(to + batch + n) = value > 0.f ? value : Vector{};
    }
  }
  return {padded, mean, rstd};
}

// Through the convolution, the ReLU and the norm: gradients of x, gamma and beta from that of the convolution's output.
std::vector<at::Tensor> norm_relu_convolution_backward(const at::Tensor& grad, const at::Tensor& x,
                                                       const at::Tensor& padded, const at::Tensor& weight,
                                                       const at::Tensor& gamma, const at::Tensor& mean,
                                                       const at::Tensor& rstd, int64_t stride) {
  check(grad), check(x);
  const int64_t in = x.size(0), length = x.size(1), batch = x.size(2), out = grad.size(0), outputs = grad.size(1);
  TORCH_CHECK(in % BLOCK == 0, "x must have a multiple of ", BLOCK, " channels");
  const at::Tensor ordered = weight.permute({0, 2, 1}).contiguous();  // (C_out, 3, C_in)
  at::Tensor found = at::empty_like(x), gamma_grad = at::empty_like(gamma), beta_grad = at::empty_like(gamma);
  const float *w = ordered.const_data_ptr<float>(), *g = grad.const_data_ptr<float>();
  const float *values = x.const_data_ptr<float>(), *active = padded.const_data_ptr<float>();
  float* to = found.data_ptr<float>();
  const int64_t row = length * batch;
  for (int64_t c = 0; c < in; c += BLOCK) {
    Vector totals[BLOCK] = {}, products[BLOCK] = {};
    for (int64_t p = 0; p < length; ++p)
      for (int64_t n = 0; n < batch; n += STEP) {
        Vector sums[BLOCK][2] = {};
        for (int k = 0; k < 3; ++k) {
          const int64_t ahead = p + 1 - k;
          if (ahead >= 0 && ahead % stride == 0 && ahead / stride < outputs)
            accumulate(sums, w + k * in + c, 3 * in, g + ahead / stride * batch + n, outputs * batch, out);
        }
        for (int b = 0; b < BLOCK; ++b)
          for (int half = 0; half < 2; ++half) {
            const int64_t place = (c + b) * row + p * batch + n + half * LANES;
            const Vector on = at(active + place + (2 * (c + b) + 1) * batch);
            const Vector value = on > 0.f ? sums[b][half] : Vector{};
            at(to + place) = value;
            totals[b] += value;
            products[b] += value * at(values + place);
          }
      }
    for (int b = 0; b < BLOCK; ++b) {
      const double middle = mean.const_data_ptr<float>()[c + b], inverse = rstd.const_data_ptr<float>()[c + b];
      const double total = sum(totals[b]), of_gamma = inverse * (sum(products[b]) - middle * total);
      gamma_grad.data_ptr<float>()[c + b] = of_gamma;
      beta_grad.data_ptr<float>()[c + b] = total;
      const double scale = inverse * gamma.const_data_ptr<float>()[c + b], slope = -scale * inverse * of_gamma / row;
      const float a = scale, s = slope, offset = -scale * total / row - slope * middle;
      for (int64_t n = (c + b) * row; n < (c + b + 1) * row; n += LANES)
        at(to + n) = at(to + n) * a + (at(values + n) * s + offset);
    }
  }
  return {found, gamma_grad, beta_grad};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("convolution", &convolution);
  m.def("convolution_weight", &convolution_weight);
  m.def("norm_relu", &norm_relu);
  m.def("norm_relu_convolution_backward", &norm_relu_convolution_backward);
}
