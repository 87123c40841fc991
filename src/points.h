// The CPU's loop over points. It computes the positions of neighbours side by side, and so finds
// the plain ones, which are nearly all: they reach the mathematics without a test.
#pragma once

#include "geometry.h"

// That loop is compiled for AVX2, for machines that have it. Nothing else is: of an inline function
// the linker keeps one copy, which must run everywhere.
#if defined(__x86_64__)
#define JAXWARP_WIDE __attribute__((target("avx2")))
#else
#define JAXWARP_WIDE
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

// Numbers that the CPU's vectors hold; so many channels are moved at once.
template <class T>
inline constexpr int kPack = 32 / static_cast<int>(sizeof(Accumulator<T>));

template <class T>
Channels<int64_t> all_channels(const Call& call) {
  const bool contiguous = call.shape.channel_stride == 1 && call.shape.point_channel_stride == 1;
  return {0, kPack<T>, call.shape.channels, contiguous};
}

// Calls body(channels) with all channels. Of the numbers that images mostly have, the compiler
// knows.
template <class Types, class Body>
void with_channels(const Call& call, const Body& body) {
  using T = typename Types::Value;
  constexpr bool kMany = Types::kDims == 2 && std::is_same_v<T, float>;
  const auto channels = all_channels<T>(call);
  if (!channels.contiguous) return body(channels);
  if (channels.count == 1) return body(FixedChannels<int64_t, 1>{});
  if constexpr (Types::kDims == 2) {
    if (channels.count == 3) return body(FixedChannels<int64_t, 3>{});
  }
  if constexpr (kMany) {
    if (channels.count == 2) return body(FixedChannels<int64_t, 2>{});
    if (channels.count == 4) return body(FixedChannels<int64_t, 4>{});
  }
  body(channels);
}

// How the points of a batch element are divided: up to kPoints neighbours in one row of the grid.
struct Tiles {
  static constexpr int64_t kPoints = 64;  // a bit for each in a mask
  int64_t row, per_row, count;            // points and tiles in a row, tiles altogether

  explicit Tiles(const Call& call) : row(call.shape.points), per_row(1), count(0) {
    if (row == 0) return;
    if (call.displacement) row = call.shape.grid[0];
    per_row = (row + kPoints - 1) / kPoints;
    count = call.shape.points / row * per_row;
  }
  int64_t first_point(int64_t tile) const {
    return tile / per_row * row + tile % per_row * kPoints;
  }
};

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
  // Of point n, the i-th of a tile that starts at `pixel`.
  __attribute__((noinline)) Stencil<Types::kMethod, D, Real, int64_t> stencil(
      int64_t n, int64_t i, const int64_t (&pixel)[D]) const {
    Real p[D];
    read(n, 1, p);
    for (int a = 0; a < D; ++a) {
      if (call.displacement) p[a] = static_cast<Real>(pixel[a] + (a == 0 ? i : 0)) + p[a];
    }
    return {p, call.shape.size, call.sampling.boundary};
  }
};

// One of them: corners and weights of the points whose corners all lie inside, some of which are
// plain, and later the pulls of the corners.
template <class Types>
struct Tile {
  static constexpr int D = Types::kDims;
  static constexpr int kPoints = Tiles::kPoints;
  using T = typename Types::Value;
  using Real = Accumulator<T>;
  static constexpr int kLanes = kPack<T>;
  using Reals = Lanes<Real, kLanes>;
  using Ints = Lanes<int32_t, kLanes>;
  using Places = Lanes<uint32_t, kLanes>;  // of points outside they wrap around
  using Stencil = PlainStencil<Types::kMethod, D, Real, int64_t>;
  using AnyStencil = typename Stencil::Base;
  static constexpr int kCorners = Stencil::kCorners;

  alignas(32) Real t[D][kPoints + kLanes];  // room for whole vectors from any point on
  alignas(32) Real weight[kCorners][kPoints];
  alignas(32) Real pull[kPoints + kLanes][kCorners];
  alignas(32) int32_t first[D][kPoints];
  alignas(32) uint32_t pixel[kPoints];
  // A bit for each point:
  uint64_t interior;  // all corners inside
  uint64_t plain;     // plain, and all its corners in the rows
  uint64_t unseen;    // interior, and none of its corners in the rows

