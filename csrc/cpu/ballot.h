// The vote of the views for chunks of points: one view at a time, in loops that vectors can run.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../point_math.h"

#if defined(__x86_64__) && defined(__GNUC__)
// No FMA, which rounds otherwise: the target names avx2 alone.
#define WIREFRAME_AVX2 __attribute__((target("avx2")))
#endif

namespace wireframe {

constexpr int64_t kPointsPerChunk = 1024;

// Where a chunk of points is seen in one view. `wide`: by instructions that not every processor of the kind has.
class Sight {
 public:
  Sight(const float* xyz, int64_t size, bool wide) : size_(size), wide_(wide) {
    for (int64_t i = 0; i < size; ++i) x_[i] = xyz[3 * i], y_[i] = xyz[3 * i + 1], z_[i] = xyz[3 * i + 2];
  }

  static bool can_be_wide() {
#ifdef WIREFRAME_AVX2
    return __builtin_cpu_supports("avx2");
#else
    return false;
#endif
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

// What PointVotes::add makes of a pixel, by two look-ups. The low half of the gestalt's code is the vote for behind:
// kNoVote outside the house, kUnnamed for a class that cannot be voted for. Or-ed, both codes hold the gestalt class in
// the low half and the occluder in the high one, all ones where it has no vote: the visible vote is their conjunction.
struct VoteCodes {
  static constexpr int16_t kNoVote = -1, kUnnamed = -2;

  uint32_t gestalt[256], ade[256];

  explicit VoteCodes(const LabelTables& tables) {
    for (int id = 0; id < 256; ++id) {
      const int role = tables.ade_role(id);
      const int behind = !tables.in_house(id) ? kNoVote : tables.named(id) ? id : kUnnamed;
      gestalt[id] = code(behind, tables.in_house(id) ? 0 : -1);
      ade[id] = code(role == 1 ? 0 : -1, role == 2 ? kAdeOffset + id : -1);
    }
  }

  static uint32_t code(int low, int high) { return uint32_t(uint16_t(low)) | uint32_t(uint16_t(high)) << 16; }
};

// The votes of up to kFewViews views for a chunk of points: PointVotes and decide() with a row of numbers per view in
// place of a tally per point. A visible vote below 0 is none.
class Ballot {
 public:
  // So many that count and vote fit into one int16.
  static constexpr int64_t kFewViews = 63;

  Ballot(int64_t points, int64_t views)
      : points_(points), views_(views), visible_(size_t(points * views)), behind_(visible_.size()) {}

  void cast(int64_t v, const Sight& sight, const ViewRow& view, const uint8_t* ade, const uint8_t* gestalt,
            const VoteCodes& codes) {
    int16_t *visible = &visible_[size_t(v * points_)], *behind = &behind_[size_t(v * points_)];
    for (int64_t i = 0; i < points_; ++i) {
      const int64_t at = sight.label(i, view.width);
      const uint32_t seen = codes.gestalt[gestalt[at]] | uint32_t(sight.outside(i)), both = seen | codes.ade[ade[at]];
      behind[i] = int16_t(seen);
      visible[i] = int16_t(both & (both >> 16));
    }
  }

  // body(point, its label)
  template <class Body>
  void decide_all(const Body& body) const {
    int16_t visible[kPointsPerChunk], behind[kPointsPerChunk], support[kPointsPerChunk], voted[kPointsPerChunk];
    winners(visible_, visible);
    winners(behind_, behind);
    std::fill_n(support, points_, int16_t(0));
    std::fill_n(voted, points_, int16_t(0));
    for (int64_t v = 0; v < views_; ++v) {
      const int16_t *seen = &visible_[size_t(v * points_)], *hidden = &behind_[size_t(v * points_)];
      for (int64_t i = 0; i < points_; ++i) {
        voted[i] = int16_t(voted[i] + (seen[i] >= 0));
        support[i] = int16_t(support[i] + (hidden[i] != VoteCodes::kNoVote));
      }
    }
    for (int64_t i = 0; i < points_; ++i) {
      const int agree = visible[i] < 0 ? 0 : visible[i] >> 9;
      body(i, point_label(vote_of(visible[i]), agree, vote_of(behind[i]), support[i], voted[i]));
    }
  }

 private:
  static int vote_of(int16_t score) { return score < 0 ? -1 : 511 - (score & 511); }

  // The most frequent vote of each point, ties to the smallest, as 512 count + 511 - vote; below 0 without votes.
  void winners(const std::vector<int16_t>& votes, int16_t* best) const {
    std::fill_n(best, points_, int16_t(-1));
    int16_t count[kPointsPerChunk];
    for (int64_t v = 0; v < views_; ++v) {
      const int16_t* mine = &votes[size_t(v * points_)];
      std::fill_n(count, points_, int16_t(1));
      // The last view that casts a vote counts all of its kind.
      for (int64_t w = 0; w < v; ++w) {
        const int16_t* other = &votes[size_t(w * points_)];
        for (int64_t i = 0; i < points_; ++i) count[i] = int16_t(count[i] + (mine[i] == other[i]));
      }
      for (int64_t i = 0; i < points_; ++i) {
        const int16_t score = int16_t((512 * count[i] + 511 - mine[i]) | (mine[i] >> 15));
        best[i] = best[i] > score ? best[i] : score;
      }
    }
  }

  int64_t points_, views_;
  std::vector<int16_t> visible_, behind_;
};

#undef WIREFRAME_AVX2

}  // namespace wireframe
