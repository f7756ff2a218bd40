// Farthest point sampling, exact: every step takes the point with the largest distance to those taken before it.
//
// The points lie in the leaves of a tree of boxes. A newly taken point can change a leaf only where its distance to
// the leaf's box is below the largest distance kept in the leaf. That test loses nothing to rounding: both distances
// are the same expression and its operations round monotonically, so the distance to a box as computed never exceeds
// the distance to a point in the box as computed. (Buckets in a tree: Han et al., QuickFPS, IEEE TCAD 2023.)
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "avx2.h"
#include "buffers.h"

#ifdef WIREFRAME_AVX2
#include <immintrin.h>
#endif

namespace wireframe {
namespace {

constexpr int64_t kLeaf = 128;  // a leaf holds at most so many points
constexpr int64_t kLanes = 4;   // a leaf repeats its last point up to a multiple of it
constexpr int64_t kFan = 8;     // children of a node
constexpr int64_t kFew = 31;    // points whose median splits a range
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Point {
  float x[3];
  uint32_t index;
};

// kFan boxes, and of the points in each the largest distance and the lowest index that has it.
struct alignas(32) Node {
  double farthest[kFan];
  int64_t index[kFan];
  float low[3][kFan];
  float high[3][kFan];
};

struct Leaf {
  int64_t begin, size;
};

// Child c of node i of a level is node (or leaf) i * kFan + c of the level below.
struct Tree {
  std::vector<Leaf> leaves;
  std::vector<std::vector<Node>> levels;  // levels[0] holds the boxes of the leaves, the last level is one node
  std::vector<float> x, y, z;             // in the order of the leaves, by index within a leaf
  std::vector<double> distance;           // squared, to the nearest point taken
  std::vector<uint32_t> index;
};

// ---- Building ----

// By coordinate, ties by index: a strict order of all points, equal ones too. No branches to mispredict.
struct Along {
  int axis;
  bool operator()(const Point& a, const Point& b) const {
    return (a.x[axis] < b.x[axis]) | ((a.x[axis] == b.x[axis]) & (a.index < b.index));
  }
};

int widest_axis(const Point* points, int64_t n) {
  double extent[3];
  for (int a = 0; a < 3; ++a) {
    float low = points[0].x[a], high = low;
    for (int64_t i = 1; i < n; ++i) {
      low = points[i].x[a] < low ? points[i].x[a] : low;
      high = points[i].x[a] > high ? points[i].x[a] : high;
    }
    extent[a] = double(high) - double(low);
  }
  return int(std::max_element(extent, extent + 3) - extent);
}

// Moves the points below `pivot` to the front, both sides in their old order; returns how many there are.
int64_t partition(Point* points, int64_t n, Point* scratch, const Along& along, const Point pivot) {
  int64_t below = 0, rest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Point point = points[i];
    const bool is_below = along(point, pivot);
    points[below] = point;
    scratch[rest] = point;
    below += is_below;
    rest += !is_below;
  }
  std::copy(scratch, scratch + rest, points + below);
  return below;
}

struct Splitter {
  std::vector<Point>& points;
  std::vector<Point> scratch;
  std::vector<Leaf>& leaves;

  // Cuts points [begin, begin + n) into leaves. As a rule the median of a few points splits well; where it did not,
  // the next split takes the true median, so the depth is logarithmic whatever the points.
  void split(int64_t begin, int64_t n, bool by_true_median) {
    if (n <= kLeaf) {
      leaves.push_back({begin, n});
      return;
    }
    Point* range = points.data() + begin;
    Point few[kFew];
    Along along;
    Point pivot;
    if (by_true_median) {
      along.axis = widest_axis(range, n);
      std::copy(range, range + n, scratch.begin());
      std::nth_element(scratch.begin(), scratch.begin() + n / 2, scratch.begin() + n, along);
      pivot = scratch[size_t(n / 2)];
    } else {
      for (int64_t i = 0; i < kFew; ++i) few[i] = range[i * n / kFew];
      along.axis = widest_axis(few, kFew);
      std::nth_element(few, few + kFew / 2, few + kFew, along);
      pivot = few[kFew / 2];
    }
    const int64_t below = partition(range, n, scratch.data(), along, pivot);
    const bool lopsided = std::min(below, n - below) < n / 8;
    split(begin, below, lopsided);
    split(begin + below, n - below, lopsided);
  }
};

struct Box {
  float low[3], high[3];

