// The CPU's loop over points. It computes the positions of neighbours side by side, and so finds
// the plain ones, which are nearly all: they reach the mathematics without a test.
#pragma once

#include <optional>

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
// knows. kCommon: false in kernels that few use or that are slow for other reasons, since each
// number is compiled anew.
template <class Types, bool kCommon, class Body>
void with_channels(const Call& call, const Body& body) {
  using T = typename Types::Value;
  constexpr bool kMany =
      Types::kDims == 2 && std::is_same_v<T, float> && Types::kMethod == Method::kLinear;
  const auto channels = all_channels<T>(call);
  if (!kCommon || !channels.contiguous) return body(channels);
  if constexpr (kCommon) {
    if (channels.count == 1) return body(FixedChannels<int64_t, 1>{});
  }
  if constexpr (kCommon && Types::kDims == 2) {
    if (channels.count == 3) return body(FixedChannels<int64_t, 3>{});
  }
  if constexpr (kCommon && kMany) {
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

// Are the plain points of such a method worth a loop of their own?
template <class Types>
constexpr bool kPlainLoop = Types::kMethod != Method::kCubic;

// The points of one batch element.
template <class Types>
struct Points {
  static constexpr int D = Types::kDims;
  using Real = Accumulator<typename Types::Value>;
  using AnyStencil =
      std::conditional_t<kPlainLoop<Types>, OtherStencil<Types::kMethod, D, Real, int64_t>,
                         Stencil<Types::kMethod, D, Real, int64_t>>;
  const Call& call;
  const void* data;
  Real end[D];  // a plain position lies below it, see PlainStencil

  Points(const Call& call, int64_t b) : call(call), data(call.points.data) {
    const int64_t offset = call.batch.offset(b, call.points.stride);
    data = static_cast<const char*>(data) + offset * size_of(call.points.dtype);
    const bool reads_on = call.shape.channels % 4 == 3;
    for (int a = 0; a < D; ++a) {
      end[a] = static_cast<Real>(call.shape.size[a] - (a == 0 && reads_on ? 2 : 1));
    }
  }
  bool half() const { return size_of(call.points.dtype) == 2; }
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
  // Point n is the i-th of a tile that starts at `pixel`.
  void position(int64_t n, int64_t i, const int64_t (&pixel)[D], Real (&p)[D]) const {
    read(n, 1, p);
    for (int a = 0; a < D; ++a) {
      if (call.displacement) p[a] = static_cast<Real>(pixel[a] + (a == 0 ? i : 0)) + p[a];
    }
  }
  __attribute__((noinline)) AnyStencil stencil(int64_t n, int64_t i,
                                               const int64_t (&pixel)[D]) const {
    Real p[D];
    position(n, i, pixel, p);
    return {p, call.shape.size, call.sampling.boundary};
  }
  // Has a linear stencil no corner inside, nor a boundary rule that folds one there?
  __attribute__((noinline)) bool beyond(int64_t n, int64_t i, const int64_t (&pixel)[D]) const {
    Real p[D];
    position(n, i, pixel, p);
    bool apart = false;
    for (int a = 0; a < D; ++a) {
      const bool near = p[a] >= -1 && p[a] < static_cast<Real>(call.shape.size[a]);
      apart = apart || (!near && call.sampling.boundary[a] == Boundary::kConstant);
    }
    return apart;
  }
};

// Sums of N neighbouring channels at the right-hand corners of a point, in registers: they mostly
// are the left-hand corners of the next, and each sum is then read and written once, not twice, and
// no addition waits for what the point before has just stored. What is added, and in which order,
// stays the same. For two taps along each axis and an image of N channels.
template <class A, int N, int D>
class Trail {
 public:
  JAXWARP_HD Trail() {
    JAXWARP_UNROLL for (int p = 0; p < kPairs; ++p) sum_[p] = Lanes<A, N>(A(0));
  }
  // Adds part(k) to the sums at the corners of a plain point, whose first is `target`.
  template <class Part>
  JAXWARP_HD void add(A* target, const int64_t* stride, Part part) {
    Lanes<A, N> right[kPairs];
    if (target == target_) {
      JAXWARP_UNROLL for (int p = 0; p < kPairs; ++p) {
        right[p] = load<N, true>(target + N + row(p, stride));
      }
    } else {
      flush(stride);
      JAXWARP_UNROLL for (int p = 0; p < kPairs; ++p) {  // as they may just have been stored
        sum_[p] = load<N>(target + row(p, stride));
        right[p] = load<N>(target + N + row(p, stride));
      }
    }
    target_ = target + N;
    JAXWARP_UNROLL for (int p = 0; p < kPairs; ++p) {
      sum_[p] += part(2 * p);
      store<N>(target + row(p, stride), sum_[p]);
      right[p] += part(2 * p + 1);
      sum_[p] = right[p];
    }
  }
  JAXWARP_HD void flush(const int64_t* stride) {
    if (target_ == nullptr) return;
    JAXWARP_UNROLL for (int p = 0; p < kPairs; ++p) store<N>(target_ + row(p, stride), sum_[p]);
    target_ = nullptr;
  }

 private:
  static constexpr int kPairs = D == 2 ? 2 : 4;
  static JAXWARP_HD int64_t row(int pair, const int64_t* stride) {
    return pair % 2 * stride[1] + (D == 3 ? pair / 2 * stride[2] : 0);
  }
  A* target_ = nullptr;  // of the first sum; null: none
  Lanes<A, N> sum_[kPairs];
};

// Those of a run of plain points, for as many channels as are known.
template <class Types, class Ch>
struct Trails {
  using A = Accumulator<typename Types::Value>;
  Trail<A, Ch::count, Types::kDims> image;
  Trail<A, 1, Types::kDims> coverage;

  JAXWARP_HD void flush(const Shape<int64_t>& shape) {
    image.flush(shape.stride);
    coverage.flush(shape.plane_stride);
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
  using AnyStencil = typename Points<Types>::AnyStencil;
  static constexpr int kCorners = Stencil::kCorners;

  alignas(32) Real t[D][kPoints + kLanes];  // room for whole vectors from any point on
  alignas(32) Real weight[kCorners][kPoints];
  alignas(32) Real pull[kPoints + kLanes][kCorners];
  alignas(32) int32_t first[D][kPoints];
  alignas(32) uint32_t pixel[kPoints];
  // A bit for each point:
  uint64_t interior;  // all corners inside, and whatever lies behind them to be read on
  uint64_t plain;     // plain, and all its corners in the rows
  uint64_t level;     // the same but for a weight of zero or nearly so: on a grid line, see Tame
  uint64_t unseen;    // interior, and none of its corners in the rows

  // Points n .. n + count - 1, of which the first starts at pixel `start`. kRowsAlone: only which
  // are interior, and the row of their first corner.
  template <bool kRowsAlone = false>
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
    uint64_t insiders = 0, plains = 0, levels = 0, strangers = 0;
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
        if constexpr (Types::kMethod == Method::kNearest) round_cell(cell[a], rest[a]);
        inside = inside & (x[a].lane >= 0) & (x[a].lane < points.end[a]);
        if (!kRowsAlone || a == D - 1) store<kLanes>(first[a] + g, cell[a]);
        if constexpr (kRowsAlone) continue;
        axis_weights_of<Types::kMethod, 0>(rest[a], static_cast<Real>(call.sampling.cubic_a), w[a]);
        JAXWARP_UNROLL for (const Reals& factor : w[a]) {
          weighs = weighs & (factor.lane > static_cast<Real>(1e-12));  // see weighs()
        }
        store<kLanes>(t[a] + g, rest[a]);
      }
      insiders |= bits(inside) << g;
      if constexpr (kRowsAlone) continue;
      for_corners<kCorners>(
          [&](int k) JAXWARP_INLINE { store<kLanes>(weight[k] + g, Stencil::weight(k, w)); });
      Places at = unsigned_of(cell[D - 1]);
      JAXWARP_UNROLL for (int a = D - 2; a >= 0; --a) {
        at = static_cast<uint32_t>(call.shape.size[a]) * at + unsigned_of(cell[a]);
      }
      store<kLanes>(pixel + g, at);

      const auto last = x[D - 1].lane;
      const auto within = inside & (last >= from) & (last < to - 1);
      const auto apart = inside & ((last < from - 1) | (last >= to));
      plains |= bits(within & weighs) << g;
      levels |= bits(within & ~weighs) << g;
      strangers |= bits(apart) << g;
    }
    const uint64_t given = count == kPoints ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
    interior = insiders & given;
    plain = plains & given;
    level = levels & given;
    unseen = strangers & given;
  }

  // How many points from i on are plain, without one between that is not.
  int64_t run(int64_t i) const {
    const uint64_t others = ~(plain >> i);
    return others == 0 ? kPoints : __builtin_ctzll(others);
  }

  // Point i, which is plain.
  template <class TrailsT>
  JAXWARP_HD auto stencil(int64_t i, TrailsT* trails) {
    PlainStencil<Types::kMethod, D, Real, int64_t, TrailsT> result;
    result.trails = trails;
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
      columns(pull + i + g, pulls);
      add_slopes<Stencil>(w, dw, pulls, ct);
      Real each[kLanes * D];
      for (int j = 0; j < kLanes; ++j) {
        JAXWARP_UNROLL for (int a = 0; a < D; ++a) each[j * D + a] = ct[a].lane[j];
      }
      if (count - g >= kLanes) {
        JAXWARP_UNROLL for (int part = 0; part < D; ++part) {
          target.template emit<kLanes>((n + g) * D + part * kLanes,
                                       load<kLanes>(each + part * kLanes));
        }
      } else {
        for (int64_t j = 0; j < count - g; ++j) {
          target.template emit<D>((n + g + j) * D, load<D>(each + j * D));
        }
      }
    }
  }

 private:
  // From the pixel at or below a position to the nearest one, where a tie goes to the even one.
  static JAXWARP_WIDE void round_cell(Ints& cell, Reals& rest) {
    typedef decltype(rest.lane > rest.lane) Mask;
    const Mask above = rest.lane > static_cast<Real>(0.5);
    const Mask tie = rest.lane == static_cast<Real>(0.5);
    const auto odd = (cell.lane & 1) != 0;
    // A comparison that holds is -1 in each lane.
    cell.lane -= __builtin_convertvector(above, typename Ints::Vector) |
                 (__builtin_convertvector(tie, typename Ints::Vector) & odd);
    rest = Reals(Real(0));
  }
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
  // Of kLanes points, the pulls of each corner side by side.
  static JAXWARP_HD void columns(const Real (*rows)[kCorners], Reals (&column)[kCorners]) {
#if defined(JAXWARP_SHUFFLE)
    if constexpr (kLanes == 8 && kCorners == 4) {
      typename Reals::Vector part[4];  // corners 0 and 1 of four points, 2 and 3; of the other four
      JAXWARP_UNROLL for (int p = 0; p < 4; p += 2) {
        const auto low = load<8>(rows[2 * p]).lane, high = load<8>(rows[2 * p + 2]).lane;
        part[p] = JAXWARP_SHUFFLE(low, high, 0, 4, 8, 12, 1, 5, 9, 13);
        part[p + 1] = JAXWARP_SHUFFLE(low, high, 2, 6, 10, 14, 3, 7, 11, 15);
      }
      JAXWARP_UNROLL for (int k = 0; k < 4; k += 2) {
        const auto low = part[k / 2], high = part[k / 2 + 2];
        column[k].lane = JAXWARP_SHUFFLE(low, high, 0, 1, 2, 3, 8, 9, 10, 11);
        column[k + 1].lane = JAXWARP_SHUFFLE(low, high, 4, 5, 6, 7, 12, 13, 14, 15);
      }
      return;
    }
#endif
    for_corners<kCorners>([&](int k) JAXWARP_INLINE {
      Real each[kLanes];
      JAXWARP_UNROLL for (int j = 0; j < kLanes; ++j) each[j] = rows[j][k];
      column[k] = load<kLanes>(each);
    });
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

// Does a call take that loop: is there AVX2, no derivative, and do positions fit the types in Tile?
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
      add(call, *image, b, shape.stride);
    }
    for (const Operand* plane : {&call.coverage, &call.weight, &call.peak}) {
      add(call, *plane, b, shape.plane_stride);
    }
  }
  void fetch(const uint32_t* pixel, int64_t count) const {
    for (int k = 0; k < count_; ++k) {
      const Source& source = sources_[k];
      for (int64_t i = 0; i < count; i += source.step) {
        // The pixel of a point that is not inside means nothing, and fetching there does no harm.
        const uintptr_t place = source.start + static_cast<uintptr_t>(pixel[i]) * source.stride;
        __builtin_prefetch(reinterpret_cast<const void*>(place));
      }
    }
  }

 private:
  struct Source {
    uintptr_t start, stride;  // the last corner of pixel 0, and bytes per pixel
    int64_t step;             // points per cache line
  };

  void add(const Call& call, const Operand& operand, int64_t b, const int64_t* stride) {
    if (operand.data == nullptr) return;
    const int64_t size = size_of(operand.dtype);
    const bool one_row = call.sampling.method == Method::kNearest;
    const int64_t row = one_row ? 0 : stride[1] + (call.dims == 3 ? stride[2] : 0);
    const int64_t offset = (call.batch.offset(b, operand.stride) + row) * size;
    sources_[count_++] = {
        reinterpret_cast<uintptr_t>(operand.data) + static_cast<uintptr_t>(offset),
        static_cast<uintptr_t>(stride[0] * size),
        std::max<int64_t>(48 / std::max<int64_t>(stride[0] * size, 1), 1)};
  }

  int count_ = 0;
  Source sources_[6];  // one for each operand above
};

