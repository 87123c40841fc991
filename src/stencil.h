// The mathematics of one position: coordinate -> corner indices, weights and their derivatives, for
// every method, boundary and dimension. Axes are in coordinate order: 0 = x (along W), 1 = y (H), 2
// = z (D).
#pragma once

#include "portable.h"

namespace jaxwarp {

enum class Method { kNearest, kLinear, kCubic };
enum class Boundary { kConstant, kNearest, kMirror, kReflect, kWrap };

struct Sampling {
  Method method;
  Boundary boundary[3];  // along x, y, z
  double fill;           // the value of every corner outside, boundary "constant"
  double cubic_a;        // the parameter of Keys' cubic kernel
  int order[3];          // derivative order along x, y, z
};

template <Method M>
inline constexpr int kTaps = M == Method::kNearest  ? 1
                             : M == Method::kLinear ? 2
                                                    : 4;

// The coefficient of t^power in the weight of a tap. Cubic: Keys' cubic convolution (1981) with the
// parameter a; the linear and the nearest method are written in the same form.
template <Method M, class Real>
JAXWARP_HD Real weight_coefficient(int tap, int power, Real a) {
  if (M == Method::kNearest) return power == 0 ? 1 : 0;
  if (M == Method::kLinear) return power > 1 ? 0 : tap == 1 ? power : power == 0 ? 1 : -1;
  switch (4 * tap + power) {
    case 1:
      return a;
    case 2:
      return -2 * a;
    case 3:
      return a;
    case 4:
      return 1;
    case 6:
      return -(a + 3);
    case 7:
      return a + 2;
    case 9:
      return -a;
    case 10:
      return 2 * a + 3;
    case 11:
      return -(a + 2);
    case 14:
      return a;
    case 15:
      return -a;
    default:
      return 0;
  }
}

// d^Order of the weight of one tap at t, the distance from the left corner of the cell, in [0, 1):
// at a kink this is the right-hand derivative. T: a number, or several side by side.
template <Method M, int Order, class T, class Real>
JAXWARP_HD T tap_weight(const T& t, int tap, Real a) {
  constexpr int kDegree = kTaps<M> - 1;
  T sum(Real(0));
  JAXWARP_UNROLL for (int power = kDegree; power >= Order; --power) {
    Real coefficient = weight_coefficient<M>(tap, power, a);
    JAXWARP_UNROLL for (int i = 0; i < Order; ++i) coefficient *= static_cast<Real>(power - i);
    sum = power == kDegree ? T(coefficient) : sum * t + T(coefficient);
  }
  return sum;
}

template <Method M, int Order, class T, class Real>
JAXWARP_HD void axis_weights_of(const T& t, Real a, T (&weight)[kTaps<M>]) {
  JAXWARP_UNROLL for (int tap = 0; tap < kTaps<M>; ++tap) weight[tap] =
      tap_weight<M, Order>(t, tap, a);
}

// The weights of all taps of one axis, differentiated `order` times.
template <Method M, class Real>
JAXWARP_HD void axis_weights(Real t, int order, Real a, Real (&weight)[kTaps<M>]) {
  if (order == 0) return axis_weights_of<M, 0>(t, a, weight);
  if (order == 1) return axis_weights_of<M, 1>(t, a, weight);
  if (order == 2) return axis_weights_of<M, 2>(t, a, weight);
  axis_weights_of<M, 3>(t, a, weight);
  if (order > 3) {
    JAXWARP_UNROLL for (int tap = 0; tap < kTaps<M>; ++tap) weight[tap] = 0;
  }
}

template <class Index>
JAXWARP_HD Index modulo(Index i, Index n) {
  const Index r = i % n;
  return r < 0 ? r + n : r;
}

// Where the corner with integer coordinate i is read or written on an axis of n pixels; -1 if
// nowhere.
template <class Index>
JAXWARP_HD Index corner_index(Boundary boundary, Index i, Index n) {
  if (i >= 0 && i < n) return i;
  switch (boundary) {
    case Boundary::kNearest:
      return i < 0 ? 0 : n - 1;
    case Boundary::kMirror: {
      if (n == 1) return 0;
      const Index r = modulo<Index>(i, 2 * n - 2);
      return r < n ? r : 2 * n - 2 - r;
    }
    case Boundary::kReflect: {
      const Index r = modulo<Index>(i, 2 * n);
      return r < n ? r : 2 * n - 1 - r;
    }
    case Boundary::kWrap:
      return modulo<Index>(i, n);
    case Boundary::kConstant:
      break;
  }
  return -1;
}

// The cell of coordinate x: the whole number at or below it, as an integer, and the rest t in [0,
// 1). Beyond the range of Index the whole number moves by periods of the boundary rule, or, where
// there is no period, to a place just as far outside.
template <class Index, class Real>
JAXWARP_HD Index split_coordinate(Real x, Boundary boundary, Index n, Real& t) {
  constexpr Index kLimit = Index(1) << (8 * sizeof(Index) - 3);
  if (x > -static_cast<Real>(kLimit) && x < static_cast<Real>(kLimit)) {
    Index whole = static_cast<Index>(x);  // truncates; cheaper than a call of floor
    if (static_cast<Real>(whole) > x) --whole;
    t = x - static_cast<Real>(whole);
    return whole;
  }
  t = 0;  // x is whole: no fraction fits beside so large a number
  double period = 0;
  if (boundary == Boundary::kMirror) period = n == 1 ? 1 : 2.0 * n - 2;
  if (boundary == Boundary::kReflect) period = 2.0 * n;
  if (boundary == Boundary::kWrap) period = n;
  if (period > 0) return static_cast<Index>(fmod(static_cast<double>(x), period));
  return x < 0 ? -kLimit : kLimit;
}

// kInfinite: infinitely far outside, along axes with boundary "constant". kNan: nowhere, since a
// coordinate is NaN, or infinite along another axis.
enum class Place { kFinite, kInfinite, kNan };

// Calls body(k) for k < K corners. So many are unrolled that their weights stay in registers; the
// 64 of a cubic in 3-D never would.
template <int K, class Body>
JAXWARP_HD void for_corners(Body body) {
#if defined(__CUDACC__)
  constexpr int kUnrolled = 16;
#else
  constexpr int kUnrolled = 8;
#endif
  if constexpr (K <= kUnrolled) {
    JAXWARP_UNROLL for (int k = 0; k < K; ++k) body(k);
  } else {
#if defined(__CUDACC__)
#pragma unroll 1
#endif
    for (int k = 0; k < K; ++k) body(k);
  }
}

// The corners of one position p: kTaps of them along each axis.
template <Method M, int D, class RealT, class IndexT>
struct Stencil {
  using Real = RealT;
  using Index = IndexT;
  static constexpr Method kMethod = M;
  static constexpr int kDims = D;
  static constexpr int kAxisTaps = kTaps<M>;
  static constexpr int kCorners =
      D == 2 ? kAxisTaps * kAxisTaps : kAxisTaps * kAxisTaps * kAxisTaps;
  using AxisWeights = Real[D][kAxisTaps];

