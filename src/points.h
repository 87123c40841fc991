// The CPU's loop over points. It computes the positions of neighbours side by side, and so finds
// the plain ones, which are nearly all: they reach the mathematics without a test.
#pragma once

#include "geometry.h"

// That loop is compiled for AVX2, for machines that have it. Nothing else is: of an inline function
// the linker keeps one copy, which must run everywhere.
#if defined(__x86_64__)
#define JAXWARP_WIDE __attribute__((target("avx2")))
#define JAXWARP_LEAVE_WIDE() __builtin_ia32_vzeroupper()  // else the callee's instructions are slow
#else
#define JAXWARP_WIDE
#define JAXWARP_LEAVE_WIDE()
#endif

namespace jaxwarp {

inline bool has_wide() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx2");
  return has;
#else
  return true;
#endif
}

// Channels that are moved at once.
template <class T>
inline constexpr int kPack = 32 / static_cast<int>(sizeof(Accumulator<T>));

template <class T>
Channels<int64_t> all_channels(const Call& call) {
  const bool contiguous = call.shape.channel_stride == 1 && call.shape.point_channel_stride == 1;
  return {0, kPack<T>, call.shape.channels, contiguous};
}

// The points of one batch element.
template <class Types>
struct Points {
  static constexpr int D = Types::kDims;
  using Real = Accumulator<typename Types::Value>;
  const Call& call;
  const void* data;
  Real end[D];  // a plain position lies below it, see PlainStencil

  Points(const Call& call, int64_t b) : call(call), data(call.points.data) {
    const int64_t offset = call.batch.offset(b, call.points.stride);
    data = static_cast<const char*>(data) + offset * size();
    const bool reads_on = call.shape.channels % 4 == 3;
    for (int a = 0; a < D; ++a) {
      end[a] = static_cast<Real>(call.shape.size[a] - (a == 0 && reads_on ? 2 : 1));
    }
  }
  bool half() const { return call.points.dtype == ffi::F16 || call.points.dtype == ffi::BF16; }
  int64_t size() const { return half() ? 2 : sizeof(Real); }
  int64_t row() const { return call.displacement ? call.shape.grid[0] : call.shape.points; }

  // Where the displacement of point n starts: its pixel in the grid; 0 for coordinates.
  void start(int64_t n, int64_t (&pixel)[D]) const {
    for (int a = 0; a < D; ++a) {
      pixel[a] = call.displacement ? n % call.shape.grid[a] : a == 0 ? n : 0;
      if (call.displacement) n /= call.shape.grid[a];
    }
  }
  // Copies the displacements or coordinates of points n .. n + count - 1.
  void read(int64_t n, int64_t count, Real* to) const {
    const auto copy = [&](auto* from) {
      for (int64_t i = 0; i < count * D; ++i) to[i] = static_cast<Real>(widen(from[n * D + i]));
    };
    if constexpr (sizeof(Real) == 4) {
      if (call.points.dtype == ffi::F16) return copy(static_cast<const float16*>(data));
      if (call.points.dtype == ffi::BF16) return copy(static_cast<const bfloat16*>(data));
    }
    copy(static_cast<const Real*>(data));
  }
};

// Up to kPoints neighbours in one row of the grid: their positions and, for the plain ones, corners
// and weights.
template <class Types>
struct Block {
  static constexpr int D = Types::kDims;
  static constexpr int kPoints = 8;
  using Real = Accumulator<typename Types::Value>;
  using Reals = Lanes<Real, kPoints>;
  using Ints = Lanes<int32_t, kPoints>;
  using Stencil = PlainStencil<Types::kMethod, D, Real, int64_t>;
  using AnyStencil = typename Stencil::Base;

  alignas(32) Real position[D][kPoints];
  alignas(32) Real t[D][kPoints];
  alignas(32) Real weight[Stencil::kCorners][kPoints];
  alignas(32) int32_t first[D][kPoints];
  alignas(32) int32_t pixel[kPoints];
  // A bit for each point:
  unsigned interior;  // all corners inside
  unsigned plain;     // plain, and all its corners in `rows`
  unsigned unseen;    // interior, and none of its corners in `rows`