// Finds the points on grid lines, as of a flow of zeros, that may be treated as plain: those whose
// own numbers and whose corners' are all of ordinary size, so that a weight of zero makes zeros of
// them. Of a call, the inputs: outputs are what the kernel writes. A peak may be anything: for a
// logit of ordinary size, w lies between 0 and 1.
class Tame {
 public:
  Tame(const Call& call, int64_t b) : call_(call), b_(b) {
    const Shape<int64_t>& shape = call.shape;
    for (const Operand* values : {&call.values, &call.d_values, &call.ct_values, &call.d_ct_values})
      add(*values, kOfPoints, {shape.point_stride, shape.point_channel_stride, shape.channels});
    for (const Operand* scalars : {&call.importance, &call.d_importance})
      add(*scalars, kOfPoints, {1, 1, 1});
    add(call.d_points, kOfPoints, {call.dims, 1, call.dims});
    for (const Operand* image : {&call.image, &call.d_image, &call.ct_image})
      add(*image, kOfCorners, {shape.stride[0], shape.channel_stride, shape.channels});
    for (const Operand* divisor : {&call.coverage, &call.weight})
      add(*divisor, kOfDivisors, {1, 1, 1});
    add(call.ct_coverage, kOfCorners, {1, 1, 1});
  }

  // Of the points in the mask `level`, the i-th of which is number n + i and has its first corner
  // at pixel[i] of a plane.
  uint64_t of(uint64_t level, const uint32_t* pixel, int64_t n) const {
    uint64_t tame = 0;
    while (level != 0) {  // a run of neighbours at a time
      const int first = __builtin_ctzll(level);
      int end = first + 1;
      while (end < 64 && level >> end & 1 && pixel[end] == pixel[end - 1] + 1) ++end;
      const uint64_t below = (uint64_t(1) << first) - 1,
                     run = (end < 64 ? (uint64_t(1) << end) - 1 : ~uint64_t(0)) & ~below;
      level &= ~run;
      if (are_tame(n + first, pixel[first], end - first)) tame |= run;
    }
    return tame;
  }

