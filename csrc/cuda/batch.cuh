// A batch of scenes as the kernels read it. The host cannot look at what is on the device, so a view whose maps lie
// outside the buffers counts as empty, and offsets are clamped: no table can make a kernel reach beyond its buffers.
#pragma once

#include "launch.h"

namespace wireframe {

__device__ inline bool fits(int64_t height, int64_t width, int64_t begin, int64_t size) {
  // Positions within a view are int, with room for the last step of a loop.
  constexpr int64_t kMost = (int64_t(1) << 31) - (1 << 16);
  return height > 0 && width > 0 && height < kMost && width < kMost && height * width < kMost && begin >= 0 &&
         begin <= size && height * width <= size - begin;
}

// Row `view` of the table, without label maps where they would not lie within `pixels` elements.
__device__ inline ViewRow label_view(const ViewRow* views, int64_t view, int64_t pixels) {
  ViewRow row = views[view];
  if (!fits(row.height, row.width, row.labels, pixels)) row.height = row.width = 0;
  return row;
}

// Likewise for the depth map.
__device__ inline ViewRow depth_view(const ViewRow* views, int64_t view, int64_t depth_pixels) {
  ViewRow row = views[view];
  if (!fits(row.depth_height, row.depth_width, row.depth, depth_pixels)) row.depth_height = row.depth_width = 0;
  return row;
}

struct Segment {
  int64_t begin;
  int size;
};

// Elements offsets[i] to offsets[i + 1] of `count`.
__device__ inline Segment segment_of(const int64_t* offsets, int64_t i, int64_t count) {
  const int64_t first = offsets[i], last = offsets[i + 1];
  const int64_t begin = first < 0 ? 0 : first < count ? first : count;
  const int64_t end = last < begin ? begin : last < count ? last : count;
  return {begin, int(end - begin)};
}

struct Cameras {
  const float *K, *R, *t;  // [V, 3, 3], [V, 3, 3], [V, 3]

  __device__ Camera of(int64_t view) const { return load_camera(K + 9 * view, R + 9 * view, t + 3 * view); }
};

}  // namespace wireframe
