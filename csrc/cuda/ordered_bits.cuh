// Doubles as integers of the same order, for atomic minima and for selection by digits.
#pragma once

#include "launch.h"

namespace wireframe {

// A number whose unsigned order is the order of the doubles (-0 below +0; no NaN).
WIREFRAME_HD uint64_t ordered_bits(double value) {
  uint64_t bits;
#if defined(__CUDA_ARCH__)
  bits = uint64_t(__double_as_longlong(value));
#else
  static_assert(sizeof bits == sizeof value, "double has 64 bits");
  __builtin_memcpy(&bits, &value, sizeof bits);
#endif
  return bits >> 63 ? ~bits : bits | (1ull << 63);
}

WIREFRAME_HD double from_ordered_bits(uint64_t ordered) {
  const uint64_t bits = ordered >> 63 ? ordered & ~(1ull << 63) : ~ordered;
#if defined(__CUDA_ARCH__)
  return __longlong_as_double((long long)bits);
#else
  double value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

}  // namespace wireframe
