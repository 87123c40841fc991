// CUDA: kernels and handlers. A thread works on one point, or on some channels of it; the launch
// numbers stand in one struct. Handlers only enqueue work, so that XLA can put them into a CUDA
// graph.
#include <cuda_runtime.h>

#include "geometry.h"

namespace jaxwarp {

template <Method M, int D>
struct CudaKernels {
  static void gather(cudaStream_t stream, const Call& call);
  static void gather_tangent(cudaStream_t stream, const Call& call);
  static void gather_vjp(cudaStream_t stream, const Call& call);
  static void gather_vjp_tangent(cudaStream_t stream, const Call& call);
  static void splat(cudaStream_t stream, const Call& call);
  static void splat_tangent(cudaStream_t stream, const Call& call);
  static void splat_vjp(cudaStream_t stream, const Call& call);
};

#if defined(JAXWARP_METHOD)
namespace {

struct Launch {
  static constexpr int kThreads =
      256;  // 8 warps: a full multiprocessor from 8 blocks up to 32 registers
  static constexpr int kPackBytes = 16;      // the widest load of a thread
  static constexpr int kMaxLanes = 32;       // threads that share a point: no more than a warp
  static constexpr int kSerialChannels = 4;  // so few unaligned channels stay with one thread
  static constexpr int64_t kMaxBatchBlocks = 65535;  // of gridDim.y
  static constexpr int64_t kMaxIndex32 = 1 << 29;  // elements: leaves room for 2 n in corner_index
};

// What every kernel is given, by value.
template <class IndexT>
struct Work {
  using Index = IndexT;
  Call call;
  Shape<Index> shape;
  Index lanes;      // threads per point (or pixel)
  Index items;      // points (or pixels) times lanes
  bool own_points;  // a thread visits all batch elements of its points, in order
};

template <class Index>
__device__ Channels<Index, true> lane_channels(const Work<Index>& work, Index item, int pack) {
  return {item % work.lanes * pack, work.lanes * pack, work.shape.channels, true};
}

// Calls body(b, item) for this thread's item in every batch element that is its own.
template <class Index, class Body>
__device__ void for_items(const Work<Index>& work, Body body) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (item >= static_cast<int64_t>(work.items)) return;
  for (int64_t b = blockIdx.y; b < work.call.batch.count; b += gridDim.y)
    body(b, static_cast<Index>(item));
}

template <class Types, class Index>
using StencilOf = Stencil<Types::kMethod, Types::kDims, Accumulator<typename Types::Value>, Index>;

template <class Types, class Index>
__device__ StencilOf<Types, Index> stencil_at(const Work<Index>& work, int64_t b, Index n) {
  constexpr int D = Types::kDims;
  using Real = Accumulator<typename Types::Value>;
  const Call& call = work.call;
  Index pixel[D] = {};
  if (call.displacement) {
    Index rest = n;
    JAXWARP_UNROLL for (int a = 0; a < D; ++a) {
      pixel[a] = rest % work.shape.grid[a];
      rest /= work.shape.grid[a];
    }
  }
  Real p[D];
  if (sizeof(Real) == 4 && call.points.dtype == ffi::F16) {
    read_position(at<const float16>(call, call.points, b), n, pixel, p);
  } else if (sizeof(Real) == 4 && call.points.dtype == ffi::BF16) {
    read_position(at<const bfloat16>(call, call.points, b), n, pixel, p);
  } else {
    read_position(at<const Real>(call, call.points, b), n, pixel, p);
  }
  return StencilOf<Types, Index>(p, work.shape.size, call.sampling.boundary);
}

template <class Types, int V, class Index>
__global__ void __launch_bounds__(Launch::kThreads) gather_kernel(const Work<Index> work) {
  using T = typename Types::Value;
  const Call& call = work.call;
  for_items(work, [&](int64_t b, Index item) {
    const Index n = item / work.lanes;
    gather_point<V>(call.sampling, work.shape, stencil_at<Types>(work, b, n),
                    at<const T>(call, call.image, b), importances_of<Accumulator<T>>(call, b).of(n),
                    at<T>(call, call.values, b) + n * work.shape.point_stride,
                    lane_channels(work, item, V));
  });
}

template <class Types, int V, class Index>
__global__ void __launch_bounds__(Launch::kThreads) gather_tangent_kernel(const Work<Index> work) {
  using T = typename Types::Value;
  using A = Accumulator<T>;
  const Call& call = work.call;
  for_items(work, [&](int64_t b, Index item) {
    const Index n = item / work.lanes;
    gather_tangent_point<V>(
        call.sampling, work.shape, stencil_at<Types>(work, b, n), at<const T>(call, call.image, b),
        importances_of<A>(call, b).of(n), at<const T>(call, call.d_image, b),
        point_tangents_of<Types::kDims, A>(call, b).of(n),
        at<T>(call, call.d_values, b) + n * work.shape.point_stride, lane_channels(work, item, V));
  });
}

template <class Types, int V, class Index>
__global__ void __launch_bounds__(Launch::kThreads) gather_vjp_kernel(const Work<Index> work) {
  constexpr int D = Types::kDims;
  using T = typename Types::Value;
  using A = Accumulator<T>;
  const Call& call = work.call;
  for_items(work, [&](int64_t b, Index n) {
    A ct[D] = {};
    gather_vjp_point<V>(
        call.sampling, work.shape, stencil_at<Types>(work, b, n), at<const T>(call, call.image, b),
        at<const T>(call, call.ct_values, b) + n * work.shape.point_stride,
        at<A>(call, call.ct_image, b), AllRows{}, ct, lane_channels(work, Index(0), V));
    const PointCotangent<A> target = {at<A>(call, call.ct_points, b), call.ct_points.summed};
    JAXWARP_UNROLL for (int a = 0; a < D; ++a) {
      const Lanes<A, 1> one(ct[a]);
      target.template emit<1>(n * D + a, one);
    }
  });
}

template <class Types, int V, class Index>
__global__ void __launch_bounds__(Launch::kThreads)
    gather_vjp_tangent_kernel(const Work<Index> work) {
  constexpr int D = Types::kDims;
  using T = typename Types::Value;
  using A = Accumulator<T>;
  const Call& call = work.call;
  for_items(work, [&](int64_t b, Index n) {
    const Index first = n * work.shape.point_stride;
    const T* d_ct_values = at<const T>(call, call.d_ct_values, b);
    A d_ct[D] = {};
    gather_vjp_tangent_point<V>(
        call.sampling, work.shape, stencil_at<Types>(work, b, n), at<const T>(call, call.image, b),
        at<const T>(call, call.ct_values, b) + first, at<const T>(call, call.d_image, b),
        d_ct_values == nullptr ? nullptr : d_ct_values + first,
        point_tangents_of<D, A>(call, b).of(n), d_ct, lane_channels(work, Index(0), V));
    const PointCotangent<A> target = {at<A>(call, call.d_ct_points, b), call.d_ct_points.summed};
    JAXWARP_UNROLL for (int a = 0; a < D; ++a) {
      const Lanes<A, 1> one(d_ct[a]);
      target.template emit<1>(n * D + a, one);
    }
  });
}

template <class Types, int V, class Index>
__global__ void __launch_bounds__(Launch::kThreads) splat_kernel(const Work<Index> work) {
  using T = typename Types::Value;
  using A = Accumulator<T>;
  const Call& call = work.call;
  for_items(work, [&](int64_t b, Index item) {
    const Index n = item / work.lanes;
    splat_point<V>(call.sampling, work.shape, stencil_at<Types>(work, b, n),
                   at<const T>(call, call.values, b) + n * work.shape.point_stride,
                   importances_of<Accumulator<T>>(call, b).of(n), at<A>(call, call.image, b),
                   at<A>(call, call.coverage, b), at<A>(call, call.weight, b), AllRows{},
                   lane_channels(work, item, V));
  });
}

template <class A>
__global__ void __launch_bounds__(Launch::kThreads) lowest_kernel(A* data, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) data[i] = -std::numeric_limits<A>::infinity();
}

