// The rank of every kept point among those of its scene: what keys its random numbers.
#pragma once

#include "batch.cuh"

namespace wireframe {

constexpr int kColmap = 0;  // source; anything else is depth

struct Points {
  const int64_t* offsets;  // [B + 1]
  int64_t count;           // P
  const uint8_t* source;   // [P]
  const bool* keep;        // [P]

  __device__ Segment scene(int64_t b) const { return segment_of(offsets, b, count); }
};

struct Kept {
  int total, depth;
};

struct RankWork {
  int* ranks;        // [P], -1 where not kept
  Kept* kept;        // [B]
  int* part_totals;  // [B, parts]
  int* part_depths;  // [B, parts]

  RankWork(Workspace& workspace, int64_t points, int64_t scenes, int parts) {
    ranks = workspace.take<int>(points);
    kept = workspace.take<Kept>(scenes);
    part_totals = workspace.take<int>(scenes * parts);
    part_depths = workspace.take<int>(scenes * parts);
  }
};

// Fills ranks and kept; two launches.
void find_ranks(const Launcher& launch, const Points& points, const RankWork& work, int64_t scenes, int parts);

}  // namespace wireframe