  // Points n .. n + count - 1, of which the first starts at pixel `start`.
  JAXWARP_WIDE __attribute__((noinline)) void place(const Points<Types>& points, int64_t n,
                                                    int64_t count, const int64_t (&start)[D],
                                                    const Rows<int64_t>& rows) {
    const Call& call = points.call;
    const Real from = static_cast<Real>(rows.begin), to = static_cast<Real>(rows.end);
    Reals origin[D], step(Real(0));
    JAXWARP_UNROLL for (int a = 0; a < D; ++a) {
      origin[a] = Reals(static_cast<Real>(call.displacement ? start[a] : 0));
    }
    if (call.displacement) {
      for (int i = 0; i < kLanes; ++i) step.lane[i] = static_cast<Real>(i);
    }
    uint64_t insiders = 0, plains = 0, strangers = 0;
    for (int64_t g = 0; g < count; g += kLanes) {
      Real copied[kLanes * D];
      const Real* raw = static_cast<const Real*>(points.data) + (n + g) * D;
      if (g + kLanes > count || points.half()) {
        for (Real& each : copied) each = 0;
        points.read(n + g, std::min<int64_t>(count - g, kLanes), copied);
        raw = copied;
      }
      Reals x[D], rest[D], w[D][Stencil::kAxisTaps];
      Ints cell[D];
      auto inside = Reals(Real(0)).lane == 0, weighs = inside;
      JAXWARP_UNROLL for (int a = 0; a < D; ++a) {
        Reals place = origin[a];
        if (a == 0) {
          place = place + step;
          if (call.displacement) origin[a] += Reals(static_cast<Real>(kLanes));
        }
        x[a] = place + axis(raw, a);
        cell[a].lane = __builtin_convertvector(x[a].lane, typename Ints::Vector);
        rest[a].lane = x[a].lane - __builtin_convertvector(cell[a].lane, typename Reals::Vector);
        axis_weights_of<Types::kMethod, 0>(rest[a], static_cast<Real>(call.sampling.cubic_a), w[a]);
        inside = inside & (x[a].lane >= 0) & (x[a].lane < points.end[a]);
        JAXWARP_UNROLL for (const Reals& factor : w[a]) {
          weighs = weighs & (factor.lane > static_cast<Real>(1e-12));  // see weighs()
        }
        store<kLanes>(t[a] + g, rest[a]);
        store<kLanes>(first[a] + g, cell[a]);
      }
      for_corners<kCorners>(
          [&](int k) JAXWARP_INLINE { store<kLanes>(weight[k] + g, Stencil::weight(k, w)); });
      Places at = unsigned_of(cell[D - 1]);
      JAXWARP_UNROLL for (int a = D - 2; a >= 0; --a) {
        at = static_cast<uint32_t>(call.shape.size[a]) * at + unsigned_of(cell[a]);
      }
      store<kLanes>(pixel + g, at);

      const auto last = x[D - 1].lane;
      const auto within = inside & weighs & (last >= from) & (last < to - 1);
      const auto apart = inside & ((last < from - 1) | (last >= to));
      insiders |= bits(inside) << g;
      plains |= bits(within) << g;
      strangers |= bits(apart) << g;
    }
    const uint64_t given = count == kPoints ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
    interior = insiders & given;
    plain = plains & given;
    unseen = strangers & given;
  }

  // How many points from i on are plain, without one between that is not.
  int64_t run(int64_t i) const {
    const uint64_t others = ~(plain >> i);
    return others == 0 ? kPoints : __builtin_ctzll(others);
  }

  // Point i, which is plain.
  JAXWARP_HD Stencil stencil(int64_t i) {
    Stencil result;
    JAXWARP_UNROLL for (int a = 0; a < D; ++a) {
      result.first[a] = first[a][i];
      result.t[a] = t[a][i];
    }
    result.pixel = pixel[i];
    for_corners<kCorners>([&](int k) JAXWARP_INLINE { result.corner_weight[k] = weight[k][i]; });
    result.pull = pull[i];
    return result;
  }
  // Point i, the n-th of all, whatever it is.
  AnyStencil any_stencil(const Points<Types>& points, int64_t n, int64_t i,
                         const int64_t (&start)[D]) const {
    if (!(interior >> i & 1)) return points.stencil(n, i, start);
    AnyStencil result;
    result.place = Place::kFinite;
    result.interior = true;
    for (int a = 0; a < D; ++a) {
      result.first[a] = first[a][i];
      result.t[a] = t[a][i];
    }
    return result;
  }

