// The CPU kernels, written once over Vec and compiled once for each instruction set (see isa_*.cpp).
//
// A row is the contiguous run of the walk (drsn_kernels/layout.py): the L elements of one (n, c), or in channels_last
// the C elements of one (n, l). Row functions work on contiguous memory, 64 elements (one plane word) a step; an operand
// whose rows are strided is staged through a buffer of 512 elements, so no layout ever needs a copy of the tensor.
// In the row walk tau, dA and the sums are one scalar a row; in channels_last they are vectors along C.
//
// Everything lives in an anonymous namespace and nothing from the C++ standard library is instantiated: a template that
// two instruction sets share would be merged by the linker, and the portable build could run AVX-512 code.
#pragma once

#include "rows.h"

namespace drsn {
namespace {

// ---- walking ---------------------------------------------------------------------------------------------------------

// One operand's rows: where row (n, j) starts (j is c, or l in channels_last), and how its elements are spaced.
template <class T> struct Rows {
  T* base = nullptr;
  Strides st;
  bool channels_last = false, contiguous = true;

  Rows() = default;
  Rows(T* p, const Strides& strides, const Walk& w) : base(p), st(strides), channels_last(w.channels_last) {
    contiguous = !p || (channels_last ? st.c == 1 : st.dims == 0 || (st.dims == 1 && st.stride[0] == 1));
  }
  int64_t spatial(int64_t l) const {
    if (st.dims == 1) return l * st.stride[0];
    int64_t offset = 0;
    for (int d = st.dims - 1; d >= 0; --d) {
      offset += l % st.size[d] * st.stride[d];
      l /= st.size[d];
    }
    return offset;
  }
  T* row(int64_t n, int64_t j) const { return base + n * st.n + (channels_last ? spatial(j) : j * st.c); }

  // Calls f(element pointer, index) for `count` elements of a strided row from `start` on.
  template <class F> void each(T* row, int64_t start, int64_t count, const F& f) const {
    if (channels_last) {
      for (int64_t i = 0; i < count; ++i) f(row + (start + i) * st.c, i);
      return;
    }
    const int last = st.dims - 1;
    for (int64_t i = 0; i < count;) {
      T* p = row + spatial(start + i);
      const int64_t run = min64(count - i, st.size[last] - (start + i) % st.size[last]);
      for (int64_t r = 0; r < run; ++r) f(p + r * st.stride[last], i + r);
      i += run;
    }
  }
  // A contiguous view of elements [start, start + count) of a row: the row itself, or the buffer, filled.
  const T* fetch(T* row, int64_t start, int64_t count, T* buffer) const {
    if (!base) return nullptr;
    if (contiguous) return row + start;
    each(row, start, count, [&](const T* p, int64_t i) { buffer[i] = *p; });
    return buffer;
  }
  T* target(T* row, int64_t start, T* buffer) const { return contiguous ? row + start : buffer; }
  void put(T* row, int64_t start, int64_t count, const T* buffer) const {
    if (!contiguous) each(row, start, count, [&](T* p, int64_t i) { *p = buffer[i]; });
  }
};

template <class T> Rows<T> rows(const void* p, const Strides& st, const Walk& w) {
  return Rows<T>(static_cast<T*>(const_cast<void*>(p)), st, w);
}

// Calls piece(start, count) over a row part: as much as one accumulator takes where every operand is contiguous, else by
// what the buffers hold.
template <class F> DRSN_INLINE void pieces(bool contiguous, int64_t start, int64_t count, const F& piece) {
  const int64_t step = contiguous ? kRun : kChunk;
  for (int64_t i = 0; i < count; i += step) piece(start + i, min64(step, count - i));
}

// Runs row(n, j, start, count, plane offset in bytes) over the whole walk, long rows in segments. Indices are counted
// on, because a division costs as much as a vector or two of a short row.
template <class F> DRSN_INLINE void for_rows(const Walk& w, const F& row) {
  const int64_t across = w.channels_last ? w.l : w.c, length = w.channels_last ? w.c : w.l;
  const int64_t segments = max64(1, (length + kSegment - 1) / kSegment), row_bytes = w.row_bytes;
  parallel(w.n * across * segments, min64(length, kSegment), [&, row](int64_t begin, int64_t end) {
    int64_t r = begin / segments, segment = begin % segments, n = r / across, j = r % across;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t start = segment * kSegment;
      row(n, j, start, min64(kSegment, length - start), r * row_bytes + start / 8);
      if (++segment < segments) continue;
      segment = 0, ++r;
      if (++j == across) j = 0, ++n;
    }
  });
}

// The same, and out (N, C) = scale * the sums that row(..., S* sums) adds up: one number in the row walk, C numbers in
// channels_last. Single-writer partial sums over fixed segments, combined in double: the same bits for any thread count.
template <bool CL, class S, class F> DRSN_INLINE void sum_rows(const Walk& w, S* out, double scale, const F& row) {
  const int64_t samples = w.n, channels = w.c, length = w.l, row_bytes = w.row_bytes;
  const int64_t step = CL ? max64(kFlush, kSegment / max64(1, channels)) : kSegment;
  const int64_t segments = max64(1, (length + step - 1) / step);
  if constexpr (!CL) {
    Scratch<S> partial(segments > 1 ? samples * channels * segments : 0);
    S* const sums = segments > 1 ? partial.data : out;
    const S factor = segments > 1 ? S(1) : S(scale);
    parallel(samples * channels * segments, min64(length, kSegment), [&, row](int64_t begin, int64_t end) {
      int64_t r = begin / segments, segment = begin % segments, n = r / channels, c = r % channels;
      for (int64_t t = begin; t < end; ++t) {
        const int64_t start = segment * kSegment;
        S sum = 0;
        row(n, c, start, min64(kSegment, length - start), r * row_bytes + start / 8, &sum);
        sums[t] = sum * factor;
        if (++segment < segments) continue;
        segment = 0, ++r;
        if (++c == channels) c = 0, ++n;
      }
    });
    if (segments == 1) return;
    for (int64_t r = 0; r < samples * channels; ++r) {
      double sum = 0;
      for (int64_t s = 0; s < segments; ++s) sum += partial.data[r * segments + s];
      out[r] = S(sum * scale);
    }
  } else if (length == 1) {  // nothing to add up; element-wise thresholds come this way
    const int64_t across = (channels + kSegment - 1) / kSegment;
    parallel(samples * across, min64(channels, kSegment), [&, row](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t n = t / across, start = t % across * kSegment, count = min64(kSegment, channels - start);
        S* const to = out + n * channels;
        std::memset(to + start, 0, size_t(count) * sizeof(S));
        row(n, int64_t(0), start, count, n * row_bytes + start / 8, to);
        for (int64_t c = start; c < start + count; ++c) to[c] *= S(scale);
      }
    });
  } else {
    Scratch<double> partial(samples * segments * channels);
    parallel(samples * segments, step * channels, [&, row](int64_t begin, int64_t end) {
      Scratch<S> sums(channels);
      sums.clear(channels);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t n = t / segments, first = t % segments * step, last = min64(length, first + step);
        double* total = partial.data + t * channels;
        std::memset(total, 0, size_t(channels) * sizeof(double));
        for (int64_t l = first; l < last; ++l) {
          row(n, l, int64_t(0), channels, (n * length + l) * row_bytes, sums.data);
          if ((l - first) % kFlush == kFlush - 1 || l == last - 1) {
            for (int64_t c = 0; c < channels; ++c) {
              total[c] += sums.data[c];
              sums.data[c] = 0;
            }
          }
        }
      }
    });
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t c = 0; c < channels; ++c) {
        double sum = 0;
        for (int64_t s = 0; s < segments; ++s) sum += partial.data[(n * segments + s) * channels + c];
        out[n * channels + c] = S(sum * scale);
      }
    }
  }
}