 private:
  enum Kind { kOfPoints, kOfCorners, kOfDivisors };
  struct Layout {
    int64_t step, channel_step, channels;  // in numbers
  };
  struct Source {
    Kind kind;
    Layout layout;
    ffi::DataType dtype;
    const char* data;
  };

  void add(const Operand& operand, Kind kind, Layout layout) {
    if (operand.data == nullptr || operand.output) return;
    const int64_t offset = call_.batch.offset(b_, operand.stride) * size_of(operand.dtype);
    sources_[count_++] = {kind, layout, operand.dtype,
                          static_cast<const char*>(operand.data) + offset};
  }

  bool are_tame(int64_t n, int64_t pixel, int64_t count) const {
    const int64_t* const row = call_.shape.plane_stride;
    for (int s = 0; s < count_; ++s) {
      if (sources_[s].kind == kOfPoints) {
        if (!ordinary(sources_[s], n, count)) return false;
        continue;
      }
      for (int k = 0; k < (call_.dims == 3 ? 4 : 2); ++k) {  // the rows of the corners
        const int64_t first = pixel + k % 2 * row[1] + k / 2 * row[2];
        if (!ordinary(sources_[s], first, count + 1)) return false;
      }
    }
    return true;
  }
  // Are all numbers of those points or pixels below 2^24 and, where they divide, 0 or at least
  // 2^-20? Then products of all that meet in a kernel are finite.
  static bool ordinary(const Source& source, int64_t first, int64_t count) {
    const Layout& layout = source.layout;
    const bool side_by_side = layout.channel_step == 1 && layout.step == layout.channels;
    const bool divides = source.kind == kOfDivisors;
    const int64_t parts = side_by_side ? 1 : layout.channels;
    const int64_t length = side_by_side ? count * layout.channels : count;
    for (int64_t c = 0; c < parts; ++c) {
      const char* const from =
          source.data + (first * layout.step + c * layout.channel_step) * size_of(source.dtype);
      bool all;
      if (source.dtype == ffi::F64) {
        all = within<uint64_t>(from, length, divides ? 0x3ebull << 52 : 0, 0x417ull << 52);
      } else if (source.dtype == ffi::F32) {
        all = within<uint32_t>(from, length, divides ? 0x6bu << 23 : 0, 0x97u << 23);
      } else {  // bfloat16 to 2^24, float16 to its largest
        all = within<uint16_t>(from, length, 0, source.dtype == ffi::BF16 ? 0x4b80 : 0x7c00);
      }
      if (!all) return false;
    }
    return true;
  }
  // Are the magnitudes of numbers with these bits 0 or from `least` on, and below `end`? The
  // highest bit of a difference says that it is negative.
  template <class Bits>
  JAXWARP_WIDE static bool within(const char* from, int64_t count, Bits least, Bits end) {
    constexpr int kHighest = 8 * sizeof(Bits) - 1;
    constexpr Bits kMagnitude = static_cast<Bits>(~(Bits(1) << kHighest));
    const Bits last = static_cast<Bits>(end - 1);
    Bits wrong = 0;
    for (int64_t i = 0; i < count; ++i) {
      Bits bits;
      memcpy(&bits, from + i * sizeof(Bits), sizeof(Bits));
      bits &= kMagnitude;
      wrong |= (last - bits) | ((bits - least) & ~(bits - 1));
    }
    return !(wrong >> kHighest);
  }

