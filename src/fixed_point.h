// Sums with the same bits in whatever order their parts arrive, for a GPU's atomics: integers, in a
// unit that follows from the largest part of each sum. The parts come twice: first for their
// magnitudes, then to be added.
#pragma once

#include <cstddef>

#include "portable.h"

namespace jaxwarp {

// How a number is cut into integers, its limbs: one for float, whose parts are rounded to 38 digits
// below the largest where there are 2^23 of them; for double a second one holds the rest.
template <class A>
struct FixedPointFormat {
  using Bits = std::conditional_t<sizeof(A) == 4, unsigned, unsigned long long>;
  static constexpr int kLimbs = sizeof(A) == 4 ? 1 : 2;
  static constexpr int kMantissa = std::numeric_limits<A>::digits - 1;
  static constexpr int kBias = std::numeric_limits<A>::max_exponent - 1;
  static constexpr Bits kInfinity = Bits(2 * kBias + 1) << kMantissa;

  // Magnitudes are ordered as their bits; NaN is above infinity.
  static JAXWARP_HD Bits magnitude(A v) {
    return bit_cast<Bits>(v) & ~(Bits(1) << (sizeof(A) * 8 - 1));
  }

  // The digits of a part, so that so many parts fit a limb.
  static JAXWARP_HD int digits(int64_t parts) {
    int digits = 62;
    for (; parts > 0; parts /= 2) --digits;
    return digits;
  }

  // The least power of two, from the least normal number on, above all magnitudes up to `bound`.
  static JAXWARP_HD int exponent(Bits bound) {
    const int stored = static_cast<int>(bound >> kMantissa);
    return (stored > 1 ? stored : 1) - kBias + 1;
  }

  static JAXWARP_HD void split(A v, Bits bound, int digits, int64_t (&limb)[kLimbs]) {
    double rest = scalbn(static_cast<double>(v), digits - exponent(bound));
    JAXWARP_UNROLL for (int l = 0; l < kLimbs; ++l) {
      const double whole = rint(rest);
      limb[l] = static_cast<int64_t>(whole);
      rest = scalbn(rest - whole, digits);
    }
  }
  static JAXWARP_HD A join(const int64_t (&limb)[kLimbs], Bits bound, int digits) {
    double sum = 0;
    JAXWARP_UNROLL for (int l = kLimbs - 1; l >= 0; --l) {
      sum = static_cast<double>(limb[l]) + scalbn(sum, -digits);
    }
    return static_cast<A>(scalbn(sum, exponent(bound) - digits));
  }

  // With a part that is not finite, a sum holds instead which infinities came; NaN counts for both.
  static JAXWARP_HD unsigned long long infinities(A v) { return v != v ? 3 : v > 0 ? 1 : 2; }
  static JAXWARP_HD A of_infinities(int64_t came) {
    constexpr A kInf = std::numeric_limits<A>::infinity();
    return came == 1 ? kInf : came == 2 ? -kInf : std::numeric_limits<A>::quiet_NaN();
  }
};

// Stands where a kernel has a pointer to sums. In memory that is zero at first, for `count` sums:
// the limbs of all sums, the next limbs, the bounds.
template <class A>
struct FixedPoint {
  using Format = FixedPointFormat<A>;
  using Bits = typename Format::Bits;
  static constexpr int64_t kBytes = Format::kLimbs * sizeof(int64_t) + sizeof(Bits);  // of a sum

  unsigned long long* limb;
  Bits* bound;
  int64_t count;
  int digits;
  bool adds;  // the second time

  FixedPoint(void* memory, int64_t count, int64_t parts)
      : limb(static_cast<unsigned long long*>(memory)),
        bound(reinterpret_cast<Bits*>(limb + Format::kLimbs * count)),
        count(count),
        digits(Format::digits(parts)),
        adds(false) {}

  friend JAXWARP_HD FixedPoint operator+(FixedPoint sums, int64_t i) {
    sums.limb += i;
    sums.bound += i;
    return sums;
  }
  friend JAXWARP_HD bool operator==(const FixedPoint& sums, std::nullptr_t) {
    return sums.limb == nullptr;
  }
  friend JAXWARP_HD bool operator!=(const FixedPoint& sums, std::nullptr_t) {
    return sums.limb != nullptr;
  }

  __device__ void add(A v) const {
    const Bits magnitude = Format::magnitude(v);
    if (!adds) {
      if (magnitude > *bound) atomicMax(bound, magnitude);  // one that has grown since is no harm
    } else if (*bound >= Format::kInfinity) {
      if (magnitude >= Format::kInfinity) atomicOr(limb, Format::infinities(v));
    } else if (magnitude > 0) {
      int64_t part[Format::kLimbs];
      Format::split(v, *bound, digits, part);
      JAXWARP_UNROLL for (int l = 0; l < Format::kLimbs; ++l) {
        atomicAdd(limb + l * count, static_cast<unsigned long long>(part[l]));
      }
    }
  }
  __device__ A value() const {
    int64_t sum[Format::kLimbs];
    JAXWARP_UNROLL for (int l = 0; l < Format::kLimbs; ++l) {
      sum[l] = static_cast<int64_t>(limb[l * count]);
    }
    return *bound >= Format::kInfinity ? Format::of_infinities(sum[0])
                                       : Format::join(sum, *bound, digits);
  }
};

template <int V, class A>
__device__ __forceinline__ void add_to(const FixedPoint<A>& target, const Lanes<A, V>& v) {
  JAXWARP_UNROLL for (int i = 0; i < V; ++i)(target + i).add(v.lane[i]);
}

}  // namespace jaxwarp
