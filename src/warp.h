// One point's work: gather, splat, their tangents and fused adjoints, right below their primals.
// Equation numbers: Zhiwei Xu, "Notes: CUDA Implementation of Differentiable Image Warping" (2021).
#pragma once

#include <type_traits>

#include "stencil.h"

namespace jaxwarp {

// Extents and element strides of one batch element. Axes in coordinate order: x, y(, z).
template <class IndexT>
struct Shape {
  using Index = IndexT;
  Index size[3];          // extent of the image
  Index stride[3];        // image: elements between neighbours
  Index plane_stride[3];  // the same for a plane, an image without channels
  Index channels;
  Index channel_stride;  // image: elements between channels
  Index points;
  Index point_stride;          // values: elements between points
  Index point_channel_stride;  // values: elements between channels
  Index grid[3];               // extent of the flow field; displacement i starts at its pixel i
};

template <int V>
using Width = std::integral_constant<int, V>;

// Which channels one caller works on: packs of V from `first`, every `step`. The last packs may be
// shorter, unless the caller knows that the channels divide into whole packs.
template <class Index, bool kWholePacks = false>
struct Channels {
  static constexpr bool kOnePack = false;
  template <int V>
  static constexpr int kWidest = V;
  Index first, step, count;
  bool contiguous;

  // Each width is compiled anew, so there are few: two that are left over are taken one by one.
  template <int V, class Body>
  JAXWARP_HD void for_packs(Body body) const {
    Index c = first;
    if constexpr (V == 1 || kWholePacks) {
      for (; c + V <= count; c += step) body(c, Width<V>{});
    } else {
      static_assert(V <= 8);
      if (contiguous) {
        for (; c + V <= count; c += step) body(c, Width<V>{});
        if constexpr (V > 4) {
          if (count - c >= 4) {
            body(c, Width<4>{});
            c += 4;
          }
        }
        if constexpr (V > 3) {
          if (count - c == 3) return body(c, Width<3>{});
        }
      }
      for (; c < count; ++c) body(c, Width<1>{});
    }
  }
};

// So many channels side by side as the compiler knows.
template <class Index, int C>
struct FixedChannels {
  static constexpr bool kOnePack = true;
  template <int V>
  static constexpr int kWidest = C;
  static constexpr Index first = 0, count = C;

  template <int V, class Body>
  JAXWARP_HD void for_packs(Body body) const {
    static_assert(C <= V);
    body(Index(0), Width<C>{});
  }
};

// A cotangent with one entry per point. Where several batch elements share the primal, it is their
// sum, kept in the accumulator's dtype: one caller owns the point and visits the batch elements in
// order.
template <class T>
struct PointCotangent {
  void* data;
  bool summed;

  template <int V, class Index>
  JAXWARP_HD void emit(Index i, const Lanes<Accumulator<T>, V>& v) const {
    if (summed) {
      Accumulator<T>* sum = static_cast<Accumulator<T>*>(data) + i;
      JAXWARP_UNROLL for (int j = 0; j < V; ++j) sum[j] += v.lane[j];
    } else {
      store<V>(static_cast<T*>(data) + i, v);
    }
  }
};

// The rows (planes, in 3-D) of the image that a caller may write.
template <class Index>
struct Rows {
  Index begin, end;
  JAXWARP_HD bool contain(Index row) const { return row >= begin && row < end; }
};
struct AllRows {
  template <class Index>
  JAXWARP_HD bool contain(Index) const {
    return true;
  }
};

// What a splat does with what reaches one target; kAverage is (5), and so is kSoftmax, with the
// importance w_ij = exp(logit_i - m_j), where m_j is the peak: the largest logit of the sources
// that reach target j.
enum class Reduce { kSum, kAverage, kSoftmax };

// w_ij. The limits are such that a logit of -inf weighs nothing and one of +inf hides all others.
template <class A>
JAXWARP_HD A softmax_weight(A logit, A peak) {
  if (logit == peak) return logit < 0 && logit - logit != 0 ? A(0) : A(1);
  const A exponent = logit - peak;
  return std::exp(exponent > 0 ? A(0) : exponent);
}

// w_ij of K targets j; of a finite logit, four at once.
template <int K, class A>
JAXWARP_HD void softmax_weights(A logit, const A (&peak)[K], A (&weight)[K]) {
  if constexpr (kHasVectors && K % 4 == 0) {
    if (logit - logit == 0) {
      JAXWARP_UNROLL for (int k = 0; k < K; k += 4) {
        const Lanes<A, 4> peaks({peak[k], peak[k + 1], peak[k + 2], peak[k + 3]});
        const Lanes<A, 4> w = exp_up_to_one(Lanes<A, 4>(logit) - peaks);
        JAXWARP_UNROLL for (int i = 0; i < 4; ++i) weight[k + i] = w.lane[i];
      }
      return;
    }
  }
  JAXWARP_UNROLL for (int k = 0; k < K; ++k) weight[k] = softmax_weight(logit, peak[k]);
}

// weight times w, where a weight of 0 hides even a w of NaN.
template <class A>
JAXWARP_HD A weighted(A weight, A w) {
  return weight == 0 ? A(0) : weight * w;
}

// What a compiler may know of the importances: all are 1; none has a peak; nothing.
enum class Importances { kOne, kWeight, kAny };

// The importance of one source: w_i, or, where the peak is given, the logit of w_ij.
template <class A, Importances K>
struct Importance {
  static constexpr bool kIsOne = K == Importances::kOne;
  static constexpr bool kMayPeak = K == Importances::kAny;
  A value;
  const A* peak;

