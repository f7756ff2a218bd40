// Vertex merging by single linkage (wireframe/merging.py), with the reference's sums in the reference's order.
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "buffers.h"

namespace wireframe {
namespace {

// Squares and sums of coordinates below this stay finite; wireframe.merging.MAX_COORDINATE.
constexpr double kMaxCoordinate = 1e150;

struct Vertex {
  double x, y, z;
  int64_t index;
};

// Sets of vertices; the root of a set is its smallest member.
class Sets {
 public:
  void reset(int64_t count) {
    parent_.resize(size_t(count));
    for (int64_t i = 0; i < count; ++i) parent_[size_t(i)] = i;
  }

  int64_t root(int64_t i) {
    while (parent_[size_t(i)] != i) {
      parent_[size_t(i)] = parent_[size_t(parent_[size_t(i)])];
      i = parent_[size_t(i)];
    }
    return i;
  }

  void join(int64_t a, int64_t b) {
    a = root(a), b = root(b);
    parent_[size_t(std::max(a, b))] = std::min(a, b);
  }

 private:
  std::vector<int64_t> parent_;
};

class Merger {
 public:
  explicit Merger(const Span<const double>& vertices) : xyz_(vertices.data, vertices.data + vertices.size) {
    count_ = vertices.shape(0);
    label_.resize(size_t(count_));
    cluster_.resize(size_t(count_));
    for (int64_t i = 0; i < count_; ++i) cluster_[size_t(i)] = i;
  }

  // Links vertices at most `radius` apart and replaces each cluster by its mean.
  void pass(double radius) {
    link(radius * radius);
    const int64_t clusters = number_clusters();
    if (clusters == count_) return;
    average(clusters);
    for (int64_t& cluster : cluster_) cluster = label_[size_t(cluster)];
    count_ = clusters;
  }

  int64_t count() const { return count_; }
  const std::vector<double>& xyz() const { return xyz_; }
  // The cluster of a vertex of the input.
  int64_t cluster(int64_t vertex) const { return cluster_[size_t(vertex)]; }

 private:
  void link(double limit) {
    sets_.reset(count_);
    sorted_.resize(size_t(count_));
    for (int64_t i = 0; i < count_; ++i) {
      const double* v = xyz_.data() + 3 * i;
      sorted_[size_t(i)] = {v[0], v[1], v[2], i};
    }
    std::sort(sorted_.begin(), sorted_.end(), [](const Vertex& a, const Vertex& b) { return a.x < b.x; });
    for (auto a = sorted_.begin(); a != sorted_.end(); ++a) {
      for (auto b = a + 1; b != sorted_.end(); ++b) {
        const double dx = b->x - a->x;
        // Rounding is monotone: neither a larger dx nor adding squares can bring the distance back within the limit.
        if (dx * dx > limit) break;
        const double dy = b->y - a->y, dz = b->z - a->z;
        if ((dx * dx + dy * dy) + dz * dz <= limit) sets_.join(a->index, b->index);
      }
    }
  }

  // Clusters count in the order of their first vertex.
  int64_t number_clusters() {
    int64_t clusters = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t root = sets_.root(i);
      label_[size_t(i)] = root == i ? clusters++ : label_[size_t(root)];
    }
    return clusters;
  }

  void average(int64_t clusters) {
    sums_.assign(size_t(3 * clusters), 0.0);
    sizes_.assign(size_t(clusters), 0);
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t label = label_[size_t(i)];
      for (int64_t axis = 0; axis < 3; ++axis) sums_[size_t(3 * label + axis)] += xyz_[size_t(3 * i + axis)];
      ++sizes_[size_t(label)];
    }
    for (size_t i = 0; i < sums_.size(); ++i) sums_[i] /= double(sizes_[i / 3]);
    xyz_.swap(sums_);
  }

  int64_t count_;
  std::vector<double> xyz_, sums_;
  std::vector<int64_t> label_, cluster_, sizes_;
  std::vector<Vertex> sorted_;
  Sets sets_;
};

void check(const Span<const double>& vertices, const Span<const int64_t>& edges) {
  for (int64_t i = 0; i < vertices.size; ++i) {
    // Written so that NaN is refused.
    if (!(std::fabs(vertices[i]) <= kMaxCoordinate)) {
      throw std::invalid_argument("vertices must be finite and at most 1e150 in size");
    }
  }
  for (int64_t i = 0; i < edges.size; ++i) {
    if (edges[i] < 0 || edges[i] >= vertices.shape(0)) throw std::invalid_argument("edges must name vertices");
  }
}

// i < j, ascending, each once.
std::vector<std::pair<int64_t, int64_t>> merged_edges(const Span<const int64_t>& edges, const Merger& merger) {
  std::vector<std::pair<int64_t, int64_t>> kept;
  for (int64_t i = 0; i < edges.size; i += 2) {
    const auto edge = std::minmax({merger.cluster(edges[i]), merger.cluster(edges[i + 1])});
    if (edge.first != edge.second) kept.push_back(edge);
  }
  std::sort(kept.begin(), kept.end());
  kept.erase(std::unique(kept.begin(), kept.end()), kept.end());
  return kept;
}

std::pair<int64_t, int64_t> merge_vertices(const py::object& vertices_object, const py::object& edges_object,
                                           const std::vector<double>& thresholds,
                                           const py::object& out_vertices_object,
                                           const py::object& out_edges_object) {
  const auto vertices = span<const double>(vertices_object, "vertices", {kAny, 3});
  const auto edges = span<const int64_t>(edges_object, "edges", {kAny, 2});
  const auto out_vertices = span<double>(out_vertices_object, "out_vertices", {vertices.shape(0), 3});
  const auto out_edges = span<int64_t>(out_edges_object, "out_edges", {edges.shape(0), 2});
  py::gil_scoped_release release;
  check(vertices, edges);
  Merger merger(vertices);
  for (double radius : thresholds) merger.pass(radius);
  const auto kept = merged_edges(edges, merger);
  std::copy(merger.xyz().begin(), merger.xyz().end(), out_vertices.data);
  for (size_t i = 0; i < kept.size(); ++i) {
    out_edges.data[2 * i] = kept[i].first, out_edges.data[2 * i + 1] = kept[i].second;
  }
  return {merger.count(), int64_t(kept.size())};
}

}  // namespace

void bind_merge(py::module_& module) {
  module.def("merge_vertices", &merge_vertices, py::arg("vertices"), py::arg("edges"), py::arg("thresholds"),
             py::arg("out_vertices"), py::arg("out_edges"),
             "Fills the fronts of out_vertices and out_edges; the numbers of vertices and edges.");
}

}  // namespace wireframe