// ---- kernels ---------------------------------------------------------------------------------------------------------

template <class T, bool CL, Sum SUM, bool PLANES> void reduce_as(const ReduceArgs& a) {
  using S = typename Compute<T>::type;
  const auto x = rows<T>(a.x, a.xs, a.walk), times = rows<T>(a.times, a.ts, a.walk);
  const bool contiguous = x.contiguous && times.contiguous;
  uint8_t *const sign = a.sign, *const nonzero = a.nonzero;
  const int64_t bytes = a.walk.row_bytes;
  const auto any = [&](T* x_row, T* times_row, int64_t start, int64_t count, int64_t plane,
                       S* sums) __attribute__((noinline)) {
    alignas(64) T x_buffer[kChunk], times_buffer[SUM == Sum::products ? kChunk : 1];
    pieces(contiguous, start, count, [&](int64_t i, int64_t len) {
      const int64_t at = plane + (i - start) / 8;
      reduce_row<false, T, CL, SUM, PLANES>(x.fetch(x_row, i, len, x_buffer),
                                            SUM == Sum::products ? times.fetch(times_row, i, len, times_buffer) : nullptr, len,
                                            CL ? sums + i : sums, offset(sign, at), offset(nonzero, at), bytes - i / 8);
    });
  };
  const double scale = SUM == Sum::products ? 1.0 : 1.0 / double(a.walk.l);
  sum_rows<CL>(a.walk, static_cast<S*>(a.out), scale,
               [=, &x, &times, &any](int64_t n, int64_t j, int64_t start, int64_t count, int64_t plane, S* sums) DRSN_LAMBDA {
                 T *const x_row = x.row(n, j), *const times_row = SUM == Sum::products ? times.row(n, j) : nullptr;
                 if (start || count > 64 || !contiguous) return any(x_row, times_row, start, count, plane, sums);
                 reduce_row<true, T, CL, SUM, PLANES>(x_row, times_row, count, sums, offset(sign, plane), offset(nonzero, plane),
                                                      bytes);
               });
}

