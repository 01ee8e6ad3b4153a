// Batch normalisation and an activation in one, forward and backward.
//
//   y  = act(a (x - mean) + bias)            a = weight rstd; act(z) = z where z > 0 or NaN, slope z elsewhere
//   g' = act'(z) g                           z is computed from x again: nothing but x and two numbers a channel is kept
//   dx = a (g' - sum g' / M - (x - mean) rstd sum g' (x - mean) rstd / M)
//
// Statistics: a chunk of x, at most 64 rows that lie in the first-level cache, is read twice: for its mean, and for the
// squared deviations from it. Chunks are merged in double, first those of a segment, then segments, in a fixed order
// (Chan, Golub, LeVeque 1983): no cancellation, and the same bits for any number of threads.
//
// In the row walk the rows of a strip are those of one channel; in channels_last a strip is four vectors of channels.
#pragma once

#include "kernels.h"

namespace drsn {
namespace {

constexpr int kStripRows = 64;         // rows of a chunk, at most
constexpr int kSegmentChunks = 16;     // chunks merged before segments are

// A channel of few bytes and long rows is still in the second-level cache when its second pass comes, for the thread that
// made the first: (16, 64, 56, 56) backward 3.9 ms instead of 5.4. Rows of 1 KiB, 64 KiB apart, are not: (128, 64, 256)
// forward 3.3 ms instead of 2.7.
constexpr int64_t kCached = 384 << 10, kLongRow = 2 << 10;

template <class V> DRSN_INLINE V valid(V v, int lanes) {  // 0 beyond the end of a row
  return lanes == V::W ? v : v.keep(V::mask((uint64_t(1) << lanes) - 1));
}

template <bool RELU, class V> DRSN_INLINE V activate(V z, V slope) {
  const auto positive = V::not_le(z, V::set(0));
  return RELU ? z.keep(positive) : V::select(positive, z, z * slope);
}
template <bool RELU, class V> DRSN_INLINE V activation_grad(V g, V z, V slope) {
  const auto positive = V::not_le(z, V::set(0));
  return RELU ? g.keep(positive) : V::select(positive, g, g * slope);
}

// What is summed where: chunks of rows, segments of chunks, strips of channels.
template <class T, bool CL> struct Strips {
  using S = typename Compute<T>::type;
  using V = Vec<S>;
  static constexpr int kWidth = 4 * V::W;  // channels of a strip in channels_last

  const int64_t samples, channels, length;
  int64_t rows, pieces, strips, chunks, segments;  // rows: at most, of a chunk; pieces: of a row, where it is long

  explicit Strips(const Walk& w) : samples(w.n), channels(w.c), length(w.l) {
    pieces = CL ? 1 : max64(1, (length + kRun - 1) / kRun);
    rows = CL ? kStripRows : pieces > 1 ? 1 : min64(kStripRows, kRun / max64(1, length));
    strips = CL ? (channels + kWidth - 1) / kWidth : channels;
    chunks = CL ? (samples * length + rows - 1) / rows : pieces > 1 ? samples * pieces : (samples + rows - 1) / rows;
    segments = (chunks + kSegmentChunks - 1) / kSegmentChunks;
  }
  int64_t first(int64_t strip) const { return CL ? strip * kWidth : strip; }  // channel
  int64_t width(int64_t strip) const { return CL ? min64(kWidth, channels - first(strip)) : 1; }
  int64_t elements() const { return kSegmentChunks * rows * (CL ? kWidth : min64(length, kRun)); }  // of a segment
  bool stays_cached(int operands) const {
    return !CL && length * int64_t(sizeof(T)) >= kLongRow && operands * samples * length * int64_t(sizeof(T)) <= kCached;
  }
  double count() const { return double(samples) * double(length); }                                 // of a channel

  // The rows of a chunk in one strip: how many, how long, and where they are (in `buffer` if they are not contiguous).
  struct Chunk {
    int64_t start, count;  // within the rows
    int rows;
    double elements() const { return CL ? double(rows) : double(rows) * double(count); }  // of a channel
  };
  Chunk chunk(int64_t k, int64_t strip) const {
    if (CL) return {first(strip), width(strip), int(min64(rows, samples * length - k * rows))};
    if (pieces == 1) return {0, length, int(min64(rows, samples - k * rows))};
    const int64_t start = k % pieces * kRun;
    return {start, min64(kRun, length - start), 1};
  }
  void fetch(const Rows<T>& t, int64_t k, int64_t strip, const Chunk& c, const T** at, T* buffer) const {
    int64_t n = CL ? k * rows / length : pieces == 1 ? k * rows : k / pieces, l = CL ? k * rows % length : 0;
    for (int r = 0; r < c.rows; ++r) {
      at[r] = t.fetch(t.row(n, CL ? l : strip), c.start, c.count, buffer + r * c.count);
      if (!CL || ++l == length) l = 0, ++n;
    }
  }
};

// Runs step(sum, row, element, lanes) over the vectors of a chunk. sum, 0 to 3, is which accumulator takes it: in
// channels_last, which vector of the strip it is. The loops over them are unrolled, so that they stay in registers.
constexpr int kStripUnroll = kUnroll > 1 ? 4 : 1;
template <class V, class F> DRSN_INLINE void over_chunk(int rows, int64_t count, const F& step) {
  for (int r = 0; r < rows; ++r) {
    int64_t i = 0;
    for (; i + 4 * V::W <= count; i += 4 * V::W)
#pragma GCC unroll kStripUnroll
      for (int v = 0; v < 4; ++v) step(v, r, i + v * V::W, V::W);
    int64_t left = count - i;
#pragma GCC unroll kStripUnroll
    for (int v = 0; v < 4; ++v, left -= V::W)
      if (left > 0) step(v, r, i + v * V::W, left < V::W ? int(left) : V::W);
  }
}
template <class V, class F> DRSN_INLINE void over_row(int64_t count, const F& step) {
  int64_t i = 0;
  for (; i + V::W <= count; i += V::W) step(i, V::W);
  if (i < count) step(i, int(count - i));
}

// The sums of a strip: one number, or in channels_last one a channel.
template <bool CL, class V, class S> DRSN_INLINE void put_sums(const V (&acc)[4], S* out) {
  if constexpr (CL) {
    for (int v = 0; v < 4; ++v) acc[v].store(out + v * V::W);
  } else {
    *out = ((acc[0] + acc[1]) + (acc[2] + acc[3])).sum();
  }
}
template <bool CL, class V, class S> DRSN_INLINE V of_strip(const S* p, int v) {
  return CL ? V::load(p + v * V::W) : V::set(*p);
}
template <class V> DRSN_INLINE void clear(V (&acc)[4]) {
  for (auto& a : acc) a = V::set(0);
}

// A number of each channel, at the elements of a row: in the row walk one for all of them.
template <bool CL, class V, class S> struct ByChannel {
  const S* p;
  V all;
  DRSN_INLINE ByChannel(const S* values, int64_t c) : p(values + c), all(CL ? V::set(0) : V::set(*p)) {}
  DRSN_INLINE V at(int64_t i, int lanes) const { return CL ? load<V>(p + i, lanes) : all; }
};

// ---- statistics ------------------------------------------------------------------------------------------------------

inline void merge(double n, double& mean, double& m2, double count, double other_mean, double other_m2) {
  const double delta = other_mean - mean, share = count / (n + count);
  mean += delta * share;
  m2 += other_m2 + delta * delta * n * share;
}

// mean and m2, by channel, of one segment and strip.
template <class T, bool CL>
void segment_moments(const Strips<T, CL>& s, const Rows<T>& x, int64_t segment, int64_t strip, double* mean, double* m2) {
  using S = typename Compute<T>::type;
  using V = Vec<S>;
  constexpr int kWide = CL ? 4 * V::W : 1;
  alignas(64) T buffer[kRun > kStripRows * kWide ? kRun : kStripRows * kWide];
  alignas(64) S sum[kWide], centre[kWide], deviation[kWide], square[kWide];
  const T* at[kStripRows];
  const int64_t width = s.width(strip), last = min64(s.chunks, (segment + 1) * kSegmentChunks);
  double n = 0;
  for (int64_t k = segment * kSegmentChunks; k < last; ++k) {
    const auto c = s.chunk(k, strip);
    s.fetch(x, k, strip, c, at, buffer);
    V acc[4], squares[4];
    clear(acc);
    over_chunk<V>(c.rows, c.count, [&](int v, int r, int64_t i, int lanes) DRSN_LAMBDA { acc[v] = acc[v] + load<V>(at[r] + i, lanes); });
    put_sums<CL>(acc, sum);
    const double count = c.elements();
    for (int j = 0; j < kWide; ++j) centre[j] = S(sum[j] / count);
    clear(acc);
    clear(squares);
    over_chunk<V>(c.rows, c.count, [&](int v, int r, int64_t i, int lanes) DRSN_LAMBDA {
      const V d = valid(load<V>(at[r] + i, lanes) - of_strip<CL, V>(centre, v), lanes);
      acc[v] = acc[v] + d;
      squares[v] = V::fma(d, d, squares[v]);
    });
    put_sums<CL>(acc, deviation);
    put_sums<CL>(squares, square);
    for (int64_t j = 0; j < width; ++j) {  // centre is rounded: the mean is `deviation / count` beside it
      const double beside = deviation[j] / count, chunk_mean = centre[j] + beside, chunk_m2 = square[j] - deviation[j] * beside;
      if (n == 0) {
        mean[j] = chunk_mean, m2[j] = chunk_m2;
      } else {
        merge(n, mean[j], m2[j], count, chunk_mean, chunk_m2);
      }
    }
    n += count;
  }
}

// Elements of a channel in a segment.
template <class T, bool CL> double segment_count(const Strips<T, CL>& s, int64_t segment) {
  double n = 0;
  for (int64_t k = segment * kSegmentChunks; k < min64(s.chunks, (segment + 1) * kSegmentChunks); ++k) n += s.chunk(k, 0).elements();
  return n;
}

// What x is multiplied by and moved by, (C,) each; a and bias are 1 and 0 where a parameter is absent.
template <class S> struct Coefficients {
  S *mean, *a, *bias;
};

template <class S> void put_coefficients(const Coefficients<S>& k, int64_t c, S mean, S rstd, const void* weight, const void* bias) {
  k.mean[c] = mean;
  k.a[c] = weight ? static_cast<const S*>(weight)[c] * rstd : rstd;
  k.bias[c] = bias ? static_cast<const S*>(bias)[c] : S(0);
}

// ---- forward ---------------------------------------------------------------------------------------------------------

template <class T, bool CL, bool RELU> void norm_as(const NormArgs& args) {
  using S = typename Compute<T>::type;
  using V = Vec<S>;
  const NormArgs a = args;
  const Strips<T, CL> s(a.walk);
  const auto x = rows<T>(a.x, a.xs, a.walk), y = rows<T>(a.y, a.ys, a.walk);
  const bool contiguous = x.contiguous && y.contiguous;
  const int64_t channels = s.channels;
  Scratch<S> numbers(3 * channels);
  const Coefficients<S> k{numbers.data, numbers.data + channels, numbers.data + 2 * channels};
  S *const out_mean = static_cast<S*>(a.stats), *const out_second = out_mean + channels;
  const V slope = V::set(S(a.slope));

  // Channels [first, last) from the moments of their segments, (segments, 2, C).
  const auto finish = [&](const double* moments, int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      double n = 0, mean = 0, m2 = 0;
      for (int64_t g = 0; g < s.segments; ++g) {
        const double count = segment_count(s, g);
        merge(n, mean, m2, count, moments[2 * g * channels + c], moments[(2 * g + 1) * channels + c]);
        n += count;
      }
      const double rstd = 1 / __builtin_sqrt(m2 / n + a.eps);
      out_mean[c] = S(mean);
      out_second[c] = S(a.y ? rstd : m2);
      if (a.running_mean) {
        S &running_mean = static_cast<S*>(a.running_mean)[c], &running_var = static_cast<S*>(a.running_var)[c];
        running_mean = S(a.factor * mean + (1 - a.factor) * running_mean);
        running_var = S(a.factor * (m2 / (n - 1)) + (1 - a.factor) * running_var);
      }
      if (a.y) put_coefficients(k, c, out_mean[c], out_second[c], a.weight, a.bias);
    }
  };
  const auto apply = [&](int64_t n, int64_t j, int64_t start, int64_t count) DRSN_LAMBDA {
    alignas(64) T x_buffer[kChunk], y_buffer[kChunk];
    T *const x_row = x.row(n, j), *const y_row = y.row(n, j);
    pieces(contiguous, start, count, [&](int64_t i, int64_t len) DRSN_LAMBDA {
      const T* const from = x.fetch(x_row, i, len, x_buffer);
      T* const to = y.target(y_row, i, y_buffer);
      const int64_t c = CL ? i : j;
      const ByChannel<CL, V, S> mean(k.mean, c), factor(k.a, c), bias(k.bias, c);
      over_row<V>(len, [=](int64_t e, int lanes) DRSN_LAMBDA {
        const V z = V::fma(load<V>(from + e, lanes) - mean.at(e, lanes), factor.at(e, lanes), bias.at(e, lanes));
        store(activate<RELU>(z, slope), to + e, lanes);
      });
      y.put(y_row, i, len, y_buffer);
    });
  };