  const Call& call_;
  const int64_t b_;
  int count_ = 0;
  Source sources_[13];  // one for each operand above
};

// The loop, with body(n, stencil, rows, channels) for plain points and rest(i) for others.
template <class Types, class Ch, class Cotangent, class Rest, class Body>
JAXWARP_WIDE void for_plain_points(Tile<Types>& tile, const Points<Types>& points, int64_t n,
                                   int64_t count, const Ch& channels, const Cotangent& ct_points,
                                   const Rest& rest, Body body) {
  for (int64_t i = 0; i < count;) {
    // A run of plain points: without a call in it, what they share stays in registers.
    const int64_t first = i, stop = std::min(i + tile.run(i), count);
    if constexpr (Ch::kOnePack && Tile<Types>::Stencil::kAxisTaps == 2) {
      Trails<Types, Ch> trails;
      for (; i < stop; ++i) body(n + i, tile.stencil(i, &trails), AllRows{}, channels);
      trails.flush(points.call.shape);
    } else {
      void* const no_trails = nullptr;
      for (; i < stop; ++i) body(n + i, tile.stencil(i, no_trails), AllRows{}, channels);
    }
    if constexpr (!std::is_same_v<Cotangent, NoCotangent>) {
      if (ct_points.data != nullptr)
        tile.emit_slopes(points.call.sampling, n + first, first, i - first, ct_points);
    }
    for (; i < count && !(tile.plain >> i & 1); ++i) {
      if (!(tile.unseen >> i & 1)) rest(i);
    }
  }
}