template <class Types, class Index>
__global__ void __launch_bounds__(Launch::kThreads) peak_kernel(const Work<Index> work) {
  using T = typename Types::Value;
  const Call& call = work.call;
  for_items(work, [&](int64_t b, Index n) {
    peak_point(call.sampling, work.shape, stencil_at<Types>(work, b, n),
               importances_of<Accumulator<T>>(call, b).of(n).value,
               at<Accumulator<T>>(call, call.peak, b), AllRows{});
  });
}

// Items are the pixels of all images, which lie one behind the other.
template <class A, int V, class Index>
__global__ void __launch_bounds__(Launch::kThreads) normalise_kernel(const Work<Index> work) {
  const Call& call = work.call;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t j = item / work.lanes;
  if (j >= call.coverage.count) return;
  const A coverage = static_cast<const A*>(call.coverage.data)[j];
  const A* weight = static_cast<const A*>(call.weight.data);
  normalise_pixel<V>(work.shape, static_cast<A*>(call.image.data) + j * work.shape.stride[0],
                     coverage, weight == nullptr ? coverage : weight[j],
                     static_cast<A>(call.min_coverage), static_cast<A>(call.sampling.fill),
                     lane_channels(work, static_cast<Index>(item % work.lanes), V));
}

template <class Types, int V, Reduce R, class Index>
__global__ void __launch_bounds__(Launch::kThreads) splat_tangent_kernel(const Work<Index> work) {
  using T = typename Types::Value;
  using A = Accumulator<T>;
  const Call& call = work.call;
  for_items(work, [&](int64_t b, Index item) {
    const Index n = item / work.lanes;
    const T* d_values = at<const T>(call, call.d_values, b);
    splat_tangent_point<V, R>(
        call.sampling, work.shape, stencil_at<Types>(work, b, n),
        at<const T>(call, call.values, b) + n * work.shape.point_stride,
        importances_of<A>(call, b).of(n), splat_residual_of<A>(call, b),
        d_values == nullptr ? nullptr : d_values + n * work.shape.point_stride,
        point_tangents_of<Types::kDims, A>(call, b).of(n), at<A>(call, call.d_image, b),
        at<A>(call, call.d_coverage, b), AllRows{}, lane_channels(work, item, V));
  });
}