  if (a.batches) ++*a.batches;
  if (!a.batch) {
    for (int64_t c = 0; c < channels; ++c) {
      const S mean = static_cast<const S*>(a.given_mean)[c];
      const double var = static_cast<const S*>(a.given_var)[c];
      out_mean[c] = mean;
      out_second[c] = S(1 / __builtin_sqrt(var + a.eps));
      put_coefficients(k, c, mean, out_second[c], a.weight, a.bias);
    }
  } else {
    Scratch<double> moments(s.segments * 2 * channels);
    const auto measure = [&](int64_t segment, int64_t strip) {
      double* const mean = moments.data + 2 * segment * channels + s.first(strip);
      segment_moments(s, x, segment, strip, mean, mean + channels);
    };
    if (a.y && s.stays_cached(1)) {
      return parallel(channels, s.samples * s.length, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
          for (int64_t g = 0; g < s.segments; ++g) measure(g, c);
          finish(moments.data, c, c + 1);
          for (int64_t n = 0; n < s.samples; ++n) apply(n, c, 0, s.length);
        }
      });
    }
    parallel(s.segments * s.strips, s.elements(), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) measure(t / s.strips, t % s.strips);
    });
    finish(moments.data, 0, channels);
  }
  if (a.y) for_rows(a.walk, [&](int64_t n, int64_t j, int64_t start, int64_t count, int64_t) { apply(n, j, start, count); });
}

