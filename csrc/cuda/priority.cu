// The priority sample of every scene (reference: wireframe/priority.py).
#include "block.cuh"
#include "fill.h"
#include "operations.h"
#include "ranks.cuh"
#include "select.cuh"

namespace wireframe {
namespace {

// The kept points by (tier, hash); segment 2 b holds the COLMAP points of scene b, segment 2 b + 1 its depth points.
struct PriorityKeys {
  static constexpr int kFirstPass = 0;

  Points points;
  const int8_t* group_id;
  const int* ranks;
  const Kept* kept;
  const int64_t* keys;
  uint64_t seed;
  int64_t num_points;

  struct Source {
    const int* ranks;
    const uint8_t* source;
    const int8_t* group_id;
    uint64_t stream;
    int64_t wanted;
    int64_t begin;
    int size;
    bool depth;

    __device__ bool key(int i, Key* key) const {
      if (ranks[i] < 0 || (source[i] != kColmap) != depth) return false;
      // The smallest int8 comes first.
      *key = {hash64(stream, uint64_t(ranks[i])), group_id[i] + 128};
      return true;
    }
  };

  __device__ Quotas take(int64_t b) const { return quotas(kept[b].total - kept[b].depth, kept[b].depth, num_points); }

  __device__ Source open(int64_t segment) const {
    const int64_t b = segment / 2;
    const bool depth = segment % 2 != 0;
    const Segment scene = points.scene(b);
    const uint64_t stream = stream_key(seed, uint64_t(keys[b]), kSampling);
    const int64_t wanted = depth ? take(b).depth : take(b).colmap;
    return {ranks + scene.begin, points.source + scene.begin, group_id + scene.begin, stream, wanted, scene.begin,
            scene.size, depth};
  }
};

// The chosen points of a scene, COLMAP first, the points of a source in any order.
struct Chosen {
  Key* keys;          // [B, num_points]
  int64_t* points;    // [B, num_points]
  unsigned* lengths;  // [B, 2]
};

__global__ void __launch_bounds__(kThreads)
    chosen_kernel(PriorityKeys keys, SelectWork work, int parts, Chosen chosen) {
  const int64_t segment = blockIdx.x / unsigned(parts), b = segment / 2;
  const PriorityKeys::Source points = keys.open(segment);
  const Cut cut = cut_before<PriorityKeys>(work, points.wanted, segment, kPasses, false);
  const Range range = piece_of(points.size, int(blockIdx.x % unsigned(parts)), parts);
  Key key;
  int count = 0;
  for (int i = range.begin + int(threadIdx.x); i < range.end; i += kThreads) {
    count += points.key(i, &key) && cut.chooses(key);
  }
  int64_t place = b * keys.num_points + (points.depth ? keys.take(b).colmap : 0);
  place += append<kThreads>(chosen.lengths + segment, count);
  for (int i = range.begin + int(threadIdx.x); i < range.end; i += kThreads) {
    if (!(points.key(i, &key) && cut.chooses(key))) continue;
    chosen.keys[place] = key;
    chosen.points[place] = points.begin + i;
    ++place;
  }
}

// A chosen point's place is the number of points of its source that come before it. The places beyond the last look
// for the last.
__global__ void __launch_bounds__(kThreads)
    order_kernel(PriorityKeys keys, Chosen chosen, int64_t blocks, int64_t* index, int64_t* count) {
  const int64_t b = blockIdx.x / blocks, start = b * keys.num_points;
  const int64_t i = int64_t(blockIdx.x) % blocks * kThreads + threadIdx.x;
  if (i >= keys.num_points) return;
  const Quotas take = keys.take(b);
  const int64_t total = take.colmap + take.depth;
  if (i == 0) count[b] = total;
  if (total == 0) {
    index[start + i] = -1;
    return;
  }
  const bool chooses = i < total;
  const bool depth = chooses ? i >= take.colmap : take.depth > 0;
  const int64_t first = start + (depth ? take.colmap : 0), last = start + (depth ? total : take.colmap);
  int64_t self = chooses ? start + i : first, before = 0;
  Key own = chosen.keys[self];
  for (int64_t j = first; j < last; ++j) {
    const Key other = chosen.keys[j];
    const bool lower = other.tier < own.tier || (other.tier == own.tier && other.hash < own.hash);
    before += lower;
    if (!chooses && !lower) self = j, own = other;
  }
  index[chooses ? first + before : start + i] = chosen.points[self];
}

struct PriorityWork {
  RankWork ranks;
  SelectWork select;
  Chosen chosen;

  PriorityWork(Workspace& workspace, int64_t P, int64_t B, int64_t num_points, int parts)
      : ranks(workspace, P, B, parts), select(workspace, 2 * B, 2 * B) {
    chosen.keys = workspace.take<Key>(B * num_points);
    chosen.points = workspace.take<int64_t>(B * num_points);
    chosen.lengths = select.counters;
  }
};

}  // namespace

int64_t priority_sample_workspace(int64_t P, int64_t B, int64_t num_points) {
  Workspace workspace;
  PriorityWork(workspace, P, B, num_points, parts_for(P, B, kPointsPerBlock));
  return workspace.used();
}

void priority_sample(int device, void* stream, uint8_t* memory, int64_t memory_bytes, const uint8_t* source,
                     const int8_t* group_id, const bool* keep, int64_t P, const int64_t* offsets,
                     const int64_t* scene_keys, int64_t B, uint64_t seed, int64_t num_points, int64_t* index,
                     int64_t* count) {
  const int parts = parts_for(P, B, kPointsPerBlock);
  Workspace workspace(memory, memory_bytes);
  const PriorityWork work(workspace, P, B, num_points, parts);
  workspace.check("priority_sample");
  const Launcher launch("priority_sample", device, stream);
  const Points points = {offsets, P, source, keep};
  const PriorityKeys keys = {points, group_id, work.ranks.ranks, work.ranks.kept, scene_keys, seed, num_points};
  fill(launch, work.select.histograms, work.select.cleared, 0u);
  find_ranks(launch, points, work.ranks, B, parts);
  select(launch, keys, work.select, 2 * B, parts);
  launch(chosen_kernel, 2 * B * parts, kThreads, keys, work.select, parts, work.chosen);
  const int64_t blocks = (num_points + kThreads - 1) / kThreads;
  launch(order_kernel, B * blocks, kThreads, keys, work.chosen, blocks, index, count);
}

}  // namespace wireframe
