// CPU: loops over points on XLA's thread pool, and the CPU handlers. Every sum is taken in an order
// that depends on the data alone, so results do not depend on the number of threads.
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>

#include "geometry.h"

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

constexpr int kPack = 4;           // channels moved at once
constexpr int64_t kGrain = 16384;  // values a task handles at least, so that scheduling stays cheap
constexpr int64_t kTile = 64;      // neighbouring points whose rows are bounded together
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
  for (int64_t t = 1; t < workers; ++t) pool.Schedule([state] { state->work(); });
  state->work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->finished.wait(lock, [&] { return state->done.load() == state->count; });
}

// Calls body(n, position) for the points begin .. end - 1 of batch element b.
template <class Types, class Body>
void for_points(const Call& call, int64_t b, int64_t begin, int64_t end, Body body) {
  constexpr int D = Types::kDims;
  using Real = Accumulator<typename Types::Value>;
  int64_t pixel[D] = {};
  if (call.displacement) {
    int64_t rest = begin;
    for (int a = 0; a < D; ++a) {
      pixel[a] = rest % call.shape.grid[a];
      rest /= call.shape.grid[a];
    }
  }
  const auto loop = [&](auto* points) {
    for (int64_t n = begin; n < end; ++n) {
      Real p[D];
      read_position(points, n, pixel, p);
      body(n, p);
      if (!call.displacement) continue;
      for (int a = 0; a < D && ++pixel[a] == call.shape.grid[a]; ++a) pixel[a] = 0;
    }
  };
  if constexpr (std::is_same_v<Real, float>) {
    if (call.points.dtype == ffi::F16) return loop(at<const float16>(call, call.points, b));
    if (call.points.dtype == ffi::BF16) return loop(at<const bfloat16>(call, call.points, b));
  }
  loop(at<const Real>(call, call.points, b));
}

// Calls body(b, begin, end) for blocks of points, in parallel. With `own_points` one task visits
// all batch elements of its points in order: it may add to what belongs to a point.
template <class Body>
void for_blocks(ffi::ThreadPool& pool, const Call& call, bool own_points, Body body) {
  const int64_t points = call.shape.points, batches = call.batch.count;
  const int64_t width = (call.shape.channels + 2) * (own_points ? batches : 1);
  const int64_t block = std::max<int64_t>(kGrain / std::max<int64_t>(width, 1) / kTile, 1) * kTile;
  const int64_t blocks = (points + block - 1) / block;
  parallel_for(pool, own_points ? blocks : blocks * batches, [&](int64_t task) {
    const int64_t begin = task % blocks * block, end = std::min(begin + block, points);
    if (own_points) {
      for (int64_t b = 0; b < batches; ++b) body(b, begin, end);
    } else {
      body(task / blocks, begin, end);
    }
  });
}

template <class Types>
using StencilOf =
    Stencil<Types::kMethod, Types::kDims, Accumulator<typename Types::Value>, int64_t>;

Channels<int64_t> all_channels(const Call& call) {
  const bool contiguous = call.shape.channel_stride == 1 && call.shape.point_channel_stride == 1;
  return {0, kPack, call.shape.channels, contiguous};
}

template <class Types>
void gather(ffi::ThreadPool& pool, const Call& call) {
  using T = typename Types::Value;
  const auto channels = all_channels(call);
  for_blocks(pool, call, false, [&](int64_t b, int64_t begin, int64_t end) {
    const T* image = at<const T>(call, call.image, b);
    T* out = at<T>(call, call.values, b);
    for_points<Types>(call, b, begin, end, [&](int64_t n, const auto& p) {
      const StencilOf<Types> stencil(p, call.shape.size, call.sampling.boundary);
      gather_point<kPack>(call.sampling, call.shape, stencil, image,
                          importance_of<Accumulator<T>>(call, b, n),
                          out + n * call.shape.point_stride, channels);
    });
  });
}

