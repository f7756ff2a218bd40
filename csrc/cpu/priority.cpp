// The priority sample of a cloud (reference: wireframe/priority.py).
#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <vector>

#include "hash_bounds.h"
#include "pool.h"
#include "ranks.h"
#include "view_table.h"

namespace wireframe {
namespace {

struct Choice {
  int tier;
  uint64_t hash;
  int64_t point;

  bool operator<(const Choice& other) const { return tier != other.tier ? tier < other.tier : hash < other.hash; }
};

// The tier in which the `take` first points of a source end, and a hash that those taken of it hardly ever exceed.
struct Cutoff {
  int tier = std::numeric_limits<int>::min();
  uint64_t hash = 0;

  bool admits(const Choice& choice) const {
    return choice.tier < tier || (choice.tier == tier && choice.hash <= hash);
  }
};

// Points of one source in each tier (an int8, from -128).
using TierCounts = std::array<int64_t, 256>;

Cutoff cutoff_of(const TierCounts& counts, int64_t take) {
  Cutoff cutoff;
  for (int tier = -128; take > 0; ++tier) {
    const int64_t n = counts[size_t(tier + 128)];
    cutoff = {tier, take < n ? hash_bounds(take, n).high : kEverything};
    take -= n;
  }
  return cutoff;
}

// Appends the `take` first points of a source by (tier, hash).
void append_first(std::vector<Choice>& points, int64_t take, std::vector<int64_t>& chosen) {
  const auto end = points.begin() + take;
  if (take > 0 && take < int64_t(points.size())) std::nth_element(points.begin(), end - 1, points.end());
  std::sort(points.begin(), end);
  for (auto point = points.begin(); point != end; ++point) chosen.push_back(point->point);
}

std::vector<int64_t> first_by_priority(const Points& points, const int8_t* group, uint64_t key, int64_t num_points) {
  std::array<TierCounts, 2> counts{};
  points.for_kept([&](int64_t p, uint64_t) { ++counts[points.source[p]][size_t(group[p] + 128)]; });
  const auto total = [](const TierCounts& tiers) { return std::accumulate(tiers.begin(), tiers.end(), int64_t(0)); };
  const Quotas quota = quotas(total(counts[0]), total(counts[1]), num_points);
  const std::array<int64_t, 2> take = {quota.colmap, quota.depth};
  std::array<Cutoff, 2> cutoffs = {cutoff_of(counts[0], take[0]), cutoff_of(counts[1], take[1])};
  std::array<std::vector<Choice>, 2> candidates;
  for (bool enough = false; !enough;) {
    for (auto& of_source : candidates) of_source.clear();
    points.for_kept([&](int64_t p, uint64_t rank) {
      const uint8_t source = points.source[p];
      if (group[p] > cutoffs[source].tier) return;
      const Choice choice = {group[p], hash64(key, rank), p};
      if (cutoffs[source].admits(choice)) candidates[source].push_back(choice);
    });
    enough = true;
    for (size_t source = 0; source < 2; ++source) {
      if (int64_t(candidates[source].size()) < take[source]) enough = false, cutoffs[source].hash = kEverything;
    }
  }
  std::vector<int64_t> chosen;
  for (size_t source = 0; source < 2; ++source) append_first(candidates[source], take[source], chosen);
  return chosen;
}

}  // namespace

void bind_priority(py::module_& module) {
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
          const Points points = {sources.data, kept.data, bounds[b], bounds[b + 1]};
          const auto chosen = first_by_priority(points, group.data, key, num_points);
          int64_t* out = std::copy(chosen.begin(), chosen.end(), index.data + b * num_points);
          std::fill(out, index.data + (b + 1) * num_points, chosen.empty() ? -1 : chosen.back());
          count[b] = int64_t(chosen.size());
        });
      },
      py::arg("source"), py::arg("group_id"), py::arg("keep"), py::arg("offsets"), py::arg("keys"), py::arg("seed"),
      py::arg("out_index"), py::arg("out_count"), py::arg("threads"));
}

}  // namespace wireframe