template <class T, bool CL, Map MAP, bool RESIDUAL, bool SHIFT> void map_as(const MapArgs& a) {
  using S = typename Compute<T>::type;
  const auto x = rows<T>(a.x, a.xs, a.walk), y = rows<T>(a.y, a.ys, a.walk), res = rows<T>(a.residual, a.rs, a.walk);
  const bool contiguous = x.contiguous && y.contiguous && res.contiguous;
  // channels_last reads t as a vector along C; where it is not one in memory, it is spread out first
  const bool spread = CL && a.t_c != 1;
  Scratch<S> wide(spread ? a.walk.n * a.walk.c : 0);
  const S* factors = static_cast<const S*>(a.t);
  int64_t t_n = a.t_n;
  const int64_t t_c = a.t_c, bytes = a.walk.row_bytes;
  if (spread) {
    for (int64_t n = 0; n < a.walk.n; ++n)
      for (int64_t c = 0; c < a.walk.c; ++c) wide.data[n * a.walk.c + c] = factors[n * t_n + c * t_c];
    factors = wide.data;
    t_n = a.walk.c;
  }
  const int64_t channels = a.walk.c;
  Scratch<S> shares(SHIFT ? a.walk.n * channels : 0);  // shift / L; -0, which changes nothing, where there is none
  if constexpr (SHIFT) {
    const S *const shift = static_cast<const S*>(a.shift), length = S(a.walk.l);
    for (int64_t i = 0; i < a.walk.n * channels; ++i) shares.data[i] = shift ? shift[i] / length : S(-0.0);
  }
  const S* const share = shares.data;
  const double inside = a.inside, factor = a.offset;
  uint8_t *const kept = a.kept, *const sign = a.sign, *const nonzero = a.nonzero;
  const auto any = [&](T* x_row, T* y_row, T* res_row, const S* t, const S* shift, int64_t start, int64_t count,
                       int64_t plane) __attribute__((noinline)) {
    alignas(64) T x_buffer[kChunk], y_buffer[kChunk], res_buffer[kChunk];
    pieces(contiguous, start, count, [&](int64_t i, int64_t len) {
      const int64_t at = plane + (i - start) / 8;
      map_row<false, T, CL, MAP, RESIDUAL, SHIFT>(x.fetch(x_row, i, len, x_buffer), y.target(y_row, i, y_buffer),
                                                  CL ? t + i : t, res.fetch(res_row, i, len, res_buffer),
                                                  SHIFT && CL ? shift + i : shift, inside, factor, len, offset(kept, at),
                                                  offset(sign, at), offset(nonzero, at), bytes - i / 8);
      y.put(y_row, i, len, y_buffer);
    });
  };
  for_rows(a.walk, [=, &x, &y, &res, &any](int64_t n, int64_t j, int64_t start, int64_t count,
                                           int64_t plane) DRSN_LAMBDA {
    const S* t = factors + n * t_n + (CL ? 0 : j * t_c);
    const S* shift = SHIFT ? share + n * channels + (CL ? 0 : j) : nullptr;
    constexpr bool optional = MAP == Map::pieces;  // no code of its own with and without a residual, nor for short rows
    T *const x_row = x.row(n, j), *const y_row = y.row(n, j);
    T* const res_row = RESIDUAL && (!optional || res.base) ? res.row(n, j) : nullptr;
    if (optional || start || count > 64 || !contiguous) return any(x_row, y_row, res_row, t, shift, start, count, plane);
    if constexpr (!optional)
      map_row<true, T, CL, MAP, RESIDUAL, SHIFT>(x_row, y_row, t, res_row, shift, inside, factor, count, offset(kept, plane),
                                                 offset(sign, plane), offset(nonzero, plane), bytes);
  });
}