// ---- backward --------------------------------------------------------------------------------------------------------

// sum g' and sum g' (x - mean), by channel, of one segment and strip.
template <class T, bool CL, bool RELU>
void segment_sums(const Strips<T, CL>& s, const Rows<T>& g, const Rows<T>& x, const Coefficients<typename Compute<T>::type>& k,
                  double slope, int64_t segment, int64_t strip, double* sums, double* products) {
  using S = typename Compute<T>::type;
  using V = Vec<S>;
  constexpr int kWide = CL ? 4 * V::W : 1;
  constexpr int64_t kBuffer = kRun > kStripRows * kWide ? kRun : kStripRows * kWide;
  alignas(64) T g_buffer[kBuffer], x_buffer[kBuffer];
  alignas(64) S mean[kWide] = {}, a[kWide] = {}, bias[kWide] = {}, sum[kWide], product[kWide];
  const T *g_at[kStripRows], *x_at[kStripRows];
  const int64_t first = s.first(strip), width = s.width(strip);
  for (int64_t j = 0; j < width; ++j) {
    mean[j] = k.mean[first + j], a[j] = k.a[first + j], bias[j] = k.bias[first + j];
    sums[j] = products[j] = 0;
  }
  const V slopes = V::set(S(slope));
  for (int64_t c = segment * kSegmentChunks; c < min64(s.chunks, (segment + 1) * kSegmentChunks); ++c) {
    const auto chunk = s.chunk(c, strip);
    s.fetch(g, c, strip, chunk, g_at, g_buffer);
    s.fetch(x, c, strip, chunk, x_at, x_buffer);
    V acc[4], with_x[4];
    clear(acc);
    clear(with_x);
    over_chunk<V>(chunk.rows, chunk.count, [&](int v, int r, int64_t i, int lanes) DRSN_LAMBDA {
      const V centred = load<V>(x_at[r] + i, lanes) - of_strip<CL, V>(mean, v);
      const V z = V::fma(centred, of_strip<CL, V>(a, v), of_strip<CL, V>(bias, v));
      const V passed = activation_grad<RELU>(load<V>(g_at[r] + i, lanes), z, slopes);
      acc[v] = acc[v] + passed;
      with_x[v] = V::fma(passed, centred, with_x[v]);
    });
    put_sums<CL>(acc, sum);
    put_sums<CL>(with_x, product);
    for (int64_t j = 0; j < width; ++j) sums[j] += sum[j], products[j] += product[j];
  }
}