  template <class RowsT>
  JAXWARP_HD Block(const Points<Types>& points, int64_t n, int64_t count, const int64_t (&start)[D],
                   const RowsT& rows) {
    const Call& call = points.call;
    Real copied[kPoints * D];
    const Real* raw = copied;
    if (count == kPoints && !points.half()) {
      raw = static_cast<const Real*>(points.data) + n * D;
    } else {
      for (Real& each : copied) each = 0;
      points.read(n, count, copied);
    }
    Reals x[D], rest[D], w[D][Stencil::kAxisTaps];
    Ints cell[D];
    auto inside = Reals(Real(0)).lane == 0, weighs = inside;
    JAXWARP_UNROLL for (int a = 0; a < D; ++a) {
      x[a] = Reals(static_cast<Real>(call.displacement ? start[a] : 0)) + axis(raw, a);
      if (a == 0 && call.displacement) x[a] = x[a] + steps();
      cell[a].lane = __builtin_convertvector(x[a].lane, typename Ints::Vector);
      rest[a].lane = x[a].lane - __builtin_convertvector(cell[a].lane, typename Reals::Vector);
      axis_weights_of<Types::kMethod, 0>(rest[a], static_cast<Real>(call.sampling.cubic_a), w[a]);
      inside = inside & (x[a].lane >= 0) & (x[a].lane < points.end[a]);
      JAXWARP_UNROLL for (const Reals& factor : w[a]) {
        weighs = weighs & (factor.lane > static_cast<Real>(1e-12));  // see weighs()
      }
      store<kPoints>(position[a], x[a]);
      store<kPoints>(t[a], rest[a]);
      memcpy(first[a], &cell[a].lane, sizeof(first[a]));
    }
    for_corners<Stencil::kCorners>(
        [&](int k) JAXWARP_INLINE { store<kPoints>(weight[k], Stencil::weight(k, w)); });
    Ints place = cell[D - 1];
    JAXWARP_UNROLL for (int a = D - 2; a >= 0; --a) {
      place = static_cast<int32_t>(call.shape.size[a]) * place + cell[a];
    }
    memcpy(pixel, &place.lane, sizeof(pixel));

    auto within = inside & weighs, touching = inside;
    if constexpr (!std::is_same_v<RowsT, AllRows>) {
      const auto last = x[D - 1].lane;
      const Real from = static_cast<Real>(rows.begin), to = static_cast<Real>(rows.end);
      within = within & (last >= from) & (last < to - 1);
      touching = touching & (last >= from - 1) & (last < to);
    }
    const unsigned given = (1u << count) - 1;
    plain = given & bits(within);
    interior = bits(inside);
    unseen = interior & ~bits(touching);
  }

  // Point i, which is plain.
  JAXWARP_HD Stencil stencil(int64_t i) const {
    Stencil result;
    JAXWARP_UNROLL for (int a = 0; a < D; ++a) {
      result.first[a] = first[a][i];
      result.t[a] = t[a][i];
    }
    result.pixel = pixel[i];
    for_corners<Stencil::kCorners>([&](int k)
                                       JAXWARP_INLINE { result.corner_weight[k] = weight[k][i]; });
    return result;
  }
  // Point i, whatever it is.
  AnyStencil any_stencil(int64_t i, const Call& call) const {
    if (!(interior >> i & 1)) {
      Real p[D];
      for (int a = 0; a < D; ++a) p[a] = position[a][i];
      return AnyStencil(p, call.shape.size, call.sampling.boundary);
    }
    AnyStencil result;
    result.place = Place::kFinite;
    result.interior = true;
    for (int a = 0; a < D; ++a) {
      result.first[a] = first[a][i];
      result.t[a] = t[a][i];
    }
    return result;
  }

 private:
  static JAXWARP_HD Reals steps() {
    Reals result;
    for (int i = 0; i < kPoints; ++i) result.lane[i] = static_cast<Real>(i);
    return result;
  }
  // A bit for each lane of a comparison.
  template <class Mask>
  static JAXWARP_HD unsigned bits(const Mask& mask) {
    Mask bit;
    for (int i = 0; i < kPoints; ++i) bit[i] = 1 << i;
    uint64_t part[sizeof(Mask) / sizeof(uint64_t)], all = 0;
    const Mask found = mask & bit;
    memcpy(part, &found, sizeof(Mask));
    for (uint64_t each : part) all |= each;
    return static_cast<unsigned>(all | all >> 32) & 0xff;
  }
  // Component a of each point.
  static JAXWARP_HD Reals axis(const Real* raw, int a) {
    Reals x;
#if __has_builtin(__builtin_shufflevector)  // GCC from 12 on
    if constexpr (D == 2) {
      const auto low = load<kPoints>(raw).lane, high = load<kPoints>(raw + kPoints).lane;
      x.lane = a == 0 ? __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14)
                      : __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15);
      return x;
    }
#endif
    for (int i = 0; i < kPoints; ++i) x.lane[i] = raw[i * D + a];
    return x;
  }
};

template <class Types>
constexpr bool kPlainLoop =
    Types::kMethod == Method::kLinear && std::is_same_v<typename Types::Value, float>;

// Are the plain points worth a loop of their own, and do positions fit the types in Block?
template <class Types>
bool has_plain_loop(const Call& call) {
  using Real = Accumulator<typename Types::Value>;
  constexpr int64_t kLimit = int64_t(1) << (sizeof(Real) == 4 ? 23 : 30);
  bool fits = has_wide() && !differentiated<Types::kDims>(call.sampling) &&
              call.shape.size[0] * call.shape.size[1] * call.shape.size[2] < int64_t(1) << 31;
  for (int a = 0; a < Types::kDims; ++a) {
    fits =
        fits && call.shape.size[a] < kLimit && (!call.displacement || call.shape.grid[a] < kLimit);
  }
  return fits;
}