  static constexpr bool kPlain = false;
  static constexpr bool kNeverPlain = false;
  static constexpr bool kTrails = false;

  Place place;
  bool interior;   // every corner lies inside
  Index first[D];  // integer coordinate of the first corner
  Real t[D];
  Index folded[D][kAxisTaps];  // see corner_index; only where not interior

  Stencil() = default;

  JAXWARP_HD Stencil(const Real (&p)[D], const Index* size, const Boundary* boundary) {
    Real finite = 0;
    JAXWARP_UNROLL for (int a = 0; a < D; ++a) finite += p[a] - p[a];
    place = Place::kFinite;
    if (finite != 0) {
      place = Place::kInfinite;
      JAXWARP_UNROLL for (int a = 0; a < D; ++a) {
        const bool finite = p[a] - p[a] == 0;
        if (p[a] != p[a] || (!finite && boundary[a] != Boundary::kConstant)) place = Place::kNan;
      }
      interior = false;
      JAXWARP_UNROLL for (int a = 0; a < D; ++a) {
        first[a] = 0;
        t[a] = 0;
        JAXWARP_UNROLL for (int tap = 0; tap < kAxisTaps; ++tap) folded[a][tap] = -1;
      }
      return;
    }
    interior = true;
    JAXWARP_UNROLL for (int a = 0; a < D; ++a) {
      first[a] = split_coordinate(p[a], boundary[a], size[a], t[a]);
      if (M == Method::kCubic) first[a] -= 1;
      if (M == Method::kNearest) {
        if (t[a] > Real(0.5) || (t[a] == Real(0.5) && first[a] % 2 != 0)) first[a] += 1;
        t[a] = 0;
      }
      interior = interior && first[a] >= 0 && first[a] + kAxisTaps <= size[a];
    }
    if (interior) return;
    JAXWARP_UNROLL for (int a = 0; a < D; ++a) {
      JAXWARP_UNROLL for (int tap = 0; tap < kAxisTaps; ++tap) {
        folded[a][tap] = corner_index<Index>(boundary[a], first[a] + tap, size[a]);
      }
    }
  }

