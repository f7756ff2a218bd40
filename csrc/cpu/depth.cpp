// Depth maps: the clip limit, the choice of pixels and their unprojection (reference: wireframe/depth.py).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "hash_bounds.h"
#include "pool.h"
#include "view_table.h"

namespace wireframe {
namespace {

// How many pixels have each depth, counted from `first` on alone.
struct Histogram {
  std::vector<uint32_t> counts = std::vector<uint32_t>(1 << 16);
  int64_t positive = 0, counted = 0;

  Histogram(const uint16_t* depth, int64_t size, uint16_t first) {
    constexpr int64_t step = 32;
    int64_t i = 0;
    for (; i + step <= size; i += step) {
      uint16_t nonzero = 0, in_tail = 0;
      for (int64_t j = i; j < i + step; ++j) {
        nonzero = uint16_t(nonzero + (depth[j] > 0)), in_tail = uint16_t(in_tail | (depth[j] >= first));
      }
      positive += nonzero;
      if (in_tail) count(depth + i, step);
    }
    for (int64_t j = i; j < size; ++j) positive += depth[j] > 0;
    count(depth + i, size - i);
    for (size_t value = first; value < counts.size(); ++value) counted += counts[value];
  }

 private:
  void count(const uint16_t* depth, int64_t size) {
    for (int64_t i = 0; i < size; ++i) ++counts[depth[i]];
  }
};

// A depth above which, going by every so many-th pixel, lies a small share of the positive ones; at least 1.
uint16_t start_of_tail(const uint16_t* depth, int64_t size) {
  constexpr int64_t samples = 4096, share = 64;
  uint32_t counts[256] = {}, positive = 0;
  for (int64_t i = 0; i < size; i += size / samples + 1) ++counts[depth[i] >> 8], positive += depth[i] > 0;
  uint32_t above = 0;
  for (int high = 255; high > 0; --high) {
    above += counts[high];
    if (above * share > positive) return uint16_t(high << 8);
  }
  return 1;
}

double limit_of(const uint16_t* depth, int64_t size) {
  uint16_t first = start_of_tail(depth, size);
  Histogram histogram(depth, size, first);
  const int64_t n = histogram.positive;
  if (n == 0) return 0.0;
  const ClipPosition at = clip_position(n);
  if (n - histogram.counted > at.low) first = 1, histogram = Histogram(depth, size, first);
  int64_t below = n - histogram.counted;
  double low = 0.0;
  bool found_low = false;
  for (size_t value = first;; ++value) {
    below += histogram.counts[value];
    if (!found_low && below > at.low) low = double(value), found_low = true;
    if (below > at.high) return clip_limit(low, double(value), at.t);
  }
}

struct Candidate {
  uint64_t hash;
  int32_t row, column;
};

// The candidate pixels of one view.
class Candidates {
 public:
  Candidates(const ViewRow& view, const uint16_t* depth, const bool* mask)
      : view_(view), depth_(depth), mask_(reinterpret_cast<const uint8_t*>(mask)), row_(size_t(padded_width())) {
    same_size_ = view.depth_height == view.height && view.depth_width == view.width;
    if (same_size_) return;
    for (int64_t x = 0; x < view.depth_width; ++x) columns_.push_back(nearest_label(x, view.depth_width, view.width));
  }

  int64_t count() {
    int64_t n = 0;
    for (int64_t y = 0; y < view_.depth_height; ++y) {
      mark_row(y);
      uint32_t in_row = 0;
      for (uint8_t mark : row_) in_row += mark;
      n += in_row;
    }
    return n;
  }

  // Those whose hash is at most `bound`, in row-major order; room is made for `expected`.
  std::vector<Candidate> below(uint64_t key, uint64_t bound, int64_t expected) {
    std::vector<Candidate> found(size_t(expected + padded_width()));
    size_t n = 0;
    for (int64_t y = 0; y < view_.depth_height; ++y) {
      mark_row(y);
      if (n + row_.size() > found.size()) found.resize(2 * found.size());
      n = below_in_row(y, key, bound, found.data(), n);
    }
    found.resize(n);
    return found;
  }