  // The slopes of the pulls on points i .. i + count - 1, the first of which is the n-th of all.
  JAXWARP_HD void emit_slopes(const Sampling& sampling, int64_t n, int64_t i, int64_t count,
                              const PointCotangent<Real>& target) const {
    for (int64_t g = 0; g < count; g += kLanes) {
      Reals w[D][Stencil::kAxisTaps], dw[D][Stencil::kAxisTaps], pulls[kCorners], ct[D];
      const Real a_cubic = static_cast<Real>(sampling.cubic_a);
      JAXWARP_UNROLL for (int a = 0; a < D; ++a) {
        const Reals rest = load<kLanes>(t[a] + i + g);
        axis_weights_of<Types::kMethod, 0>(rest, a_cubic, w[a]);
        axis_weights_of<Types::kMethod, 1>(rest, a_cubic, dw[a]);
        ct[a] = Reals(Real(0));
      }
      for_corners<kCorners>([&](int k) JAXWARP_INLINE {
        Real column[kLanes];
        JAXWARP_UNROLL for (int j = 0; j < kLanes; ++j) column[j] = pull[i + g + j][k];
        pulls[k] = load<kLanes>(column);
      });
      add_slopes<Stencil>(w, dw, pulls, ct);
      Real each[kLanes][D];
      for (int j = 0; j < kLanes; ++j) {
        JAXWARP_UNROLL for (int a = 0; a < D; ++a) each[j][a] = ct[a].lane[j];
      }
      const int64_t given = std::min<int64_t>(count - g, kLanes);
      for (int64_t j = 0; j < given; ++j) {
        target.template emit<D>((n + g + j) * D, Lanes<Real, D>(each[j]));
      }
    }
  }

 private:
  static JAXWARP_WIDE Places unsigned_of(const Ints& cell) {
    Places place;
    place.lane = __builtin_convertvector(cell.lane, typename Places::Vector);
    return place;
  }
  // A bit for each lane of a comparison.
  template <class Mask>
  static JAXWARP_WIDE uint64_t bits(const Mask& mask) {
#if defined(__x86_64__)
    if constexpr (sizeof(mask[0]) == 4) {
      typedef float Vector __attribute__((vector_size(32)));
      return static_cast<uint64_t>(__builtin_ia32_movmskps256(reinterpret_cast<Vector>(mask)));
    } else {
      typedef double Vector __attribute__((vector_size(32)));
      return static_cast<uint64_t>(__builtin_ia32_movmskpd256(reinterpret_cast<Vector>(mask)));
    }
#else
    uint64_t all = 0;
    for (int i = 0; i < kLanes; ++i) all |= static_cast<uint64_t>(mask[i] & 1) << i;
    return all;
#endif
  }
  // Component a of each point.
  static JAXWARP_HD Reals axis(const Real* raw, int a) {
    Reals x;
#if defined(JAXWARP_SHUFFLE)
    if constexpr (D == 2) {
      const auto low = load<kLanes>(raw).lane, high = load<kLanes>(raw + kLanes).lane;
      if constexpr (kLanes == 8) {
        x.lane = a == 0 ? JAXWARP_SHUFFLE(low, high, 0, 2, 4, 6, 8, 10, 12, 14)
                        : JAXWARP_SHUFFLE(low, high, 1, 3, 5, 7, 9, 11, 13, 15);
      } else {
        x.lane = a == 0 ? JAXWARP_SHUFFLE(low, high, 0, 2, 4, 6)
                        : JAXWARP_SHUFFLE(low, high, 1, 3, 5, 7);
      }
      return x;
    }
#endif
    for (int i = 0; i < kLanes; ++i) x.lane[i] = raw[i * D + a];
    return x;
  }
};