template <class Types, int V, Reduce R, class Index>
__global__ void __launch_bounds__(Launch::kThreads) splat_vjp_kernel(const Work<Index> work) {
  constexpr int D = Types::kDims;
  using T = typename Types::Value;
  using A = Accumulator<T>;
  const Call& call = work.call;
  for_items(work, [&](int64_t b, Index n) {
    // Of either dtype, see PointCotangent: the batch offset is counted in elements.
    const int64_t first = call.batch.offset(b, call.ct_values.stride);
    const PointCotangent<T> ct_values = {
        call.ct_values.data == nullptr ? nullptr
        : call.ct_values.summed ? static_cast<void*>(static_cast<A*>(call.ct_values.data) + first)
                                : static_cast<void*>(static_cast<T*>(call.ct_values.data) + first),
        call.ct_values.summed};
    A ct_p[D] = {}, ct_w = 0;
    splat_vjp_point<V, R>(
        call.sampling, work.shape, stencil_at<Types>(work, b, n),
        at<const T>(call, call.values, b) + n * work.shape.point_stride,
        importances_of<A>(call, b).of(n), splat_residual_of<A>(call, b),
        at<const T>(call, call.ct_image, b), at<const A>(call, call.ct_coverage, b), ct_values,
        n * work.shape.point_stride, ct_p, ct_w, lane_channels(work, Index(0), V));
    const PointCotangent<A> ct_points = {at<A>(call, call.ct_points, b), call.ct_points.summed};
    if (ct_points.data != nullptr) {
      JAXWARP_UNROLL for (int a = 0; a < D; ++a) {
        const Lanes<A, 1> one(ct_p[a]);
        ct_points.template emit<1>(n * D + a, one);
      }
    }
    const PointCotangent<A> ct_importance = {at<A>(call, call.ct_importance, b),
                                             call.ct_importance.summed};
    const Lanes<A, 1> one(ct_w);
    if (ct_importance.data != nullptr) ct_importance.template emit<1>(n, one);
  });
}