template <class Types>
void gather_tangent(ffi::ThreadPool& pool, const Call& call) {
  using T = typename Types::Value;
  using A = Accumulator<T>;
  const auto channels = all_channels(call);
  for_blocks(pool, call, false, [&](int64_t b, int64_t begin, int64_t end) {
    const T* image = at<const T>(call, call.image, b);
    const T* d_image = at<const T>(call, call.d_image, b);
    T* d_out = at<T>(call, call.d_values, b);
    for_points<Types>(call, b, begin, end, [&](int64_t n, const auto& p) {
      const StencilOf<Types> stencil(p, call.shape.size, call.sampling.boundary);
      gather_tangent_point<kPack>(call.sampling, call.shape, stencil, image,
                                  importance_of<A>(call, b, n), d_image,
                                  point_tangent_of<Types::kDims, A>(call, b, n),
                                  d_out + n * call.shape.point_stride, channels);
    });
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

// Calls work(b, rows, for_sources) for every band of rows of every image, b being the first batch
// element that goes to the image; for_sources(body) then calls body(b, n, stencil, home) for every
// point that touches the band or is at home in it. One task owns a band and visits its points in
// order: sums do not depend on the bands.
template <class Types, class Work>
void for_bands(ffi::ThreadPool& pool, const Call& call, const Operand& image, Work work) {
  constexpr int kLast = Types::kDims - 1;
  using S = StencilOf<Types>;
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
  const int64_t tiles = (points + kTile - 1) / kTile;
  std::vector<Rows<int64_t>> touched(bands > 1 ? tiles * batches : 0);
  if (bands > 1) {
    for_blocks(pool, call, false, [&](int64_t b, int64_t begin, int64_t end) {
      for_points<Types>(call, b, begin, end, [&](int64_t n, const auto& p) {
        const S stencil(p, call.shape.size, call.sampling.boundary);
        Rows<int64_t>& tile = touched[b * tiles + n / kTile];
        const int64_t home = home_row(stencil);
        if (n % kTile == 0) tile = {home, home + 1};
        tile = {std::min(tile.begin, home), std::max(tile.end, home + 1)};
        for (int tap = 0; tap < S::kAxisTaps; ++tap) {
          const int64_t row = stencil.tap_index(tap, kLast);
          if (row >= 0) tile = {std::min(tile.begin, row), std::max(tile.end, row + 1)};
        }
      });
    });
  }

  parallel_for(pool, images * bands, [&](int64_t task) {
    const auto& own = sources[task / bands];
    const int64_t band = task % bands;
    const Rows<int64_t> mine = {rows * band / bands, rows * (band + 1) / bands};
    work(own.front(), mine, [&](auto body) {
      for (int64_t b : own) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
          if (bands > 1) {
            const Rows<int64_t> other = touched[b * tiles + tile];
            if (other.begin >= mine.end || other.end <= mine.begin) continue;
          }
          for_points<Types>(call, b, tile * kTile, std::min((tile + 1) * kTile, points),
                            [&](int64_t n, const auto& p) {
                              const S stencil(p, call.shape.size, call.sampling.boundary);
                              const bool home = bands == 1 || mine.contain(home_row(stencil));
                              if (home || touches(stencil, mine)) body(b, n, stencil, home);
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

template <class Types>
void gather_vjp(ffi::ThreadPool& pool, const Call& call) {
  constexpr int D = Types::kDims;
  using T = typename Types::Value;
  using A = Accumulator<T>;
  using S = StencilOf<Types>;
  const auto channels = all_channels(call);
  const auto visit = [&](int64_t b, int64_t n, const S& stencil, A* ct_image, const auto& rows) {
    A ct[D] = {};
    gather_vjp_point<kPack>(call.sampling, call.shape, stencil, at<const T>(call, call.image, b),
                            at<const T>(call, call.ct_values, b) + n * call.shape.point_stride,
                            ct_image, rows, ct, channels);
    const PointCotangent<A> target = {at<A>(call, call.ct_points, b), call.ct_points.summed};
    target.template emit<D>(n * D, ct);
  };

  // Points that several images share are at home in none of them: their cotangents take a pass of
  // their own.
  const bool apart = call.ct_image.data == nullptr || call.ct_points.summed;
  if (apart) {
    fill_zero_if_summed<A>(pool, call.ct_points, call.ct_points.count);
    for_blocks(pool, call, call.ct_points.summed, [&](int64_t b, int64_t begin, int64_t end) {
      for_points<Types>(call, b, begin, end, [&](int64_t n, const auto& p) {
        visit(b, n, S(p, call.shape.size, call.sampling.boundary), nullptr, AllRows{});
      });
    });
  }
  if (call.ct_image.data == nullptr) return;
  if (call.batch.count == 0) fill_zero_if_summed<A>(pool, call.ct_image, call.ct_image.count);
  for_bands<Types>(
      pool, call, call.ct_image, [&](int64_t first, const auto& rows, const auto& for_sources) {
        fill_rows<D>(call, call.ct_image, first, rows, false, A(0));
        for_sources([&](int64_t b, int64_t n, const S& stencil, bool home) {
          A* ct_image = at<A>(call, call.ct_image, b);
          if (home && !apart) return visit(b, n, stencil, ct_image, rows);
          splat_point<kPack>(call.sampling, call.shape, stencil,
                             at<const T>(call, call.ct_values, b) + n * call.shape.point_stride,
                             Importance<A>{1, nullptr}, ct_image, static_cast<A*>(nullptr),
                             static_cast<A*>(nullptr), rows, channels);
        });
      });
}

template <class Types>
void gather_vjp_tangent(ffi::ThreadPool& pool, const Call& call) {
  constexpr int D = Types::kDims;
  using T = typename Types::Value;
  using A = Accumulator<T>;
  const auto channels = all_channels(call);
  fill_zero_if_summed<A>(pool, call.d_ct_points, call.d_ct_points.count);
  for_blocks(pool, call, call.d_ct_points.summed, [&](int64_t b, int64_t begin, int64_t end) {
    const T* d_ct_values = at<const T>(call, call.d_ct_values, b);
    const PointCotangent<A> target = {at<A>(call, call.d_ct_points, b), call.d_ct_points.summed};
    for_points<Types>(call, b, begin, end, [&](int64_t n, const auto& p) {
      const StencilOf<Types> stencil(p, call.shape.size, call.sampling.boundary);
      const int64_t first = n * call.shape.point_stride;
      A d_ct[D] = {};
      gather_vjp_tangent_point<kPack>(
          call.sampling, call.shape, stencil, at<const T>(call, call.image, b),
          at<const T>(call, call.ct_values, b) + first, at<const T>(call, call.d_image, b),
          d_ct_values == nullptr ? nullptr : d_ct_values + first,
          point_tangent_of<D, A>(call, b, n), d_ct, channels);
      target.template emit<D>(n * D, d_ct);
    });
  });
}

template <class Types>
void splat(ffi::ThreadPool& pool, const Call& call) {
  constexpr int D = Types::kDims;
  using T = typename Types::Value;
  using A = Accumulator<T>;
  const auto channels = all_channels(call);
  const int64_t plane_row = call.shape.plane_stride[D - 1];
  const bool softmax = call.reduce == Reduce::kSoftmax;
  if (call.batch.count == 0) {  // no task owns the empty sums
    for (const Operand* output : {&call.image, &call.coverage, &call.weight}) {
      fill_zero_if_summed<A>(pool, *output, output->count);
    }
  }
  for_bands<Types>(
      pool, call, call.image, [&](int64_t first, const auto& rows, const auto& for_sources) {
        fill_rows<D>(call, call.image, first, rows, false, A(0));
        fill_rows<D>(call, call.coverage, first, rows, true, A(0));
        fill_rows<D>(call, call.weight, first, rows, true, A(0));
        if (softmax) {
          fill_rows<D>(call, call.peak, first, rows, true, -std::numeric_limits<A>::infinity());
          for_sources([&](int64_t b, int64_t n, const auto& stencil, bool) {
            peak_point(call.sampling, call.shape, stencil,
                       importance_of<Accumulator<T>>(call, b, n).value, at<A>(call, call.peak, b),
                       rows);
          });
        }
        for_sources([&](int64_t b, int64_t n, const auto& stencil, bool) {
          splat_point<kPack>(call.sampling, call.shape, stencil,
                             at<const T>(call, call.values, b) + n * call.shape.point_stride,
                             importance_of<Accumulator<T>>(call, b, n), at<A>(call, call.image, b),
                             at<A>(call, call.coverage, b), at<A>(call, call.weight, b), rows,
                             channels);
        });
        if (call.reduce == Reduce::kSum) return;
        A* image = at<A>(call, call.image, first);
        const A* coverage = at<const A>(call, call.coverage, first);
        const A* weight = at<const A>(call, call.weight, first);
        for (int64_t j = rows.begin * plane_row; j < rows.end * plane_row; ++j) {
          normalise_pixel<kPack>(call.shape, image + j * call.shape.stride[0], coverage[j],
                                 weight == nullptr ? coverage[j] : weight[j],
                                 static_cast<A>(call.min_coverage),
                                 static_cast<A>(call.sampling.fill), channels);
        }
      });
}

template <class Types>
void splat_tangent(ffi::ThreadPool& pool, const Call& call) {
  constexpr int D = Types::kDims;
  using T = typename Types::Value;
  using A = Accumulator<T>;
  const auto channels = all_channels(call);
  if (call.batch.count == 0) {  // no task owns the empty sums
    for (const Operand* output : {&call.d_image, &call.d_coverage}) {
      fill_zero_if_summed<A>(pool, *output, output->count);
    }
  }
  for_bands<Types>(pool, call, call.d_image,
                   [&](int64_t first, const auto& rows, const auto& for_sources) {
                     fill_rows<D>(call, call.d_image, first, rows, false, A(0));
                     fill_rows<D>(call, call.d_coverage, first, rows, true, A(0));
                     for_sources([&](int64_t b, int64_t n, const auto& stencil, bool) {
                       const T* d_values = at<const T>(call, call.d_values, b);
                       dispatch_reduce<Types>(call, [&](auto reduce) {
                         splat_tangent_point<kPack, decltype(reduce)::value>(
                             call.sampling, call.shape, stencil,
                             at<const T>(call, call.values, b) + n * call.shape.point_stride,
                             importance_of<A>(call, b, n), splat_residual_of<A>(call, b),
                             d_values == nullptr ? nullptr : d_values + n * call.shape.point_stride,
                             point_tangent_of<D, A>(call, b, n), at<A>(call, call.d_image, b),
                             at<A>(call, call.d_coverage, b), rows, channels);
                       });
                     });
                   });
}

template <class Types>
void splat_vjp(ffi::ThreadPool& pool, const Call& call) {
  constexpr int D = Types::kDims;
  using T = typename Types::Value;
  using A = Accumulator<T>;
  const auto channels = all_channels(call);
  fill_zero_if_summed<A>(pool, call.ct_values, call.ct_values.count);
  fill_zero_if_summed<A>(pool, call.ct_points, call.ct_points.count);
  fill_zero_if_summed<A>(pool, call.ct_importance, call.ct_importance.count);
  const bool own_points =
      call.ct_values.summed || call.ct_points.summed || call.ct_importance.summed;
  for_blocks(pool, call, own_points, [&](int64_t b, int64_t begin, int64_t end) {
    const T* values = at<const T>(call, call.values, b);
    const auto residual = splat_residual_of<A>(call, b);
    const T* ct_image = at<const T>(call, call.ct_image, b);
    const A* ct_coverage = at<const A>(call, call.ct_coverage, b);
    // Of either dtype, see PointCotangent: places in ct_values are counted in elements.
    const PointCotangent<T> ct_values = {call.ct_values.data, call.ct_values.summed};
    const int64_t first_value = call.batch.offset(b, call.ct_values.stride);
    const PointCotangent<A> ct_points = {at<A>(call, call.ct_points, b), call.ct_points.summed};
    const PointCotangent<A> ct_importance = {at<A>(call, call.ct_importance, b),
                                             call.ct_importance.summed};
    for_points<Types>(call, b, begin, end, [&](int64_t n, const auto& p) {
      const StencilOf<Types> stencil(p, call.shape.size, call.sampling.boundary);
      A ct_p[D] = {}, ct_w[1] = {};
      dispatch_reduce<Types>(call, [&](auto reduce) {
        splat_vjp_point<kPack, decltype(reduce)::value>(
            call.sampling, call.shape, stencil, values + n * call.shape.point_stride,
            importance_of<A>(call, b, n).value, residual, ct_image, ct_coverage, ct_values,
            first_value + n * call.shape.point_stride, ct_p, ct_w[0], channels);
      });
      if (ct_points.data != nullptr) ct_points.template emit<D>(n * D, ct_p);
      if (ct_importance.data != nullptr) ct_importance.template emit<1>(n, ct_w);
    });
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