  void include(const float* l, const float* h) {
    for (int a = 0; a < 3; ++a) low[a] = std::min(low[a], l[a]), high[a] = std::max(high[a], h[a]);
  }
};

constexpr float kFar = std::numeric_limits<float>::infinity();
constexpr Box kNothing = {{kFar, kFar, kFar}, {-kFar, -kFar, -kFar}};

// A level whose nodes have the given children. The places that no child fills are never entered nor taken.
std::vector<Node> level_of(const std::vector<Box>& children) {
  Node empty = {};
  for (int64_t c = 0; c < kFan; ++c) empty.farthest[c] = -1.0, empty.index[c] = std::numeric_limits<int64_t>::max();
  std::vector<Node> level((children.size() + kFan - 1) / kFan, empty);
  for (size_t i = 0; i < children.size(); ++i) {
    Node& node = level[i / kFan];
    const size_t c = i % kFan;
    for (int a = 0; a < 3; ++a) node.low[a][c] = children[i].low[a], node.high[a][c] = children[i].high[a];
    node.farthest[c] = kInfinity;
  }
  return level;
}

// Copies the points out of their records, and returns the boxes of the leaves.
std::vector<Box> fill_leaves(Tree& tree, const std::vector<Point>& points) {
  int64_t room = 0;
  for (const Leaf& leaf : tree.leaves) room += (leaf.size + kLanes - 1) / kLanes * kLanes;
  const size_t n = size_t(room);
  tree.x.resize(n), tree.y.resize(n), tree.z.resize(n), tree.index.resize(n);
  tree.distance.assign(n, kInfinity);
  std::vector<Box> boxes;
  size_t to = 0;
  for (Leaf& leaf : tree.leaves) {
    const Leaf padded = {int64_t(to), (leaf.size + kLanes - 1) / kLanes * kLanes};
    Box box = kNothing;
    for (int64_t i = 0; i < padded.size; ++i, ++to) {
      const Point& point = points[size_t(leaf.begin + std::min(i, leaf.size - 1))];
      tree.x[to] = point.x[0], tree.y[to] = point.x[1], tree.z[to] = point.x[2], tree.index[to] = point.index;
      box.include(point.x, point.x);
    }
    boxes.push_back(box);
    leaf = padded;
  }
  return boxes;
}

Tree build(const float* xyz, int64_t n) {
  std::vector<Point> points(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) points[size_t(i)] = {{xyz[3 * i], xyz[3 * i + 1], xyz[3 * i + 2]}, uint32_t(i)};
  Tree tree;
  Splitter{points, std::vector<Point>(points.size()), tree.leaves}.split(0, n, false);
  std::vector<Box> boxes = fill_leaves(tree, points);
  tree.levels.push_back(level_of(boxes));
  while (tree.levels.back().size() > 1) {
    std::vector<Box> merged(tree.levels.back().size(), kNothing);
    for (size_t i = 0; i < boxes.size(); ++i) merged[i / kFan].include(boxes[i].low, boxes[i].high);
    boxes = std::move(merged);
    tree.levels.push_back(level_of(boxes));
  }
  return tree;
}

// ---- Sampling ----

struct Farthest {
  double distance;
  int64_t index;

  // Ties to the lower index.
  void consider(double d, int64_t i) {
    const bool better = (d > distance) | ((d == distance) & (i < index));
    distance = better ? d : distance;
    index = better ? i : index;
  }
};

Farthest farthest_of(const Node& node) {
  Farthest far = {node.farthest[0], node.index[0]};
  for (int64_t c = 1; c < kFan; ++c) far.consider(node.farthest[c], node.index[c]);
  return far;
}

struct Portable {
  // Takes point s into the distances of a leaf.
  static Farthest take(Tree& tree, const Leaf& leaf, const double* s) {
    Farthest far = {-1.0, 0};
    for (size_t i = size_t(leaf.begin); i < size_t(leaf.begin + leaf.size); ++i) {
      const double dx = double(tree.x[i]) - s[0], dy = double(tree.y[i]) - s[1], dz = double(tree.z[i]) - s[2];
      const double d = (dx * dx + dy * dy) + dz * dz;
      const double nearest = d < tree.distance[i] ? d : tree.distance[i];
      tree.distance[i] = nearest;
      if (nearest > far.distance) far = {nearest, int64_t(i)};
    }
    return {far.distance, tree.index[size_t(far.index)]};
  }

