// What one point, pixel or hash needs, written once for the CPU and the GPU. (One exception: project().)
//
// Both compile this file without contraction (-ffp-contract=off, -fmad=false). The arithmetic is double, in the order
// written, with + - * / sqrt and rint alone; the NumPy reference (wireframe/depth.py, voting.py, normalisation.py) does
// the same operations in the same order, so all three give the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define WIREFRAME_HD __host__ __device__ __forceinline__
#else
#define WIREFRAME_HD inline
#endif

namespace wireframe {

// ---- Randomness: SplitMix64 at a position of a keyed stream (wireframe/hashing.py) ----

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;
constexpr uint64_t kDepthPixels = 1ull << 32;  // + the view's position in the raw row
constexpr uint64_t kSampling = 2ull << 32;
constexpr uint64_t kCentreScale = 3ull << 32;

WIREFRAME_HD uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

WIREFRAME_HD uint64_t stream_key(uint64_t seed, uint64_t scene, uint64_t stream) {
  uint64_t key = mix(seed + kGolden);
  key = mix((key ^ scene) + kGolden);
  return mix((key ^ stream) + kGolden);
}

// Injective in the index: two positions of one stream never tie.
WIREFRAME_HD uint64_t hash64(uint64_t key, uint64_t index) { return mix(key + (index + 1) * kGolden); }

// ---- Views ----

// A row of SceneBatch.views; every offset counts elements.
struct ViewRow {
  int64_t scene;         // position of the scene in the batch; rows are sorted by it
  int64_t index;         // position of the view in the raw row; keys its random stream
  int64_t height;        // of the label maps
  int64_t width;
  int64_t labels;        // where its ade and gestalt maps begin
  int64_t depth_height;  // 0 without a depth map
  int64_t depth_width;
  int64_t depth;         // where its depth map begins
};

// camera = R world + t; u = fx c0 / c2 + cx, v = fy c1 / c2 + cy; pixel centres are integers.
struct Camera {
  double fx, fy, cx, cy;
  double R[9], t[3];
};

WIREFRAME_HD Camera load_camera(const float* K, const float* R, const float* t) {
  Camera camera;
  camera.fx = K[0], camera.cx = K[2], camera.fy = K[4], camera.cy = K[5];
  for (int i = 0; i < 9; ++i) camera.R[i] = R[i];
  for (int i = 0; i < 3; ++i) camera.t[i] = t[i];
  return camera;
}

// Where a point is seen: column u, row v, distance c2 along the optical axis.
struct Projection {
  double u, v, depth;