template <class Types>
constexpr bool kPlainLoop = Types::kMethod == Method::kLinear;

// Are the plain points worth a loop of their own, and do positions fit the types in Tile?
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

// For kernels without a cotangent of the points.
struct NoCotangent {};

// Calls body(n, count, pixel) for tiles first .. last - 1: their first point, how many there are,
// and the pixel of the first.
template <class Types, class Body>
void for_tiles(const Points<Types>& points, int64_t first, int64_t last, const Body& body) {
  const Tiles tiles(points.call);
  int64_t n = tiles.first_point(first), pixel[Types::kDims];
  points.start(n, pixel);
  int64_t in_row = first % tiles.per_row * Tiles::kPoints;
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t count = std::min(tiles.row - in_row, Tiles::kPoints);
    body(n, count, pixel);
    n += count;
    in_row += count;
    pixel[0] += count;
    if (in_row < tiles.row) continue;
    in_row = 0;
    for (int a = 0; a + 1 < Types::kDims && pixel[a] == points.call.shape.grid[a]; ++a) {
      pixel[a] = 0;
      ++pixel[a + 1];
    }
  }
}

// Fetches what the corners of a tile will touch: along a flow, rows begin and end where no hardware
// foresees it. Of each cache line one point is enough, and of its corners the last, since the
// others' rows have mostly been touched before.
class Prefetcher {
 public:
  Prefetcher(const Call& call, int64_t b) {
    const Shape<int64_t>& shape = call.shape;
    for (const Operand* image : {&call.image, &call.ct_image, &call.d_image}) {
      if (image->data == nullptr) continue;
      const int64_t size = image->dtype == ffi::F64 ? 8 : image->dtype == ffi::F32 ? 4 : 2;
      const int64_t row = shape.stride[1] + (call.dims == 3 ? shape.stride[2] : 0);
      const int64_t offset = (call.batch.offset(b, image->stride) + row) * size;
      start_[count_++] = {reinterpret_cast<uintptr_t>(image->data) + static_cast<uintptr_t>(offset),
                          static_cast<uintptr_t>(shape.stride[0] * size)};
      step_ = std::max<int64_t>(48 / std::max<int64_t>(shape.stride[0] * size, 1), 1);
    }
  }
  void fetch(const uint32_t* pixel, int64_t count) const {
    for (int k = 0; k < count_; ++k) {
      for (int64_t i = 0; i < count; i += step_) {
        // The pixel of a point that is not inside means nothing, and fetching there does no harm.
        const uintptr_t place =
            start_[k].first + static_cast<uintptr_t>(pixel[i]) * start_[k].second;
        __builtin_prefetch(reinterpret_cast<const void*>(place));
      }
    }
  }

 private:
  int count_ = 0;
  int64_t step_ = 1;
  std::pair<uintptr_t, uintptr_t> start_[3];  // of the last corner of pixel 0, and bytes per pixel
};

// The loop, with body(n, stencil, rows, channels) for plain points and rest(n, stencil) for others.
template <class Types, class Ch, class Cotangent, class Rest, class Body>
JAXWARP_WIDE void for_plain_points(Tile<Types>& tile, const Points<Types>& points, int64_t n,
                                   int64_t count, const int64_t (&pixel)[Types::kDims],
                                   const Ch& channels, const Cotangent& ct_points, const Rest& rest,
                                   Body body) {
  for (int64_t i = 0; i < count;) {
    // A run of plain points: without a call in it, what they share stays in registers.
    const int64_t first = i, stop = i + tile.run(i);
    for (; i < stop && i < count; ++i) body(n + i, tile.stencil(i), AllRows{}, channels);
    if constexpr (!std::is_same_v<Cotangent, NoCotangent>) {
      if (ct_points.data != nullptr)
        tile.emit_slopes(points.call.sampling, n + first, first, i - first, ct_points);
    }
    for (; i < count && !(tile.plain >> i & 1); ++i) {
      if (tile.unseen >> i & 1) continue;
      rest(n + i, tile.any_stencil(points, n + i, i, pixel));
    }
  }
}

