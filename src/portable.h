// What differs between a C++ and a CUDA compiler: function qualifiers, half-precision storage,
// numbers side by side, sums and maxima in memory that others may be writing too. Everything else
// in the mathematics is written once, for both.
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

// V numbers that are computed with side by side, such as neighbouring channels: a vector of the
// host's compiler, an array in a device's registers.
template <class A, int V>
struct Lanes {
#if defined(__CUDACC__)
  A lane[V];
#else
  static constexpr int kRoom = V == 3 ? 4 : V;  // of the fourth, nobody asks
  typedef A Vector __attribute__((vector_size(kRoom * sizeof(A))));
  Vector lane;
#endif

  Lanes() = default;
  JAXWARP_HD explicit Lanes(A all) {
#if defined(__CUDACC__)
    JAXWARP_UNROLL for (int i = 0; i < V; ++i) lane[i] = all;
#else
    lane = all - Vector{};  // -0 stays -0
#endif
  }
  JAXWARP_HD explicit Lanes(const A (&each)[V]) {
    JAXWARP_UNROLL for (int i = 0; i < V; ++i) lane[i] = each[i];
  }
#if defined(__CUDACC__)
  JAXWARP_HD Lanes& operator+=(const Lanes& other) {
    JAXWARP_UNROLL for (int i = 0; i < V; ++i) lane[i] += other.lane[i];
    return *this;
  }
  friend JAXWARP_HD Lanes operator+(Lanes x, const Lanes& y) {
    x += y;
    return x;
  }
  friend JAXWARP_HD Lanes operator-(Lanes x, const Lanes& y) {
    JAXWARP_UNROLL for (int i = 0; i < V; ++i) x.lane[i] -= y.lane[i];
    return x;
  }
  friend JAXWARP_HD Lanes operator*(Lanes x, const Lanes& y) {
    JAXWARP_UNROLL for (int i = 0; i < V; ++i) x.lane[i] *= y.lane[i];
    return x;
  }
  friend JAXWARP_HD Lanes operator*(A scale, Lanes x) {
    JAXWARP_UNROLL for (int i = 0; i < V; ++i) x.lane[i] *= scale;
    return x;
  }
  friend JAXWARP_HD Lanes operator/(Lanes x, A divisor) {
    JAXWARP_UNROLL for (int i = 0; i < V; ++i) x.lane[i] /= divisor;
    return x;
  }
#else
  JAXWARP_HD Lanes& operator+=(const Lanes& other) {
    lane += other.lane;
    return *this;
  }
  friend JAXWARP_HD Lanes operator+(Lanes x, const Lanes& y) {
    x.lane += y.lane;
    return x;
  }
  friend JAXWARP_HD Lanes operator-(Lanes x, const Lanes& y) {
    x.lane -= y.lane;
    return x;
  }
  friend JAXWARP_HD Lanes operator*(Lanes x, const Lanes& y) {
    x.lane *= y.lane;
    return x;
  }
  friend JAXWARP_HD Lanes operator*(A scale, Lanes x) {
    x.lane *= scale;
    return x;
  }
  friend JAXWARP_HD Lanes operator/(Lanes x, A divisor) {
    x.lane /= divisor;
    return x;
  }
#endif
};

// A dot product over channels that come V or fewer at a time. On the host each lane has a sum of
// its own until the end; on a device the registers are too few.
template <class A, int V>
class Dot {
 public:
#if defined(__CUDACC__)
  template <int N>
  JAXWARP_HD void add(const Lanes<A, N>& x, const Lanes<A, N>& y) {
    JAXWARP_UNROLL for (int i = 0; i < N; ++i) sum_ += x.lane[i] * y.lane[i];
  }
  JAXWARP_HD A total() const { return sum_; }

 private:
  A sum_ = 0;
#else
  template <int N>
  JAXWARP_HD void add(const Lanes<A, N>& x, const Lanes<A, N>& y) {
    if constexpr (N == V) {
      sum_ += x * y;
    } else if constexpr (N == 4) {
      rest_ += x * y;
    } else {
      JAXWARP_UNROLL for (int i = 0; i < N; ++i) rest_.lane[i] += x.lane[i] * y.lane[i];
    }
  }
  // Halves are added to each other, whatever V is: so a few channels have one order of summation.
  JAXWARP_HD A total() const {
    A part[V];
    JAXWARP_UNROLL for (int i = 0; i < V; ++i) part[i] = sum_.lane[i];
    if constexpr (V >= 4) {  // fewer are never a part of more
      JAXWARP_UNROLL for (int i = 4; i < V; ++i) part[i - 4] += part[i];
      JAXWARP_UNROLL for (int i = 0; i < 4; ++i) part[i] += rest_.lane[i];
    }
    JAXWARP_UNROLL for (int i = 2; i < (V < 4 ? V : 4); ++i) part[i - 2] += part[i];
    if constexpr (V > 1) part[0] += part[1];
    return part[0];
  }