  // Written so that NaN is outside.
  WIREFRAME_HD bool inside(int64_t height, int64_t width) const {
    return (depth > 1e-6) & (u >= 0.0) & (u < double(width)) & (v >= 0.0) & (v < double(height));
  }
};

WIREFRAME_HD Projection project_exactly(const Camera& camera, double x, double y, double z) {
  double c[3];
  for (int i = 0; i < 3; ++i) {
    const double* r = camera.R + 3 * i;
    c[i] = ((r[0] * x + r[1] * y) + r[2] * z) + camera.t[i];
  }
  return {camera.fx * (c[0] / c[2]) + camera.cx, camera.fy * (c[1] / c[2]) + camera.cy, c[2]};
}

struct Pixel {
  int64_t row, column;
  double depth;
  bool inside;
};

// The GPU's. On the CPU Sight (cpu/sight.h) finds the pixel in a way that vectors can run. Both are held to the
// reference: this by tests/test_cuda_emulation.py, that by tests/test_native_fusion.py.
WIREFRAME_HD Pixel project(const Camera& camera, double x, double y, double z, int64_t height, int64_t width) {
  const Projection seen = project_exactly(camera, x, y, z);
  Pixel pixel = {0, 0, seen.depth, seen.inside(height, width)};
  if (!pixel.inside) return pixel;
  pixel.column = int64_t(rint(seen.u));
  pixel.row = int64_t(rint(seen.v));
  // u just below the width rounds up to it.
  if (pixel.column > width - 1) pixel.column = width - 1;
  if (pixel.row > height - 1) pixel.row = height - 1;
  return pixel;
}

// ---- Depth ----

constexpr double kClipQuantile = 0.995;
constexpr double kMetresPerUnit = 0.001;

// Where the clip limit lies among n sorted positive depths: between the low-th and the next, t of the way.
struct ClipPosition {
  int64_t low, high;
  double t;
};

WIREFRAME_HD ClipPosition clip_position(int64_t n) {
  const double position = kClipQuantile * double(n - 1);
  ClipPosition at;
  at.low = int64_t(position);
  at.high = at.low + 1 < n - 1 ? at.low + 1 : n - 1;
  at.t = position - double(at.low);
  return at;
}

// NumPy interpolates from the nearer side, which fixes the last bit.
WIREFRAME_HD double clip_limit(double a, double b, double t) {
  return t >= 0.5 ? b - (b - a) * (1.0 - t) : a + (b - a) * t;
}

// The pixel of the label axis nearest to pixel i of a depth axis of another size.
WIREFRAME_HD int64_t nearest_label(int64_t i, int64_t size, int64_t label_size) {
  if (size == label_size) return i;
  const int64_t position = int64_t(rint(double(i) * double(label_size) / double(size)));
  return position < label_size - 1 ? position : label_size - 1;
}

// The camera of a depth map whose size differs from the label maps'.
WIREFRAME_HD Camera depth_camera(Camera camera, const ViewRow& view) {
  camera.fx = camera.fx * double(view.depth_width) / double(view.width);
  camera.cx = camera.cx * double(view.depth_width) / double(view.width);
  camera.fy = camera.fy * double(view.depth_height) / double(view.height);
  camera.cy = camera.cy * double(view.depth_height) / double(view.height);
  return camera;
}

WIREFRAME_HD void unproject(const Camera& camera, int64_t row, int64_t column, double millimetres, double limit,
                            float* world) {
  const double z = (millimetres < limit ? millimetres : limit) * kMetresPerUnit;
  const double d0 = (double(column) - camera.cx) * z / camera.fx - camera.t[0];
  const double d1 = (double(row) - camera.cy) * z / camera.fy - camera.t[1];
  const double d2 = z - camera.t[2];
  for (int i = 0; i < 3; ++i) {
    world[i] = float((camera.R[i] * d0 + camera.R[3 + i] * d1) + camera.R[6 + i] * d2);
  }
}

// ---- Votes ----

constexpr int kUnknown = 255;
constexpr int kAdeOffset = 256;  // a visible vote as one number that sorts by (source, id)

// wireframe.voting.LABEL_TABLES, uint8 [7, 256].
struct LabelTables {
  const uint8_t* data;
  WIREFRAME_HD bool in_house(int gestalt) const { return data[gestalt] != 0; }
  WIREFRAME_HD bool named(int gestalt) const { return data[256 + gestalt] != 0; }
  WIREFRAME_HD int ade_role(int ade) const { return data[512 + ade]; }  // 1 envelope, 2 occluder
  WIREFRAME_HD int tier(int gestalt) const { return data[768 + gestalt]; }
  WIREFRAME_HD int point_class(int gestalt) const { return data[1024 + gestalt]; }
  WIREFRAME_HD bool tier_3_ade(int ade) const { return data[1280 + ade] != 0; }
  WIREFRAME_HD bool excluded(int gestalt) const { return data[1536 + gestalt] != 0; }
};

// Distinct votes and their counts. The tables name 28 gestalt classes and 17 occluders, so 64 places suffice:
// the CPU's bindings refuse tables with more, CUDA's get wireframe.voting.LABEL_TABLES alone.
constexpr int kMaxDistinct = 64;

struct Tally {
  int16_t key[kMaxDistinct];
  uint16_t count[kMaxDistinct];
  int distinct = 0;

  WIREFRAME_HD void add(int vote) {
    for (int i = 0; i < distinct; ++i) {
      if (key[i] == vote) {
        ++count[i];
        return;
      }
    }
    if (distinct < kMaxDistinct) {
      key[distinct] = int16_t(vote);
      count[distinct++] = 1;
    }
  }

  // The most frequent vote (ties to the smallest), -1 without votes; agree = how many cast it.
  WIREFRAME_HD int winner(int* agree) const {
    int best = -1, most = 0;
    for (int i = 0; i < distinct; ++i) {
      if (count[i] > most || (count[i] == most && key[i] < best)) best = key[i], most = count[i];
    }
    *agree = most;
    return best;
  }
};

// The votes of all views for one point.
struct PointVotes {
  Tally visible, behind;
  int support = 0, voted = 0;