template <class T, bool CL, bool G, bool DA, bool DX, bool DTAU, bool LEAKY> void grad_as(const GradArgs& a) {
  using S = typename Compute<T>::type;
  const auto g = rows<T>(a.g, a.gs, a.walk), dx = rows<T>(a.dx, a.ds, a.walk);
  const bool contiguous = g.contiguous && dx.contiguous;
  const int64_t channels = a.walk.c, bytes = a.walk.row_bytes;
  const double inside = a.inside;
  const S *const da = static_cast<const S*>(a.da), length = S(a.walk.l);
  Scratch<S> scaled(DA && CL ? a.walk.n * channels : 0);  // dA / L, in the row walk divided a row at a time
  if constexpr (DA && CL) {
    for (int64_t i = 0; i < a.walk.n * channels; ++i) scaled.data[i] = da[i] / length;
  }
  const S* const share = scaled.data;
  const uint8_t *const kept = a.kept, *const sign = a.sign, *const nonzero = a.nonzero;
  const auto any = [&](T* g_row, T* dx_row, const S* direct, int64_t start, int64_t count, int64_t plane,
                       S* sums) __attribute__((noinline)) {
    alignas(64) T g_buffer[kChunk], dx_buffer[kChunk];
    pieces(contiguous, start, count, [&](int64_t i, int64_t len) {
      const int64_t at = plane + (i - start) / 8;
      grad_row<false, T, CL, G, DA, DX, DTAU, LEAKY>(g.fetch(g_row, i, len, g_buffer), DX ? dx.target(dx_row, i, dx_buffer) : nullptr,
                                       CL ? direct + i : direct, CL && DTAU ? sums + i : sums, inside, len, offset(kept, at),
                                       offset(sign, at), offset(nonzero, at), bytes - i / 8);
      if constexpr (DX) dx.put(dx_row, i, len, dx_buffer);
    });
  };
  const auto row = [=, &g, &dx, &any](int64_t n, int64_t j, int64_t start, int64_t count, int64_t plane,
                                      S* sums) DRSN_LAMBDA {
    T *const g_row = G ? g.row(n, j) : nullptr, *const dx_row = DX ? dx.row(n, j) : nullptr;
    const S one = DA && !CL ? da[n * channels + j] / length : S(0);
    const S* direct = DA && CL ? share + n * channels : &one;
    if (LEAKY || start || count > 64 || !contiguous) return any(g_row, dx_row, direct, start, count, plane, sums);
    if constexpr (!LEAKY)
      grad_row<true, T, CL, G, DA, DX, DTAU, LEAKY>(g_row, dx_row, direct, sums, inside, count, offset(kept, plane),
                                                    offset(sign, plane), offset(nonzero, plane), bytes);
  };
  if constexpr (DTAU) {
    sum_rows<CL>(a.walk, static_cast<S*>(a.dtau), -a.offset, row);
  } else {
    for_rows(a.walk, [row](int64_t n, int64_t j, int64_t start, int64_t count, int64_t plane) DRSN_LAMBDA {
      row(n, j, start, count, plane, nullptr);
    });
  }
}

// ---- selection -------------------------------------------------------------------------------------------------------

template <class F> void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
  }
}

template <class T, bool CL> void reduce_walk(const ReduceArgs& a) {
  switch (a.sum) {
    case Sum::magnitudes: return a.sign ? reduce_as<T, CL, Sum::magnitudes, true>(a) : reduce_as<T, CL, Sum::magnitudes, false>(a);
    case Sum::values: return reduce_as<T, CL, Sum::values, false>(a);
    case Sum::products: return reduce_as<T, CL, Sum::products, false>(a);
  }
}
template <class T, bool CL> void map_walk(const MapArgs& a) {
  switch (a.map) {
    case Map::soft: return a.residual ? map_as<T, CL, Map::soft, true, false>(a) : map_as<T, CL, Map::soft, false, false>(a);
    case Map::pieces: return map_as<T, CL, Map::pieces, true, false>(a);
    case Map::scale: return a.residual ? map_as<T, CL, Map::scale, true, false>(a) : map_as<T, CL, Map::scale, false, true>(a);
  }
}
template <class T, bool CL, bool LEAKY> void grad_of(const GradArgs& a) {
  if (a.dtau) return grad_as<T, CL, true, false, true, true, LEAKY>(a);
  return a.da ? grad_as<T, CL, true, true, true, false, LEAKY>(a) : grad_as<T, CL, true, false, true, false, LEAKY>(a);
}
template <class T, bool CL> void grad_walk(const GradArgs& a) {
  if (!a.g) return grad_as<T, CL, false, true, true, false, false>(a);
  if (!a.dx) return grad_as<T, CL, true, false, false, true, false>(a);
  a.inside == 0 ? grad_of<T, CL, false>(a) : grad_of<T, CL, true>(a);
}

void reduce(const ReduceArgs& a) {
  with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    a.walk.channels_last ? reduce_walk<T, true>(a) : reduce_walk<T, false>(a);
  });
}
void map(const MapArgs& a) {
  with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    a.walk.channels_last ? map_walk<T, true>(a) : map_walk<T, false>(a);
  });
}
void grad(const GradArgs& a) {
  with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    a.walk.channels_last ? grad_walk<T, true>(a) : grad_walk<T, false>(a);
  });
}

}  // namespace
}  // namespace drsn