template <class Index>
Shape<Index> narrowed(const Shape<int64_t>& shape) {
  Shape<Index> result;
  for (int a = 0; a < 3; ++a) {
    result.size[a] = static_cast<Index>(shape.size[a]);
    result.stride[a] = static_cast<Index>(shape.stride[a]);
    result.plane_stride[a] = static_cast<Index>(shape.plane_stride[a]);
    result.grid[a] = static_cast<Index>(shape.grid[a]);
  }
  result.channels = static_cast<Index>(shape.channels);
  result.channel_stride = static_cast<Index>(shape.channel_stride);
  result.points = static_cast<Index>(shape.points);
  result.point_stride = static_cast<Index>(shape.point_stride);
  result.point_channel_stride = static_cast<Index>(shape.point_channel_stride);
  return result;
}

// Calls body(Width<V>, index) with the widest pack that every pixel and point is aligned to, and
// with the smaller index type where one batch element fits it.
template <class T, class Body>
void with_pack_and_index(const Call& call, Body body) {
  constexpr int kPack = Launch::kPackBytes / static_cast<int>(sizeof(T));
  const Shape<int64_t>& shape = call.shape;
  const int64_t pixels = shape.size[0] * shape.size[1] * shape.size[2];
  const int64_t elements = std::max(pixels, shape.points) * std::max<int64_t>(shape.channels, 4);
  if (elements >= Launch::kMaxIndex32) {
    body(Width<1>{}, int64_t{});
  } else if (!call.channels_first && shape.channels > 0 && shape.channels % kPack == 0) {
    body(Width<kPack>{}, int32_t{});
  } else {
    body(Width<1>{}, int32_t{});
  }
}

template <class Index>
Work<Index> work_on(const Call& call, int64_t items, int pack, bool split_channels,
                    bool own_points) {
  const int64_t packs = call.shape.channels / pack;
  // Channels-first, neighbouring points are what lies side by side.
  const bool serial =
      !split_channels || call.channels_first || (pack == 1 && packs <= Launch::kSerialChannels);
  const int64_t lanes =
      serial ? 1 : std::min<int64_t>(std::max<int64_t>(packs, 1), Launch::kMaxLanes);
  return {call, narrowed<Index>(call.shape), static_cast<Index>(lanes),
          static_cast<Index>(items * lanes), own_points};
}

template <class... Parameters, class... Arguments>
void launch_threads(cudaStream_t stream, int64_t threads, int64_t batch_blocks,
                    void (*kernel)(Parameters...), const Arguments&... arguments) {
  if (threads == 0 || batch_blocks == 0) return;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>((threads + Launch::kThreads - 1) / Launch::kThreads),
                        static_cast<unsigned>(batch_blocks));
  config.blockDim = dim3(Launch::kThreads);
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class Index>
void launch(cudaStream_t stream, void (*kernel)(Work<Index>), const Work<Index>& work,
            int64_t items, int64_t batches) {
  const int64_t blocks = std::min(batches, work.own_points ? 1 : Launch::kMaxBatchBlocks);
  launch_threads(stream, items * static_cast<int64_t>(work.lanes), blocks, kernel, work);
}

template <class A>
void fill_zero(cudaStream_t stream, const Operand& operand) {
  if (operand.data != nullptr && operand.count > 0) {
    cudaMemsetAsync(operand.data, 0, static_cast<size_t>(operand.count) * sizeof(A), stream);
  }
}

template <class Types>
void gather(cudaStream_t stream, const Call& call) {
  with_pack_and_index<typename Types::Value>(call, [&](auto pack, auto index) {
    using Index = decltype(index);
    constexpr int V = decltype(pack)::value;
    const auto work = work_on<Index>(call, call.shape.points, V, true, false);
    launch(stream, gather_kernel<Types, V, Index>, work, call.shape.points, call.batch.count);
  });
}

