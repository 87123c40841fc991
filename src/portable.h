// What differs between a C++ and a CUDA compiler: function qualifiers, half-precision storage, sums
// and maxima in memory that others may be writing too. Everything else in the mathematics is
// written once, for both.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define JAXWARP_HD __host__ __device__ __forceinline__
#define JAXWARP_INLINE
#define JAXWARP_UNROLL _Pragma("unroll")
#if defined(__CUDA_ARCH__)
#define JAXWARP_DEVICE_ARCH __CUDA_ARCH__
#endif
#else
#define JAXWARP_HD inline __attribute__((always_inline))
#define JAXWARP_INLINE __attribute__((always_inline))  // for lambdas
#if defined(__clang__)
#define JAXWARP_UNROLL _Pragma("unroll")
#else
#define JAXWARP_UNROLL _Pragma("GCC unroll 8")  // else the small arrays stay in memory
#endif
#if defined(JAXWARP_CUDA_SHIM)  // kernels compiled for the host, in tests
#include <cuda_runtime.h>
#define JAXWARP_DEVICE_ARCH JAXWARP_CUDA_SHIM
#endif
#endif

namespace jaxwarp {

// Storage formats; arithmetic happens in Accumulator<T>.
struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

template <class To, class From>
JAXWARP_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast: sizes differ");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

JAXWARP_HD float widen(float v) { return v; }
JAXWARP_HD double widen(double v) { return v; }
JAXWARP_HD float widen(bfloat16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
JAXWARP_HD float widen(float16 v) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(v.bits));
#else
  // Exponent and mantissa moved into place are off by 2^112 in scale; the product restores
  // subnormals as well. An exponent of all ones (inf, NaN) has to become all ones again.
  const uint32_t magnitude = v.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | special | sign);
#endif
}

// Rounds to nearest even, as XLA does.
template <class T>
JAXWARP_HD T narrow(Accumulator<T> v);
template <>
JAXWARP_HD float narrow<float>(float v) {
  return v;
}
template <>
JAXWARP_HD double narrow<double>(double v) {
  return v;
}
template <>
JAXWARP_HD bfloat16 narrow<bfloat16>(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  if (v != v) return bfloat16{static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return bfloat16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
JAXWARP_HD float16 narrow<float16>(float v) {
#if defined(__CUDA_ARCH__)
  return float16{__half_as_ushort(__float2half_rn(v))};
#else
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520: the first value that rounds to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal's bits
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return float16{static_cast<uint16_t>(half | sign)};
#endif
}

#if !defined(JAXWARP_CUDA_SHIM)  // the shim checks it
template <class T>
JAXWARP_HD T* aligned(T* place) {
  return place;
}
#endif

// V neighbouring values, moved as one.
template <class T, int V>
struct alignas(sizeof(T) * (V == 3 ? 1 : V)) Pack {
  T value[V];
};

#if defined(JAXWARP_DEVICE_ARCH)
// Other threads may add to the same place. Vector reductions exist for float32 from sm_90 on; V > 1
// is chosen only where the address is aligned to the pack.
template <int V, class A>
__device__ __forceinline__ void add_to(A* target, const A (&v)[V]) {
#if JAXWARP_DEVICE_ARCH >= 900
  if constexpr (sizeof(A) == 4 && V % 4 == 0) {
    JAXWARP_UNROLL for (int i = 0; i < V; i += 4) {
      atomicAdd(reinterpret_cast<float4*>(target + i),
                make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]));
    }
  } else
#endif
  {
    JAXWARP_UNROLL for (int i = 0; i < V; ++i) atomicAdd(target + i, v[i]);
  }
}

// *target = max(*target, v). Numbers of one sign are ordered as the integers with their bits, those
// below 0 backwards.
template <class A>
__device__ __forceinline__ void max_to(A* target, A v) {
  using Signed = std::conditional_t<sizeof(A) == 4, int, long long>;
  using Unsigned = std::conditional_t<sizeof(A) == 4, unsigned, unsigned long long>;
  if (v >= 0) {
    atomicMax(reinterpret_cast<Signed*>(target), bit_cast<Signed>(v + A(0)));  // -0 becomes 0
  } else if (v < 0) {
    atomicMin(reinterpret_cast<Unsigned*>(target), bit_cast<Unsigned>(v));
  }
}
#else
// On the host whoever adds owns the target (a band of rows, or the only thread).
template <int V, class A>
JAXWARP_HD void add_to(A* target, const A (&v)[V]) {
  JAXWARP_UNROLL for (int i = 0; i < V; ++i) target[i] += v[i];
}
template <class A>
JAXWARP_HD void max_to(A* target, A v) {
  if (v > *target) *target = v;
}
#endif

}  // namespace jaxwarp
