// The vote of the views for chunks of points: one view at a time, in loops that vectors can run.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "sight.h"

namespace wireframe {

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

}  // namespace wireframe