// Calls body(n, stencil, rows, channels) for the points of tiles first .. last - 1 of batch element
// b: all of them, but for some that touch none of `rows`. Of plain points, ct_points takes the
// cotangents that the body leaves as pulls. kCommon: see with_channels().
template <class Types, bool kCommon, class RowsT, class Cotangent, class Body>
void for_points(const Call& call, int64_t b, int64_t first, int64_t last, const RowsT& rows,
                const Cotangent& ct_points, const Body& body) {
  constexpr int D = Types::kDims;
  using T = typename Types::Value;
  const Points<Types> points(call, b);
  const auto any_channels = all_channels<T>(call);  // their number is not a constant
  const auto visit = [&](int64_t n, const typename Points<Types>::AnyStencil& stencil)
                         __attribute__((noinline)) { body(n, stencil, rows, any_channels); };
  if constexpr (kPlainLoop<Types>) {
    if (has_plain_loop<Types>(call)) {
      // Where all that comes of a point goes to rows, one without a corner has nothing to do.
      constexpr bool kNeedsCorner =
          !std::is_same_v<RowsT, AllRows> && std::is_same_v<Cotangent, NoCotangent>;
      Rows<int64_t> all = {0, call.shape.size[D - 1]};
      if constexpr (!std::is_same_v<RowsT, AllRows>) all = rows;
      struct {
        Tile<Types> tile;
        int64_t n, count, pixel[D];
      } placed[2];  // one whose corners are on their way to the cache, and one that is worked on
      const Prefetcher prefetcher(call, b);
      std::optional<Tame> tame;
      return with_channels<Types, kCommon>(call, [&](const auto& channels) {
        const auto work = [&](auto& now) {
          if (now.tile.level != 0) {
            if (!tame) tame.emplace(call, b);
            now.tile.plain |= tame->of(now.tile.level, now.tile.pixel, now.n);
          }
          const auto rest = [&](int64_t i) {
            const bool interior = now.tile.interior >> i & 1;
            if (kNeedsCorner && !interior && points.beyond(now.n + i, i, now.pixel)) return;
            visit(now.n + i, now.tile.any_stencil(points, now.n + i, i, now.pixel));
          };
          for_plain_points(now.tile, points, now.n, now.count, channels, ct_points, rest, body);
        };
        int64_t turn = 0;
        for_tiles(points, first, last, [&](int64_t n, int64_t count, const int64_t (&pixel)[D]) {
          auto& next = placed[turn % 2];
          next.n = n;
          next.count = count;
          std::copy(pixel, pixel + D, next.pixel);
          next.tile.place(points, n, count, next.pixel, all);  // `pixel` stays in registers
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
      if (plain) tile.template place<true>(points, n, count, pixel, {0, call.shape.size[D - 1]});
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
      for (int64_t i = 0; i < count; ++i) {
        if (tile.interior >> i & 1) {
          const int64_t row = tile.first[D - 1][i];
          add({row, row + Tile<Types>::Stencil::kAxisTaps});
        } else {
          add(row_range(points.stencil(n + i, i, pixel)));
        }
      }
    }
    *ranges++ = range;
  });
}

}  // namespace jaxwarp