  JAXWARP_HD bool peaks() const { return kMayPeak && peak != nullptr; }

  // w at the corners; of those for which reads(k) is false, any number.
  template <class S, class Reads>
  JAXWARP_HD void at_corners(const S& at, const typename S::Index* plane_stride, Reads reads,
                             A (&w)[S::kCorners]) const {
    for_corners<S::kCorners>([&](int k) JAXWARP_INLINE { w[k] = value; });
    if constexpr (kMayPeak && S::kMethod != Method::kCubic) {  // which has no softmax
      if (!peaks()) return;
      A peaks[S::kCorners];
      for_corners<S::kCorners>([&](int k) JAXWARP_INLINE {
        peaks[k] = reads(k) ? peak[at.plane_offset(k, plane_stride)] : value;
      });
      softmax_weights(value, peaks, w);
    }
  }
};

// Those of all sources of a batch element; without values each is 1.
template <class A, Importances K = Importances::kAny>
struct ImportanceField {
  const A* values;
  const A* peak;

  template <class Index>
  JAXWARP_HD Importance<A, K> of(Index n) const {
    return {K == Importances::kOne || values == nullptr ? A(1) : values[n], peak};
  }
};

// How one point moves: the tangents of its position and of its importance, 0 where there is none.
template <int D, class A>
struct PointTangent {
  A points[D];
  A importance;
};
template <int D, class A>
struct PointTangents {
  const A* points;
  const A* importance;

  template <class Index>
  JAXWARP_HD PointTangent<D, A> of(Index n) const {
    PointTangent<D, A> d_point;
    JAXWARP_UNROLL for (int a = 0; a < D; ++a) {
      d_point.points[a] = points == nullptr ? A(0) : points[n * D + a];
    }
    d_point.importance = importance == nullptr ? A(0) : importance[n];
    return d_point;
  }
};

// Is a factor of a weight so far from zero that no product of three underflows?
template <class A>
JAXWARP_HD bool weighs(A factor) {
  return factor * factor > A(1e-24);
}

// The corners of one position as places in the image and weights.
template <class S>
struct Corners {
  using Index = typename S::Index;
  using A = typename S::Real;
  Index offset[S::kCorners];  // -1: outside
  A weight[S::kCorners];
  bool plain;  // all inside, no weight zero or nearly so, or see Tame: the loops need no test

  JAXWARP_HD Corners(const S& at, const Index* stride, const typename S::AxisWeights& w) {
    if constexpr (S::kPlain) {
      plain = true;
      for_corners<S::kCorners>([&](int k) JAXWARP_INLINE {
        weight[k] = at.corner_weight[k];
        offset[k] = at.offset(k, stride);
      });
    } else {
      for_corners<S::kCorners>([&](int k) JAXWARP_INLINE { weight[k] = S::weight(k, w); });
      plain = at.interior;
      JAXWARP_UNROLL for (int a = 0; a < S::kDims; ++a) {
        JAXWARP_UNROLL for (int tap = 0; tap < S::kAxisTaps; ++tap) {
          plain = plain && weighs(w[a][tap]);
        }
      }
      Index corner = 0;
      if (at.interior) {
        JAXWARP_UNROLL for (int a = 0; a < S::kDims; ++a) corner += at.first[a] * stride[a];
      }
      for_corners<S::kCorners>([&](int k) JAXWARP_INLINE {
        offset[k] = corner;
        JAXWARP_UNROLL for (int a = 0; a < S::kDims; ++a) offset[k] += S::tap(k, a) * stride[a];
        if (!at.interior) offset[k] = at.offset(k, stride);
      });
    }
  }