// The loop, with body(n, stencil, rows, channels) for plain points and rest(n, stencil) for others.
template <class Types, class RowsT, class Ch, class Rest, class Body>
JAXWARP_WIDE void for_plain_points(const Points<Types>& points, int64_t begin, int64_t end,
                                   const RowsT& rows, const Ch& channels, const Rest& rest,
                                   Body body) {
  constexpr int D = Types::kDims;
  const int64_t row = points.row();
  int64_t pixel[D];
  points.start(begin, pixel);
  for (int64_t n = begin; n < end;) {
    const int64_t left = std::min(end - n, row - pixel[0]);
    const int64_t count = std::min<int64_t>(left, Block<Types>::kPoints);
    const Block<Types> block(points, n, count, pixel, rows);
    for (int64_t i = 0; i < count; ++i) {
      // A run of plain points: without a call in it, what they share stays in registers.
      const int64_t run = __builtin_ctz(~(block.plain >> i));
      for (const int64_t stop = i + run; i < stop; ++i) {
        body(n + i, block.stencil(i), AllRows{}, channels);
      }
      if (i < count && !(block.unseen >> i & 1)) {
        const auto stencil = block.any_stencil(i, points.call);
        JAXWARP_LEAVE_WIDE();
        rest(n + i, stencil);
      }
    }
    n += count;
    pixel[0] += count;
    for (int a = 0; a + 1 < D && pixel[a] == points.call.shape.grid[a] && points.call.displacement;
         ++a) {
      pixel[a] = 0;
      ++pixel[a + 1];
    }
  }
}

// Calls body(n, stencil, rows, channels) for the points begin .. end - 1 of batch element b: all of
// them, but for some that touch none of `rows`.
template <class Types, class RowsT, class Body>
void for_points(const Call& call, int64_t b, int64_t begin, int64_t end, const RowsT& rows,
                const Body& body) {
  constexpr int D = Types::kDims;
  using T = typename Types::Value;
  using Real = Accumulator<T>;
  const Points<Types> points(call, b);
  const auto channels = all_channels<T>(call);
  using AnyStencil = Stencil<Types::kMethod, D, Real, int64_t>;
  const auto visit = [&](int64_t n, const AnyStencil& stencil)
                         __attribute__((noinline)) { body(n, stencil, rows, channels); };
  if constexpr (kPlainLoop<Types>) {
    if (has_plain_loop<Types>(call)) {
      const auto loop = [&](const auto& channels) {
        for_plain_points<Types>(points, begin, end, rows, channels, visit, body);
      };
      if (!channels.contiguous) return loop(channels);
      if (channels.count == 1) return loop(FixedChannels<int64_t, 1>{});
      if constexpr (D == 2) {  // volumes rarely have more, and each loop takes long to compile
        if (channels.count == 3) return loop(FixedChannels<int64_t, 3>{});
        if (channels.count == 4) return loop(FixedChannels<int64_t, 4>{});
      }
      return loop(channels);
    }
  }
  int64_t pixel[D];
  points.start(begin, pixel);
  for (int64_t n = begin; n < end; ++n) {
    Real p[D];
    points.read(n, 1, p);
    for (int a = 0; a < D; ++a) p[a] = static_cast<Real>(call.displacement ? pixel[a] : 0) + p[a];
    visit(n, AnyStencil(p, call.shape.size, call.sampling.boundary));
    if (!call.displacement) continue;
    for (int a = 0; a < D && ++pixel[a] == call.shape.grid[a]; ++a) pixel[a] = 0;
  }
}

// The row that stands for a point: the first one that it touches, or 0. Each point has exactly one,
// so that exactly one band computes what belongs to the point.
template <class S>
int64_t home_row(const S& stencil) {
  for (int tap = 0; tap < S::kAxisTaps; ++tap) {
    const int64_t row = stencil.tap_index(tap, S::kDims - 1);
    if (row >= 0) return row;
  }
  return 0;
}

template <class S>
bool touches(const S& stencil, const Rows<int64_t>& rows) {
  for (int tap = 0; tap < S::kAxisTaps; ++tap) {
    if (rows.contain(stencil.tap_index(tap, S::kDims - 1))) return true;
  }
  return false;
}

// From the first to the last row that a point touches or is at home in.
template <class S>
Rows<int64_t> row_range(const S& stencil) {
  const int64_t home = home_row(stencil);
  if (S::kPlain) return {home, home + S::kAxisTaps};
  Rows<int64_t> range = {home, home + 1};
  for (int tap = 0; tap < S::kAxisTaps; ++tap) {
    const int64_t row = stencil.tap_index(tap, S::kDims - 1);
    if (row >= 0) range = {std::min(range.begin, row), std::max(range.end, row + 1)};
  }
  return range;
}

}  // namespace jaxwarp
