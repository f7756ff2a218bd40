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
using LaneInts = int32_t __attribute__((vector_size(32)));

WIREFRAME_INLINE Lanes lanes(float x) { return Lanes{x, x, x, x, x, x, x, x}; }

WIREFRAME_INLINE Lanes load(const float* from) {
  Lanes x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

WIREFRAME_INLINE void store(float* to, Lanes x) { std::memcpy(to, &x, sizeof x); }

// The first `count` of eight, the others `rest`.
WIREFRAME_INLINE Lanes load(const float* from, int64_t count, float rest = 0.0f) {
  Lanes x = lanes(rest);
  std::memcpy(&x, from, size_t(count) * sizeof(float));
  return x;
}

WIREFRAME_INLINE void store(float* to, Lanes x, int64_t count) { std::memcpy(to, &x, size_t(count) * sizeof(float)); }

WIREFRAME_INLINE Lanes smaller(Lanes a, Lanes b) { return b < a ? b : a; }
WIREFRAME_INLINE Lanes larger(Lanes a, Lanes b) { return b > a ? b : a; }
WIREFRAME_INLINE Lanes absolute(Lanes x) { return Lanes(LaneInts(x) & 0x7fffffff); }

// The sum of the eight, by halves.
WIREFRAME_INLINE float sum(Lanes x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

WIREFRAME_INLINE float maximum(Lanes x) {
  float most = x[0];
  for (int i = 1; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

// e^x for x up to 88, 0 below -87: 2^n e^r with |r| <= log(2) / 2, e^r by a polynomial of degree 6 fitted to a relative
// 3e-9. Within 1.5 units in the last place.
WIREFRAME_INLINE Lanes exponential(Lanes x) {
  constexpr float kRound = 12582912.0f;  // 1.5 x 2^23: adding it rounds to an integer
  const Lanes bounded = larger(x, lanes(-87.0f));
  const Lanes n = (bounded * 1.44269504f + kRound) - kRound;
  // log(2) in two parts, the first with so few digits that its product is exact.
  const Lanes r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  Lanes p = lanes(1.3814611593261361e-3f);
  p = p * r + 8.368710055947304e-3f;
  p = p * r + 4.166838899254799e-2f;
  p = p * r + 1.666652113199234e-1f;
  p = p * r + 0.5f;
  p = (p * r) * r + r + 1.0f;
  const Lanes power = Lanes((__builtin_convertvector(n, LaneInts) + 127) << 23);
  return x < lanes(-87.0f) ? lanes(0.0f) : p * power;
}

}  // namespace wireframe
