// What differs between a C++ and a CUDA compiler: function qualifiers, half-precision storage,
// numbers side by side, sums and maxima in memory that others may be writing too. Everything else
// in the mathematics is written once, for both.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

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

// exp of several numbers at once: the vector functions of glibc, by the names of x86-64's vector
// ABI.
#if defined(JAXWARP_MVEC) && !defined(__CUDACC__)
typedef float jaxwarp_floats __attribute__((vector_size(16)));
typedef double jaxwarp_doubles __attribute__((vector_size(16)));
extern "C" jaxwarp_floats _ZGVbN4v_expf(jaxwarp_floats);
extern "C" jaxwarp_doubles _ZGVbN2v_exp(jaxwarp_doubles);
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
template <>
struct AccumulatorOf<int32_t> {  // cells and places, side by side
  using type = int32_t;
};
template <>
struct AccumulatorOf<uint32_t> {
  using type = uint32_t;
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

// The words below are one uint32_t, or several side by side.
JAXWARP_HD uint32_t mask(bool yes) { return yes ? ~uint32_t(0) : 0; }
template <class Word>
JAXWARP_HD Word select(Word condition, Word yes, Word no) {
  return (condition & yes) | (~condition & no);
}
#if !defined(__CUDACC__)
typedef uint32_t Words __attribute__((vector_size(16)));
template <class Mask>
JAXWARP_HD Words mask(Mask lanes) {
  return reinterpret_cast<Words>(lanes);
}
#endif

// Exponent and mantissa move into place, and the exponent's bias grows by 112. A subnormal becomes
// the fraction of 2^-14, from which 2^-14 is taken away: XLA's threads treat subnormal operands as
// 0.
template <class Float, class Word>
JAXWARP_HD Float float_of_float16(Word half) {
  const Word magnitude = half & 0x7fffu, moved = magnitude << 13;
  const Word subnormal = bit_cast<Word>(bit_cast<Float>(moved + 0x38800000u) - 0x1p-14f);
  const Word special = mask(magnitude >= 0x7c00u) & 0x7f800000u;  // inf, NaN: all ones again
  const Word finite = select(mask(magnitude < 0x400u), subnormal, moved + 0x38000000u);
  return bit_cast<Float>(finite | special | ((half & 0x8000u) << 16));
}

// Both round to nearest even, as XLA does.
template <class Word>
JAXWARP_HD Word bfloat16_of_float(Word bits) {
  const Word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return select(mask((bits & 0x7fffffffu) > 0x7f800000u), (bits >> 16) | 0x40u, rounded);
}
template <class Float, class Word>
JAXWARP_HD Word float16_of_float(Word bits) {
  const Word magnitude = bits & 0x7fffffffu;
  // Below 2^-14: adding 0.5 leaves the subnormal's bits.
  const Word subnormal = bit_cast<Word>(bit_cast<Float>(magnitude) + 0.5f) - 0x3f000000u;
  const Word normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  Word half = select(mask(magnitude < 0x38800000u), subnormal, normal);
  const Word infinity = half * 0u + 0x7c00u, nan = half * 0u + 0x7e00u;
  half = select(mask(magnitude >= 0x477ff000u), infinity, half);  // from 65520 on
  half = select(mask(magnitude > 0x7f800000u), nan, half);
  return half | ((bits >> 16) & 0x8000u);
}

JAXWARP_HD float widen(float v) { return v; }
JAXWARP_HD double widen(double v) { return v; }
JAXWARP_HD float widen(bfloat16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
JAXWARP_HD float widen(float16 v) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(v.bits));
#else
  return float_of_float16<float>(static_cast<uint32_t>(v.bits));
#endif
}

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
  return bfloat16{static_cast<uint16_t>(bfloat16_of_float(bit_cast<uint32_t>(v)))};
}
template <>
JAXWARP_HD float16 narrow<float16>(float v) {
#if defined(__CUDA_ARCH__)
  return float16{__half_as_ushort(__float2half_rn(v))};
#else
  return float16{static_cast<uint16_t>(float16_of_float<float>(bit_cast<uint32_t>(v)))};
#endif
}

