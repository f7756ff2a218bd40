// Depth maps: the clip limit, the choice of pixels and their unprojection (reference: wireframe/depth.py).
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "pool.h"
#include "view_table.h"

namespace wireframe {
namespace {

double limit_of(const uint16_t* depth, int64_t size) {
  std::vector<uint32_t> counts(1 << 16);
  for (int64_t i = 0; i < size; ++i) ++counts[depth[i]];
  const int64_t n = size - counts[0];
  if (n == 0) return 0.0;
  const ClipPosition at = clip_position(n);
  int64_t below = 0;
  double low = 0.0;
  bool found_low = false;
  for (size_t value = 1;; ++value) {
    below += counts[value];
    if (!found_low && below > at.low) low = double(value), found_low = true;
    if (below > at.high) return clip_limit(low, double(value), at.t);
  }
}

struct Candidate {
  uint64_t hash;
  int64_t pixel;
};

// The candidate pixels of one view, in row-major order.
class Candidates {
 public:
  Candidates(const ViewRow& view, const uint16_t* depth, const bool* mask) : view_(view), depth_(depth), mask_(mask) {
    same_size_ = view.depth_height == view.height && view.depth_width == view.width;
    if (same_size_) return;
    for (int64_t x = 0; x < view.depth_width; ++x) columns_.push_back(nearest_label(x, view.depth_width, view.width));
  }

  int64_t count() const {
    int64_t n = 0;
    for (int64_t y = 0; y < view_.depth_height; ++y) {
      const uint16_t* depth = depth_ + y * view_.depth_width;
      const bool* mask = mask_row(y);
      if (same_size_) {
        for (int64_t x = 0; x < view_.depth_width; ++x) n += int64_t(mask[x]) & int64_t(depth[x] > 0);
      } else {
        for (int64_t x = 0; x < view_.depth_width; ++x) n += int64_t(mask[columns_[size_t(x)]]) & int64_t(depth[x] > 0);
      }
    }
    return n;
  }

  // Those whose hash is at most `bound`.
  std::vector<Candidate> below(uint64_t key, uint64_t bound, size_t expected) const {
    std::vector<Candidate> found;
    found.reserve(expected);
    for (int64_t y = 0; y < view_.depth_height; ++y) {
      const uint16_t* depth = depth_ + y * view_.depth_width;
      const bool* mask = mask_row(y);
      for (int64_t x = 0; x < view_.depth_width; ++x) {
        if (!(mask[same_size_ ? x : columns_[size_t(x)]] && depth[x] > 0)) continue;
        const int64_t pixel = y * view_.depth_width + x;
        const uint64_t hash = hash64(key, uint64_t(pixel));
        if (hash <= bound) found.push_back({hash, pixel});
      }
    }
    return found;
  }

 private:
  const bool* mask_row(int64_t y) const {
    return mask_ + (same_size_ ? y : nearest_label(y, view_.depth_height, view_.height)) * view_.width;
  }

  const ViewRow& view_;
  const uint16_t* depth_;
  const bool* mask_;
  bool same_size_;
  std::vector<int64_t> columns_;
};

// A hash that about `wanted` of `n` uniform hashes do not exceed.
uint64_t quantile(double wanted, int64_t n) {
  const double share = wanted / double(n);
  return share >= 1.0 ? std::numeric_limits<uint64_t>::max() : uint64_t(share * 18446744073709549568.0);
}

// The `count` candidates with the smallest hashes, in row-major order.
std::vector<Candidate> choose(const Candidates& candidates, int64_t count, uint64_t key) {
  const int64_t n = candidates.count();
  constexpr uint64_t everything = std::numeric_limits<uint64_t>::max();
  if (n <= count) return candidates.below(key, everything, size_t(n));
  // Hashes are uniform: a bound that lets a few more than `count` pass spares sorting the rest.
  const double margin = 8.0 * std::sqrt(double(count)) + 16.0;
  std::vector<Candidate> found =
      candidates.below(key, quantile(double(count) + margin, n), size_t(std::min(n, count + int64_t(2 * margin))));
  if (int64_t(found.size()) < count) found = candidates.below(key, everything, size_t(n));
  std::vector<uint64_t> hashes(found.size());
  std::transform(found.begin(), found.end(), hashes.begin(), [](const Candidate& c) { return c.hash; });
  if (count == 0) return {};
  std::nth_element(hashes.begin(), hashes.begin() + count - 1, hashes.end());
  const uint64_t bound = hashes[size_t(count - 1)];
  found.erase(std::remove_if(found.begin(), found.end(), [&](const Candidate& c) { return c.hash > bound; }), found.end());
  return found;
}

}  // namespace

void bind_depth(py::module_& module) {
  module.def(
      "clip_limits",
      [](const py::object& depth, const py::object& views, const py::object& out, int threads) {
        const auto maps = span<const uint16_t>(depth, "depth", {kAny});
        const ViewTable table = view_table(views, std::numeric_limits<int64_t>::max(), false, 0, true, maps.size);
        const auto limits = span<double>(out, "out", {table.size});
        py::gil_scoped_release release;
        parallel_for(threads, table.size, [&](int64_t v) {
          const ViewRow& view = table[v];
          limits[v] = limit_of(maps.data + view.depth, view.depth_height * view.depth_width);
        });
      },
      py::arg("depth"), py::arg("views"), py::arg("out"), py::arg("threads"));

  module.def(
      "depth_points",
      [](const py::object& depth, const py::object& mask, const py::object& limits, const py::object& views,
         const py::object& K, const py::object& R, const py::object& t, const py::object& keys, uint64_t seed,
         const py::object& out_xyz, const py::object& out_counts, int threads) {
        const auto maps = span<const uint16_t>(depth, "depth", {kAny});
        const auto masks = span<const bool>(mask, "mask", {kAny});
        const auto scene_keys = span<const int64_t>(keys, "keys", {kAny});
        const ViewTable table = view_table(views, scene_keys.size, true, masks.size, true, maps.size);
        const auto clip = span<const double>(limits, "limits", {table.size});
        const Cameras all = cameras(K, R, t, table.size);
        const auto xyz = span<float>(out_xyz, "out_xyz", {table.size, kAny, 3});
        const auto counts = span<int64_t>(out_counts, "out_counts", {table.size});
        const int64_t count = xyz.shape(1);
        py::gil_scoped_release release;
        parallel_for(threads, table.size, [&](int64_t v) {
          const ViewRow& view = table[v];
          const uint16_t* map = maps.data + view.depth;
          const Camera camera = depth_camera(all[v], view);
          const uint64_t key = stream_key(seed, uint64_t(scene_keys[view.scene]), kDepthPixels + uint64_t(view.index));
          const auto chosen = choose(Candidates(view, map, masks.data + view.labels), count, key);
          float* point = xyz.data + v * count * 3;
          for (const Candidate& c : chosen) {
            unproject(camera, c.pixel / view.depth_width, c.pixel % view.depth_width, double(map[c.pixel]), clip[v], point);
            point += 3;
          }
          std::fill(point, xyz.data + (v + 1) * count * 3, 0.0f);
          counts[v] = int64_t(chosen.size());
        });
      },
      py::arg("depth"), py::arg("mask"), py::arg("limits"), py::arg("views"), py::arg("K"), py::arg("R"), py::arg("t"),
      py::arg("keys"), py::arg("seed"), py::arg("out_xyz"), py::arg("out_counts"), py::arg("threads"));
}

}  // namespace wireframe