  // Which tap of axis a corner k belongs to.
  static JAXWARP_HD constexpr int tap(int k, int a) {
    return (a == 0 ? k : a == 1 ? k / kAxisTaps : k / (kAxisTaps * kAxisTaps)) % kAxisTaps;
  }

  // Where a tap of axis a, or corner k along axis a, lies; -1 if nowhere.
  JAXWARP_HD Index tap_index(int tap, int a) const {
    return interior ? first[a] + tap : folded[a][tap];
  }
  JAXWARP_HD Index index(int k, int a) const { return tap_index(tap(k, a), a); }

  // Do all corners lie in rows that `rows` contains?
  template <class Rows>
  JAXWARP_HD bool within(const Rows& rows) const {
    bool all = true;
    JAXWARP_UNROLL for (int tap = 0; tap < kAxisTaps; ++tap) {
      all = all && rows.contain(tap_index(tap, D - 1));
    }
    return all;
  }

  // The corner's place in the image, in elements, or -1.
  JAXWARP_HD Index offset(int k, const Index* stride) const {
    Index sum = 0;
    bool inside = true;
    JAXWARP_UNROLL for (int a = 0; a < D; ++a) {
      inside = inside && index(k, a) >= 0;
      sum += index(k, a) * stride[a];
    }
    return inside ? sum : -1;
  }

  // The same in a plane, whose pixels are neighbours.
  JAXWARP_HD Index plane_offset(int k, const Index* stride) const { return offset(k, stride); }

  // The factors of g(p, k), axis a differentiated order[a] times; and once and twice more, for
  // d/dp.
  JAXWARP_HD void weights(const Sampling& sampling, AxisWeights& w) const {
    differentiated_weights(sampling, 0, w);
  }
  JAXWARP_HD void slopes(const Sampling& sampling, AxisWeights& dw) const {
    differentiated_weights(sampling, 1, dw);
  }
  JAXWARP_HD void curvatures(const Sampling& sampling, AxisWeights& ddw) const {
    differentiated_weights(sampling, 2, ddw);
  }
  template <class T>
  static JAXWARP_HD T weight(int k, const T (&w)[D][kAxisTaps]) {
    T product = w[0][tap(k, 0)];
    JAXWARP_UNROLL for (int a = 1; a < D; ++a) product = product * w[a][tap(k, a)];
    return product;
  }
  // The same with axis `raised` taken from `dw`, whose orders are one higher.
  template <class T>
  static JAXWARP_HD T weight(int k, const T (&w)[D][kAxisTaps], const T (&dw)[D][kAxisTaps],
                             int raised) {
    T product = (raised == 0 ? dw : w)[0][tap(k, 0)];
    JAXWARP_UNROLL for (int a = 1; a < D; ++a) {
      product = product * (a == raised ? dw : w)[a][tap(k, a)];
    }
    return product;
  }
  // The same, raised along axis a and along axis b.
  static JAXWARP_HD Real weight(int k, const AxisWeights& w, const AxisWeights& dw,
                                const AxisWeights& ddw, int a, int b) {
    Real product = 1;
    JAXWARP_UNROLL for (int i = 0; i < D; ++i) {
      product *= (i == a && i == b ? ddw : i == a || i == b ? dw : w)[i][tap(k, i)];
    }
    return product;
  }
  // dp . dg(p, k)/dp
  static JAXWARP_HD Real weight_tangent(int k, const AxisWeights& w, const AxisWeights& dw,
                                        const Real (&dp)[D]) {
    Real sum = 0;
    JAXWARP_UNROLL for (int a = 0; a < D; ++a) sum += weight(k, w, dw, a) * dp[a];
    return sum;
  }