  JAXWARP_HD bool any_inside() const {
    bool any = plain;
    for_corners<S::kCorners>([&](int k) JAXWARP_INLINE { any = any || offset[k] >= 0; });
    return any;
  }
};

// Runs body(std::true_type) where a fast loop without tests will do, else body(std::false_type).
// Of some stencils the compiler knows which: never, or, if kAlways, for every PlainStencil.
template <class S, bool kAlways, class Body>
JAXWARP_HD void choose(bool plain, Body body) {
  if constexpr (S::kNeverPlain) {
    body(std::false_type{});
  } else if constexpr (S::kPlain && kAlways) {
    body(std::true_type{});
  } else if (plain) {
    body(std::true_type{});
  } else {
    body(std::false_type{});
  }
}

// What gather gives where no corner lies inside: the fill value times the sum of the weights, which
// is 1 or, once differentiated, 0.
template <class A>
JAXWARP_HD A value_outside(const Sampling& sampling, Place place, bool differentiated,
                           bool any_weight) {
  const A nan = std::numeric_limits<A>::quiet_NaN();
  const A fill = static_cast<A>(sampling.fill);
  if (place == Place::kNan) return nan;
  if (!differentiated) return fill;
  if (place == Place::kInfinite) return 0;
  return any_weight ? fill * A(0) : A(0);
}

template <int D>
JAXWARP_HD bool differentiated(const Sampling& sampling) {
  bool any = false;
  JAXWARP_UNROLL for (int a = 0; a < D; ++a) any = any || sampling.order[a] > 0;
  return any;
}

// ct_points += sum_k pull_k dg(p, k)/dp. T: of one point, or of several side by side.
template <class S, class T>
JAXWARP_HD void add_slopes(const T (&w)[S::kDims][S::kAxisTaps],
                           const T (&dw)[S::kDims][S::kAxisTaps], const T (&pull)[S::kCorners],
                           T (&ct_points)[S::kDims]) {
  if constexpr (S::kMethod == Method::kNearest) return;  // no weight moves
  JAXWARP_UNROLL for (int a = 0; a < S::kDims; ++a) {
    for_corners<S::kCorners>([&](int k) JAXWARP_INLINE {
      const T slope = S::weight(k, w, dw, a);
      if constexpr (!S::kPlain) {
        if (slope == 0) return;
      }
      ct_points[a] += slope * pull[k];
    });
  }
}

// The same for one point; a plain one notes its pulls, and their slopes are taken of many at once.
template <class S, class A>
JAXWARP_HD void pull_point(const Sampling& sampling, const S& at, const A (&pull)[S::kCorners],
                           A (&ct_points)[S::kDims]) {
  if constexpr (S::kPlain) {
    for_corners<S::kCorners>([&](int k) JAXWARP_INLINE { at.pull[k] = pull[k]; });
  } else {
    typename S::AxisWeights w, dw;
    at.weights(sampling, w);
    at.slopes(sampling, dw);
    add_slopes<S>(w, dw, pull, ct_points);
  }
}

// (1)  out = sum_j g(p, j) I(j), with g differentiated sampling.order times; where the importance
// has a peak, out = sum_j w_j g(p, j) I(j).
template <int V, class S, class T, class I, class Ch, class Index = typename S::Index>
JAXWARP_HD void gather_point(const Sampling& sampling, const Shape<Index>& shape, const S& at,
                             const T* image, const I& importance, T* out, const Ch& channels) {
  using A = Accumulator<T>;
  typename S::AxisWeights w;
  at.weights(sampling, w);
  Corners<S> corner(at, shape.stride, w);
  if (importance.peaks()) {
    corner.plain = false;
    A factor[S::kCorners];
    const auto inside = [&](int k) JAXWARP_INLINE { return corner.offset[k] >= 0; };
    importance.at_corners(at, shape.plane_stride, inside, factor);
    for_corners<S::kCorners>([&](int k) JAXWARP_INLINE {
      if (inside(k)) corner.weight[k] = weighted(corner.weight[k], factor[k]);
    });
  }
  choose<S, !I::kMayPeak>(corner.plain, [&](auto plain) JAXWARP_INLINE {
    const bool beyond = !plain && !corner.any_inside();
    A fill = static_cast<A>(sampling.fill);
    if (beyond) {
      bool any_weight = false;
      for_corners<S::kCorners>(
          [&](int k) JAXWARP_INLINE { any_weight = any_weight || corner.weight[k] != 0; });
      fill = value_outside<A>(sampling, at.place, differentiated<S::kDims>(sampling), any_weight);
    }
    channels.template for_packs<V>([&](Index c, auto width) JAXWARP_INLINE {
      constexpr int N = decltype(width)::value;
      Lanes<A, N> sum(beyond ? fill : A(0));
      for_corners<S::kCorners>([&](int k) JAXWARP_INLINE {
        if (!plain && (beyond || corner.weight[k] == 0)) return;
        Lanes<A, N> v(fill);
        if (plain || corner.offset[k] >= 0) {
          v = load<N, S::kPlain>(image + corner.offset[k] + c * shape.channel_stride);
        }
        if (plain && k == 0) {
          sum = corner.weight[k] * v;
        } else {
          sum += corner.weight[k] * v;
        }
      });
      store<N>(out + c * shape.point_channel_stride, sum);
    });
  });
}

// (1) as the image, the point and the logit move:
//      d_out = sum_j w_j g(p, j) dI(j) + w_j (dp . dg(p, j)/dp + dlogit g(p, j)) I(j).
// Without a peak, w_j is 1. d_image may be null.
template <int V, class S, class T, class I, class Ch, class Index = typename S::Index>
JAXWARP_HD void gather_tangent_point(const Sampling& sampling, const Shape<Index>& shape,
                                     const S& at, const T* image, const I& importance,
                                     const T* d_image,
                                     const PointTangent<S::kDims, Accumulator<T>>& d_point,
                                     T* d_out, const Ch& channels) {
  using A = Accumulator<T>;
  typename S::AxisWeights w, dw;
  at.weights(sampling, w);
  at.slopes(sampling, dw);
  Corners<S> corner(at, shape.stride, w);
  A change[S::kCorners];  // of the weight
  A factor[S::kCorners];  // w_j
  const auto inside = [&](int k) JAXWARP_INLINE { return corner.offset[k] >= 0; };
  importance.at_corners(at, shape.plane_stride, inside, factor);
  bool any_change = false;
  for_corners<S::kCorners>([&](int k) JAXWARP_INLINE {
    change[k] = S::weight_tangent(k, w, dw, d_point.points);
    if (importance.peaks() && inside(k)) {
      change[k] += weighted(corner.weight[k], d_point.importance);
      change[k] = weighted(change[k], factor[k]);
      corner.weight[k] = weighted(corner.weight[k], factor[k]);
    }
    any_change = any_change || change[k] != 0;
  });
  choose<S, !I::kMayPeak>(corner.plain && !importance.peaks(), [&](auto plain) JAXWARP_INLINE {
    const bool beyond = !plain && !corner.any_inside();
    const A fill = beyond ? value_outside<A>(sampling, at.place, true, any_change)
                          : static_cast<A>(sampling.fill);
    channels.template for_packs<V>([&](Index c, auto width) JAXWARP_INLINE {
      constexpr int N = decltype(width)::value;
      Lanes<A, N> sum(beyond ? fill : A(0));
      for_corners<S::kCorners>([&](int k) JAXWARP_INLINE {
        if (!plain && beyond) return;
        const bool inside = plain || corner.offset[k] >= 0;
        const Index place = corner.offset[k] + c * shape.channel_stride;
        if (change[k] != 0) {
          sum += change[k] * (inside ? load<N, S::kPlain>(image + place) : Lanes<A, N>(fill));
        }
        if (d_image != nullptr && inside && (plain || corner.weight[k] != 0)) {
          sum += corner.weight[k] * load<N, S::kPlain>(d_image + place);
        }
      });
      store<N>(d_out + c * shape.point_channel_stride, sum);
    });
  });
}

// (2)  ct_points = sum_j (I(j) . ct_out) dg(p, j)/dp  is added to `ct_points`;
//      ct_image(j) += g(p, j) ct_out  for the corners in `rows`, unless ct_image is null.
template <int V, class S, class T, class RowsT, class Ch, class Index = typename S::Index>
JAXWARP_HD void gather_vjp_point(const Sampling& sampling, const Shape<Index>& shape, const S& at,
                                 const T* image, const T* ct_out, Accumulator<T>* ct_image,
                                 const RowsT& rows, Accumulator<T> (&ct_points)[S::kDims],
                                 const Ch& channels) {
  using A = Accumulator<T>;
  constexpr int D = S::kDims;
  typename S::AxisWeights w, dw;
  at.weights(sampling, w);
  at.slopes(sampling, dw);
  const Corners<S> corner(at, shape.stride, w);
  choose<S, true>(corner.plain && at.within(rows), [&](auto plain) JAXWARP_INLINE {
    if (!plain && !corner.any_inside()) {
      if (channels.count == 0) return;  // an empty sum is 0, even of NaN
      JAXWARP_UNROLL for (int a = 0; a < D; ++a) {
        bool any_weight = false;
        for_corners<S::kCorners>(
            [&](int k) JAXWARP_INLINE { any_weight = any_weight || S::weight(k, w, dw, a) != 0; });
        ct_points[a] += value_outside<A>(sampling, at.place, true, any_weight);
      }
      return;
    }
    Dots<A, Ch::template kWidest<V>, S::kCorners, Ch::kOnePack> dots;  // I(j) . ct_out
    bool adds[S::kCorners];
    for_corners<S::kCorners>([&](int k) JAXWARP_INLINE {
      adds[k] = ct_image != nullptr && (plain || (corner.weight[k] != 0 && corner.offset[k] >= 0 &&
                                                  rows.contain(at.index(k, D - 1))));
    });
    channels.template for_packs<V>([&](Index c, auto width) JAXWARP_INLINE {
      constexpr int N = decltype(width)::value;
      const Lanes<A, N> ct = load<N>(ct_out + c * shape.point_channel_stride);
      for_corners<S::kCorners>([&](int k) JAXWARP_INLINE {
        const Index place = corner.offset[k] + c * shape.channel_stride;
        Lanes<A, N> v(static_cast<A>(sampling.fill));
        if (plain || corner.offset[k] >= 0) v = load<N, S::kPlain>(image + place);
        dots.add(k, v, ct);
        if (S::kTrails || (plain ? ct_image == nullptr : !adds[k])) return;
        add_to<N>(ct_image + place, corner.weight[k] * ct);
      });
      if constexpr (S::kTrails) {
        if (ct_image == nullptr) return;
        at.trails->image.add(ct_image + corner.offset[0], shape.stride,
                             [&](int k) JAXWARP_INLINE { return corner.weight[k] * ct; });
      }
    });
    A pull[S::kCorners];
    dots.total(pull);
    pull_point(sampling, at, pull, ct_points);
  });
}

// (2) as the image, the point and the cotangent move, of the points alone: that of the image is a
// splat.  d_ct_points = sum_j (dI(j) . ct_out + I(j) . d_ct_out) dg(p, j)/dp
//                     + sum_j (I(j) . ct_out) d^2g(p, j)/dp^2 dp
// is added to `d_ct_points`. d_image and d_ct_out may be null.
template <int V, class S, class T, class Ch, class Index = typename S::Index>
JAXWARP_HD void gather_vjp_tangent_point(const Sampling& sampling, const Shape<Index>& shape,
                                         const S& at, const T* image, const T* ct_out,
                                         const T* d_image, const T* d_ct_out,
                                         const PointTangent<S::kDims, Accumulator<T>>& d_point,
                                         Accumulator<T> (&d_ct_points)[S::kDims],
                                         const Ch& channels) {
  using A = Accumulator<T>;
  constexpr int D = S::kDims;
  typename S::AxisWeights w, dw, ddw;
  at.weights(sampling, w);
  at.slopes(sampling, dw);
  at.curvatures(sampling, ddw);
  const Corners<S> corner(at, shape.stride, w);
  Dots<A, Ch::template kWidest<V>, S::kCorners, Ch::kOnePack> dots;  // I(j) . ct_out
  Dots<A, Ch::template kWidest<V>, S::kCorners> d_dots;  // dI(j) . ct_out + I(j) . d_ct_out
  choose<S, true>(corner.plain, [&](auto plain) JAXWARP_INLINE {
    if (!plain && !corner.any_inside()) {
      if (channels.count == 0) return;  // an empty sum is 0, even of NaN
      JAXWARP_UNROLL for (int a = 0; a < D; ++a) {
        d_ct_points[a] += value_outside<A>(sampling, at.place, true, true);
      }
      return;
    }
    channels.template for_packs<V>([&](Index c, auto width) JAXWARP_INLINE {
      constexpr int N = decltype(width)::value;
      const Lanes<A, N> ct = load<N>(ct_out + c * shape.point_channel_stride);
      Lanes<A, N> d_ct(A(0));
      if (d_ct_out != nullptr) d_ct = load<N>(d_ct_out + c * shape.point_channel_stride);
      for_corners<S::kCorners>([&](int k) JAXWARP_INLINE {
        const Index place = corner.offset[k] + c * shape.channel_stride;
        const bool inside = plain || corner.offset[k] >= 0;
        Lanes<A, N> v(static_cast<A>(sampling.fill));
        if (inside) v = load<N, S::kPlain>(image + place);
        dots.add(k, v, ct);
        if (d_ct_out != nullptr) d_dots.add(k, v, d_ct);
        if (inside && d_image != nullptr) d_dots.add(k, load<N, S::kPlain>(d_image + place), ct);
      });
    });
    A pull[S::kCorners], d_pull[S::kCorners];
    dots.total(pull);
    d_dots.total(d_pull);
    add_slopes<S>(w, dw, d_pull, d_ct_points);
    JAXWARP_UNROLL for (int a = 0; a < D; ++a) {
      JAXWARP_UNROLL for (int b = 0; b < D; ++b) {
        for_corners<S::kCorners>([&](int k) JAXWARP_INLINE {
          const A curvature = S::weight(k, w, dw, ddw, a, b) * d_point.points[b];
          if (curvature != 0) d_ct_points[a] += curvature * pull[k];
        });
      }
    }
  });
}

// m_j:  peak(j) = max(peak(j), logit)  for the corners in `rows` that have a weight.
template <class S, class A, class RowsT, class Index = typename S::Index>
JAXWARP_HD void peak_point(const Sampling& sampling, const Shape<Index>& shape, const S& at,
                           A logit, A* peak, const RowsT& rows) {
  typename S::AxisWeights w;
  at.weights(sampling, w);
  const Corners<S> corner(at, shape.plane_stride, w);
  for_corners<S::kCorners>([&](int k) JAXWARP_INLINE {
    if constexpr (S::kPlain) {  // rather than branch
      const A none = -std::numeric_limits<A>::infinity();
      max_to(peak + corner.offset[k], corner.weight[k] != 0 ? logit : none);
    } else if (corner.weight[k] != 0 && corner.offset[k] >= 0 &&
               rows.contain(at.index(k, S::kDims - 1))) {
      max_to(peak + corner.offset[k], logit);
    }
  });
}

// (5), before the division:  image(j) += w g(p, j) f,  coverage(j) += g(p, j),
// weight(j) += w g(p, j),  for the corners in `rows`. The planes may be null.
// Sum: a pointer to numbers, or what stands for one.
template <int V, class S, class T, class I, class Sum, class RowsT, class Ch,
          class Index = typename S::Index>
JAXWARP_HD void splat_point(const Sampling& sampling, const Shape<Index>& shape, const S& at,
                            const T* values, const I& importance, const Sum& image,
                            const Sum& coverage, const Sum& weight, const RowsT& rows,
                            const Ch& channels) {
  using A = Accumulator<T>;
  constexpr int D = S::kDims;
  typename S::AxisWeights w;
  at.weights(sampling, w);
  const Corners<S> corner(at, shape.stride, w);
  choose<S, true>(corner.plain && at.within(rows), [&](auto plain) JAXWARP_INLINE {
    A scale[S::kCorners];  // w, then w g(p, j)
    bool writes[S::kCorners];
    for_corners<S::kCorners>([&](int k) JAXWARP_INLINE {
      writes[k] = plain || (corner.weight[k] != 0 && corner.offset[k] >= 0 &&
                            rows.contain(at.index(k, D - 1)));
    });
    importance.at_corners(
        at, shape.plane_stride, [&](int k) JAXWARP_INLINE { return writes[k]; }, scale);
    for_corners<S::kCorners>([&](int k) JAXWARP_INLINE { scale[k] *= corner.weight[k]; });
    channels.template for_packs<V>([&](Index c, auto width) JAXWARP_INLINE {
      constexpr int N = decltype(width)::value;
      const Lanes<A, N> f = load<N>(values + c * shape.point_channel_stride);
      if constexpr (S::kTrails) {
        at.trails->image.add(image + corner.offset[0], shape.stride, [&](int k) JAXWARP_INLINE {
          return I::kIsOne || scale[k] != 0 ? scale[k] * f : Lanes<A, N>(A(0));
        });
      } else {
        for_corners<S::kCorners>([&](int k) JAXWARP_INLINE {
          if ((!plain && !writes[k]) || (!I::kIsOne && scale[k] == 0)) return;
          add_to<N>(image + corner.offset[k] + c * shape.channel_stride, scale[k] * f);
        });
      }
    });
    if (coverage == nullptr || channels.first != 0) return;
    if constexpr (S::kTrails) {
      at.trails->coverage.add(coverage + at.plane_offset(0, shape.plane_stride), shape.plane_stride,
                              [&](int k) JAXWARP_INLINE { return Lanes<A, 1>(corner.weight[k]); });
    }
    for_corners<S::kCorners>([&](int k) JAXWARP_INLINE {
      if (!plain && !writes[k]) return;
      const Index j = at.plane_offset(k, shape.plane_stride);
      if (!S::kTrails) add_to<1>(coverage + j, Lanes<A, 1>(corner.weight[k]));
      if (weight != nullptr) add_to<1>(weight + j, Lanes<A, 1>(scale[k]));
    });
  });
}

// A target with no more than min_coverage, or without weight, holds the fill value: it passes no
// gradient.
template <class A>
JAXWARP_HD bool is_hole(A coverage, A weight, A min_coverage) {
  return (coverage <= min_coverage) | (weight == 0);  // both, rather than a branch
}

// (5), the division: image(j) = N(j) / D(j), or the fill value in a hole.
template <int V, class A, class Index, class Ch>
JAXWARP_HD void normalise_pixel(const Shape<Index>& shape, A* image, A coverage, A weight,
                                A min_coverage, A fill, const Ch& channels) {
  const bool hole = is_hole(coverage, weight, min_coverage);
  channels.template for_packs<V>([&](Index c, auto width) JAXWARP_INLINE {
    constexpr int N = decltype(width)::value;
    const Lanes<A, N> sum = load<N>(image + c * shape.channel_stride);
    store<N>(image + c * shape.channel_stride,
             hole ? Lanes<A, N>(fill) : sum / Lanes<A, N>(weight));
  });
}

// What tangent and adjoint of a splat know of its result; one batch element. Null: absent.
template <class A>
struct SplatResidual {
  const A* image;  // out(j) of (5), unrounded; null for a sum
  const A* coverage;
  const A* weight;  // null: the coverage is the weight
  A min_coverage;