#if !defined(__CUDACC__) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)  // GCC from 12 on, clang
#define JAXWARP_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#endif
#endif

#if defined(__CUDACC__)
inline constexpr bool kHasVectors = false;
#else
inline constexpr bool kHasVectors = true;
#endif

// V numbers that are computed with side by side, such as neighbouring channels: an array in
// registers or, on the host and if there are several, a vector of its compiler.
template <class A, int V, bool kVector = kHasVectors && (V > 1)>
struct Lanes {
  A lane[V];

  Lanes() = default;
  JAXWARP_HD explicit Lanes(A all) { JAXWARP_UNROLL for (int i = 0; i < V; ++i) lane[i] = all; }
  JAXWARP_HD explicit Lanes(const A (&each)[V]) {
    JAXWARP_UNROLL for (int i = 0; i < V; ++i) lane[i] = each[i];
  }
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
  friend JAXWARP_HD Lanes operator/(Lanes x, const Lanes& y) {
    JAXWARP_UNROLL for (int i = 0; i < V; ++i) x.lane[i] /= y.lane[i];
    return x;
  }
};

#if !defined(__CUDACC__)
template <class A, int V>
struct Lanes<A, V, true> {
  static constexpr int kRoom = V == 3 ? 4 : V;  // of the fourth, nobody asks
  typedef A Vector __attribute__((vector_size(kRoom * sizeof(A))));
  Vector lane;

  Lanes() = default;
  JAXWARP_HD explicit Lanes(A all)
      : lane(repeated(all, std::make_integer_sequence<int, kRoom>{})) {}
  JAXWARP_HD explicit Lanes(const A (&each)[V]) {
    JAXWARP_UNROLL for (int i = 0; i < V; ++i) lane[i] = each[i];
  }
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
    x.lane *= Lanes(scale).lane;
    return x;
  }
  friend JAXWARP_HD Lanes operator/(Lanes x, const Lanes& y) {
    x.lane /= y.lane;
    return x;
  }

 private:
  template <int... I>
  static JAXWARP_HD Vector repeated(A all, std::integer_sequence<int, I...>) {
#if defined(JAXWARP_SHUFFLE)  // GCC makes one instruction of it
    if constexpr (sizeof(Vector) == 32) {
      typedef A Half __attribute__((vector_size(16)));
      constexpr int kHalf = kRoom / 2;
      const Half half = Lanes<A, kHalf>(all).lane;
      return JAXWARP_SHUFFLE(half, half, (I % kHalf)...);
    }
#endif
    return Vector{(static_cast<void>(I), all)...};
  }
};
#endif

// exp(min(x, 0)) of each.
template <class A>
JAXWARP_HD Lanes<A, 4> exp_up_to_one(Lanes<A, 4> x) {
#if defined(JAXWARP_MVEC) && !defined(__CUDACC__)
  x.lane = x.lane > 0 ? Lanes<A, 4>(A(0)).lane : x.lane;
  if constexpr (sizeof(A) == 4) {
    x.lane = _ZGVbN4v_expf(x.lane);
  } else {
    jaxwarp_doubles half[2];
    memcpy(half, &x.lane, sizeof(half));
    half[0] = _ZGVbN2v_exp(half[0]);
    half[1] = _ZGVbN2v_exp(half[1]);
    memcpy(&x.lane, half, sizeof(half));
  }
#else
  JAXWARP_UNROLL for (int i = 0; i < 4; ++i) x.lane[i] = std::exp(x.lane[i] > 0 ? A(0) : x.lane[i]);
#endif
  return x;
}