  // Bit c: whether point s can change anything in child c.
  static unsigned reached(const Node& node, const double* s) {
    unsigned mask = 0;
    for (int c = 0; c < kFan; ++c) {
      double square[3];
      for (int a = 0; a < 3; ++a) {
        const double before = double(node.low[a][c]) - s[a], after = s[a] - double(node.high[a][c]);
        const double outside = std::max(std::max(before, after), 0.0);
        square[a] = outside * outside;
      }
      mask |= unsigned((square[0] + square[1]) + square[2] < node.farthest[c]) << c;
    }
    return mask;
  }
};

#ifdef WIREFRAME_AVX2
// The same operations on four doubles at once.
struct Avx2 {
  WIREFRAME_AVX2 static Farthest take(Tree& tree, const Leaf& leaf, const double* s) {
    const size_t begin = size_t(leaf.begin);
    const float *x = &tree.x[begin], *y = &tree.y[begin], *z = &tree.z[begin];
    double* distance = &tree.distance[begin];
    const __m256d sx = _mm256_set1_pd(s[0]), sy = _mm256_set1_pd(s[1]), sz = _mm256_set1_pd(s[2]);
    __m256d most = _mm256_set1_pd(-1.0);
    __m256i where = _mm256_setzero_si256(), at = _mm256_setr_epi64x(0, 1, 2, 3);
    for (int64_t i = 0; i < leaf.size; i += 4) {
      const __m256d dx = _mm256_sub_pd(_mm256_cvtps_pd(_mm_loadu_ps(x + i)), sx);
      const __m256d dy = _mm256_sub_pd(_mm256_cvtps_pd(_mm_loadu_ps(y + i)), sy);
      const __m256d dz = _mm256_sub_pd(_mm256_cvtps_pd(_mm_loadu_ps(z + i)), sz);
      const __m256d xy = _mm256_add_pd(_mm256_mul_pd(dx, dx), _mm256_mul_pd(dy, dy));
      const __m256d d = _mm256_add_pd(xy, _mm256_mul_pd(dz, dz));
      const __m256d nearest = _mm256_min_pd(d, _mm256_loadu_pd(distance + i));
      _mm256_storeu_pd(distance + i, nearest);
      const __m256d more = _mm256_cmp_pd(nearest, most, _CMP_GT_OQ);
      most = _mm256_max_pd(nearest, most);
      where = _mm256_blendv_epi8(where, at, _mm256_castpd_si256(more));
      at = _mm256_add_epi64(at, _mm256_set1_epi64x(4));
    }
    alignas(32) double lane_most[4];
    alignas(32) int64_t lane_where[4];
    _mm256_store_pd(lane_most, most);
    _mm256_store_si256(reinterpret_cast<__m256i*>(lane_where), where);
    // Positions in a leaf order as indices do.
    Farthest far = {lane_most[0], lane_where[0]};
    for (int lane = 1; lane < 4; ++lane) far.consider(lane_most[lane], lane_where[lane]);
    return {far.distance, tree.index[begin + size_t(far.index)]};
  }

  WIREFRAME_AVX2 static unsigned reached(const Node& node, const double* s) {
    unsigned mask = 0;
    for (int half = 0; half < kFan; half += 4) {
      __m256d square[3];
      for (int a = 0; a < 3; ++a) {
        const __m256d low = _mm256_cvtps_pd(_mm_load_ps(node.low[a] + half));
        const __m256d high = _mm256_cvtps_pd(_mm_load_ps(node.high[a] + half));
        const __m256d sa = _mm256_set1_pd(s[a]);
        const __m256d beyond = _mm256_max_pd(_mm256_sub_pd(low, sa), _mm256_sub_pd(sa, high));
        const __m256d outside = _mm256_max_pd(beyond, _mm256_setzero_pd());
        square[a] = _mm256_mul_pd(outside, outside);
      }
      const __m256d bound = _mm256_add_pd(_mm256_add_pd(square[0], square[1]), square[2]);
      const __m256d farthest = _mm256_load_pd(node.farthest + half);
      mask |= unsigned(_mm256_movemask_pd(_mm256_cmp_pd(bound, farthest, _CMP_LT_OQ))) << half;
    }
    return mask;
  }
};
#endif

template <class Ops>
class Sampler {
 public:
  explicit Sampler(Tree& tree) : tree_(tree), reach_(tree.levels.size() + 1), count_(tree.levels.size() + 1, 0) {
    for (size_t l = 0; l + 1 < reach_.size(); ++l) reach_[l].resize(tree.levels[l].size() * kFan);
    reach_.back() = {0};
    count_.back() = 1;
  }