// Calls body(n, stencil, rows, channels) for the points of tiles first .. last - 1 of batch element
// b: all of them, but for some that touch none of `rows`. Of plain points, ct_points takes the
// cotangents that the body leaves as pulls.
template <class Types, class RowsT, class Cotangent, class Body>
void for_points(const Call& call, int64_t b, int64_t first, int64_t last, const RowsT& rows,
                const Cotangent& ct_points, const Body& body) {
  constexpr int D = Types::kDims;
  using T = typename Types::Value;
  using Real = Accumulator<T>;
  const Points<Types> points(call, b);
  const auto any_channels = all_channels<T>(call);  // their number is not a constant
  using AnyStencil = Stencil<Types::kMethod, D, Real, int64_t>;
  const auto visit = [&](int64_t n, const AnyStencil& stencil)
                         __attribute__((noinline)) { body(n, stencil, rows, any_channels); };
  if constexpr (kPlainLoop<Types>) {
    if (has_plain_loop<Types>(call)) {
      Rows<int64_t> all = {0, call.shape.size[D - 1]};
      if constexpr (!std::is_same_v<RowsT, AllRows>) all = rows;
      struct {
        Tile<Types> tile;
        int64_t n, count, pixel[D];
      } placed[2];  // one whose corners are on their way to the cache, and one that is worked on
      const Prefetcher prefetcher(call, b);
      return with_channels<Types>(call, [&](const auto& channels) {
        const auto work = [&](auto& now) {
          for_plain_points(now.tile, points, now.n, now.count, now.pixel, channels, ct_points,
                           visit, body);
        };
        int64_t turn = 0;
        for_tiles(points, first, last, [&](int64_t n, int64_t count, const int64_t (&pixel)[D]) {
          auto& next = placed[turn % 2];
          next.n = n;
          next.count = count;
          std::copy(pixel, pixel + D, next.pixel);
          next.tile.place(points, n, count, pixel, all);
          prefetcher.fetch(next.tile.pixel, count);
          if (turn++ > 0) work(placed[turn % 2]);
        });
        if (turn > 0) work(placed[(turn - 1) % 2]);
      });
    }
  }
  for_tiles(points, first, last, [&](int64_t n, int64_t count, const int64_t (&pixel)[D]) {
    for (int64_t i = 0; i < count; ++i) visit(n + i, points.stencil(n + i, i, pixel));
  });
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
  Rows<int64_t> range = {home, home + 1};
  for (int tap = 0; tap < S::kAxisTaps; ++tap) {
    const int64_t row = stencil.tap_index(tap, S::kDims - 1);
    if (row >= 0) range = {std::min(range.begin, row), std::max(range.end, row + 1)};
  }
  return range;
}

// The same of all points of tiles first .. last - 1 of batch element b, one range for each.
template <class Types>
void row_ranges(const Call& call, int64_t b, int64_t first, int64_t last, Rows<int64_t>* ranges) {
  constexpr int D = Types::kDims;
  const Points<Types> points(call, b);
  const bool plain = kPlainLoop<Types> && has_plain_loop<Types>(call);
  Tile<Types> tile;
  for_tiles(points, first, last, [&](int64_t n, int64_t count, const int64_t (&pixel)[D]) {
    Rows<int64_t> range = {call.shape.size[D - 1], 0};
    const auto add = [&](const Rows<int64_t>& own) {
      range = {std::min(range.begin, own.begin), std::max(range.end, own.end)};
    };
    tile.interior = 0;
    if constexpr (kPlainLoop<Types>) {
      if (plain) tile.place(points, n, count, pixel, {0, call.shape.size[D - 1]});
    }
    if (tile.interior + 1 == 0) {  // all bits
      const int32_t* const rows = tile.first[D - 1];
      int32_t low = rows[0], high = rows[0];
      for (int i = 1; i < Tile<Types>::kPoints; ++i) {
        low = std::min(low, rows[i]);
        high = std::max(high, rows[i]);
      }
      add({low, high + Tile<Types>::Stencil::kAxisTaps});
    } else {
      for (int64_t i = 0; i < count; ++i) add(row_range(tile.any_stencil(points, n + i, i, pixel)));
    }
    *ranges++ = range;
  });
}

}  // namespace jaxwarp