template <class Types>
void gather_tangent(cudaStream_t stream, const Call& call) {
  with_pack_and_index<typename Types::Value>(call, [&](auto pack, auto index) {
    using Index = decltype(index);
    constexpr int V = decltype(pack)::value;
    const auto work = work_on<Index>(call, call.shape.points, V, true, false);
    launch(stream, gather_tangent_kernel<Types, V, Index>, work, call.shape.points,
           call.batch.count);
  });
}

template <class Types>
void gather_vjp(cudaStream_t stream, const Call& call) {
  using A = Accumulator<typename Types::Value>;
  fill_zero<A>(stream, call.ct_image);
  if (call.ct_points.summed) fill_zero<A>(stream, call.ct_points);
  with_pack_and_index<typename Types::Value>(call, [&](auto pack, auto index) {
    using Index = decltype(index);
    constexpr int V = decltype(pack)::value;
    const auto work = work_on<Index>(call, call.shape.points, V, false, call.ct_points.summed);
    launch(stream, gather_vjp_kernel<Types, V, Index>, work, call.shape.points, call.batch.count);
  });
}

template <class Types>
void gather_vjp_tangent(cudaStream_t stream, const Call& call) {
  using A = Accumulator<typename Types::Value>;
  if (call.d_ct_points.summed) fill_zero<A>(stream, call.d_ct_points);
  with_pack_and_index<typename Types::Value>(call, [&](auto pack, auto index) {
    using Index = decltype(index);
    constexpr int V = decltype(pack)::value;
    const auto work = work_on<Index>(call, call.shape.points, V, false, call.d_ct_points.summed);
    launch(stream, gather_vjp_tangent_kernel<Types, V, Index>, work, call.shape.points,
           call.batch.count);
  });
}

template <class Types>
void splat(cudaStream_t stream, const Call& call) {
  using A = Accumulator<typename Types::Value>;
  for (const Operand* output : {&call.image, &call.coverage, &call.weight})
    fill_zero<A>(stream, *output);
  with_pack_and_index<typename Types::Value>(call, [&](auto pack, auto index) {
    using Index = decltype(index);
    constexpr int V = decltype(pack)::value;
    if (call.reduce == Reduce::kSoftmax) {
      launch_threads(stream, call.peak.count, 1, lowest_kernel<A>, static_cast<A*>(call.peak.data),
                     call.peak.count);
      const auto points = work_on<Index>(call, call.shape.points, V, false, false);
      launch(stream, peak_kernel<Types, Index>, points, call.shape.points, call.batch.count);
    }
    const auto work = work_on<Index>(call, call.shape.points, V, true, false);
    launch(stream, splat_kernel<Types, V, Index>, work, call.shape.points, call.batch.count);
    if (call.reduce != Reduce::kSum) {
      // The accumulators are at least as wide as the values, so they are aligned to packs of 16
      // bytes too.
      constexpr int W = V == 1 ? 1 : Launch::kPackBytes / static_cast<int>(sizeof(A));
      const auto pixels = work_on<Index>(call, 0, W, true, true);
      launch(stream, normalise_kernel<A, W, Index>, pixels, call.coverage.count, 1);
    }
  });
}

template <class Types>
void splat_tangent(cudaStream_t stream, const Call& call) {
  using A = Accumulator<typename Types::Value>;
  for (const Operand* output : {&call.d_image, &call.d_coverage}) fill_zero<A>(stream, *output);
  with_pack_and_index<typename Types::Value>(call, [&](auto pack, auto index) {
    using Index = decltype(index);
    constexpr int V = decltype(pack)::value;
    const auto work = work_on<Index>(call, call.shape.points, V, true, false);
    dispatch_reduce<Types>(call, [&](auto reduce) {
      launch(stream, splat_tangent_kernel<Types, V, decltype(reduce)::value, Index>, work,
             call.shape.points, call.batch.count);
    });
  });
}

