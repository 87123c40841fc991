// The conversions of half types, held against their definition and against another machine's.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "portable.h"
#include "results.h"

// x in `digits` binary digits, as a multiple of 2^lowest: the nearest, of two the even one.
inline double rounded(double x, int digits, int lowest, double largest) {
  int exponent;
  std::frexp(x, &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent - digits, lowest));
  const double nearest = std::nearbyint(x / unit) * unit;
  return std::abs(nearest) > largest ? std::copysign(INFINITY, x) : nearest;
}

// Every number of half type T as a float; and as T, floats on and beside all places where rounding
// changes, which are multiples of 2^12 as bits. One at a time, eight at a time and on another
// machine the bits are the same, and those of rounded().
template <class T>
void check_conversions(Results& results) {
  constexpr bool kBrain = std::is_same_v<T, jaxwarp::bfloat16>;
  const auto agree = [](const char* what, uint32_t from, uint32_t here, uint32_t expected) {
    if (here == expected) return;
    std::fprintf(stderr, "driver: %s of %#x as %s: %#x, expected %#x\n",
                 kBrain ? "bfloat16" : "float16", from, what, here, expected);
    std::abort();
  };
  const auto bits = [](float x) { return jaxwarp::bit_cast<uint32_t>(x); };

  std::vector<uint32_t> widened;
  for (uint32_t first = 0; first < 1 << 16; first += 8) {
    T half[8];
    for (uint32_t i = 0; i < 8; ++i) half[i].bits = static_cast<uint16_t>(first + i);
    const auto eight = jaxwarp::load<8>(half);
    for (int i = 0; i < 8; ++i) {
      widened.push_back(bits(jaxwarp::widen(half[i])));
      agree("one of eight floats", half[i].bits, bits(eight.lane[i]), widened.back());
    }
  }
  std::vector<uint32_t> there = widened;
  results.exchange(there.data(), there.size() * 4);
  for (uint32_t i = 0; i < 1 << 16; ++i) agree("a float", i, widened[i], there[i]);

  std::vector<float> floats;
  for (uint64_t near = 0; near < uint64_t(1) << 32; near += 1 << 12) {
    for (const int step : {-1, 0, 1}) {
      floats.push_back(jaxwarp::bit_cast<float>(static_cast<uint32_t>(near + step)));
    }
  }
  std::vector<T> narrowed(floats.size());
  for (size_t first = 0; first < floats.size(); first += 8) {
    jaxwarp::store<8>(&narrowed[first], jaxwarp::load<8>(&floats[first]));
  }
  std::vector<T> theirs = narrowed;
  results.exchange(theirs.data(), theirs.size() * 2);
  for (size_t i = 0; i < floats.size(); ++i) {
    const float x = floats[i];
    const uint32_t from = bits(x), half = narrowed[i].bits;
    agree("one of eight halves", from, half, jaxwarp::narrow<T>(x).bits);
    agree("a half", from, half, theirs[i].bits);
    const float y =
        static_cast<float>(kBrain ? rounded(x, 8, -133, 0x1.fep127) : rounded(x, 11, -24, 65504));
    const float back = jaxwarp::widen(narrowed[i]);
    if (!std::isnan(y) || !std::isnan(back)) agree("a half and a float", from, bits(back), bits(y));
  }
}