 private:
  static_assert(V <= 8);
  Lanes<A, V> sum_ = Lanes<A, V>(A(0));
  Lanes<A, 4> rest_ = Lanes<A, 4>(A(0));
#endif
};

#if defined(__CUDACC__) || defined(JAXWARP_CUDA_SHIM)
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

template <int V, bool kMayReadOn = false, class T>
JAXWARP_HD Lanes<Accumulator<T>, V> load(const T* source) {
  const Pack<T, V> pack = *aligned(reinterpret_cast<const Pack<T, V>*>(source));
  Lanes<Accumulator<T>, V> v;
  JAXWARP_UNROLL for (int i = 0; i < V; ++i) v.lane[i] = widen(pack.value[i]);
  return v;
}

template <int V, class T>
JAXWARP_HD void store(T* target, const Lanes<Accumulator<T>, V>& v) {
  Pack<T, V> pack;
  JAXWARP_UNROLL for (int i = 0; i < V; ++i) pack.value[i] = narrow<T>(v.lane[i]);
  *aligned(reinterpret_cast<Pack<T, V>*>(target)) = pack;
}

#else
// Values at any address, as the host's compiler moves them at once.
template <class T, int V>
struct Unaligned {
  typedef T Vector __attribute__((vector_size(V * sizeof(T)), aligned(alignof(T))));
};

// kMayReadOn: the value behind them may be read as well, which makes one access of three values.
template <int V, bool kMayReadOn = false, class T>
JAXWARP_HD Lanes<Accumulator<T>, V> load(const T* source) {
  Lanes<Accumulator<T>, V> v;
  if constexpr (!std::is_same_v<T, Accumulator<T> >) {
    JAXWARP_UNROLL for (int i = 0; i < V; ++i) v.lane[i] = widen(source[i]);
  } else if constexpr (V == 3 && !kMayReadOn) {
    const auto pair = *reinterpret_cast<const typename Unaligned<T, 2>::Vector*>(source);
    v.lane = typename Lanes<T, 3>::Vector{pair[0], pair[1], source[2], 0};
  } else {
    constexpr int kRead = V == 3 ? 4 : V;
    v.lane = *reinterpret_cast<const typename Unaligned<T, kRead>::Vector*>(source);
  }
  return v;
}

template <int V, class T>
JAXWARP_HD void store(T* target, const Lanes<Accumulator<T>, V>& v) {
  if constexpr (!std::is_same_v<T, Accumulator<T> >) {
    JAXWARP_UNROLL for (int i = 0; i < V; ++i) target[i] = narrow<T>(v.lane[i]);
  } else if constexpr (V == 3) {
    using Pair = typename Unaligned<T, 2>::Vector;
    *reinterpret_cast<Pair*>(target) = Pair{v.lane[0], v.lane[1]};
    target[2] = v.lane[2];
  } else {
    *reinterpret_cast<typename Unaligned<T, V>::Vector*>(target) = v.lane;
  }
}
#endif

#if defined(JAXWARP_DEVICE_ARCH)
// Other threads may add to the same place. Vector reductions exist for float32 from sm_90 on; V > 1
// is chosen only where the address is aligned to the pack.
template <int V, class A>
__device__ __forceinline__ void add_to(A* target, const Lanes<A, V>& v) {
#if JAXWARP_DEVICE_ARCH >= 900
  if constexpr (sizeof(A) == 4 && V % 4 == 0) {
    JAXWARP_UNROLL for (int i = 0; i < V; i += 4) {
      atomicAdd(reinterpret_cast<float4*>(target + i),
                make_float4(v.lane[i], v.lane[i + 1], v.lane[i + 2], v.lane[i + 3]));
    }
  } else
#endif
  {
    JAXWARP_UNROLL for (int i = 0; i < V; ++i) atomicAdd(target + i, A(v.lane[i]));
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
JAXWARP_HD void add_to(A* target, const Lanes<A, V>& v) {
  Lanes<A, V> sum = load<V>(target);
  sum += v;
  store<V>(target, sum);
}
template <class A>
JAXWARP_HD void max_to(A* target, A v) {
  if (v > *target) *target = v;
}
#endif

}  // namespace jaxwarp