template <class Types>
void splat_vjp(cudaStream_t stream, const Call& call) {
  using A = Accumulator<typename Types::Value>;
  bool own_points = false;
  for (const Operand* output : {&call.ct_values, &call.ct_points, &call.ct_importance}) {
    if (output->summed) fill_zero<A>(stream, *output);
    own_points = own_points || output->summed;
  }
  with_pack_and_index<typename Types::Value>(call, [&](auto pack, auto index) {
    using Index = decltype(index);
    constexpr int V = decltype(pack)::value;
    const auto work = work_on<Index>(call, call.shape.points, V, false, own_points);
    dispatch_reduce<Types>(call, [&](auto reduce) {
      launch(stream, splat_vjp_kernel<Types, V, decltype(reduce)::value, Index>, work,
             call.shape.points, call.batch.count);
    });
  });
}

}  // namespace

#define JAXWARP_CUDA_KERNEL(kernel)                                                            \
  template <Method M, int D>                                                                   \
  void CudaKernels<M, D>::kernel(cudaStream_t stream, const Call& call) {                      \
    dispatch_types<M, D>(call,                                                                 \
                         [&](auto types) { jaxwarp::kernel<decltype(types)>(stream, call); }); \
  }
JAXWARP_CUDA_KERNEL(gather)
JAXWARP_CUDA_KERNEL(gather_tangent)
JAXWARP_CUDA_KERNEL(gather_vjp)
JAXWARP_CUDA_KERNEL(gather_vjp_tangent)
JAXWARP_CUDA_KERNEL(splat)
JAXWARP_CUDA_KERNEL(splat_tangent)
JAXWARP_CUDA_KERNEL(splat_vjp)

template struct CudaKernels<Method::JAXWARP_METHOD, JAXWARP_DIMS>;

#else  // the handlers

// `scatters`: atomic additions come in any order.
#define JAXWARP_CUDA_HANDLER(Handler, kernel, scatters)                                       \
  static ffi::Error Handler##Cuda(cudaStream_t stream, ffi::RemainingArgs args,               \
                                  ffi::RemainingRets rets, ffi::Dictionary attrs) {           \
    Call call{};                                                                              \
    const ffi::Error error = Decoder(k##Handler, call).decode(args, rets, attrs);             \
    if (error.failure()) return error;                                                        \
    if (call.deterministic && (scatters)) {                                                   \
      return ffi::Error(                                                                      \
          ffi::ErrorCode::kUnimplemented,                                                     \
          "jaxwarp: deterministic=True is not available on a GPU yet for splats and "         \
          "image gradients; unset JAXWARP_DETERMINISTIC or pass deterministic=False");        \
    }                                                                                         \
    dispatch_kernels<CudaKernels>(call, [&](auto kernels) { kernels.kernel(stream, call); }); \
    const cudaError_t status = cudaGetLastError();                                            \
    if (status == cudaSuccess) return ffi::Error::Success();                                  \
    return ffi::Error::Internal(std::string("jaxwarp: ") + cudaGetErrorString(status));       \
  }                                                                                           \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(Handler, Handler##Cuda,                                       \
                                ffi::Ffi::Bind()                                              \
                                    .Ctx<ffi::PlatformStream<cudaStream_t>>()                 \
                                    .RemainingArgs()                                          \
                                    .RemainingRets()                                          \
                                    .Attrs(),                                                 \
                                {ffi::Traits::kCmdBufferCompatible})

JAXWARP_CUDA_HANDLER(Gather, gather, false);
JAXWARP_CUDA_HANDLER(GatherTangent, gather_tangent, false);
JAXWARP_CUDA_HANDLER(GatherVjp, gather_vjp, call.ct_image.data != nullptr);
JAXWARP_CUDA_HANDLER(GatherVjpTangent, gather_vjp_tangent, false);
JAXWARP_CUDA_HANDLER(Splat, splat, true);
JAXWARP_CUDA_HANDLER(SplatTangent, splat_tangent, true);
JAXWARP_CUDA_HANDLER(SplatVjp, splat_vjp, false);

#endif

}  // namespace jaxwarp
