// CPU: loops over points on XLA's thread pool, and the CPU handlers. Every sum is taken in an order
// that depends on the data alone, so results do not depend on the number of threads.
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <tuple>

#include "points.h"

namespace jaxwarp {

template <Method M, int D>
struct CpuKernels {
  static void gather(ffi::ThreadPool& pool, const Call& call);
  static void gather_tangent(ffi::ThreadPool& pool, const Call& call);
  static void gather_vjp(ffi::ThreadPool& pool, const Call& call);
  static void gather_vjp_tangent(ffi::ThreadPool& pool, const Call& call);
  static void splat(ffi::ThreadPool& pool, const Call& call);
  static void splat_tangent(ffi::ThreadPool& pool, const Call& call);
  static void splat_vjp(ffi::ThreadPool& pool, const Call& call);
};

#if defined(JAXWARP_METHOD)
namespace {

constexpr int64_t kGrain = 16384;  // values a task handles at least, so that scheduling stays cheap
// Blocks of points per thread: so few that a row's corners are mostly still in the cache of the
// thread that read them for the row before.
constexpr int64_t kBlocksPerThread = 16;
constexpr int64_t kBandsPerThread = 4;  // bands of rows per thread: evens out uneven flows
constexpr int64_t kBandRows = 16;       // rows of a band at least: few points touch two bands

// Runs body(i) for i < count. The caller takes part, so that it ends even if no pool thread ever
// comes.
void parallel_for(ffi::ThreadPool& pool, int64_t count, const std::function<void(int64_t)>& body) {
  const int64_t workers = std::min<int64_t>(pool.num_threads(), count);
  if (workers <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  struct State {
    const std::function<void(int64_t)>* body;  // valid while an index is left
    int64_t count;
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;

    void work() {
      int64_t mine = 0;
      for (int64_t i; (i = next.fetch_add(1)) < count; ++mine) (*body)(i);
      if (mine > 0 && done.fetch_add(mine) + mine == count) {
        std::lock_guard<std::mutex> lock(mutex);
        finished.notify_one();
      }
    }
  };
  auto state = std::make_shared<State>();  // a late pool thread may look at it after this call
  state->body = &body;
  state->count = count;
  try {
    for (int64_t t = 1; t < workers; ++t) pool.Schedule([state] { state->work(); });
  } catch (...) {  // no memory for a task: those that have been scheduled, and this thread, do all
  }
  state->work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->finished.wait(lock, [&] { return state->done.load() == state->count; });
}

// Calls body(b, first, last) for blocks of tiles, in parallel. With `own_points` one task visits
// all batch elements of its points in order: it may add to what belongs to a point.
template <class Body>
void for_blocks(ffi::ThreadPool& pool, const Call& call, bool own_points, Body body) {
  const Tiles tiles(call);
  const int64_t batches = call.batch.count;
  const int64_t width = (call.shape.channels + 2) * (own_points ? batches : 1);
  const int64_t values = std::max<int64_t>(width * std::min(tiles.row, Tiles::kPoints), 1);
  const int64_t share = tiles.count * (own_points ? 1 : batches) /
                        (std::max<int64_t>(pool.num_threads(), 1) * kBlocksPerThread);
  const int64_t block = std::max({kGrain / values, std::min(share, tiles.count), int64_t(1)});
  const int64_t blocks = (tiles.count + block - 1) / block;
  parallel_for(pool, own_points ? blocks : blocks * batches, [&](int64_t task) {
    const int64_t first = task % blocks * block, last = std::min(first + block, tiles.count);
    if (own_points) {
      for (int64_t b = 0; b < batches; ++b) body(b, first, last);
    } else {
      body(task / blocks, first, last);
    }
  });
}

template <class Types>
void gather(ffi::ThreadPool& pool, const Call& call) {
  using T = typename Types::Value;
  dispatch_importances<Types, false>(call, [&](auto kind) {
    for_blocks(pool, call, false, [&](int64_t b, int64_t first, int64_t last) {
      const auto image = at<const T>(call, call.image, b);
      const auto importances = importances_of<Accumulator<T>, kind>(call, b);
      const auto out = at<T>(call, call.values, b);
      for_points<Types, kind == Importances::kOne>(
          call, b, first, last, AllRows{}, NoCotangent{},
          [=, &call](int64_t n, const auto& stencil, const auto&, const auto& channels)
              JAXWARP_INLINE {
                gather_point<kPack<T>>(call.sampling, call.shape, stencil, image, importances.of(n),
                                       out + n * call.shape.point_stride, channels);
              });
    });
  });
}

template <class Types>
void gather_tangent(ffi::ThreadPool& pool, const Call& call) {
  using T = typename Types::Value;
  using A = Accumulator<T>;
  dispatch_importances<Types, false>(call, [&](auto kind) {
    for_blocks(pool, call, false, [&](int64_t b, int64_t first, int64_t last) {
      const auto image = at<const T>(call, call.image, b),
                 d_image = at<const T>(call, call.d_image, b);
      const auto importances = importances_of<A, kind>(call, b);
      const auto d_points = point_tangents_of<Types::kDims, A>(call, b);
      const auto d_out = at<T>(call, call.d_values, b);
      for_points<Types, false>(
          call, b, first, last, AllRows{}, NoCotangent{},
          [=, &call](int64_t n, const auto& stencil, const auto&, const auto& channels)
              JAXWARP_INLINE {
                gather_tangent_point<kPack<T>>(call.sampling, call.shape, stencil, image,
                                               importances.of(n), d_image, d_points.of(n),
                                               d_out + n * call.shape.point_stride, channels);
              });
    });
  });
}

// Calls work(b, rows, for_sources) for every band of rows of every image, b being the first batch
// element that goes to the image. for_sources(prepare) then calls body = prepare(b) for every batch
// element that goes there, and body(n, stencil, rows, channels, home) for every point that touches
// the band or is at home in it. One task owns a band and visits its points in order: sums do not
// depend on the bands.
template <class Types, bool kCommon, class Work>
void for_bands(ffi::ThreadPool& pool, const Call& call, const Operand& image, Work work) {
  constexpr int kLast = Types::kDims - 1;
  const int64_t points = call.shape.points, batches = call.batch.count,
                rows = call.shape.size[kLast];

  std::vector<std::vector<int64_t>> sources;  // per image: the batch elements that go to it
  std::vector<int64_t> image_of(batches);
  {
    std::vector<std::pair<int64_t, int64_t>> by_offset;
    for (int64_t b = 0; b < batches; ++b)
      by_offset.emplace_back(call.batch.offset(b, image.stride), b);
    std::sort(by_offset.begin(), by_offset.end());
    for (size_t i = 0; i < by_offset.size(); ++i) {
      if (i == 0 || by_offset[i].first != by_offset[i - 1].first || !image.summed)
        sources.emplace_back();
      sources.back().push_back(by_offset[i].second);
    }
  }
  const int64_t images = static_cast<int64_t>(sources.size());
  const int64_t wanted =
      (pool.num_threads() * kBandsPerThread + images - 1) / std::max<int64_t>(images, 1);
  const int64_t small =
      points * (call.shape.channels + 2) * batches / std::max<int64_t>(images, 1) / kGrain;
  const int64_t bands = std::max<int64_t>(1, std::min({wanted, rows / kBandRows, small}));

  // The rows that each tile of points touches.
  const int64_t tiles = Tiles(call).count;
  std::vector<Rows<int64_t>> touched(bands > 1 ? tiles * batches : 0);
  if (bands > 1) {
    for_blocks(pool, call, false, [&](int64_t b, int64_t first, int64_t last) {
      row_ranges<Types>(call, b, first, last, &touched[b * tiles + first]);
    });
  }

  parallel_for(pool, images * bands, [&](int64_t task) {
    const auto& own = sources[task / bands];
    const int64_t band = task % bands;
    const Rows<int64_t> mine = {rows * band / bands, rows * (band + 1) / bands};
    const auto no_cotangent = [](int64_t) { return NoCotangent{}; };
    work(own.front(), mine, [&](const auto& prepare, const auto&... of_points) {
      const auto& cotangent = std::get<0>(std::tie(of_points..., no_cotangent));
      for (int64_t b : own) {
        const auto body = prepare(b);
        const auto ct_points = cotangent(b);
        const auto apart = [&](int64_t tile) {
          if (bands == 1) return false;
          const Rows<int64_t> other = touched[b * tiles + tile];
          return other.begin >= mine.end || other.end <= mine.begin;
        };
        for (int64_t first = 0, last; first < tiles; first = last) {
          for (last = first + 1; last < tiles && apart(first) == apart(last);) ++last;
          if (apart(first)) continue;
          for_points<Types, kCommon>(
              call, b, first, last, mine, ct_points,
              [=](int64_t n, const auto& stencil, const auto& rows, const auto& channels)
                  JAXWARP_INLINE {
                    const bool all = std::is_same_v<decltype(rows), const AllRows&>;
                    const bool home = all || bands == 1 || mine.contain(home_row(stencil));
                    if (home || touches(stencil, mine)) {
                      body(n, stencil, rows, channels, home);
                    }
                  });
        }
      }
    });
  });
}

// Sets those rows of an image or, with plane strides, of a plane.
template <int D, class A>
void fill_rows(const Call& call, const Operand& operand, int64_t b, const Rows<int64_t>& rows,
               bool plane, A value) {
  A* data = at<A>(call, operand, b);
  if (data == nullptr) return;
  const Shape<int64_t>& shape = call.shape;
  const int64_t row = plane ? shape.plane_stride[D - 1] : shape.stride[D - 1];
  const int64_t parts = plane || !call.channels_first ? 1 : shape.channels;
  for (int64_t c = 0; c < parts; ++c) {
    A* part = data + c * shape.channel_stride;
    std::fill(part + rows.begin * row, part + rows.end * row, value);
  }
}

// Outputs that are sums over batch elements start at 0.
template <class T>
void fill_zero_if_summed(ffi::ThreadPool& pool, const Operand& output, int64_t count) {
  if (output.data == nullptr || !output.summed) return;
  const int64_t tasks = (count + kGrain - 1) / kGrain;
  parallel_for(pool, tasks, [&](int64_t i) {
    T* data = static_cast<T*>(output.data);
    std::fill(data + i * kGrain, data + std::min((i + 1) * kGrain, count), T(0));
  });
}

// Unless the point is a plain one: it has left its pulls, see Tile.
template <int D, class S, class A>
JAXWARP_HD void emit_cotangent(const S&, int64_t n, const A (&ct)[D],
                               const PointCotangent<A>& target) {
  if constexpr (!S::kPlain) {
    if (target.data != nullptr) target.template emit<D>(n * D, Lanes<A, D>(ct));
  }
}

template <class Types>
void gather_vjp(ffi::ThreadPool& pool, const Call& call) {
  constexpr int D = Types::kDims;
  using T = typename Types::Value;
  using A = Accumulator<T>;
  const auto cotangent = [&](int64_t b) {
    return PointCotangent<A>{at<A>(call, call.ct_points, b), call.ct_points.summed};
  };
  // What belongs to the points of batch element b; with the image's share where they are at home.
  const auto visitor = [&](int64_t b) {
    const auto image = at<const T>(call, call.image, b);
    const auto ct_values = at<const T>(call, call.ct_values, b);
    const auto target = cotangent(b);
    return [=, &call](int64_t n, const auto& stencil, A* ct_image, const auto& rows,
                      const auto& channels) JAXWARP_INLINE {
      A ct[D] = {};
      gather_vjp_point<kPack<T>>(call.sampling, call.shape, stencil, image,
                                 ct_values + n * call.shape.point_stride, ct_image, rows, ct,
                                 channels);
      emit_cotangent<D>(stencil, n, ct, target);
    };
  };

  // Points that several images share are at home in none of them: their cotangents take a pass of
  // their own.
  const bool apart = call.ct_image.data == nullptr || call.ct_points.summed;
  if (apart) {
    fill_zero_if_summed<A>(pool, call.ct_points, call.ct_points.count);
    for_blocks(pool, call, call.ct_points.summed, [&](int64_t b, int64_t first, int64_t last) {
      const auto visit = visitor(b);
      for_points<Types, true>(
          call, b, first, last, AllRows{}, cotangent(b),
          [=](int64_t n, const auto& stencil, const auto& rows, const auto& channels)
              JAXWARP_INLINE { visit(n, stencil, nullptr, rows, channels); });
    });
  }
  if (call.ct_image.data == nullptr) return;
  if (call.batch.count == 0) fill_zero_if_summed<A>(pool, call.ct_image, call.ct_image.count);
  for_bands<Types, true>(pool, call, call.ct_image,
                         [&](int64_t first, const auto& rows, const auto& for_sources) {
                           fill_rows<D>(call, call.ct_image, first, rows, false, A(0));
                           const auto image_alone = [&](int64_t b) {
                             const auto ct_image = at<A>(call, call.ct_image, b);
                             const auto ct_values = at<const T>(call, call.ct_values, b);
                             return [=, &call](int64_t n, const auto& stencil, const auto& rows,
                                               const auto& channels, bool) JAXWARP_INLINE {
                               A* const no_plane = nullptr;
                               splat_point<kPack<T>>(call.sampling, call.shape, stencil,
                                                     ct_values + n * call.shape.point_stride,
                                                     Importance<A, Importances::kOne>{1, nullptr},
                                                     ct_image, no_plane, no_plane, rows, channels);
                             };
                           };
                           if (apart) return for_sources(image_alone);
                           for_sources(
                               [&](int64_t b) {
                                 const auto visit = visitor(b);
                                 const auto splat = image_alone(b);
                                 const auto ct_image = at<A>(call, call.ct_image, b);
                                 return [=](int64_t n, const auto& stencil, const auto& rows,
                                            const auto& channels, bool home) JAXWARP_INLINE {
                                   if (home) return visit(n, stencil, ct_image, rows, channels);
                                   splat(n, stencil, rows, channels, home);
                                 };
                               },
                               cotangent);
                         });
}

template <class Types>
void gather_vjp_tangent(ffi::ThreadPool& pool, const Call& call) {
  constexpr int D = Types::kDims;
  using T = typename Types::Value;
  using A = Accumulator<T>;
  fill_zero_if_summed<A>(pool, call.d_ct_points, call.d_ct_points.count);
  for_blocks(pool, call, call.d_ct_points.summed, [&](int64_t b, int64_t first, int64_t last) {
    const T* image = at<const T>(call, call.image, b);
    const T* ct_values = at<const T>(call, call.ct_values, b);
    const T* d_image = at<const T>(call, call.d_image, b);
    const T* d_ct_values = at<const T>(call, call.d_ct_values, b);
    const auto d_points = point_tangents_of<D, A>(call, b);
    const PointCotangent<A> target = {at<A>(call, call.d_ct_points, b), call.d_ct_points.summed};
    for_points<Types, false>(call, b, first, last, AllRows{}, NoCotangent{},
                             [=, &call](int64_t n, const auto& stencil, const auto&,
                                        const auto& channels) JAXWARP_INLINE {
                               const int64_t first = n * call.shape.point_stride;
                               A d_ct[D] = {};
                               gather_vjp_tangent_point<kPack<T>>(
                                   call.sampling, call.shape, stencil, image, ct_values + first,
                                   d_image, d_ct_values == nullptr ? nullptr : d_ct_values + first,
                                   d_points.of(n), d_ct, channels);
                               target.template emit<D>(n * D, Lanes<A, D>(d_ct));
                             });
  });
}

template <class Types>
void splat(ffi::ThreadPool& pool, const Call& call) {
  constexpr int D = Types::kDims;
  using T = typename Types::Value;
  using A = Accumulator<T>;
  const int64_t plane_row = call.shape.plane_stride[D - 1];
  const A min_coverage = static_cast<A>(call.min_coverage);
  const A fill = static_cast<A>(call.sampling.fill);
  const auto normalise = [&](int64_t b, const Rows<int64_t>& rows) {
    A* image = at<A>(call, call.image, b);
    const A* coverage = at<const A>(call, call.coverage, b);
    const A* weight = call.weight.data == nullptr ? coverage : at<const A>(call, call.weight, b);
    with_channels<Types, true>(call, [&](const auto& channels) {
      for (int64_t j = rows.begin * plane_row; j < rows.end * plane_row; ++j) {
        normalise_pixel<kPack<T>>(call.shape, image + j * call.shape.stride[0], coverage[j],
                                  weight[j], min_coverage, fill, channels);
      }
    });
  };
  const auto peaks = [&](int64_t first, const auto& band, const auto& for_sources) {
    fill_rows<D>(call, call.peak, first, band, true, -std::numeric_limits<A>::infinity());
    for_sources([&](int64_t b) {
      const auto importances = importances_of<A>(call, b);
      const auto peak = at<A>(call, call.peak, b);
      return [=, &call](int64_t n, const auto& stencil, const auto& rows, const auto&,
                        bool) JAXWARP_INLINE {
        peak_point(call.sampling, call.shape, stencil, importances.of(n).value, peak, rows);
      };
    });
  };
  if (call.batch.count == 0) {  // no task owns the empty sums
    for (const Operand* output : {&call.image, &call.coverage, &call.weight}) {
      fill_zero_if_summed<A>(pool, *output, output->count);
    }
  }
  dispatch_importances<Types, true>(call, [&](auto kind) {
    for_bands<Types, true>(
        pool, call, call.image, [&](int64_t first, const auto& band, const auto& for_sources) {
          fill_rows<D>(call, call.image, first, band, false, A(0));
          fill_rows<D>(call, call.coverage, first, band, true, A(0));
          fill_rows<D>(call, call.weight, first, band, true, A(0));
          if constexpr (kind == Importances::kAny) {
            if (call.reduce == Reduce::kSoftmax) peaks(first, band, for_sources);
          }
          for_sources([&](int64_t b) {
            const auto importances = importances_of<A, kind>(call, b);
            const auto values = at<const T>(call, call.values, b);
            const auto image = at<A>(call, call.image, b);
            const auto coverage = at<A>(call, call.coverage, b);
            const auto weight = at<A>(call, call.weight, b);
            return [=, &call](int64_t n, const auto& stencil, const auto& rows,
                              const auto& channels, bool) JAXWARP_INLINE {
              splat_point<kPack<T>>(call.sampling, call.shape, stencil,
                                    values + n * call.shape.point_stride, importances.of(n), image,
                                    coverage, weight, rows, channels);
            };
          });
          if (call.reduce != Reduce::kSum) normalise(first, band);
        });
  });
}

template <class Types>
void splat_tangent(ffi::ThreadPool& pool, const Call& call) {
  constexpr int D = Types::kDims;
  using T = typename Types::Value;
  using A = Accumulator<T>;
  if (call.batch.count == 0) {  // no task owns the empty sums
    for (const Operand* output : {&call.d_image, &call.d_coverage}) {
      fill_zero_if_summed<A>(pool, *output, output->count);
    }
  }
  dispatch_reduce<Types>(call, [&](auto reduce) {
    for_bands<Types, false>(
        pool, call, call.d_image, [&](int64_t first, const auto& rows, const auto& for_sources) {
          fill_rows<D>(call, call.d_image, first, rows, false, A(0));
          fill_rows<D>(call, call.d_coverage, first, rows, true, A(0));
          for_sources([&](int64_t b) {
            constexpr bool kPeak = reduce != Reduce::kAverage && Types::kMethod != Method::kCubic;
            constexpr auto kKind = kPeak ? Importances::kAny : Importances::kWeight;
            const auto importances = importances_of<A, kKind>(call, b);
            const auto residual = splat_residual_of<A>(call, b);
            const auto d_points = point_tangents_of<D, A>(call, b);
            const auto values = at<const T>(call, call.values, b);
            const auto d_values = at<const T>(call, call.d_values, b);
            const auto d_image = at<A>(call, call.d_image, b);
            const auto d_coverage = at<A>(call, call.d_coverage, b);
            return [=, &call](int64_t n, const auto& stencil, const auto& rows,
                              const auto& channels, bool) JAXWARP_INLINE {
              const int64_t first = n * call.shape.point_stride;
              splat_tangent_point<kPack<T>, reduce>(
                  call.sampling, call.shape, stencil, values + first, importances.of(n), residual,
                  d_values == nullptr ? nullptr : d_values + first, d_points.of(n), d_image,
                  d_coverage, rows, channels);
            };
          });
        });
  });
}

template <class Types>
void splat_vjp(ffi::ThreadPool& pool, const Call& call) {
  constexpr int D = Types::kDims;
  using T = typename Types::Value;
  using A = Accumulator<T>;
  fill_zero_if_summed<A>(pool, call.ct_values, call.ct_values.count);
  fill_zero_if_summed<A>(pool, call.ct_points, call.ct_points.count);
  fill_zero_if_summed<A>(pool, call.ct_importance, call.ct_importance.count);
  const bool own_points =
      call.ct_values.summed || call.ct_points.summed || call.ct_importance.summed;
  const auto run = [&](auto reduce, auto kind) {
    for_blocks(pool, call, own_points, [&](int64_t b, int64_t first, int64_t last) {
      const auto values = at<const T>(call, call.values, b);
      const auto importances = importances_of<A, kind>(call, b);
      const auto residual = splat_residual_of<A>(call, b);
      const auto ct_image = at<const T>(call, call.ct_image, b);
      const auto ct_coverage = at<const A>(call, call.ct_coverage, b);
      // Of either dtype, see PointCotangent: places in ct_values are counted in elements.
      const PointCotangent<T> ct_values = {call.ct_values.data, call.ct_values.summed};
      const int64_t first_value = call.batch.offset(b, call.ct_values.stride);
      const PointCotangent<A> ct_points = {at<A>(call, call.ct_points, b), call.ct_points.summed};
      const PointCotangent<A> ct_importance = {at<A>(call, call.ct_importance, b),
                                               call.ct_importance.summed};
      for_points<Types, true>(
          call, b, first, last, AllRows{}, ct_points,
          [=, &call](int64_t n, const auto& stencil, const auto&, const auto& channels)
              JAXWARP_INLINE {
                const int64_t first = n * call.shape.point_stride;
                A ct_p[D] = {}, ct_w = 0;
                splat_vjp_point<kPack<T>, reduce>(
                    call.sampling, call.shape, stencil, values + first, importances.of(n), residual,
                    ct_image, ct_coverage, ct_values, first_value + first, ct_p, ct_w, channels);
                emit_cotangent<D>(stencil, n, ct_p, ct_points);
                if (kind != Importances::kOne && ct_importance.data != nullptr) {
                  ct_importance.template emit<1>(n, Lanes<A, 1>(ct_w));
                }
              });
    });
  };
  dispatch_reduce<Types>(call, [&](auto reduce) {
    constexpr std::integral_constant<Importances, Importances::kWeight> kGiven{};
    if constexpr (reduce == Reduce::kSoftmax) {
      return run(reduce, std::integral_constant<Importances, Importances::kAny>{});
    }
    if (call.importance.data != nullptr || call.ct_importance.data != nullptr) {
      return run(reduce, kGiven);
    }
    run(reduce, std::integral_constant<Importances, Importances::kOne>{});
  });
}

}  // namespace

#define JAXWARP_CPU_KERNEL(kernel)                                                                 \
  template <Method M, int D>                                                                       \
  void CpuKernels<M, D>::kernel(ffi::ThreadPool& pool, const Call& call) {                         \
    dispatch_types<M, D>(call, [&](auto types) { jaxwarp::kernel<decltype(types)>(pool, call); }); \
  }
JAXWARP_CPU_KERNEL(gather)
JAXWARP_CPU_KERNEL(gather_tangent)
JAXWARP_CPU_KERNEL(gather_vjp)
JAXWARP_CPU_KERNEL(gather_vjp_tangent)
JAXWARP_CPU_KERNEL(splat)
JAXWARP_CPU_KERNEL(splat_tangent)
JAXWARP_CPU_KERNEL(splat_vjp)

template struct CpuKernels<Method::JAXWARP_METHOD, JAXWARP_DIMS>;

#else  // the handlers

#define JAXWARP_CPU_HANDLER(Handler, kernel)                                               \
  static ffi::Error Handler##Cpu(ffi::ThreadPool pool, ffi::RemainingArgs args,            \
                                 ffi::RemainingRets rets, ffi::Dictionary attrs) {         \
    Call call{};                                                                           \
    const ffi::Error error = Decoder(k##Handler, call).decode(args, rets, attrs);          \
    if (error.failure()) return error;                                                     \
    dispatch_kernels<CpuKernels>(call, [&](auto kernels) { kernels.kernel(pool, call); }); \
    return ffi::Error::Success();                                                          \
  }                                                                                        \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                           \
      Handler, Handler##Cpu,                                                               \
      ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs())

JAXWARP_CPU_HANDLER(Gather, gather);
JAXWARP_CPU_HANDLER(GatherTangent, gather_tangent);
JAXWARP_CPU_HANDLER(GatherVjp, gather_vjp);
JAXWARP_CPU_HANDLER(GatherVjpTangent, gather_vjp_tangent);
JAXWARP_CPU_HANDLER(Splat, splat);
JAXWARP_CPU_HANDLER(SplatTangent, splat_tangent);
JAXWARP_CPU_HANDLER(SplatVjp, splat_vjp);

#endif

}  // namespace jaxwarp
