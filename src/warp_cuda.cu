// CUDA: kernels and handlers. A thread works on one point, or on some channels of it; the launch
// numbers stand in one struct. Handlers only enqueue work, so that XLA can put them into a CUDA
// graph.
#include <cuda_runtime.h>

#include "fixed_point.h"
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

// The widest access of a thread. XLA aligns its arrays to it and should refuse others; one that
// came through all the same would end the process's CUDA context, so nothing here relies on it.
constexpr int kPackBytes = 16;
inline bool is_aligned(const Operand& operand) {
  return reinterpret_cast<uintptr_t>(operand.data) % kPackBytes == 0;
}

#if defined(JAXWARP_METHOD)
namespace {

struct Launch {
  static constexpr int kThreads =
      256;  // 8 warps: a full multiprocessor from 8 blocks up to 32 registers
  static constexpr int kBlocks = 1;  // of a multiprocessor at least; else registers spill for more
  static constexpr int kMaxLanes = 32;       // threads that share a point: no more than a warp
  static constexpr int kSummingLanes = 8;    // where they add up: a line of 128 bytes, 3 shuffles
  static constexpr int kSerialChannels = 4;  // so few unaligned channels stay with one thread
  static constexpr int64_t kMaxBatchBlocks = 65535;  // of gridDim.y
  static constexpr int64_t kMaxIndex32 = 1 << 29;  // elements: leaves room for 2 n in corner_index
};

// What most calls are. The host finds that out once and takes kernels that do not ask again at
// every point; their code is an eighth as long.
struct UsualCall : Call {
  static bool is(const Call& call) {
    const bool whole = call.points.dtype != ffi::F16 && call.points.dtype != ffi::BF16;
    bool weighted = call.reduce == Reduce::kSoftmax;  // or has a derivative in a weight that is 1
    for (const Operand* operand :
         {&call.importance, &call.peak, &call.d_importance, &call.ct_importance}) {
      weighted = weighted || operand->data != nullptr;
    }
    const int (&order)[3] = call.sampling.order;
    const bool differentiated = order[0] != 0 || order[1] != 0 || order[2] != 0;
    bool periodic = false;
    for (const Boundary boundary : call.sampling.boundary) {
      periodic = periodic || (boundary != Boundary::kConstant && boundary != Boundary::kNearest);
    }
    return call.batch.rank <= 1 && whole && !weighted && !differentiated && !periodic;
  }
  JAXWARP_HD int64_t offset(const Operand& operand, int64_t b) const {
    return b * operand.stride[0];
  }
};

template <bool kUsual>
inline constexpr Importances kImportances = kUsual ? Importances::kOne : Importances::kAny;

// What every kernel is given, by value.
template <class IndexT, bool kUsual>
struct Work {
  using Index = IndexT;
  std::conditional_t<kUsual, UsualCall, Call> call;
  Shape<Index> shape;
  Index lanes;      // threads per point (or pixel)
  Index items;      // points (or pixels) times lanes
  bool own_points;  // a thread visits all batch elements of its points, in order
};

template <class Index, bool kUsual>
__device__ Channels<Index, true> lane_channels(const Work<Index, kUsual>& work, Index item,
                                               int pack) {
  return {item % work.lanes * pack, work.lanes * pack, work.shape.channels, true};
}

// Calls body(b, item) for this thread's item in every batch element that is its own.
template <class Index, bool kUsual, class Body>
__device__ void for_items(const Work<Index, kUsual>& work, Body body) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (item >= static_cast<int64_t>(work.items)) return;
  for (int64_t b = blockIdx.y; b < work.call.batch.count; b += gridDim.y)
    body(b, static_cast<Index>(item));
}

// Emits a cotangent of point n, of which each of its lanes has a part; they all come here together,
// and the first one has the sum.
template <class Index, bool kUsual, class A, int N>
__device__ void emit_lanes(const Work<Index, kUsual>& work, Index item, A (&part)[N],
                           const PointCotangent<A>& target) {
  if (target.data == nullptr) return;
  const unsigned lanes = static_cast<unsigned>(work.lanes);
  const unsigned first = threadIdx.x % 32 / lanes * lanes;
  const unsigned together = ((1u << lanes) - 1) << first;
  for (unsigned step = lanes / 2; step > 0; step /= 2) {
    JAXWARP_UNROLL for (int i = 0; i < N; ++i) {
      part[i] += __shfl_down_sync(together, part[i], step, static_cast<int>(lanes));
    }
  }
  if (item % work.lanes == 0) {
    target.template emit<N>(item / work.lanes * N, Lanes<A, N>(part));
  }
}

