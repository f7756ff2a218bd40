// Centre and scale of a cloud (reference: wireframe/normalisation.py).
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "hash_bounds.h"
#include "pool.h"
#include "ranks.h"
#include "view_table.h"

namespace wireframe {
namespace {

// The value of rank k. A quickselect whose partition does not branch on the values, which cannot be predicted.
double ranked(const std::vector<double>& values, size_t k) {
  std::vector<double> buffer(values), spare(values.size());
  double *data = buffer.data(), *other = spare.data();
  size_t n = values.size();
  // More rounds than this, or values all alike, are for the library.
  for (int round = 0; n > 32 && round < 64; ++round) {
    const double a = data[n / 4], b = data[n / 2], c = data[3 * n / 4];
    const double pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
    size_t below = 0, above = 0;
    for (size_t i = 0; i < n; ++i) {
      const double value = data[i];
      data[below] = other[above] = value;
      below += value < pivot, above += !(value < pivot);
    }
    if (below == 0) break;
    n = k < below ? below : above;
    if (k >= below) k -= below, std::swap(data, other);
  }
  std::nth_element(data, data + k, data + n);
  return data[k];
}

// Mean of the two middle values, of the middle one twice for an odd count.
double median(const std::vector<double>& values) {
  const size_t half = values.size() / 2;
  const double high = ranked(values, half);
  if (values.size() % 2) return middle_of(high, high);
  size_t below = 0;
  double most = -std::numeric_limits<double>::infinity();
  for (double value : values) {
    below += value < high;
    most = std::max(most, value < high ? value : most);
  }
  return middle_of(below == half ? most : high, high);
}

double order_statistic(const std::vector<double>& values, double fraction) {
  return ranked(values, size_t(int64_t(fraction * double(values.size() - 1))));
}

using Cloud = std::array<std::vector<double>, 3>;

Cloud select(const Cloud& cloud, const std::vector<double>& distances, double limit) {
  Cloud near;
  for (size_t i = 0; i < distances.size(); ++i) {
    if (!(distances[i] <= limit)) continue;
    for (size_t axis = 0; axis < 3; ++axis) near[axis].push_back(cloud[axis][i]);
  }
  return near;
}

void centre_of_cloud(const Cloud& cloud, float* center, float* scale) {
  double middle[3], low[3], high[3];
  for (size_t axis = 0; axis < 3; ++axis) middle[axis] = median(cloud[axis]);
  std::vector<double> distances, deviations;
  for (size_t i = 0; i < cloud[0].size(); ++i) {
    const double point[3] = {cloud[0][i], cloud[1][i], cloud[2][i]};
    distances.push_back(distance(point, middle));
  }
  const double typical = median(distances);
  for (double d : distances) deviations.push_back(std::fabs(d - typical));
  const Cloud near = select(cloud, distances, typical + kMadFactor * median(deviations));
  for (size_t axis = 0; axis < 3; ++axis) {
    low[axis] = order_statistic(near[axis], kBoxLow);
    high[axis] = order_statistic(near[axis], kBoxHigh);
  }
  centre_of_box(low, high, center, scale);
}

// The reference points of a scene: its depth points, else all; those with the smallest hashes where there are too many.
Cloud reference_cloud(const Span<const float>& xyz, const Points& points, uint64_t key) {
  int64_t kept = 0, depth = 0;
  points.for_kept([&](int64_t p, uint64_t) { ++kept, depth += points.source[p]; });
  const int64_t n = depth > 0 ? depth : kept;
  std::vector<std::pair<uint64_t, int64_t>> chosen;
  const auto choose = [&](uint64_t bound) {
    chosen.clear();
    points.for_kept([&](int64_t p, uint64_t rank) {
      if (depth > 0 && points.source[p] == 0) return;
      const uint64_t hash = hash64(key, rank);
      if (hash <= bound) chosen.emplace_back(hash, p);
    });
  };
  if (n > kReferencePoints) choose(hash_bounds(kReferencePoints, n).high);
  if (int64_t(chosen.size()) < kReferencePoints) choose(kEverything);
  if (int64_t(chosen.size()) > kReferencePoints) {
    std::nth_element(chosen.begin(), chosen.begin() + kReferencePoints - 1, chosen.end());
    chosen.resize(size_t(kReferencePoints));
  }
  Cloud cloud;
  for (const auto& [hash, p] : chosen) {
    for (size_t axis = 0; axis < 3; ++axis) cloud[axis].push_back(double(xyz[3 * p + int64_t(axis)]));
  }
  return cloud;
}

void check_kept(const Span<const float>& xyz, const Span<const bool>& keep) {
  // Most often all is finite, which vectors see faster.
  constexpr uint32_t exponent = 0x7F800000u;
  uint32_t special = 0;
  for (int64_t i = 0; i < xyz.size; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &xyz[i], sizeof bits);
    special |= uint32_t((bits & exponent) == exponent);
  }
  if (special == 0) return;
  for (int64_t p = 0; p < keep.size; ++p) {
    if (keep[p] && !(std::isfinite(xyz[3 * p]) && std::isfinite(xyz[3 * p + 1]) && std::isfinite(xyz[3 * p + 2]))) {
      throw std::invalid_argument("xyz: point " + std::to_string(p) + " is kept and not finite");
    }
  }
}

}  // namespace

void bind_centre(py::module_& module) {
  module.def(
      "centre_and_scale",
      [](const py::object& xyz, const py::object& source, const py::object& keep, const py::object& offsets,
         const py::object& keys, uint64_t seed, const py::object& out_center, const py::object& out_scale, int threads) {
        const auto points = span<const float>(xyz, "xyz", {kAny, 3});
        const auto sources = span<const uint8_t>(source, "source", {points.shape(0)});
        const auto kept = span<const bool>(keep, "keep", {points.shape(0)});
        const auto bounds = offsets_to(offsets, "offsets", points.shape(0));
        const int64_t scenes = bounds.size - 1;
        const auto scene_keys = span<const int64_t>(keys, "keys", {scenes});
        const auto center = span<float>(out_center, "out_center", {scenes, 3});
        const auto scale = span<float>(out_scale, "out_scale", {scenes});
        py::gil_scoped_release release;
        check_kept(points, kept);
        check_sources(sources);
        parallel_for(threads, scenes, [&](int64_t b) {
          const uint64_t key = stream_key(seed, uint64_t(scene_keys[b]), kCentreScale);
          const Cloud cloud = reference_cloud(points, {sources.data, kept.data, bounds[b], bounds[b + 1]}, key);
          float* out = center.data + 3 * b;
          if (!cloud[0].empty()) {
            centre_of_cloud(cloud, out, scale.data + b);
          } else {
            std::fill(out, out + 3, 0.0f);
            scale[b] = 1.0f;
          }
        });
      },
      py::arg("xyz"), py::arg("source"), py::arg("keep"), py::arg("offsets"), py::arg("keys"), py::arg("seed"),
      py::arg("out_center"), py::arg("out_scale"), py::arg("threads"));
}

}  // namespace wireframe