  // Takes point s; the farthest of the points not taken, as long as its distance is positive.
  Farthest take(const double* s) {
    for (size_t l = tree_.levels.size(); l-- > 0;) descend(l, s);
    for (int64_t i = 0; i < count_[0]; ++i) {
      const int64_t leaf = reach_[0][size_t(i)];
      keep(0, leaf, Ops::take(tree_, tree_.leaves[size_t(leaf)], s));
    }
    for (size_t l = 1; l < tree_.levels.size(); ++l) {
      for (int64_t i = 0; i < count_[l]; ++i) {
        const int64_t node = reach_[l][size_t(i)];
        keep(l, node, farthest_of(tree_.levels[l - 1][size_t(node)]));
      }
    }
    return farthest_of(tree_.levels.back()[0]);
  }

 private:
  // The children of level l that s reaches, from the nodes it reaches.
  void descend(size_t l, const double* s) {
    int64_t n = 0;
    int64_t* list = reach_[l].data();
    for (int64_t i = 0; i < count_[l + 1]; ++i) {
      const int64_t node = reach_[l + 1][size_t(i)];
      const unsigned mask = Ops::reached(tree_.levels[l][size_t(node)], s);
      for (int c = 0; c < kFan; ++c) {
        list[n] = node * kFan + c;
        n += mask >> c & 1u;
      }
    }
    count_[l] = n;
  }

  void keep(size_t l, int64_t child, const Farthest& far) {
    Node& node = tree_.levels[l][size_t(child / kFan)];
    node.farthest[child % kFan] = far.distance;
    node.index[child % kFan] = far.index;
  }

  Tree& tree_;
  std::vector<std::vector<int64_t>> reach_;  // [l]: children of nodes of level l; the last: the top node
  std::vector<int64_t> count_;
};

// Fills out[0 .. count) beginning with `start`; count is at most n.
template <class Ops>
void sample(const float* xyz, int64_t n, int64_t start, int64_t count, int64_t* out) {
  out[0] = start;
  if (count == 1) return;
  Tree tree = build(xyz, n);
  Sampler<Ops> sampler(tree);
  for (int64_t k = 1; k < count; ++k) {
    const float* last = xyz + 3 * out[k - 1];
    const double s[3] = {last[0], last[1], last[2]};
    const Farthest far = sampler.take(s);
    if (far.distance > 0.0) {
      out[k] = far.index;
      continue;
    }
    // All that is left repeats a point taken: by index.
    std::vector<bool> taken(static_cast<size_t>(n));
    for (int64_t i = 0; i < k; ++i) taken[size_t(out[i])] = true;
    for (int64_t i = 0; k < count; ++i) {
      if (!taken[size_t(i)]) out[k++] = i;
    }
  }
}

void farthest_point_sample(const py::object& xyz_object, int64_t start, const py::object& out_object, bool vector) {
  const auto xyz = span<const float>(xyz_object, "xyz", {kAny, 3});
  const auto out = span<int64_t>(out_object, "out", {kAny});
  const int64_t n = xyz.shape(0);
  if (n > int64_t(std::numeric_limits<uint32_t>::max())) throw std::invalid_argument("xyz has over 2^32 - 1 points");
  if (out.size > n) throw std::invalid_argument("out is longer than xyz");
  if (out.size == 0) return;
  if (start < 0 || start >= n) throw std::invalid_argument("start is not the index of a point");
  py::gil_scoped_release released;
  bool finite = true;
  for (int64_t i = 0; i < xyz.size; ++i) finite &= std::isfinite(xyz[i]);
  if (!finite) throw std::invalid_argument("xyz must be finite");
#ifdef WIREFRAME_AVX2
  if (vector && has_avx2()) return sample<Avx2>(xyz.data, n, start, out.size, out.data);
#endif
  static_cast<void>(vector);
  sample<Portable>(xyz.data, n, start, out.size, out.data);
}

}  // namespace

void bind_farthest(py::module_& module) {
  module.def("farthest_point_sample", &farthest_point_sample, py::arg("xyz"), py::arg("start"), py::arg("out"),
             py::arg("vector") = true,
             "Fills out int64 [count] with the farthest point sample of xyz float32 [P, 3]; vector=False keeps to\n"
             "portable code, which gives the same indices.");
}

}  // namespace wireframe
