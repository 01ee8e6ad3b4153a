// How a block of threads walks over rows of a tensor: along L, a sum for each row, or (channels_last) along C, a sum for
// each channel. An operation (operations.h) is given V elements at a time; U accesses are under way before any is used.
#pragma once

#include "lanes.h"

namespace drsn {
namespace {

// Where V neighbouring elements lie: along L in rows, along C in channels_last.
struct Place {
  int64_t n, c, l;
  int64_t dense;  // offset in a dense tensor
  int64_t bit;    // in a plane
  bool live;      // inside the tensor
};

template <int V> constexpr int kUnroll = V == 8 ? 2 : 4;  // more spill, and take twice as long to compile

DRSN_HD int64_t plane_words(const Walk& w) { return (w.n * (w.channels_last ? w.l : w.c) * w.row_bytes + 3) / 4; }

// Where V elements lie in memory; strides are looked at only if STRIDED.
template <bool STRIDED> __device__ __forceinline__ int64_t offset_of(const Strides* s, const Place& at) {
  if constexpr (!STRIDED) return at.dense;
  int64_t offset = at.n * s->n + at.c * s->c, rest = at.l;
#pragma unroll 1  // divisions of 64 bits: a copy of the loop for each access would be most of the code
  for (int d = s->dims - 1; d > 0; --d) {
    const int64_t outer = rest / s->size[d];
    offset += (rest - outer * s->size[d]) * s->stride[d];
    rest = outer;
  }
  return offset + rest * s->stride[0];  // 0 where there is no such dimension
}

// Threads that share a row of `length` elements: a power of two up to the block, one round of U accesses where possible.
template <int V> DRSN_HD int lanes_for(int64_t length, int threads) {
  const int64_t bits = plane_row_bits(length), each = bits < 32 ? V : V * kUnroll<V>;
  int lanes = bits < 32 ? int(bits) / V : kGroup<V>;
  while (lanes < threads && lanes * each < bits) lanes *= 2;
  return lanes;
}

// Threads along C of channels_last, at most a warp, so that there are rows left for the others.
template <int V> DRSN_HD int lanes_along_channels(int64_t channels) {
  const int64_t bits = plane_row_bits(channels);
  int lanes = bits < 32 ? int(bits) / V : kGroup<V>;
  while (lanes < kWarp && lanes * V < bits) lanes *= 2;
  return lanes;
}

// Writes the bits that a team of `lanes` threads has brought, U rounds of them. Rows of 32 and more bits own whole words:
// each word is written by one thread, U words of neighbouring rounds by one access. Shorter rows own bytes.
template <int V, int U> __device__ __forceinline__ void
write_bits(uint8_t* plane, const Walk& w, const uint32_t (&bits)[U], const int64_t (&at)[U], const bool (&mine)[U], bool leader) {
  uint32_t words[U];
#pragma unroll
  for (int u = 0; u < U; ++u) words[u] = gather_bits<V>(bits[u]);
  const int lane = threadIdx.x % kGroup<V>;
  if (w.row_bytes >= 4) {
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (lane == u && mine[u]) reinterpret_cast<uint32_t*>(plane)[at[u] >> 5] = words[u];
    return;
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (!leader || !mine[u]) continue;
    const uint32_t own = words[u] >> lane * V;
    plane[at[u] >> 3] = uint8_t(own);
    if (w.row_bytes == 2) plane[(at[u] >> 3) + 1] = uint8_t(own >> 8);
    const int64_t end = (at[u] >> 3) + w.row_bytes, bytes = plane_words(w) * 4;
    if (end + w.row_bytes > bytes)  // the last row, and behind it less than a row
#pragma unroll 1  // at most three bytes: unrolled it is as long as the rest of the kernel
      for (int64_t b = end; b < bytes; ++b) plane[b] = 0;
  }
}

// Rows [first, last) of L elements each, (n, c) by (n, c), elements [begin, end) of each; `lanes` threads a row. The sum of
// a row goes to op.finish; `scratch` holds a number for each warp. `end` is L, or begin and a multiple of lanes * V * U.
template <int V, class Op>
__device__ void walk_rows(const Op& op, const Walk& w, int64_t first, int64_t last, int lanes, int64_t begin, int64_t end,
                          typename Op::S* scratch) {
  using S = typename Op::S;
  constexpr int U = kUnroll<V>;
  const int lane = threadIdx.x & (lanes - 1), team = threadIdx.x / lanes, teams = kThreads / lanes;
  const int64_t bits = w.row_bytes * 8;
  for (int64_t r = first; r < last; r += teams) {
    const int64_t row = r + team;
    const bool there = row < last;
    Place at{there ? row / w.c : 0, 0, 0, 0, 0, false};
    at.c = there ? row - at.n * w.c : 0;
    const auto given = op.begin(at.n, at.c, there);
    S sum = 0;
    for (int64_t base = begin; base < (end < w.l ? end : bits); base += int64_t(lanes) * V * U) {
      typename Op::Data data[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        at.l = base + (u * lanes + lane) * V;
        at.dense = row * w.l + at.l, at.bit = row * bits + at.l, at.live = there && at.l < w.l;
        data[u] = op.fetch(at);
      }
      uint32_t found[Op::kPlanes][U];
      int64_t place[U];
      bool mine[U];
      S round[1] = {0};  // added up apart: a sum of 2^20 equal numbers is 1e-6 off instead of 1e-5
#pragma unroll
      for (int u = 0; u < U; ++u) {
        at.l = base + (u * lanes + lane) * V;
        at.dense = row * w.l + at.l, at.live = there && at.l < w.l;
        place[u] = row * bits + at.l, mine[u] = there && at.l < bits;
        uint32_t own[Op::kPlanes] = {};
        op.step(at, given, data[u], round, own);
#pragma unroll
        for (int p = 0; p < Op::kPlanes; ++p) found[p][u] = own[p];
      }
      sum += round[0];
#pragma unroll
      for (int p = 0; p < Op::kWritten; ++p)
        if (uint8_t* const plane = op.plane(p)) write_bits<V>(plane, w, found[p], place, mine, lane == 0);
    }
    if (!op.sums()) continue;
    S total = warp_sum(sum, lanes < kWarp ? lanes : kWarp);
    if (lanes > kWarp) {
      __syncthreads();  // scratch may still be read
      if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = total;
      __syncthreads();
      total = 0;
      for (int i = 0; i < lanes / kWarp; ++i) total += scratch[team * (lanes / kWarp) + i];
    }
    if (lane == 0 && there) op.finish(at.n, at.c, total);
  }
}

// channels_last: rows l in [first, last) of sample n, channels from `channel` on, V * lanes of them. The sums over the rows
// go to op.finish by channel; `scratch` holds V numbers for each thread.
template <int V, class Op>
__device__ void walk_columns(const Op& op, const Walk& w, int64_t n, int64_t first, int64_t last, int64_t channel, int lanes,
                             typename Op::S* scratch) {
  using S = typename Op::S;
  constexpr int U = kUnroll<V>;
  const int lane = threadIdx.x & (lanes - 1), team = threadIdx.x / lanes, teams = kThreads / lanes;
  const int64_t bits = w.row_bytes * 8;
  Place at{n, channel + lane * V, 0, 0, 0, false};
  const bool there = at.c < w.c;
  const auto given = op.begin(n, at.c, there);
  S sum[V] = {};
  for (int64_t base = first; base < last; base += int64_t(teams) * U) {
    typename Op::Data data[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      at.l = base + u * teams + team;
      at.dense = (n * w.l + at.l) * w.c + at.c, at.bit = (n * w.l + at.l) * bits + at.c, at.live = there && at.l < last;
      data[u] = op.fetch(at);
    }
    uint32_t found[Op::kPlanes][U];
    int64_t place[U];
    bool mine[U];
    S round[V] = {};
#pragma unroll
    for (int u = 0; u < U; ++u) {
      at.l = base + u * teams + team;
      at.dense = (n * w.l + at.l) * w.c + at.c, at.live = there && at.l < last;
      place[u] = (n * w.l + at.l) * bits + at.c, mine[u] = at.l < last && at.c < bits;
      uint32_t own[Op::kPlanes] = {};
      op.step(at, given, data[u], round, own);
#pragma unroll
      for (int p = 0; p < Op::kPlanes; ++p) found[p][u] = own[p];
    }
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += round[v];
#pragma unroll
    for (int p = 0; p < Op::kWritten; ++p)
      if (uint8_t* const plane = op.plane(p)) write_bits<V>(plane, w, found[p], place, mine, lane == 0);
  }
  if (!op.sums()) return;
  __syncthreads();  // scratch may still be read
#pragma unroll
  for (int v = 0; v < V; ++v) scratch[team * lanes * V + lane * V + v] = sum[v];
  __syncthreads();
  for (int i = threadIdx.x; i < lanes * V; i += kThreads) {
    S total = 0;
    for (int t = 0; t < teams; ++t) total += scratch[t * lanes * V + i];
    if (channel + i < w.c) op.finish(n, channel + i, total);
  }
}

}  // namespace
}  // namespace drsn
