// Centre, scale and priority sample of a cloud (references: wireframe/normalisation.py, priority.py).
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "pool.h"
#include "view_table.h"

namespace wireframe {
namespace {

// The kept points of one scene; rank = position among them, which keys their hashes.
std::vector<int64_t> kept_points(const Span<const bool>& keep, int64_t first, int64_t last) {
  std::vector<int64_t> kept;
  for (int64_t p = first; p < last; ++p) {
    if (keep[p]) kept.push_back(p);
  }
  return kept;
}

// Mean of the two middle values, of the middle one twice for an odd count.
double median(std::vector<double> values) {
  const auto high = values.begin() + std::ptrdiff_t(values.size() / 2);
  std::nth_element(values.begin(), high, values.end());
  const double low = values.size() % 2 ? *high : *std::max_element(values.begin(), high);
  return middle_of(low, *high);
}

double order_statistic(std::vector<double> values, double fraction) {
  const auto at = values.begin() + std::ptrdiff_t(int64_t(fraction * double(values.size() - 1)));
  std::nth_element(values.begin(), at, values.end());
  return *at;
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
Cloud reference_cloud(const Span<const float>& xyz, const Span<const uint8_t>& source, const std::vector<int64_t>& kept,
                      uint64_t key) {
  const bool any_depth = std::any_of(kept.begin(), kept.end(), [&](int64_t p) { return source[p] == 1; });
  std::vector<std::pair<uint64_t, int64_t>> chosen;
  for (size_t rank = 0; rank < kept.size(); ++rank) {
    if (!any_depth || source[kept[rank]] == 1) chosen.emplace_back(hash64(key, rank), kept[rank]);
  }
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

struct Choice {
  int tier;
  uint64_t hash;
  int64_t point;

  bool operator<(const Choice& other) const { return tier != other.tier ? tier < other.tier : hash < other.hash; }
};

// Appends the `take` first points of a source by (tier, hash).
void append_first(std::vector<Choice>& points, int64_t take, std::vector<int64_t>& chosen) {
  const auto end = points.begin() + take;
  if (take > 0 && take < int64_t(points.size())) std::nth_element(points.begin(), end - 1, points.end());
  std::sort(points.begin(), end);
  for (auto point = points.begin(); point != end; ++point) chosen.push_back(point->point);
}

std::vector<int64_t> first_by_priority(const Span<const uint8_t>& source, const Span<const int8_t>& group,
                                       const std::vector<int64_t>& kept, uint64_t key, int64_t num_points) {
  std::vector<Choice> colmap, depth;
  for (size_t rank = 0; rank < kept.size(); ++rank) {
    const int64_t p = kept[rank];
    (source[p] == 0 ? colmap : depth).push_back({group[p], hash64(key, rank), p});
  }
  const Quotas take = quotas(int64_t(colmap.size()), int64_t(depth.size()), num_points);
  std::vector<int64_t> chosen;
  append_first(colmap, take.colmap, chosen);
  append_first(depth, take.depth, chosen);
  return chosen;
}

void check_kept(const Span<const float>& xyz, const Span<const bool>& keep) {
  for (int64_t p = 0; p < keep.size; ++p) {
    if (keep[p] && !(std::isfinite(xyz[3 * p]) && std::isfinite(xyz[3 * p + 1]) && std::isfinite(xyz[3 * p + 2]))) {
      throw std::invalid_argument("xyz: point " + std::to_string(p) + " is kept and not finite");
    }
  }
}

void check_sources(const Span<const uint8_t>& source) {
  for (int64_t p = 0; p < source.size; ++p) {
    if (source[p] > 1) throw std::invalid_argument("source must be 0 (COLMAP) or 1 (depth), got " + std::to_string(source[p]));
  }
}

}  // namespace

void bind_sampling(py::module_& module) {
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
          const Cloud cloud = reference_cloud(points, sources, kept_points(kept, bounds[b], bounds[b + 1]), key);
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

  module.def(
      "priority_sample",
      [](const py::object& source, const py::object& group_id, const py::object& keep, const py::object& offsets,
         const py::object& keys, uint64_t seed, const py::object& out_index, const py::object& out_count, int threads) {
        const auto sources = span<const uint8_t>(source, "source", {kAny});
        const auto group = span<const int8_t>(group_id, "group_id", {sources.size});
        const auto kept = span<const bool>(keep, "keep", {sources.size});
        const auto bounds = offsets_to(offsets, "offsets", sources.size);
        const int64_t scenes = bounds.size - 1;
        const auto scene_keys = span<const int64_t>(keys, "keys", {scenes});
        const auto index = span<int64_t>(out_index, "out_index", {scenes, kAny});
        const auto count = span<int64_t>(out_count, "out_count", {scenes});
        const int64_t num_points = index.shape(1);
        py::gil_scoped_release release;
        check_sources(sources);
        parallel_for(threads, scenes, [&](int64_t b) {
          const uint64_t key = stream_key(seed, uint64_t(scene_keys[b]), kSampling);
          const auto chosen =
              first_by_priority(sources, group, kept_points(kept, bounds[b], bounds[b + 1]), key, num_points);
          int64_t* out = std::copy(chosen.begin(), chosen.end(), index.data + b * num_points);
          std::fill(out, index.data + (b + 1) * num_points, chosen.empty() ? -1 : chosen.back());
          count[b] = int64_t(chosen.size());
        });
      },
      py::arg("source"), py::arg("group_id"), py::arg("keep"), py::arg("offsets"), py::arg("keys"), py::arg("seed"),
      py::arg("out_index"), py::arg("out_count"), py::arg("threads"));
}

}  // namespace wireframe