 private:
  // Pixels are looked at eight at a time: most eights hold no candidate, or candidates alone.
  static constexpr int64_t kStep = 8;

  int64_t padded_width() const { return (view_.depth_width + kStep - 1) / kStep * kStep; }

  // row_ = 1 where there is a candidate.
  void mark_row(int64_t y) {
    const uint16_t* depth = depth_ + y * view_.depth_width;
    const uint8_t* mask = mask_ + (same_size_ ? y : nearest_label(y, view_.depth_height, view_.height)) * view_.width;
    // Copies of what a uint8 written could be, for all the compiler knows.
    uint8_t* row = row_.data();
    const int64_t width = view_.depth_width;
    if (same_size_) {
      for (int64_t x = 0; x < width; ++x) row[x] = uint8_t(mask[x] != 0) & uint8_t(depth[x] > 0);
    } else {
      const int64_t* columns = columns_.data();
      for (int64_t x = 0; x < width; ++x) row[x] = uint8_t(mask[columns[x]] != 0) & uint8_t(depth[x] > 0);
    }
  }

  size_t below_in_row(int64_t y, uint64_t key, uint64_t bound, Candidate* found, size_t n) const {
    for (int64_t x = 0; x < view_.depth_width; x += kStep) {
      uint64_t marks;
      std::memcpy(&marks, &row_[size_t(x)], sizeof marks);
      if (marks == 0) continue;
      uint64_t hashes[kStep];
      for (int64_t i = 0; i < kStep; ++i) hashes[i] = hash64(key, uint64_t(y * view_.depth_width + x + i));
      for (int64_t i = 0; i < kStep; ++i) {
        found[n] = {hashes[i], int32_t(y), int32_t(x + i)};
        n += size_t(hashes[i] <= bound) & row_[size_t(x + i)];
      }
    }
    return n;
  }

  const ViewRow& view_;
  const uint16_t* depth_;
  const uint8_t* mask_;
  bool same_size_;
  std::vector<int64_t> columns_;
  std::vector<uint8_t> row_;
};

// The count-th smallest hash. Most of those at most `low` are passed over without ordering them.
uint64_t nth_hash(const std::vector<Candidate>& candidates, int64_t count, uint64_t low) {
  std::vector<uint64_t> hashes(candidates.size() + 1);
  size_t n = 0;
  for (const Candidate& c : candidates) {
    hashes[n] = c.hash;
    n += c.hash > low;
  }
  int64_t passed = int64_t(candidates.size() - n);
  if (passed >= count) {
    passed = 0, n = 0;
    for (const Candidate& c : candidates) hashes[n++] = c.hash;
  }
  const auto nth = hashes.begin() + (count - passed - 1);
  std::nth_element(hashes.begin(), nth, hashes.begin() + std::ptrdiff_t(n));
  return *nth;
}

// The `count` candidates with the smallest hashes, in row-major order.
std::vector<Candidate> choose(Candidates candidates, int64_t count, uint64_t key) {
  if (count == 0) return {};
  const int64_t n = candidates.count();
  if (n <= count) return candidates.below(key, kEverything, n);
  const HashBounds bounds = hash_bounds(count, n);
  std::vector<Candidate> found = candidates.below(key, bounds.high, count + count / 8);
  if (int64_t(found.size()) < count) found = candidates.below(key, kEverything, n);
  const uint64_t bound = nth_hash(found, count, bounds.low);
  const auto too_many = [&](const Candidate& c) { return c.hash > bound; };
  found.erase(std::remove_if(found.begin(), found.end(), too_many), found.end());
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
            const double millimetres = map[c.row * view.depth_width + c.column];
            unproject(camera, c.row, c.column, millimetres, clip[v], point);
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
