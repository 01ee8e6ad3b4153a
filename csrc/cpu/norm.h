// Batch normalisation and an activation in one, forward and backward.
//
//   y  = act(a (x - mean) + bias)            a = weight rstd; act(z) = z where z > 0 or NaN, slope z elsewhere
//   g' = act'(z) g                           z is computed from x again: nothing but x and two numbers a channel is kept
//   dx = a (g' - sum g' / M - (x - mean) rstd sum g' (x - mean) rstd / M)
//
// Statistics: sums of x - centre and of its square over a chunk of at most 4096 elements of a channel, centre being the mean
// so far, and once more about the chunk's own mean where that was far off: nothing cancels. Chunks are merged in double,
// first those of a segment, then segments, in a fixed order (Chan, Golub, LeVeque 1983): the same bits for any number of
// threads.
//
// A strip is what is summed together: in the row walk the rows of up to 16 channels, which lie one behind the other (a
// channel alone would take 16 to 64 KiB steps, all of them to the same lines of the caches), in channels_last four vectors
// of channels.
#pragma once

#include "kernels.h"

namespace drsn {
namespace {

constexpr size_t kLine = 64;        // bytes of a cache line
constexpr int kStripRows = 64;      // rows of a chunk, at most
constexpr int kStripChannels = 16;  // in the row walk
constexpr int kSegmentChunks = 4;   // chunks merged before segments are
constexpr int kStripUnroll = kUnroll > 1 ? 4 : 1;

template <class V> DRSN_INLINE V valid(V v, int lanes) {  // 0 beyond the end of a row
  return lanes == V::W ? v : v.keep(V::mask((uint64_t(1) << lanes) - 1));
}

// act(z), or what it lets through of a gradient. ReLU is slope 0, and no code of its own: 0 * -inf is masked.
template <class V> DRSN_INLINE V activate(V z, V slope) {
  return V::select(V::not_le(z, V::set(0)), z, (z * slope).keep(slope.nonzero()));
}
template <class V> DRSN_INLINE V activation_grad(V g, V z, V slope) {
  return V::select(V::not_le(z, V::set(0)), g, (g * slope).keep(slope.nonzero()));
}

// What is summed where: chunks of rows, segments of chunks, strips of channels.
template <class T, bool CL> struct Strips {
  using S = typename Compute<T>::type;
  using V = Vec<S>;
  static constexpr int kWide = CL ? 4 * V::W : kStripChannels;  // channels of a strip, at most

  const int64_t samples, channels, length;
  int64_t rows, pieces, across, strips, chunks, segments;  // rows: of a chunk, at most; pieces: of a long row

  explicit Strips(const Walk& w) : samples(w.n), channels(w.c), length(w.l) {
    pieces = CL ? 1 : max64(1, (length + kRun - 1) / kRun);
    rows = CL ? kStripRows : pieces > 1 ? 1 : min64(kStripRows, kRun / max64(1, length));
    across = CL ? kWide : max64(1, min64(kWide, kRun * 2 / max64(1, length)));
    strips = (channels + across - 1) / across;
    chunks = CL ? (samples * length + rows - 1) / rows : pieces > 1 ? samples * pieces : (samples + rows - 1) / rows;
    segments = (chunks + kSegmentChunks - 1) / kSegmentChunks;
  }
  int64_t first(int64_t strip) const { return strip * across; }  // channel
  int width(int64_t strip) const { return int(min64(across, channels - first(strip))); }
  int64_t elements() const { return kSegmentChunks * rows * (CL ? kWide : across * min64(length, kRun)); }  // of a segment
  double count() const { return double(samples) * double(length); }  // of a channel
  // Elements of a channel in chunks [k, last).
  double count(int64_t k, int64_t last) const {
    double n = 0;
    for (; k < last; ++k) {
      if (CL) n += double(min64(rows, samples * length - k * rows));
      else if (pieces == 1) n += double(min64(rows, samples - k * rows)) * double(length);
      else n += double(min64(kRun, length - k % pieces * kRun));
    }
    return n;
  }
  int64_t last(int64_t segment) const { return min64(chunks, (segment + 1) * kSegmentChunks); }

  // SUMS sums, by channel, over a chunk of one strip. add(sums, j, a, b, lanes) adds a vector of the operands to sums[0] and
  // on; j is the channel in the strip, in channels_last the vector.
  template <int SUMS, bool TWO, class F>
  DRSN_INLINE void sum(const Rows<T>& a, const Rows<T>& b, int64_t k, int64_t strip, S (&out)[SUMS][kWide], const F& add) const {
    alignas(64) T a_buffer[kChunk], b_buffer[TWO ? kChunk : 1];
    const int64_t from = first(strip);
    const int channels_here = width(strip);
    const bool contiguous = a.contiguous && (!TWO || b.contiguous);
    if constexpr (CL) {
      V total[4][SUMS];
      for (auto& one : total) zero(one);
      const int64_t end = min64(samples * length, (k + 1) * rows);
      // Two loops: with tests for the end of a strip in it, the sums of a full one would not stay in registers.
      const auto over_rows = [&](auto part) DRSN_LAMBDA {
        int64_t n = k * rows / length, l = k * rows % length;
        for (int64_t r = k * rows; r < end; ++r) {
          const T* const p = a.fetch(a.row(n, l), from, channels_here, a_buffer);
          const T* const q = TWO ? b.fetch(b.row(n, l), from, channels_here, b_buffer) : p;
          // The next strip's part of the row, as no prefetcher follows strips down the rows: a training step of
          // (64, 512, 7, 7) and (128, 512, 4, 4) takes 0.7 to 0.85 of the time.
          for (size_t e = 0; contiguous && e < kWide * sizeof(T); e += kLine) {
            __builtin_prefetch(reinterpret_cast<const char*>(p + kWide) + e);
            if (TWO) __builtin_prefetch(reinterpret_cast<const char*>(q + kWide) + e);
          }
          int left = channels_here;
#pragma GCC unroll kStripUnroll
          for (int v = 0; v < 4; ++v, left -= V::W) {
            const int lanes = part.full || left >= V::W ? V::W : left;
            if (part.full || left > 0)
              add(total[v], v, load<V>(p + v * V::W, lanes), load<V>(q + v * V::W, lanes), lanes);
          }
          if (++l == length) l = 0, ++n;
        }
      };
      if (channels_here == kWide) {
        over_rows(Full{});
      } else {
        over_rows(Tail{});
      }
      for (int v = 0; v < 4; ++v)
        for (int s = 0; s < SUMS; ++s) total[v][s].store(out[s] + v * V::W);
    } else {
      V total[kWide][SUMS];
      for (auto& one : total) zero(one);
      const int64_t n = pieces == 1 ? k * rows : k / pieces, end = pieces == 1 ? min64(samples, n + rows) : n + 1;
      const int64_t start = pieces == 1 ? 0 : k % pieces * kRun, count = min64(kRun, length - start);
      for (int64_t m = n; m < end; ++m)
        for (int j = 0; j < channels_here; ++j) {
          T *const a_row = a.row(m, from + j), *const b_row = TWO ? b.row(m, from + j) : a_row;
          V parts[4][SUMS];
          for (auto& one : parts) zero(one);
          drsn::pieces(contiguous, start, count, [&](int64_t i, int64_t len) DRSN_LAMBDA {
            const T* const p = a.fetch(a_row, i, len, a_buffer);
            const T* const q = TWO ? b.fetch(b_row, i, len, b_buffer) : p;
            int64_t e = 0;
            for (; e + 4 * V::W <= len; e += 4 * V::W)
#pragma GCC unroll kStripUnroll
              for (int v = 0; v < 4; ++v) add(parts[v], j, V::load(p + e + v * V::W), V::load(q + e + v * V::W), V::W);
            for (; e < len; e += V::W) {
              const int lanes = len - e < V::W ? int(len - e) : V::W;
              add(parts[0], j, load<V>(p + e, lanes), load<V>(q + e, lanes), lanes);
            }
          });
          for (int s = 0; s < SUMS; ++s)
            total[j][s] = total[j][s] + ((parts[0][s] + parts[1][s]) + (parts[2][s] + parts[3][s]));
        }
      for (int j = 0; j < channels_here; ++j)
        for (int s = 0; s < SUMS; ++s) out[s][j] = total[j][s].sum();
    }
  }
  // Of numbers by channel of the strip, the vector that `add` needs.
  static DRSN_INLINE V at(const S* numbers, int j) { return CL ? V::load(numbers + j * V::W) : V::set(numbers[j]); }

 private:
  template <int SUMS> static DRSN_INLINE void zero(V (&sums)[SUMS]) {
    for (auto& one : sums) one = V::set(0);
  }
};

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

// mean and M2, by channel, of one segment and strip.
template <class T, bool CL>
void segment_moments(const Strips<T, CL>& s, const Rows<T>& x, int64_t segment, int64_t strip, double* mean, double* m2) {
  using S = typename Compute<T>::type;
  using V = Vec<S>;
  constexpr int kWide = Strips<T, CL>::kWide;
  alignas(64) S centre[kWide] = {}, sums[2][kWide];
  double chunk_mean[kWide], chunk_m2[kWide], n = 0;
  const int width = s.width(strip);
  for (int64_t k = segment * kSegmentChunks; k < s.last(segment); ++k) {
    const double count = s.count(k, k + 1);
    if (n == 0) {  // the first element, until there is a mean
      const int64_t row = CL ? k * s.rows : 0, at = CL ? row / s.length : s.pieces == 1 ? k * s.rows : k / s.pieces;
      for (int j = 0; j < width; ++j) {
        const int64_t c = s.first(strip) + j;
        T slot;
        centre[j] = widen(*x.fetch(x.row(at, CL ? row % s.length : c), CL ? c : k % s.pieces * kRun, 1, &slot));
      }
    }
    for (bool again = true, once = false; again; once = true) {
      s.template sum<2, false>(x, x, k, strip, sums, [&](V* sum, int j, V a, V, int lanes) DRSN_LAMBDA {
        const V d = valid(a - s.at(centre, j), lanes);
        sum[0] = sum[0] + d;
        sum[1] = V::fma(d, d, sum[1]);
      });
      again = false;
      for (int j = 0; j < width; ++j) {
        const double beside = sums[0][j] / count;
        chunk_mean[j] = centre[j] + beside;
        chunk_m2[j] = sums[1][j] - sums[0][j] * beside;
        if (chunk_m2[j] < 0) chunk_m2[j] = 0;
        again |= !(sums[1][j] <= 8 * chunk_m2[j]);  // three bits are gone, or NaN
      }
      if (!again || once) break;
      for (int j = 0; j < width; ++j) centre[j] = S(chunk_mean[j]);
    }
    for (int j = 0; j < width; ++j) {
      if (n == 0) mean[j] = chunk_mean[j], m2[j] = chunk_m2[j];
      else merge(n, mean[j], m2[j], count, chunk_mean[j], chunk_m2[j]);
      centre[j] = S(mean[j]);
    }
    n += count;
  }
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

template <class T, bool CL> void norm_as(const NormArgs& args) {
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

  const auto finish = [&](const double* moments) {  // (segments, 2, C)
    for (int64_t c = 0; c < channels; ++c) {
      double n = 0, mean = 0, m2 = 0;
      for (int64_t g = 0; g < s.segments; ++g) {
        const double count = s.count(g * kSegmentChunks, s.last(g));
        const double here = moments[2 * g * channels + c], within = moments[(2 * g + 1) * channels + c];
        if (n == 0) mean = here, m2 = within;  // merged, the square of a large mean would be infinite
        else merge(n, mean, m2, count, here, within);
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
        store(activate(z, slope), to + e, lanes);
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
    parallel(s.segments * s.strips, s.elements(), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) measure(t / s.strips, t % s.strips);
    });
    finish(moments.data);
  }
  if (a.y) for_rows(a.walk, [&](int64_t n, int64_t j, int64_t start, int64_t count, int64_t) { apply(n, j, start, count); });
}

// ---- backward --------------------------------------------------------------------------------------------------------

// sum g' and sum g' (x - mean), by channel, of one segment and strip.
template <class T, bool CL>
void segment_sums(const Strips<T, CL>& s, const Rows<T>& g, const Rows<T>& x, const Coefficients<typename Compute<T>::type>& k,
                  double slope, int64_t segment, int64_t strip, double* sums, double* products) {
  using S = typename Compute<T>::type;
  using V = Vec<S>;
  constexpr int kWide = Strips<T, CL>::kWide;
  alignas(64) S mean[kWide] = {}, a[kWide] = {}, bias[kWide] = {}, found[2][kWide];
  const int64_t first = s.first(strip);
  const int width = s.width(strip);
  for (int j = 0; j < width; ++j) {
    mean[j] = k.mean[first + j], a[j] = k.a[first + j], bias[j] = k.bias[first + j];
    sums[j] = products[j] = 0;
  }
  const V slopes = V::set(S(slope));
  for (int64_t c = segment * kSegmentChunks; c < s.last(segment); ++c) {
    s.template sum<2, true>(g, x, c, strip, found, [&](V* sum, int j, V g_here, V x_here, int) DRSN_LAMBDA {
      const V centred = x_here - s.at(mean, j);
      const V passed = activation_grad(g_here, V::fma(centred, s.at(a, j), s.at(bias, j)), slopes);
      sum[0] = sum[0] + passed;
      sum[1] = V::fma(passed, centred, sum[1]);
    });
    for (int j = 0; j < width; ++j) sums[j] += found[0][j], products[j] += found[1][j];
  }
}

template <class T, bool CL> void norm_grad_as(const NormGradArgs& args) {
  using S = typename Compute<T>::type;
  using V = Vec<S>;
  const NormGradArgs a = args;
  const Strips<T, CL> s(a.walk);
  const auto g = rows<T>(a.g, a.gs, a.walk), x = rows<T>(a.x, a.xs, a.walk), dx = rows<T>(a.dx, a.ds, a.walk);
  const bool contiguous = g.contiguous && x.contiguous && dx.contiguous, batch = args.batch;
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
  const auto finish = [&](const double* partial) {  // (segments, 2, C)
    for (int64_t c = 0; c < channels; ++c) {
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
        const V passed = activation_grad(load<V>(g_from + e, lanes), V::fma(centred, a, bias.at(e, lanes)), slope);
        // of given statistics dx is finite where x is not
        const V direct = batch ? passed - shifted.at(e, lanes) - centred * tilted.at(e, lanes) : passed;
        store(a * direct, to + e, lanes);
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
      segment_sums<T, CL>(s, g, x, k, a.slope, segment, strip, sums, sums + channels);
    };
    parallel(s.segments * s.strips, s.elements(), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) add(t / s.strips, t % s.strips);
    });
    finish(partial.data);
  }
  if (a.dx) for_rows(a.walk, [&](int64_t n, int64_t j, int64_t start, int64_t length, int64_t) { apply(n, j, start, length); });
}

// ---- selection -------------------------------------------------------------------------------------------------------

void norm(const NormArgs& a) {
  with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    a.walk.channels_last ? norm_as<T, true>(a) : norm_as<T, false>(a);
  });
}
void norm_grad(const NormGradArgs& a) {
  with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    a.walk.channels_last ? norm_grad_as<T, true>(a) : norm_grad_as<T, false>(a);
  });
}

}  // namespace
}  // namespace drsn