#if !defined(__CUDACC__)
// sum[k] = (x[k][0] + x[k][2]) + (x[k][1] + x[k][3]) for K vectors at once; of three lanes, the
// fourth counts for nothing. Four vectors are added across as columns of a matrix.
template <int Given, int K, class A>
JAXWARP_HD void add_across(const Lanes<A, 4> (&x)[K], A (&sum)[K]) {
#if defined(JAXWARP_SHUFFLE)
  if constexpr (K % 4 == 0) {
    JAXWARP_UNROLL for (int k = 0; k < K; k += 4) {
      const auto a = x[k].lane, b = x[k + 1].lane, c = x[k + 2].lane, d = x[k + 3].lane;
      const auto ab_low = JAXWARP_SHUFFLE(a, b, 0, 4, 1, 5),
                 cd_low = JAXWARP_SHUFFLE(c, d, 0, 4, 1, 5),
                 ab_high = JAXWARP_SHUFFLE(a, b, 2, 6, 3, 7),
                 cd_high = JAXWARP_SHUFFLE(c, d, 2, 6, 3, 7);
      auto even = JAXWARP_SHUFFLE(ab_low, cd_low, 0, 1, 4, 5) +
                  JAXWARP_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5);
      auto odd = JAXWARP_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7);
      if constexpr (Given == 4) odd += JAXWARP_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7);
      even += odd;
      memcpy(sum + k, &even, sizeof(even));
    }
    return;
  }
#endif
  JAXWARP_UNROLL for (int k = 0; k < K; ++k) {
    const A odd = Given == 4 ? x[k].lane[1] + x[k].lane[3] : x[k].lane[1];
    sum[k] = (x[k].lane[0] + x[k].lane[2]) + odd;
  }
}
#endif

// K dot products over channels that come V or fewer at a time. On the host each lane has a sum of
// its own until the end; on a device the registers are too few. kOnce: one pack is all of them.
template <class A, int V, int K, bool kOnce = false>
class Dots {
 public:
#if defined(__CUDACC__)
  template <int N>
  JAXWARP_HD void add(int k, const Lanes<A, N>& x, const Lanes<A, N>& y) {
    JAXWARP_UNROLL for (int i = 0; i < N; ++i) sum_[k] += x.lane[i] * y.lane[i];
  }
  JAXWARP_HD void total(A (&sum)[K]) const {
    JAXWARP_UNROLL for (int k = 0; k < K; ++k) sum[k] = sum_[k];
  }

 private:
  A sum_[K] = {};
#else
  JAXWARP_HD Dots() {
    JAXWARP_UNROLL for (int k = 0; k < K; ++k) {
      sum_[k] = Lanes<A, V>(A(0));
      rest_[k] = Lanes<A, 4>(A(0));
    }
  }
  template <int N>
  JAXWARP_HD void add(int k, const Lanes<A, N>& x, const Lanes<A, N>& y) {
    if constexpr (kOnce) {
      sum_[k] = x * y;
    } else if constexpr (N == V) {
      sum_[k] += x * y;
    } else if constexpr (N == 4) {
      rest_[k] += x * y;
    } else {
      JAXWARP_UNROLL for (int i = 0; i < N; ++i) rest_[k].lane[i] += x.lane[i] * y.lane[i];
    }
  }
  // Halves are added to each other, whatever V is: so a few channels have one order of summation.
  JAXWARP_HD void total(A (&sum)[K]) const {
    if constexpr (V < 3) {  // fewer than four are never a part of more
      JAXWARP_UNROLL for (int k = 0; k < K; ++k) {
        sum[k] = sum_[k].lane[0];
        if constexpr (V > 1) sum[k] += sum_[k].lane[1];
      }
    } else {
      Lanes<A, 4> part[K];
      JAXWARP_UNROLL for (int k = 0; k < K; ++k) {
        if constexpr (V == 8) {
          typename Lanes<A, 4>::Vector half[2];
          memcpy(half, &sum_[k].lane, sizeof(half));
          part[k].lane = (half[0] + half[1]) + rest_[k].lane;
        } else if constexpr (V == 4) {
          part[k] = sum_[k] + rest_[k];
        } else {
          part[k].lane = sum_[k].lane;
        }
      }
      add_across<V == 3 ? 3 : 4>(part, sum);
    }
  }

