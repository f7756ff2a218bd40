// Counts of the kept points by parts of a scene, then their ranks.
#include "ranks.cuh"

#include "block.cuh"

namespace wireframe {
namespace {

__global__ void __launch_bounds__(kThreads) kept_count_kernel(Points points, RankWork work, int parts) {
  const Segment scene = points.scene(blockIdx.x / unsigned(parts));
  const Range range = piece_of(scene.size, int(blockIdx.x % unsigned(parts)), parts);
  int total = 0, depth = 0;
  for (int i = range.begin + int(threadIdx.x); i < range.end; i += kThreads) {
    if (!points.keep[scene.begin + i]) continue;
    ++total;
    depth += points.source[scene.begin + i] != kColmap;
  }
  total = block_scan<kThreads>(total).total;
  depth = block_scan<kThreads>(depth).total;
  if (threadIdx.x == 0) work.part_totals[blockIdx.x] = total, work.part_depths[blockIdx.x] = depth;
}

__global__ void __launch_bounds__(kThreads) kept_rank_kernel(Points points, RankWork work, int parts) {
  const int64_t b = blockIdx.x / unsigned(parts);
  const int part = int(blockIdx.x % unsigned(parts));
  const Segment scene = points.scene(b);
  const Scan kept = sum_of_parts<kThreads>(work.part_totals + b * parts, part, parts);
  const Scan depth = sum_of_parts<kThreads>(work.part_depths + b * parts, part, parts);
  if (part == 0 && threadIdx.x == 0) work.kept[b] = {kept.total, depth.total};
  // Neighbouring points go to one thread: their ranks follow one another.
  const Range range = piece_of(scene.size, part, parts);
  const Range own = piece_of(range.end - range.begin, int(threadIdx.x), kThreads);
  const int64_t first = scene.begin + range.begin;
  int count = 0;
  for (int i = own.begin; i < own.end; ++i) count += points.keep[first + i];
  int rank = kept.before + block_scan<kThreads>(count).before;
  for (int i = own.begin; i < own.end; ++i) work.ranks[first + i] = points.keep[first + i] ? rank++ : -1;
}

}  // namespace

void find_ranks(const Launcher& launch, const Points& points, const RankWork& work, int64_t scenes, int parts) {
  launch(kept_count_kernel, scenes * parts, kThreads, points, work, parts);
  launch(kept_rank_kernel, scenes * parts, kThreads, points, work, parts);
}

}  // namespace wireframe