// The boundaries of a usual call. The compiler sees that none has a period.
struct UsualBoundaries {
  Boundary along[3];
  __device__ explicit UsualBoundaries(const Boundary (&given)[3]) {
    JAXWARP_UNROLL for (int a = 0; a < 3; ++a) {
      along[a] = given[a] == Boundary::kNearest ? Boundary::kNearest : Boundary::kConstant;
    }
  }
};

// A position in a usual call.
template <Method M, int D, class Real, class Index>
struct UsualStencil : UndifferentiatedStencil<M, D, Real, Index> {
  __device__ UsualStencil(const Real (&p)[D], const Index* size, const Boundary (&boundary)[3])
      : UndifferentiatedStencil<M, D, Real, Index>(p, size, UsualBoundaries(boundary).along) {}
};

template <class Types, class Index, bool kUsual>
__device__ auto stencil_at(const Work<Index, kUsual>& work, int64_t b, Index n) {
  constexpr Method M = Types::kMethod;
  constexpr int D = Types::kDims;
  using Real = Accumulator<typename Types::Value>;
  const auto& call = work.call;
  Index pixel[D] = {};
  if (call.displacement) {
    Index rest = n;
    JAXWARP_UNROLL for (int a = 0; a < D; ++a) {
      pixel[a] = rest % work.shape.grid[a];
      rest /= work.shape.grid[a];
    }
  }
  Real p[D];
  if (!kUsual && sizeof(Real) == 4 && call.points.dtype == ffi::F16) {
    read_position(at<const float16>(call, call.points, b), n, pixel, p);
  } else if (!kUsual && sizeof(Real) == 4 && call.points.dtype == ffi::BF16) {
    read_position(at<const bfloat16>(call, call.points, b), n, pixel, p);
  } else {
    read_position(at<const Real>(call, call.points, b), n, pixel, p);
  }
  using S = std::conditional_t<kUsual, UsualStencil<M, D, Real, Index>, Stencil<M, D, Real, Index>>;
  return S(p, work.shape.size, call.sampling.boundary);
}

template <class Types, int V, class Index, bool kUsual>
__global__ void __launch_bounds__(Launch::kThreads, Launch::kBlocks)
    gather_kernel(const Work<Index, kUsual> work) {
  using T = typename Types::Value;
  const auto& call = work.call;
  for_items(work, [&](int64_t b, Index item) {
    const Index n = item / work.lanes;
    gather_point<V>(
        call.sampling, work.shape, stencil_at<Types>(work, b, n), at<const T>(call, call.image, b),
        importances_of<Accumulator<T>, kImportances<kUsual>>(call, b).of(n),
        at<T>(call, call.values, b) + n * work.shape.point_stride, lane_channels(work, item, V));
  });
}

template <class Types, int V, class Index, bool kUsual>
__global__ void __launch_bounds__(Launch::kThreads, Launch::kBlocks)
    gather_tangent_kernel(const Work<Index, kUsual> work) {
  using T = typename Types::Value;
  using A = Accumulator<T>;
  const auto& call = work.call;
  for_items(work, [&](int64_t b, Index item) {
    const Index n = item / work.lanes;
    gather_tangent_point<V>(
        call.sampling, work.shape, stencil_at<Types>(work, b, n), at<const T>(call, call.image, b),
        importances_of<A, kImportances<kUsual>>(call, b).of(n), at<const T>(call, call.d_image, b),
        point_tangents_of<Types::kDims, A>(call, b).of(n),
        at<T>(call, call.d_values, b) + n * work.shape.point_stride, lane_channels(work, item, V));
  });
}