 private:
  JAXWARP_HD void differentiated_weights(const Sampling& sampling, int more, AxisWeights& w) const {
    JAXWARP_UNROLL for (int a = 0; a < D; ++a) {
      axis_weights<M>(t[a], sampling.order[a] + more, static_cast<Real>(sampling.cubic_a), w[a]);
    }
  }
};

// A position that is not treated as a plain one, even if it is, so that the compiler has half as
// much to do: for a caller that mostly has a loop of its own for those, see below.
template <Method M, int D, class Real, class Index>
struct OtherStencil : Stencil<M, D, Real, Index> {
  static constexpr bool kNeverPlain = true;
  using Stencil<M, D, Real, Index>::Stencil;
};

// A position where no derivative is asked for.
template <Method M, int D, class Real, class Index>
struct UndifferentiatedStencil : Stencil<M, D, Real, Index> {
  using Base = Stencil<M, D, Real, Index>;
  using Base::Base;
  using typename Base::AxisWeights;

  JAXWARP_HD void weights(const Sampling& sampling, AxisWeights& w) const {
    differentiated_weights<0>(sampling, w);
  }
  JAXWARP_HD void slopes(const Sampling& sampling, AxisWeights& dw) const {
    differentiated_weights<1>(sampling, dw);
  }
  JAXWARP_HD void curvatures(const Sampling& sampling, AxisWeights& ddw) const {
    differentiated_weights<2>(sampling, ddw);
  }

 private:
  template <int Order>
  JAXWARP_HD void differentiated_weights(const Sampling& sampling, AxisWeights& w) const {
    JAXWARP_UNROLL for (int a = 0; a < D; ++a) {
      axis_weights_of<M, Order>(Base::t[a], static_cast<Real>(sampling.cubic_a), w[a]);
    }
  }
};

// A position all of whose corners lie inside, with a pixel behind each in its row, and weigh
// something or meet only numbers of which a weight of zero makes zeros (see Tame), with no
// derivative asked for: what most positions are. The caller has made sure of that. TrailsT: see
// Trail; void where there are none.
template <Method M, int D, class Real, class Index, class TrailsT = void>
struct PlainStencil : UndifferentiatedStencil<M, D, Real, Index> {
  using Base = Stencil<M, D, Real, Index>;
  static constexpr bool kPlain = true;
  static constexpr bool kTrails = !std::is_void_v<TrailsT>;

  Index pixel;                         // the first corner's place in a plane
  Real corner_weight[Base::kCorners];  // as weight() gives them
  Real* pull;                          // where the pulls of the corners are noted
  TrailsT* trails;                     // what adds to the corners
  JAXWARP_HD PlainStencil() {
    Base::place = Place::kFinite;
    Base::interior = true;
  }

  // Strides are multiples of that along the first axis.
  JAXWARP_HD Index offset(int k, const Index* stride) const {
    Index sum = pixel * stride[0];
    JAXWARP_UNROLL for (int a = 0; a < D; ++a) sum += Base::tap(k, a) * stride[a];
    return sum;
  }
  JAXWARP_HD Index plane_offset(int k, const Index* stride) const {
    Index sum = pixel + Base::tap(k, 0);
    JAXWARP_UNROLL for (int a = 1; a < D; ++a) sum += Base::tap(k, a) * stride[a];
    return sum;
  }
};

}  // namespace jaxwarp
