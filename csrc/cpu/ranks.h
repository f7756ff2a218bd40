// The points of a scene that are kept, by rank.
#pragma once

#include <stdexcept>
#include <string>

#include "../point_math.h"
#include "buffers.h"

namespace wireframe {

// The points of one scene. Hashes are keyed by a point's rank among the kept ones.
struct Points {
  const uint8_t* source;
  const bool* keep;
  int64_t first, last;

  template <class Body>
  void for_kept(const Body& body) const {
    uint64_t rank = 0;
    for (int64_t p = first; p < last; ++p) {
      if (keep[p]) body(p, rank++);
    }
  }
};

inline void check_sources(const Span<const uint8_t>& source) {
  uint8_t all = 0;
  for (int64_t p = 0; p < source.size; ++p) all |= source[p];
  if (all <= 1) return;
  for (int64_t p = 0; p < source.size; ++p) {
    if (source[p] > 1) throw std::invalid_argument("source must be 0 (COLMAP) or 1 (depth), got " + std::to_string(source[p]));
  }
}

}  // namespace wireframe