  // Is target j none of the holes? With its D(j). kIsOne: all importances are, see Importances.
  template <bool kIsOne = false, class Index>
  JAXWARP_HD bool divides(Index j, A& divisor) const {
    divisor = kIsOne || weight == nullptr ? coverage[j] : weight[j];
    if (kIsOne) return divisor > min_coverage;  // which is at least 0
    return !is_hole(coverage[j], divisor, min_coverage);
  }
};

// (5) as the values, the point and its importance move, in the form of (6), so that what cancels
// does so exactly:
//      d_image(j) += w g(p, j) / D(j) df + (w dp . dg(p, j)/dp + dw g(p, j)) / D(j) (f - out(j)),
//      d_coverage(j) += dp . dg(p, j)/dp,  for the corners in `rows`.
// With a peak, dw is w dlogit. d_values and d_coverage may be null.
template <int V, Reduce R, class S, class T, class I, class Sum, class RowsT, class Ch,
          class Index = typename S::Index>
JAXWARP_HD void splat_tangent_point(const Sampling& sampling, const Shape<Index>& shape,
                                    const S& at, const T* values, const I& importance,
                                    const SplatResidual<Accumulator<T>>& residual,
                                    const T* d_values,
                                    const PointTangent<S::kDims, Accumulator<T>>& d_point,
                                    const Sum& d_image, const Sum& d_coverage, const RowsT& rows,
                                    const Ch& channels) {
  using A = Accumulator<T>;
  constexpr bool kDivides = R != Reduce::kSum;
  typename S::AxisWeights w, dw;
  at.weights(sampling, w);
  at.slopes(sampling, dw);
  const Corners<S> corner(at, shape.stride, w);
  A share[S::kCorners];   // w g(p, j) / D(j)
  A change[S::kCorners];  // (w dp . dg(p, j)/dp + dw g(p, j)) / D(j)
  A weight[S::kCorners];  // w
  bool writes[S::kCorners];
  bool plain = corner.plain && at.within(rows);
  for_corners<S::kCorners>([&](int k) JAXWARP_INLINE {
    writes[k] = corner.offset[k] >= 0 && rows.contain(at.index(k, S::kDims - 1));
  });
  importance.at_corners(
      at, shape.plane_stride, [&](int k) JAXWARP_INLINE { return writes[k]; }, weight);
  for_corners<S::kCorners>([&](int k) JAXWARP_INLINE {
    share[k] = change[k] = 0;
    if (!writes[k]) return;
    const Index j = at.plane_offset(k, shape.plane_stride);
    const A dg = S::weight_tangent(k, w, dw, d_point.points);
    if (d_coverage != nullptr && channels.first == 0 && dg != 0) {
      add_to<1>(d_coverage + j, Lanes<A, 1>(dg));
    }
    const A d_weight = d_point.importance * (importance.peaks() ? weight[k] : A(1));
    A divisor = 1;
    if constexpr (kDivides) writes[k] = residual.divides(j, divisor);
    share[k] = weighted(corner.weight[k], weight[k]) / divisor;
    change[k] = (weighted(dg, weight[k]) + weighted(corner.weight[k], d_weight)) / divisor;
    plain = plain && writes[k];
  });
  choose<S, false>(plain, [&](auto plain) JAXWARP_INLINE {
    channels.template for_packs<V>([&](Index c, auto width) JAXWARP_INLINE {
      constexpr int N = decltype(width)::value;
      const Lanes<A, N> f = load<N>(values + c * shape.point_channel_stride);
      Lanes<A, N> df(A(0));
      if (d_values != nullptr) df = load<N>(d_values + c * shape.point_channel_stride);
      for_corners<S::kCorners>([&](int k) JAXWARP_INLINE {
        if (!plain && (!writes[k] || (share[k] == 0 && change[k] == 0))) return;
        const Index place = corner.offset[k] + c * shape.channel_stride;
        Lanes<A, N> difference = f, v(A(0));
        if constexpr (kDivides) difference = f - load<N, S::kPlain>(residual.image + place);
        if (change[k] != 0) v = change[k] * difference;  // the same in every band, of inf as well
        if (share[k] != 0) v += share[k] * df;
        add_to<N>(d_image + place, v);
      });
    });
  });
}

// share = w g / D and inverse = 1 / D of every corner: for few corners by one division.
template <bool kDivides, bool kIsOne, int K, class A>
JAXWARP_HD void divide_corners(const A (&weight)[K], const A (&g)[K], const A (&divisor)[K],
                               A (&share)[K], A (&inverse)[K]) {
  if constexpr (!kDivides) {
    for_corners<K>([&](int k) JAXWARP_INLINE { share[k] = weight[k] * g[k]; });
  } else if constexpr (K == 4) {
    const Lanes<A, K> inverses = Lanes<A, K>(A(1)) / Lanes<A, K>(divisor);
    Lanes<A, K> shares = Lanes<A, K>(g) * inverses;
    if constexpr (!kIsOne) shares = Lanes<A, K>(weight) * shares;
    JAXWARP_UNROLL for (int k = 0; k < K; ++k) {
      share[k] = shares.lane[k];
      inverse[k] = inverses.lane[k];
    }
  } else {
    for_corners<K>([&](int k) JAXWARP_INLINE {
      inverse[k] = A(1) / divisor[k];
      share[k] = weight[k] * (g[k] * inverse[k]);
    });
  }
}

// (6)  ct_values = sum_j w g(p, j) ct(j) / D(j);
//      ct_points = sum_j ct(j) . (f - out(j)) w / D(j) dg(p, j)/dp;
//      ct_importance = sum_j ct(j) . (f - out(j)) g(p, j) / D(j), for softmax, where it is that of
//      the logit, times w.  For a sum, out = 0 and D = 1.
// A cotangent of the coverage adds ct_coverage(j) dg(p, j)/dp. The last two are added to.
template <int V, Reduce R, class S, class T, class I, class Ch, class Index = typename S::Index>
JAXWARP_HD void splat_vjp_point(const Sampling& sampling, const Shape<Index>& shape, const S& at,
                                const T* values, const I& importance,
                                const SplatResidual<Accumulator<T>>& residual, const T* ct_image,
                                const Accumulator<T>* ct_coverage,
                                const PointCotangent<T>& ct_values, Index value_offset,
                                Accumulator<T> (&ct_points)[S::kDims],
                                Accumulator<T>& ct_importance, const Ch& channels) {
  using A = Accumulator<T>;
  constexpr bool kDivides = R != Reduce::kSum;
  typename S::AxisWeights w;
  at.weights(sampling, w);
  const Corners<S> corner(at, shape.stride, w);

  constexpr int K = S::kCorners;
  Dots<A, Ch::template kWidest<V>, K, Ch::kOnePack> dots;  // ct(j) . (f - out(j))
  A divisor[K];                                            // D(j)
  A weight[K];  // w, which differs from j to j for softmax
  bool reads[K];
  bool plain = corner.plain;
  const auto inside = [&](int k) JAXWARP_INLINE { return S::kPlain || corner.offset[k] >= 0; };
  importance.at_corners(at, shape.plane_stride, inside, weight);
  for_corners<K>([&](int k) JAXWARP_INLINE {
    divisor[k] = 1;
    reads[k] = inside(k);
    if (kDivides && reads[k]) {
      const Index j = at.plane_offset(k, shape.plane_stride);
      reads[k] = residual.template divides<I::kIsOne>(j, divisor[k]);
    }
    if (!I::kIsOne) plain = plain & (weight[k] * corner.weight[k] != 0);
    plain = plain & reads[k];
  });
  A share[K], inverse[K];  // w g(p, j) / D(j), 1 / D(j)
  divide_corners<kDivides, I::kIsOne>(weight, corner.weight, divisor, share, inverse);

  choose<S, false>(plain, [&](auto plain) JAXWARP_INLINE {
    channels.template for_packs<V>([&](Index c, auto width) JAXWARP_INLINE {
      constexpr int N = decltype(width)::value;
      const Lanes<A, N> f = load<N>(values + c * shape.point_channel_stride);
      Lanes<A, N> ct_f(A(0));
      for_corners<K>([&](int k) JAXWARP_INLINE {
        if (!plain && !reads[k]) return;
        const Index place = corner.offset[k] + c * shape.channel_stride;
        const Lanes<A, N> ct = load<N, S::kPlain>(ct_image + place);
        Lanes<A, N> difference = f;
        if constexpr (kDivides) difference = f - load<N, S::kPlain>(residual.image + place);
        dots.add(k, ct, difference);
        if (plain || share[k] != 0) ct_f += share[k] * ct;
      });
      if (ct_values.data != nullptr) {
        ct_values.template emit<N>(value_offset + c * shape.point_channel_stride, ct_f);
      }
    });
    A pull[K];
    dots.total(pull);
    for_corners<K>([&](int k) JAXWARP_INLINE {
      if (!plain && !reads[k]) {
        pull[k] = 0;
        return;
      }
      if constexpr (kDivides) pull[k] *= inverse[k];
      if constexpr (!I::kIsOne) {
        const A per_weight = pull[k];
        pull[k] = plain ? weight[k] * per_weight : weighted(weight[k], per_weight);
        if (!plain && corner.weight[k] == 0) return;
        ct_importance += (R == Reduce::kSoftmax ? pull[k] : per_weight) * corner.weight[k];
      }
    });
    if (ct_coverage != nullptr && channels.first == 0) {
      for_corners<K>([&](int k) JAXWARP_INLINE {
        if (plain || corner.offset[k] >= 0) {
          pull[k] += ct_coverage[at.plane_offset(k, shape.plane_stride)];
        }
      });
    }
    pull_point(sampling, at, pull, ct_points);
  });
}

// The position of point n: its coordinates, or its flow, added to `pixel` of the flow field (0 for
// coordinates).
template <int D, class Real, class Stored, class Index>
JAXWARP_HD void read_position(const Stored* points, Index n, const Index (&pixel)[D],
                              Real (&p)[D]) {
  JAXWARP_UNROLL for (int a = 0; a < D; ++a) {
    p[a] = static_cast<Real>(pixel[a]) + static_cast<Real>(widen(points[n * D + a]));
  }
}

}  // namespace jaxwarp