template <class Types, int V, class Index, bool kUsual>
__global__ void __launch_bounds__(Launch::kThreads, Launch::kBlocks)
    gather_vjp_kernel(const Work<Index, kUsual> work) {
  constexpr int D = Types::kDims;
  using T = typename Types::Value;
  using A = Accumulator<T>;
  const auto& call = work.call;
  for_items(work, [&](int64_t b, Index item) {
    const Index n = item / work.lanes;
    A ct[D] = {};
    gather_vjp_point<V>(call.sampling, work.shape, stencil_at<Types>(work, b, n),
                        at<const T>(call, call.image, b),
                        at<const T>(call, call.ct_values, b) + n * work.shape.point_stride,
                        at<A>(call, call.ct_image, b), AllRows{}, ct, lane_channels(work, item, V));
    emit_lanes(work, item, ct, {at<A>(call, call.ct_points, b), call.ct_points.summed});
  });
}

template <class Types, int V, class Index, bool kUsual>
__global__ void __launch_bounds__(Launch::kThreads, Launch::kBlocks)
    gather_vjp_tangent_kernel(const Work<Index, kUsual> work) {
  constexpr int D = Types::kDims;
  using T = typename Types::Value;
  using A = Accumulator<T>;
  const auto& call = work.call;
  for_items(work, [&](int64_t b, Index item) {
    const Index n = item / work.lanes, first = n * work.shape.point_stride;
    const T* d_ct_values = at<const T>(call, call.d_ct_values, b);
    A d_ct[D] = {};
    gather_vjp_tangent_point<V>(
        call.sampling, work.shape, stencil_at<Types>(work, b, n), at<const T>(call, call.image, b),
        at<const T>(call, call.ct_values, b) + first, at<const T>(call, call.d_image, b),
        d_ct_values == nullptr ? nullptr : d_ct_values + first,
        point_tangents_of<D, A>(call, b).of(n), d_ct, lane_channels(work, item, V));
    emit_lanes(work, item, d_ct, {at<A>(call, call.d_ct_points, b), call.d_ct_points.summed});
  });
}

// Where a kernel adds: to the results themselves, in any order ...
template <class A>
struct AtomicSums {
  template <class C>
  __device__ A* of(const C& call, const Operand& operand, int64_t b) const {
    return at<A>(call, operand, b);
  }
};
// ... or in fixed point, so that the order does not matter.
template <class A>
struct FixedPointSums {
  FixedPoint<A> sums;
  __device__ FixedPoint<A> of(const Call& call, const Operand& operand, int64_t b) const {
    FixedPoint<A> own = sums + (operand.first_sum + call.offset(operand, b));
    if (operand.data == nullptr) own.limb = nullptr;
    return own;
  }
};

template <class A>
__global__ void __launch_bounds__(Launch::kThreads, Launch::kBlocks)
    round_kernel(const FixedPoint<A> sums, A* result, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) result[i] = (sums + i).value();
}

template <class Types, int V, class Sums, class Index, bool kUsual>
__global__ void __launch_bounds__(Launch::kThreads, Launch::kBlocks)
    splat_kernel(const Work<Index, kUsual> work, const Sums sums) {
  using T = typename Types::Value;
  using A = Accumulator<T>;
  const auto& call = work.call;
  for_items(work, [&](int64_t b, Index item) {
    const Index n = item / work.lanes;
    splat_point<V>(call.sampling, work.shape, stencil_at<Types>(work, b, n),
                   at<const T>(call, call.values, b) + n * work.shape.point_stride,
                   importances_of<A, kImportances<kUsual>>(call, b).of(n),
                   sums.of(call, call.image, b), sums.of(call, call.coverage, b),
                   sums.of(call, call.weight, b), AllRows{}, lane_channels(work, item, V));
  });
}

template <class A>
__global__ void __launch_bounds__(Launch::kThreads, Launch::kBlocks)
    lowest_kernel(A* data, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) data[i] = -std::numeric_limits<A>::infinity();
}

template <class Types, class Index>
__global__ void __launch_bounds__(Launch::kThreads, Launch::kBlocks)
    peak_kernel(const Work<Index, false> work) {
  using T = typename Types::Value;
  const auto& call = work.call;
  for_items(work, [&](int64_t b, Index n) {
    peak_point(call.sampling, work.shape, stencil_at<Types>(work, b, n),
               importances_of<Accumulator<T>>(call, b).of(n).value,
               at<Accumulator<T>>(call, call.peak, b), AllRows{});
  });
}

