// Functions for processors with AVX2, chosen when they are called: the build itself is for any processor of the kind.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
// No FMA, which rounds otherwise: the target names avx2 alone.
#define WIREFRAME_AVX2 __attribute__((target("avx2")))
#endif

namespace wireframe {

inline bool has_avx2() {
#ifdef WIREFRAME_AVX2
  return __builtin_cpu_supports("avx2");
#else
  return false;
#endif
}

}  // namespace wireframe