  WIREFRAME_HD void add(int ade, int gestalt, const LabelTables& tables) {
    if (!tables.in_house(gestalt)) return;
    ++support;
    const bool named = tables.named(gestalt);
    if (named) behind.add(gestalt);
    const int role = tables.ade_role(ade);
    // A colour outside the table supports the point but cannot name it.
    if (role == 1 && named) visible.add(gestalt), ++voted;
    if (role == 2) visible.add(kAdeOffset + ade), ++voted;
  }
};

struct PointLabel {
  uint8_t visible_src, support, n_views_voted;
  int16_t visible_id, behind;
  float vote_frac;
};

// From the most frequent visible vote (-1 = none), how many cast it, and the most frequent one of behind.
WIREFRAME_HD PointLabel point_label(int visible, int agree, int behind, int support, int voted) {
  PointLabel label;
  label.visible_src = uint8_t(visible < 0 ? 0 : visible < kAdeOffset ? 1 : 2);
  label.visible_id = int16_t(visible < kAdeOffset ? visible : visible - kAdeOffset);
  label.behind = int16_t(behind);
  label.support = uint8_t(support < 255 ? support : 255);
  label.n_views_voted = uint8_t(voted < 255 ? voted : 255);
  label.vote_frac = float(double(agree) / double(voted > 1 ? voted : 1));
  return label;
}

WIREFRAME_HD PointLabel decide(const PointVotes& votes) {
  int agree, ignored;
  const int visible = votes.visible.winner(&agree);
  return point_label(visible, agree, votes.behind.winner(&ignored), votes.support, votes.voted);
}

struct PointTier {
  int8_t group;
  uint8_t point_class;
};

constexpr int kOtherHousePart = 11;  // classes.POINT_CLASSES

WIREFRAME_HD PointTier tier_of(int visible_src, int visible_id, int behind, const LabelTables& tables) {
  const int visible = visible_src == 1 ? visible_id : -1;
  const int effective = visible >= 0 ? visible : behind;
  // The last entry of the tables is that of a point without a gestalt id.
  const int entry = effective >= 0 ? effective & 255 : kUnknown;
  PointTier tier = {int8_t(tables.tier(entry)), uint8_t(tables.point_class(entry))};
  if (effective < 0 && visible_src == 2 && visible_id >= 0 && tables.tier_3_ade(visible_id & 255)) {
    tier.group = 3, tier.point_class = uint8_t(kOtherHousePart);
  }
  if ((visible >= 0 && tables.excluded(visible & 255)) || (behind >= 0 && tables.excluded(behind & 255))) tier.group = -1;
  return tier;
}

// ---- Optional visibility test of the vote: the nearest point of each cell of 8 x 8 pixels hides what lies behind it ----

constexpr int kZBufferCell = 8;

WIREFRAME_HD int64_t zbuffer_size(int64_t height, int64_t width) {
  return ((height + kZBufferCell - 1) / kZBufferCell) * ((width + kZBufferCell - 1) / kZBufferCell);
}

WIREFRAME_HD int64_t zbuffer_cell(const Pixel& pixel, int64_t width) {
  return (pixel.row / kZBufferCell) * ((width + kZBufferCell - 1) / kZBufferCell) + pixel.column / kZBufferCell;
}

WIREFRAME_HD bool zbuffer_sees(double depth, double nearest, double tolerance) {
  return depth <= nearest * (1.0 + tolerance);
}

// ---- Centre and scale ----

constexpr int64_t kReferencePoints = 8000;
constexpr double kMadFactor = 2.5;
constexpr double kBoxLow = 0.025, kBoxHigh = 0.975;
constexpr double kMinScale = 1e-6;

WIREFRAME_HD double middle_of(double low, double high) { return (low + high) / 2.0; }

WIREFRAME_HD double distance(const double* a, const double* b) {
  const double d0 = a[0] - b[0], d1 = a[1] - b[1], d2 = a[2] - b[2];
  return sqrt((d0 * d0 + d1 * d1) + d2 * d2);
}

// low, high: the box between the percentiles. center [3], scale [1].
WIREFRAME_HD void centre_of_box(const double* low, const double* high, float* center, float* scale) {
  const double diagonal = distance(high, low);
  // Adding zero: which of -0 and +0 a sort leaves at the percentile is not defined.
  for (int i = 0; i < 3; ++i) center[i] = float((low[i] + high[i]) / 2.0 + 0.0);
  *scale = float(diagonal > kMinScale ? diagonal : kMinScale);
}

// ---- Priority sampling ----

// Quotas: what one source lacks goes to the other.
struct Quotas {
  int64_t colmap, depth;
};

WIREFRAME_HD Quotas quotas(int64_t colmap, int64_t depth, int64_t num_points) {
  const int64_t wanted = 3 * num_points / 4, room = num_points - depth;
  const int64_t first = wanted > room ? wanted : room;
  Quotas take;
  take.colmap = colmap < first ? colmap : first;
  const int64_t rest = num_points - take.colmap;
  take.depth = depth < rest ? depth : rest;
  return take;
}

}  // namespace wireframe