// Items are the pixels of all images, which lie one behind the other.
template <class A, int V, class Index>
__global__ void __launch_bounds__(Launch::kThreads, Launch::kBlocks)
    normalise_kernel(const Work<Index, false> work) {
  const Call& call = work.call;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool shared = work.lanes > 1;  // else no division, which takes long in 64 bits
  const int64_t j = shared ? item / work.lanes : item;
  if (j >= call.coverage.count) return;
  const A coverage = static_cast<const A*>(call.coverage.data)[j];
  const A* weight = static_cast<const A*>(call.weight.data);
  normalise_pixel<V>(work.shape, static_cast<A*>(call.image.data) + j * work.shape.stride[0],
                     coverage, weight == nullptr ? coverage : weight[j],
                     static_cast<A>(call.min_coverage), static_cast<A>(call.sampling.fill),
                     lane_channels(work, static_cast<Index>(shared ? item % work.lanes : 0), V));
}

template <class Types, int V, Reduce R, class Sums, class Index, bool kUsual>
__global__ void __launch_bounds__(Launch::kThreads, Launch::kBlocks)
    splat_tangent_kernel(const Work<Index, kUsual> work, const Sums sums) {
  using T = typename Types::Value;
  using A = Accumulator<T>;
  const auto& call = work.call;
  for_items(work, [&](int64_t b, Index item) {
    const Index n = item / work.lanes;
    const T* d_values = at<const T>(call, call.d_values, b);
    splat_tangent_point<V, R>(
        call.sampling, work.shape, stencil_at<Types>(work, b, n),
        at<const T>(call, call.values, b) + n * work.shape.point_stride,
        importances_of<A, kImportances<kUsual>>(call, b).of(n), splat_residual_of<A>(call, b),
        d_values == nullptr ? nullptr : d_values + n * work.shape.point_stride,
        point_tangents_of<Types::kDims, A>(call, b).of(n), sums.of(call, call.d_image, b),
        sums.of(call, call.d_coverage, b), AllRows{}, lane_channels(work, item, V));
  });
}