 private:
  static_assert(V <= 4 || V == 8);
  Lanes<A, V> sum_[K];
  Lanes<A, 4> rest_[K];
#endif
};

#if defined(__CUDACC__) || defined(JAXWARP_CUDA_SHIM)
#if !defined(JAXWARP_CUDA_SHIM)  // the shim checks it
template <class T>
JAXWARP_HD T* aligned(T* place) {
  return place;
}
#endif

// V neighbouring values, moved by as few accesses as there can be: XLA aligns what it is given to
// 16 bytes.
template <class T, int V>
struct alignas(V == 3               ? sizeof(T)
               : sizeof(T) * V < 16 ? sizeof(T) * V
                                    : 16) Pack {
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

#if defined(JAXWARP_SHUFFLE)
typedef uint16_t Halves __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));

template <class T>
JAXWARP_HD Floats widen_four(Halves v) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return reinterpret_cast<Floats>(JAXWARP_SHUFFLE(Halves{}, v, 0, 8, 1, 9, 2, 10, 3, 11));
  } else {
    const Halves words = JAXWARP_SHUFFLE(v, Halves{}, 0, 8, 1, 9, 2, 10, 3, 11);
    return float_of_float16<Floats>(reinterpret_cast<Words>(words));
  }
}
template <class T>
JAXWARP_HD Halves narrow_four(Floats v) {  // each in the lower half of its word
  const Words bits = reinterpret_cast<Words>(v);
  if constexpr (std::is_same_v<T, bfloat16>) {
    return reinterpret_cast<Halves>(bfloat16_of_float(bits));
  } else {
    return reinterpret_cast<Halves>(float16_of_float<Floats>(bits));
  }
}
#endif

// Half types, V of them at once.
template <int V, bool kMayReadOn, class T>
JAXWARP_HD Lanes<float, V> load_halves(const T* source) {
  Lanes<float, V> v;
#if defined(JAXWARP_SHUFFLE)
  if constexpr (V == 8) {
    Halves bits;
    memcpy(&bits, source, sizeof(bits));
    const Halves high = JAXWARP_SHUFFLE(bits, bits, 4, 5, 6, 7, 4, 5, 6, 7);
    v.lane = JAXWARP_SHUFFLE(widen_four<T>(bits), widen_four<T>(high), 0, 1, 2, 3, 4, 5, 6, 7);
    return v;
  } else if constexpr (V == 3 || V == 4) {
    uint64_t bits;
    if constexpr (V == 4 || kMayReadOn) {
      memcpy(&bits, source, 8);
    } else {
      uint32_t two;
      memcpy(&two, source, 4);
      bits = two | static_cast<uint64_t>(source[2].bits) << 32;
    }
    typedef uint64_t Pair __attribute__((vector_size(16)));
    v.lane = widen_four<T>(reinterpret_cast<Halves>(Pair{bits, 0}));
    return v;
  }
#endif
  JAXWARP_UNROLL for (int i = 0; i < V; ++i) v.lane[i] = widen(source[i]);
  return v;
}
template <int V, class T>
JAXWARP_HD void store_halves(T* target, const Lanes<float, V>& v) {
#if defined(JAXWARP_SHUFFLE)
  if constexpr (V == 8) {
    const Halves low = narrow_four<T>(JAXWARP_SHUFFLE(v.lane, v.lane, 0, 1, 2, 3));
    const Halves high = narrow_four<T>(JAXWARP_SHUFFLE(v.lane, v.lane, 4, 5, 6, 7));
    const Halves bits = JAXWARP_SHUFFLE(low, high, 0, 2, 4, 6, 8, 10, 12, 14);
    memcpy(target, &bits, sizeof(bits));
    return;
  } else if constexpr (V == 3 || V == 4) {
    const Halves words = narrow_four<T>(v.lane);
    const Halves bits = JAXWARP_SHUFFLE(words, words, 0, 2, 4, 6, 0, 2, 4, 6);
    memcpy(target, &bits, V * sizeof(T));
    return;
  }
#endif
  JAXWARP_UNROLL for (int i = 0; i < V; ++i) target[i] = narrow<T>(v.lane[i]);
}