template <class T, bool CL, bool RELU> void norm_grad_as(const NormGradArgs& args) {
  using S = typename Compute<T>::type;
  using V = Vec<S>;
  const NormGradArgs a = args;
  const Strips<T, CL> s(a.walk);
  const auto g = rows<T>(a.g, a.gs, a.walk), x = rows<T>(a.x, a.xs, a.walk), dx = rows<T>(a.dx, a.ds, a.walk);
  const bool contiguous = g.contiguous && x.contiguous && dx.contiguous;
  const int64_t channels = s.channels;
  Scratch<S> numbers(5 * channels);
  const Coefficients<S> k{numbers.data, numbers.data + channels, numbers.data + 2 * channels};
  S *const shift = numbers.data + 3 * channels, *const tilt = shift + channels;  // dx = a (g' - shift - (x - mean) tilt)
  const S *const means = static_cast<const S*>(a.stats), *const rstd = means + channels;
  S *const dbias = static_cast<S*>(a.sums), *const dweight = dbias + channels;
  const double count = a.given ? a.count : s.count();
  const V slope = V::set(S(a.slope));
  for (int64_t c = 0; c < channels; ++c) {
    put_coefficients(k, c, means[c], rstd[c], a.weight, a.bias);
    shift[c] = tilt[c] = 0;
  }
  const auto settle = [&](int64_t c) {
    if (!a.batch) return;
    shift[c] = S(dbias[c] / count);
    tilt[c] = S(double(dweight[c]) * rstd[c] / count);
  };
  const auto finish = [&](const double* partial, int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      double sum = 0, product = 0;
      for (int64_t t = 0; t < s.segments; ++t) {
        sum += partial[2 * t * channels + c];
        product += partial[(2 * t + 1) * channels + c];
      }
      dbias[c] = S(sum);
      dweight[c] = S(product * rstd[c]);
      settle(c);
    }
  };
  const auto apply = [&](int64_t n, int64_t j, int64_t start, int64_t length) DRSN_LAMBDA {
    alignas(64) T g_buffer[kChunk], x_buffer[kChunk], dx_buffer[kChunk];
    T *const g_row = g.row(n, j), *const x_row = x.row(n, j), *const dx_row = dx.row(n, j);
    pieces(contiguous, start, length, [&](int64_t i, int64_t len) DRSN_LAMBDA {
      const T *const g_from = g.fetch(g_row, i, len, g_buffer), *const x_from = x.fetch(x_row, i, len, x_buffer);
      T* const to = dx.target(dx_row, i, dx_buffer);
      const int64_t c = CL ? i : j;
      const ByChannel<CL, V, S> mean(k.mean, c), factor(k.a, c), bias(k.bias, c), shifted(shift, c), tilted(tilt, c);
      over_row<V>(len, [=](int64_t e, int lanes) DRSN_LAMBDA {
        const V centred = load<V>(x_from + e, lanes) - mean.at(e, lanes), a = factor.at(e, lanes);
        const V passed = activation_grad<RELU>(load<V>(g_from + e, lanes), V::fma(centred, a, bias.at(e, lanes)), slope);
        store(a * (passed - shifted.at(e, lanes) - centred * tilted.at(e, lanes)), to + e, lanes);
      });
      dx.put(dx_row, i, len, dx_buffer);
    });
  };

  if (a.given) {
    for (int64_t c = 0; c < channels; ++c) settle(c);
  } else if (a.sums) {
    Scratch<double> partial(s.segments * 2 * channels);
    const auto add = [&](int64_t segment, int64_t strip) {
      double* const sums = partial.data + 2 * segment * channels + s.first(strip);
      segment_sums<T, CL, RELU>(s, g, x, k, a.slope, segment, strip, sums, sums + channels);
    };
    if (a.dx && s.stays_cached(2)) {
      return parallel(channels, 2 * s.samples * s.length, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
          for (int64_t t = 0; t < s.segments; ++t) add(t, c);
          finish(partial.data, c, c + 1);
          for (int64_t n = 0; n < s.samples; ++n) apply(n, c, 0, s.length);
        }
      });
    }
    parallel(s.segments * s.strips, s.elements(), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) add(t / s.strips, t % s.strips);
    });
    finish(partial.data, 0, channels);
  }
  if (a.dx) for_rows(a.walk, [&](int64_t n, int64_t j, int64_t start, int64_t length, int64_t) { apply(n, j, start, length); });
}

// ---- selection -------------------------------------------------------------------------------------------------------

void norm(const NormArgs& a) {
  with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    if (a.walk.channels_last) return a.slope == 0 ? norm_as<T, true, true>(a) : norm_as<T, true, false>(a);
    a.slope == 0 ? norm_as<T, false, true>(a) : norm_as<T, false, false>(a);
  });
}
void norm_grad(const NormGradArgs& a) {
  with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    if (a.walk.channels_last) return a.slope == 0 ? norm_grad_as<T, true, true>(a) : norm_grad_as<T, true, false>(a);
    a.slope == 0 ? norm_grad_as<T, false, true>(a) : norm_grad_as<T, false, false>(a);
  });
}

}  // namespace
}  // namespace drsn