template <class Types, int V, Reduce R, class Index, bool kUsual>
__global__ void __launch_bounds__(Launch::kThreads, Launch::kBlocks)
    splat_vjp_kernel(const Work<Index, kUsual> work) {
  constexpr int D = Types::kDims;
  using T = typename Types::Value;
  using A = Accumulator<T>;
  const auto& call = work.call;
  for_items(work, [&](int64_t b, Index item) {
    const Index n = item / work.lanes;
    // Of either dtype, see PointCotangent: the batch offset is counted in elements.
    const int64_t first = call.offset(call.ct_values, b);
    const PointCotangent<T> ct_values = {
        call.ct_values.data == nullptr ? nullptr
        : call.ct_values.summed ? static_cast<void*>(static_cast<A*>(call.ct_values.data) + first)
                                : static_cast<void*>(static_cast<T*>(call.ct_values.data) + first),
        call.ct_values.summed};
    A ct_p[D] = {}, ct_w[1] = {};
    splat_vjp_point<V, R>(call.sampling, work.shape, stencil_at<Types>(work, b, n),
                          at<const T>(call, call.values, b) + n * work.shape.point_stride,
                          importances_of<A, kImportances<kUsual>>(call, b).of(n),
                          splat_residual_of<A>(call, b), at<const T>(call, call.ct_image, b),
                          at<const A>(call, call.ct_coverage, b), ct_values,
                          n * work.shape.point_stride, ct_p, ct_w[0], lane_channels(work, item, V));
    emit_lanes(work, item, ct_p, {at<A>(call, call.ct_points, b), call.ct_points.summed});
    emit_lanes(work, item, ct_w, {at<A>(call, call.ct_importance, b), call.ct_importance.summed});
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

// The operands with channels, of which kernels move packs. Of the others they move one number at a
// time; for the cotangents of points see add_points_one_by_one(). Scratch is always XLA's own.
inline bool channels_are_aligned(const Call& call) {
  return is_aligned(call.image) && is_aligned(call.d_image) && is_aligned(call.ct_image) &&
         is_aligned(call.values) && is_aligned(call.d_values) && is_aligned(call.ct_values) &&
         is_aligned(call.d_ct_values);
}

// Calls body(Width<V>, index, usual) with the widest pack that every pixel and point is aligned to,
// or half of it, with the smaller index type where one batch element fits it, and with true where
// the call is a UsualCall; its three channels, which are no pack of the hardware's, are read at
// once.
template <class T, class Body>
void with_pack_and_index(const Call& call, Body body) {
  constexpr int kPack = kPackBytes / static_cast<int>(sizeof(T));
  const Shape<int64_t>& shape = call.shape;
  const int64_t pixels = shape.size[0] * shape.size[1] * shape.size[2];
  const int64_t elements = std::max(pixels, shape.points) * std::max<int64_t>(shape.channels, 4);
  if (elements >= Launch::kMaxIndex32) return body(Width<1>{}, int64_t{}, std::false_type{});
  const auto with_pack = [&](auto usual) {
    if (!call.channels_first && shape.channels > 0 && channels_are_aligned(call)) {
      if (shape.channels % kPack == 0) return body(Width<kPack>{}, int32_t{}, usual);
      if constexpr (kPack > 2) {
        if (shape.channels % (kPack / 2) == 0) return body(Width<kPack / 2>{}, int32_t{}, usual);
      }
      if constexpr (usual) {
        if (shape.channels == 3) return body(Width<3>{}, int32_t{}, usual);
      }
    }
    body(Width<1>{}, int32_t{}, usual);
  };
  UsualCall::is(call) ? with_pack(std::true_type{}) : with_pack(std::false_type{});
}

// Which threads work on a point: one, several, or several that add up something.
enum class Team { kOne, kAny, kSumming };

template <class Index, bool kUsual>
Work<Index, kUsual> work_on(const Call& call, int64_t items, int pack, Team team, bool own_points) {
  const int64_t packs = call.shape.channels / pack;
  // Channels-first, neighbouring points are what lies side by side.
  const bool serial =
      team == Team::kOne || call.channels_first || (pack == 1 && packs <= Launch::kSerialChannels);
  int64_t lanes = serial ? 1 : std::min<int64_t>(std::max<int64_t>(packs, 1), Launch::kMaxLanes);
  if (team == Team::kSumming) {  // a power of two
    int64_t halved = Launch::kSummingLanes;
    while (halved > lanes) halved /= 2;
    lanes = halved;
  }
  Work<Index, kUsual> work;
  static_cast<Call&>(work.call) = call;
  work.shape = narrowed<Index>(call.shape);
  work.lanes = static_cast<Index>(lanes);
  work.items = static_cast<Index>(items * lanes);
  work.own_points = own_points;
  return work;
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

template <class Index, bool kUsual, class... More>
void launch(cudaStream_t stream, void (*kernel)(Work<Index, kUsual>, More...),
            const Work<Index, kUsual>& work, int64_t items, int64_t batches, const More&... more) {
  const int64_t blocks = std::min(batches, work.own_points ? 1 : Launch::kMaxBatchBlocks);
  launch_threads(stream, items * static_cast<int64_t>(work.lanes), blocks, kernel, work, more...);
}

template <class A>
void fill_zero(cudaStream_t stream, const Operand& operand) {
  if (operand.data != nullptr && operand.count > 0) {
    cudaMemsetAsync(operand.data, 0, static_cast<size_t>(operand.count) * sizeof(A), stream);
  }
}

// Calls body(sums, Width<V>, index), which launches the kernel that adds to `outputs`; a
// deterministic call twice. Its time goes into the additions, so one width and index will do.
template <class Types, class Body>
void with_sums(cudaStream_t stream, const Call& call, std::initializer_list<const Operand*> outputs,
               Body body) {
  using A = Accumulator<typename Types::Value>;
  if (!call.deterministic) {
    for (const Operand* output : outputs) fill_zero<A>(stream, *output);
    return with_pack_and_index<typename Types::Value>(
        call, [&](auto... chosen) { body(AtomicSums<A>{}, chosen...); });
  }
  if (call.sums == 0) return;
  constexpr int64_t kCorners = Stencil<Types::kMethod, Types::kDims, A, int64_t>::kCorners;
  FixedPoint<A> sums(call.scratch, call.sums, call.shape.points * kCorners * call.batch.count);
  cudaMemsetAsync(call.scratch, 0, static_cast<size_t>(call.sums * sums.kBytes), stream);
  for (const bool adds : {false, true}) {
    sums.adds = adds;
    body(FixedPointSums<A>{sums}, Width<1>{}, int64_t{}, std::false_type{});
  }
  for (const Operand* output : outputs) {
    if (output->data == nullptr) continue;
    launch_threads(stream, output->count, 1, round_kernel<A>, sums + output->first_sum,
                   static_cast<A*>(output->data), output->count);
  }
}

template <class Types>
void gather(cudaStream_t stream, const Call& call) {
  with_pack_and_index<typename Types::Value>(call, [&](auto pack, auto index, auto usual) {
    using Index = decltype(index);
    constexpr int V = decltype(pack)::value;
    const auto work = work_on<Index, usual>(call, call.shape.points, V, Team::kAny, false);
    launch(stream, gather_kernel<Types, V, Index, usual>, work, call.shape.points,
           call.batch.count);
  });
}

template <class Types>
void gather_tangent(cudaStream_t stream, const Call& call) {
  with_pack_and_index<typename Types::Value>(call, [&](auto pack, auto index, auto usual) {
    using Index = decltype(index);
    constexpr int V = decltype(pack)::value;
    const auto work = work_on<Index, usual>(call, call.shape.points, V, Team::kAny, false);
    launch(stream, gather_tangent_kernel<Types, V, Index, usual>, work, call.shape.points,
           call.batch.count);
  });
}

template <class Types>
void splat(cudaStream_t stream, const Call& call);

template <class Types>
void gather_vjp(cudaStream_t stream, const Call& call) {
  if (call.deterministic && call.ct_image.data != nullptr) {  // a splat, and the points alone
    Call image = call, points = call;
    image.values = std::exchange(image.ct_values, {});
    image.image = std::exchange(image.ct_image, {});
    points.ct_image = {};
    splat<Types>(stream, image);
    return gather_vjp<Types>(stream, points);
  }
  using A = Accumulator<typename Types::Value>;
  fill_zero<A>(stream, call.ct_image);
  if (call.ct_points.summed) fill_zero<A>(stream, call.ct_points);
  with_pack_and_index<typename Types::Value>(call, [&](auto pack, auto index, auto usual) {
    using Index = decltype(index);
    constexpr int V = decltype(pack)::value;
    const auto work =
        work_on<Index, usual>(call, call.shape.points, V, Team::kSumming, call.ct_points.summed);
    launch(stream, gather_vjp_kernel<Types, V, Index, usual>, work, call.shape.points,
           call.batch.count);
  });
}

template <class Types>
void gather_vjp_tangent(cudaStream_t stream, const Call& call) {
  using A = Accumulator<typename Types::Value>;
  if (call.d_ct_points.summed) fill_zero<A>(stream, call.d_ct_points);
  with_pack_and_index<typename Types::Value>(call, [&](auto pack, auto index, auto usual) {
    using Index = decltype(index);
    constexpr int V = decltype(pack)::value;
    const auto work =
        work_on<Index, usual>(call, call.shape.points, V, Team::kSumming, call.d_ct_points.summed);
    launch(stream, gather_vjp_tangent_kernel<Types, V, Index, usual>, work, call.shape.points,
           call.batch.count);
  });
}

template <class Types>
void splat(cudaStream_t stream, const Call& call) {
  using T = typename Types::Value;
  using A = Accumulator<T>;
  if (call.reduce == Reduce::kSoftmax) {
    launch_threads(stream, call.peak.count, 1, lowest_kernel<A>, static_cast<A*>(call.peak.data),
                   call.peak.count);
    with_pack_and_index<T>(call, [&](auto pack, auto index, auto) {
      using Index = decltype(index);
      const auto points = work_on<Index, false>(call, call.shape.points, pack, Team::kOne, false);
      launch(stream, peak_kernel<Types, Index>, points, call.shape.points, call.batch.count);
    });
  }
  with_sums<Types>(stream, call, {&call.image, &call.coverage, &call.weight},
                   [&](auto sums, auto pack, auto index, auto usual) {
                     constexpr int V = decltype(pack)::value;
                     using Index = decltype(index);
                     const auto work =
                         work_on<Index, usual>(call, call.shape.points, V, Team::kAny, false);
                     launch(stream, splat_kernel<Types, V, decltype(sums), Index, usual>, work,
                            call.shape.points, call.batch.count, sums);
                   });
  if (call.reduce == Reduce::kSum) return;
  with_pack_and_index<T>(call, [&](auto pack, auto index, auto) {
    using Index = decltype(index);
    constexpr int V = decltype(pack)::value, kWidest = kPackBytes / static_cast<int>(sizeof(A));
    constexpr int W = V % kWidest == 0 ? kWidest : V;  // of T and of A
    const auto pixels = work_on<Index, false>(call, 0, W, Team::kAny, true);
    launch(stream, normalise_kernel<A, W, Index>, pixels, call.coverage.count, 1);
  });
}

template <class Types>
void splat_tangent(cudaStream_t stream, const Call& call) {
  with_sums<Types>(stream, call, {&call.d_image, &call.d_coverage},
                   [&](auto sums, auto pack, auto index, auto usual) {
                     constexpr int V = decltype(pack)::value;
                     using Index = decltype(index);
                     using Sums = decltype(sums);
                     const auto work =
                         work_on<Index, usual>(call, call.shape.points, V, Team::kAny, false);
                     dispatch_reduce<Types>(call, [&](auto reduce) {
                       constexpr Reduce R = decltype(reduce)::value;
                       if constexpr (!usual || R != Reduce::kSoftmax)  // see UsualCall
                         launch(stream, splat_tangent_kernel<Types, V, R, Sums, Index, usual>, work,
                                call.shape.points, call.batch.count, sums);
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
  with_pack_and_index<typename Types::Value>(call, [&](auto pack, auto index, auto usual) {
    using Index = decltype(index);
    constexpr int V = decltype(pack)::value;
    const auto work = work_on<Index, usual>(call, call.shape.points, V, Team::kSumming, own_points);
    dispatch_reduce<Types>(call, [&](auto reduce) {
      constexpr Reduce R = decltype(reduce)::value;
      if constexpr (!usual || R != Reduce::kSoftmax)  // see UsualCall
        launch(stream, splat_vjp_kernel<Types, V, R, Index, usual>, work, call.shape.points,
               call.batch.count);
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

// The two coordinates of a cotangent are stored at once. Where they may not be, they are added to
// zeros instead, as a sum over batch elements is.
static void add_points_one_by_one(Call& call) {
  for (Operand* points : {&call.ct_points, &call.d_ct_points}) {
    points->summed = points->summed || !is_aligned(*points);
  }
}

#define JAXWARP_CUDA_HANDLER(Handler, kernel)                                                 \
  static ffi::Error Handler##Cuda(cudaStream_t stream, ffi::RemainingArgs args,               \
                                  ffi::RemainingRets rets, ffi::Dictionary attrs) {           \
    Call call{};                                                                              \
    const ffi::Error error = Decoder(k##Handler, call, true).decode(args, rets, attrs);       \
    if (error.failure()) return error;                                                        \
    add_points_one_by_one(call);                                                              \
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

JAXWARP_CUDA_HANDLER(Gather, gather);
JAXWARP_CUDA_HANDLER(GatherTangent, gather_tangent);
JAXWARP_CUDA_HANDLER(GatherVjp, gather_vjp);
JAXWARP_CUDA_HANDLER(GatherVjpTangent, gather_vjp_tangent);
JAXWARP_CUDA_HANDLER(Splat, splat);
JAXWARP_CUDA_HANDLER(SplatTangent, splat_tangent);
JAXWARP_CUDA_HANDLER(SplatVjp, splat_vjp);

#endif

}  // namespace jaxwarp