// kMayReadOn: the value behind them may be read as well, which makes one access of three values.
template <int V, bool kMayReadOn = false, class T>
JAXWARP_HD Lanes<Accumulator<T>, V> load(const T* source) {
  Lanes<Accumulator<T>, V> v;
  if constexpr (!std::is_same_v<T, Accumulator<T> >) {
    return load_halves<V, kMayReadOn>(source);
  } else if constexpr (V == 3 && !kMayReadOn) {
    // Two at once and one, as store() writes them: else this would wait until they are in memory.
    if constexpr (sizeof(T) == 4) {
      typedef int64_t Pair __attribute__((vector_size(16)));
      Pair pair = {};
      memcpy(&pair, source, 8);
      memcpy(&v.lane, &pair, sizeof(pair));
      v.lane[2] = source[2];
      return v;
    }
#if defined(JAXWARP_SHUFFLE)
    typedef T Pair __attribute__((vector_size(2 * sizeof(T))));
    const Pair first = *reinterpret_cast<const typename Unaligned<T, 2>::Vector*>(source);
    v.lane = JAXWARP_SHUFFLE(first, (Pair{source[2], 0}), 0, 1, 2, 3);
#else
    v.lane = typename Lanes<T, 3>::Vector{source[0], source[1], source[2], 0};
#endif
  } else if constexpr (V == 1) {
    v.lane[0] = *source;
  } else {
    constexpr int kRead = V == 3 ? 4 : V;
    v.lane = *reinterpret_cast<const typename Unaligned<T, kRead>::Vector*>(source);
  }
  return v;
}

template <int V, class T>
JAXWARP_HD void store(T* target, const Lanes<Accumulator<T>, V>& v) {
  if constexpr (!std::is_same_v<T, Accumulator<T> >) {
    store_halves(target, v);
  } else if constexpr (V == 3) {
    using Pair = typename Unaligned<T, 2>::Vector;
#if defined(JAXWARP_SHUFFLE)
    if constexpr (sizeof(T) == 8) {
      *reinterpret_cast<Pair*>(target) = JAXWARP_SHUFFLE(v.lane, v.lane, 0, 1);
      target[2] = JAXWARP_SHUFFLE(v.lane, v.lane, 2, 3)[0];
      return;
    }
#endif
    *reinterpret_cast<Pair*>(target) = Pair{v.lane[0], v.lane[1]};
    target[2] = v.lane[2];
  } else if constexpr (V == 1) {
    *target = v.lane[0];
  } else {
    *reinterpret_cast<typename Unaligned<T, V>::Vector*>(target) = v.lane;
  }
}
#endif

#if defined(JAXWARP_DEVICE_ARCH)
// Other threads may add to the same place. Vector reductions exist from sm_90 on, and for float32:
// sums are never kept in less. V > 1 is chosen only where the address is aligned to the pack.
template <int V, class A>
__device__ __forceinline__ void add_to(A* target, const Lanes<A, V>& v) {
#if JAXWARP_DEVICE_ARCH >= 900
  if constexpr (sizeof(A) == 4 && V % 4 == 0) {
    JAXWARP_UNROLL for (int i = 0; i < V; i += 4) {
      atomicAdd(reinterpret_cast<float4*>(target + i),
                make_float4(v.lane[i], v.lane[i + 1], v.lane[i + 2], v.lane[i + 3]));
    }
  } else if constexpr (sizeof(A) == 4 && V == 2) {
    atomicAdd(reinterpret_cast<float2*>(target), make_float2(v.lane[0], v.lane[1]));
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
  *target = v > *target ? v : *target;  // no branch
}
#endif

}  // namespace jaxwarp
