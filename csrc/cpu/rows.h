// The row functions of the CPU kernels: contiguous memory, 64 elements (one plane word) a step. kernels.h walks tensors
// with them and says why nothing here may instantiate the C++ standard library.
#pragma once

#include <cstdlib>

#include "api.h"

namespace drsn {
namespace {

template <class T> struct Compute {
  using type = float;
};
template <> struct Compute<double> {
  using type = double;
};

constexpr int64_t kSegment = 32768;  // elements that one sum runs over before partial sums take over; fixed, so that
                                     // results do not depend on the number of threads
constexpr int64_t kGrain = 16384;    // elements worth waking a second thread for (torch uses 32768)
constexpr int64_t kRun = 4096;       // elements summed in one float accumulator (64 a lane): 32768 of them cost 1e-5
constexpr int kChunk = 512;          // elements of a staging buffer, a multiple of 64
constexpr int kFlush = 64;           // channels_last rows summed in float before they go to double

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
template <class P> inline P* offset(P* p, int64_t bytes) { return p ? p + bytes : nullptr; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Memory of one call, uninitialised. Scratch of a thread is a stack that the thread keeps, up to 16 MiB: malloc maps blocks
// of this size anew, or hands the top of the heap back, and page faults and unmapping beside a second thread cost as much
// as a product of 128x256x256. What does not fit comes from malloc, and makes room for the next call.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kScratchKept = 0;  // so that an access beyond the end is seen
#else
constexpr size_t kScratchKept = 16 << 20;
#endif
struct ScratchStack {
  char* base = nullptr;
  size_t size = 0, used = 0, needed = 0;
  ~ScratchStack() { std::free(base); }
};
inline ScratchStack& scratch_stack() {
  static thread_local ScratchStack stack;
  return stack;
}

template <class S> struct Scratch {
  S* data;
  explicit Scratch(int64_t n) {
    ScratchStack& stack = scratch_stack();
    bytes = (size_t(n) * sizeof(S) + 127) & ~size_t(63);
    if (stack.used == 0 && stack.needed > stack.size) {
      std::free(stack.base);
      stack.base = static_cast<char*>(std::aligned_alloc(64, stack.needed));
      stack.size = stack.base ? stack.needed : 0;
    }
    fits = stack.used + bytes <= stack.size;
    data = static_cast<S*>(fits ? static_cast<void*>(stack.base + stack.used) : std::malloc(bytes));
    if (!data) out_of_memory();
    stack.used += bytes;
    if (stack.used <= kScratchKept && stack.used > stack.needed) stack.needed = stack.used;
  }
  ~Scratch() {
    scratch_stack().used -= bytes;
    if (!fits) std::free(data);
  }
  void clear(int64_t n) { std::memset(static_cast<void*>(data), 0, size_t(n) * sizeof(S)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

 private:
  size_t bytes;
  bool fits;
};

template <class F> void parallel(int64_t tasks, int64_t elements_per_task, const F& f) {
  if (tasks <= 0) return;  // an empty tensor; the walks below divide by its sizes
  const int64_t grain = max64(1, kGrain / max64(1, elements_per_task));
  if (!parallel_for || tasks <= grain) return f(int64_t(0), tasks);
  struct Shared {
    const F& f;
    int failed;
  } shared{f, 0};
  const int32_t error = parallel_for(
      0, tasks, grain,
      [](int64_t begin, int64_t end, void* context) {
        auto& s = *static_cast<Shared*>(context);
        try {
          s.f(begin, end);
        } catch (...) {  // a thread of the pool must not throw; nothing but memory can be missing
          __atomic_store_n(&s.failed, 1, __ATOMIC_RELAXED);
        }
      },
      &shared);
  if (error) f(int64_t(0), tasks);  // torch can only have refused before it started
  if (shared.failed) out_of_memory();
}

// ---- plane words -----------------------------------------------------------------------------------------------------

inline uint64_t get_word(const uint8_t* p, int64_t bytes) {
  if (bytes >= 8) {
    uint64_t w;
    std::memcpy(&w, p, 8);
    return w;
  }
  uint64_t w = p[0];
  if (bytes >= 2) w |= uint64_t(p[1]) << 8;
  if (bytes >= 4) w |= uint64_t(p[2]) << 16 | uint64_t(p[3]) << 24;
  return w;
}

inline void put_word(uint8_t* p, int64_t bytes, uint64_t w) {
  if (bytes >= 8) {
    std::memcpy(p, &w, 8);
  } else if (bytes == 4) {
    std::memcpy(p, &w, 4);
  } else if (bytes == 2) {
    std::memcpy(p, &w, 2);
  } else {
    std::memcpy(p, &w, 1);
  }
}

#define DRSN_LAMBDA __attribute__((always_inline))

// Calls block(Full or Tail, first element, elements) for the blocks of 64 elements of a row and what is left of it.
// The two are compiled apart: the full one has no lane counts, and its accumulators stay in registers.
template <bool B> struct Flag {
  static constexpr bool value = B;
};
struct Full {
  static constexpr bool full = true;
};
struct Tail {
  static constexpr bool full = false;
};
template <bool SHORT, class F> DRSN_INLINE void each_block(int64_t n, const F& block) {
  int64_t i = 0;
  if constexpr (!SHORT)
    for (; i + 64 <= n; i += 64) block(Full{}, i, 64);
  if (i < n) block(Tail{}, i, int(n - i));
}

// Calls step(accumulator, first element, lanes) for the vectors of a block; lanes is W but for the last of a tail.
template <class V, class Part, class F> DRSN_INLINE void each_vector(Part, int count, const F& step) {
  if constexpr (Part::full) {
#pragma GCC unroll kUnroll
    for (int v = 0; v < 64 / V::W; ++v) step(v % 4, v * V::W, V::W);
  } else {
    for (int j = 0; j < count; j += V::W) step(0, j, count - j < V::W ? count - j : V::W);
  }
}

// Calls step(first element, lanes) for the vectors of a row.
template <class V, class F> DRSN_INLINE void over_row(int64_t count, const F& step) {
  int64_t i = 0;
  for (; i + V::W <= count; i += V::W) step(i, V::W);
  if (i < count) step(i, int(count - i));
}

template <class Part> DRSN_INLINE uint64_t word(Part, const uint8_t* p, int64_t bytes) {
  return get_word(p, Part::full ? 8 : bytes);
}

template <class V, class T> DRSN_INLINE V load(const T* p, int lanes) {
  return lanes == V::W ? V::load(p) : V::load(p, lanes);
}
template <class V, class T> DRSN_INLINE void store(V v, T* p, int lanes) {
  if (lanes == V::W) {
    v.store(p);
  } else {
    v.store(p, lanes);
  }
}

// The per-row scalar of the row walk, or the vector along C of channels_last.
template <bool CL, class V, class S> DRSN_INLINE V coefficient(const S* p, int64_t i, int lanes) {
  if constexpr (CL) return load<V>(p + i, lanes);
  return V::set(*p);
}

// Sums: four independent accumulators in the row walk, an array along C in channels_last.
template <bool CL, class V, class S> struct Sums {
  V acc[4];
  S* out;
  DRSN_INLINE explicit Sums(S* p) : out(p) {
    for (auto& a : acc) a = V::set(0);
  }
  DRSN_INLINE void add(int k, int64_t i, int lanes, V value) {
    if constexpr (CL) {
      store(load<V>(out + i, lanes) + value, out + i, lanes);
    } else {
      acc[k] = acc[k] + value;
    }
  }
  DRSN_INLINE void finish() {
    if constexpr (!CL) *out += ((acc[0] + acc[1]) + (acc[2] + acc[3])).sum();
  }
};

// ---- rows: SHORT ones, of at most 64 elements, go inline into the walk; longer ones are called ------------------------

template <bool SHORT, class T, bool CL, Sum SUM, bool PLANES>
DRSN_INLINE void reduce_row(const T* x, const T* times, int64_t n, typename Compute<T>::type* sums, uint8_t* sign, uint8_t* nonzero, int64_t bytes) {
  using V = Vec<typename Compute<T>::type>;
  Sums<CL, V, typename Compute<T>::type> total(sums);
  each_block<SHORT>(n, [&](auto part, int64_t i, int count) DRSN_LAMBDA {
    uint64_t s = 0, z = 0;
    each_vector<V>(part, count, [&](int k, int j, int lanes) DRSN_LAMBDA {
      const V a = load<V>(x + i + j, lanes);
      if constexpr (SUM == Sum::magnitudes) total.add(k, i + j, lanes, a.abs());
      if constexpr (SUM == Sum::values) total.add(k, i + j, lanes, a);
      if constexpr (SUM == Sum::products) total.add(k, i + j, lanes, a * load<V>(times + i + j, lanes));
      if constexpr (PLANES) {
        s |= V::bits(a.negative()) << j;
        z |= V::bits(a.nonzero()) << j;
      }
    });
    if constexpr (PLANES) {
      put_word(sign + i / 8, part.full ? 8 : bytes - i / 8, s);
      put_word(nonzero + i / 8, part.full ? 8 : bytes - i / 8, z);
    }
  });
  total.finish();
}

// inside and offset: of Map::pieces.
template <bool SHORT, class T, bool CL, Map MAP, bool RESIDUAL, bool SHIFT>
DRSN_INLINE void map_row(const T* x, T* y, const typename Compute<T>::type* factors, const T* residual,
               const typename Compute<T>::type* shift, double inside, double offset, int64_t n, uint8_t* kept, uint8_t* sign,
               uint8_t* nonzero, int64_t bytes) {
  using S = typename Compute<T>::type;
  using V = Vec<S>;
  each_block<SHORT>(n, [&](auto part, int64_t i, int count) DRSN_LAMBDA {
    uint64_t k = 0, s = 0, z = 0;
    const auto vectors = [&](auto with_nonzero) DRSN_LAMBDA {
      each_vector<V>(part, count, [&](int, int j, int lanes) DRSN_LAMBDA {
        const V a = load<V>(x + i + j, lanes), t = coefficient<CL, V>(factors, i + j, lanes);
        V out = a * t;
        if constexpr (MAP != Map::scale) {
          decltype(a.nonzero()) above;
          if constexpr (MAP == Map::soft) out = soft_threshold(a, t, above);
          if constexpr (MAP == Map::pieces) out = piecewise(a, t, V::set(S(inside)), V::set(S(offset)), above);
          k |= V::bits(above) << j;
          s |= V::bits(a.negative()) << j;
          if constexpr (decltype(with_nonzero)::value) z |= V::bits(a.nonzero()) << j;
        }
        if constexpr (SHIFT) out = out + coefficient<CL, V>(shift, i + j, lanes);
        if (RESIDUAL && (MAP != Map::pieces || residual)) out = out + load<V>(residual + i + j, lanes);
        store(out, y + i + j, lanes);
      });
    };
    // Two loops: a test within one costs a map without planes 2 to 5 %, a pass of its own over x for nonzero 10 to 18 %.
    if (MAP == Map::scale || !nonzero) {
      vectors(Flag<false>{});
    } else {
      vectors(Flag<true>{});
      put_word(nonzero + i / 8, part.full ? 8 : bytes - i / 8, z);
    }
    if (kept) put_word(kept + i / 8, part.full ? 8 : bytes - i / 8, k);
    if (sign) put_word(sign + i / 8, part.full ? 8 : bytes - i / 8, s);
  });
}

// LEAKY: inside * g where it is not kept, instead of 0.
template <bool SHORT, class T, bool CL, bool G, bool DA, bool DX, bool DTAU, bool LEAKY>
DRSN_INLINE void grad_row(const T* g, T* dx, const typename Compute<T>::type* da, typename Compute<T>::type* dtau,
              double inside, int64_t n, const uint8_t* kept, const uint8_t* sign, const uint8_t* nonzero, int64_t bytes) {
  using S = typename Compute<T>::type;
  using V = Vec<S>;
  Sums<CL, V, S> total(dtau);
  each_block<SHORT>(n, [&](auto part, int64_t i, int count) DRSN_LAMBDA {
    const int64_t left = bytes - i / 8;
    const uint64_t k = G ? word(part, kept + i / 8, left) : 0;
    const uint64_t s = DA || DTAU ? word(part, sign + i / 8, left) : 0;
    const uint64_t z = DA ? word(part, nonzero + i / 8, left) : 0;
    each_vector<V>(part, count, [&](int a, int j, int lanes) DRSN_LAMBDA {
      const auto negative = V::mask(s >> j);
      V out = V::set(0);
      if constexpr (G) {
        out = load<V>(g + i + j, lanes).keep(V::mask(k >> j));
        if constexpr (DTAU) total.add(a, i + j, lanes, out.negate(negative));
        if constexpr (LEAKY) out = out + (load<V>(g + i + j, lanes) * V::set(S(inside))).keep(V::mask(~k >> j));
      }
      if constexpr (DA) {
        const V direct = direct_grad(coefficient<CL, V>(da, i + j, lanes), negative, V::mask(z >> j));
        out = G ? out + direct : direct;
      }
      if constexpr (DX) store(out, dx + i + j, lanes);
    });
  });
  if constexpr (DTAU) total.finish();
}

}  // namespace
}  // namespace drsn
