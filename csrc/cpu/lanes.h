// Eight floats at a time, for any processor: one register where there is AVX2, several elsewhere, and the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "avx2.h"

// The functions below are inlined or not there, so that how such values are passed to functions does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

#define WIREFRAME_INLINE inline __attribute__((always_inline))

namespace wireframe {

constexpr int64_t kLanes = 8;

using Lanes = float __attribute__((vector_size(32)));

WIREFRAME_INLINE Lanes lanes(float x) { return Lanes{x, x, x, x, x, x, x, x}; }

WIREFRAME_INLINE Lanes load(const float* from) {
  Lanes x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

WIREFRAME_INLINE void store(float* to, Lanes x) { std::memcpy(to, &x, sizeof x); }

// The first `count` of eight, the others 0.
WIREFRAME_INLINE Lanes load(const float* from, int64_t count) {
  Lanes x = lanes(0.0f);
  std::memcpy(&x, from, size_t(count) * sizeof(float));
  return x;
}

WIREFRAME_INLINE void store(float* to, Lanes x, int64_t count) { std::memcpy(to, &x, size_t(count) * sizeof(float)); }

// The sum of the eight, by halves.
WIREFRAME_INLINE float sum(Lanes x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

}  // namespace wireframe
