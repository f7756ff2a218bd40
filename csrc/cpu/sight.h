// Where chunks of points are seen: one view at a time, in loops that vectors can run.
#pragma once

#include <cstdint>

#include "../point_math.h"
#include "avx2.h"

namespace wireframe {

constexpr int64_t kPointsPerChunk = 1024;

// Where a chunk of points is seen in one view. `wide`: by AVX2, which only a processor that has_avx2() runs.
class Sight {
 public:
  Sight(const float* xyz, int64_t size, bool wide) : size_(size), wide_(wide) {
    for (int64_t i = 0; i < size; ++i) x_[i] = xyz[3 * i], y_[i] = xyz[3 * i + 1], z_[i] = xyz[3 * i + 2];
  }

  void look(const Camera& camera, const ViewRow& view) {
#ifdef WIREFRAME_AVX2
    if (wide_) return look_avx2(camera, view);
#endif
    look_inlined(camera, view);
  }

  bool inside(int64_t i) const { return row_[i] >= 0; }
  Pixel pixel(int64_t i) const { return {row_[i], column_[i], depth_[i], inside(i)}; }
  void hide(int64_t i, bool hidden) { row_[i] |= -int32_t(hidden); }

  // All ones for a point outside, else 0.
  int32_t outside(int64_t i) const { return row_[i] >> 31; }

  // In the label maps, 0 for a point outside: no branch, which could not be predicted.
  int64_t label(int64_t i, int64_t width) const { return (row_[i] * width + column_[i]) & ~int64_t(outside(i)); }

 private:
  // project() in loops that vectors can run.
  __attribute__((always_inline)) void look_inlined(Camera camera, const ViewRow& view) {
    const int64_t size = size_, height = view.height, width = view.width;
    for (int64_t i = 0; i < size; ++i) {
      const Projection seen = project_exactly(camera, x_[i], y_[i], z_[i]);
      u_[i] = seen.u, v_[i] = seen.v, depth_[i] = seen.depth;
    }
    const double last_row = double(height - 1), last_column = double(width - 1);
    for (int64_t i = 0; i < size; ++i) {
      const bool is_inside = Projection{u_[i], v_[i], depth_[i]}.inside(height, width);
      column_[i] = nearest(u_[i], last_column);
      row_[i] = nearest(v_[i], last_row) | (int32_t(is_inside) - 1);
    }
  }

#ifdef WIREFRAME_AVX2
  WIREFRAME_AVX2 void look_avx2(const Camera& camera, const ViewRow& view) { look_inlined(camera, view); }
#endif

  // rint by additions, to even as well for 0 <= value < 2^51; what lies outside the map must only not overflow.
  static int32_t nearest(double value, double last) {
    double whole = (value + 0x1p52) - 0x1p52;
    whole = whole < last ? whole : last;
    return int32_t(whole > 0.0 ? whole : 0.0);
  }

  int64_t size_;
  bool wide_;
  double x_[kPointsPerChunk], y_[kPointsPerChunk], z_[kPointsPerChunk];
  double u_[kPointsPerChunk], v_[kPointsPerChunk], depth_[kPointsPerChunk];
  int32_t row_[kPointsPerChunk], column_[kPointsPerChunk];
};

}  // namespace wireframe
