// The vote of the views on every point, tiers and classes (reference: wireframe/voting.py).
#include "batch.cuh"
#include "block.cuh"
#include "fill.h"
#include "operations.h"
#include "ordered_bits.cuh"

namespace wireframe {
namespace {

// Cameras in shared memory at a time.
constexpr int kViewsAtOnce = 16;

struct Scenes {
  const float* xyz;  // [P, 3]
  int64_t P;
  const int64_t *offsets, *view_offsets;  // [B + 1]
  const ViewRow* views;
  int64_t V, N;
  Cameras cameras;
};

// Nearest depth (ordered_bits) of each cell of each view. A view of n pixels has at most n / 8 + 1 cells, so places
// that start at labels / 8 + v do not overlap, and N / 8 + V cells are enough.
struct ZBuffer {
  unsigned long long* cells;  // null: no visibility test
  double tolerance;

  static int64_t size(int64_t N, int64_t V) { return N / 8 + V; }

  __device__ unsigned long long& at(const ViewRow& view, int64_t v, const Pixel& pixel) const {
    return cells[view.labels / 8 + v + zbuffer_cell(pixel, view.width)];
  }
};

struct SharedViews {
  Camera cameras[kViewsAtOnce];
  ViewRow rows[kViewsAtOnce];
};

// For every point i of this thread (those of the block's part of its scene): body(v, row, pixel) for each view v of
// the scene into which it projects, then done(i).
template <class Body, class Done>
__device__ void for_each_projection(const Scenes& scenes, int parts, Body body, Done done) {
  __shared__ SharedViews shared;
  const int64_t b = blockIdx.x / unsigned(parts);
  const Segment points = segment_of(scenes.offsets, b, scenes.P);
  const Segment views = segment_of(scenes.view_offsets, b, scenes.V);
  const Range range = piece_of(points.size, int(blockIdx.x % unsigned(parts)), parts);
  // All threads go round equally often: those without a point only take part in loading.
  for (int first = range.begin; first < range.end; first += kThreads) {
    const int64_t i = points.begin + first + threadIdx.x;
    const bool exists = first + int(threadIdx.x) < range.end;
    const double x = exists ? scenes.xyz[3 * i] : 0.0, y = exists ? scenes.xyz[3 * i + 1] : 0.0;
    const double z = exists ? scenes.xyz[3 * i + 2] : 0.0;
    for (int loaded = 0; loaded < views.size; loaded += kViewsAtOnce) {
      const int count = views.size - loaded < kViewsAtOnce ? views.size - loaded : kViewsAtOnce;
      const int64_t v = views.begin + loaded;
      __syncthreads();
      if (int(threadIdx.x) < count) {
        shared.cameras[threadIdx.x] = scenes.cameras.of(v + threadIdx.x);
        shared.rows[threadIdx.x] = label_view(scenes.views, v + threadIdx.x, scenes.N);
      }
      __syncthreads();
      for (int k = 0; exists && k < count; ++k) {
        const ViewRow& row = shared.rows[k];
        const Pixel pixel = project(shared.cameras[k], x, y, z, row.height, row.width);
        if (pixel.inside) body(v + k, row, pixel);
      }
    }
    if (exists) done(i);
  }
}

__global__ void __launch_bounds__(kThreads) zbuffer_kernel(Scenes scenes, int parts, ZBuffer zbuffer) {
  for_each_projection(
      scenes, parts,
      [&](int64_t v, const ViewRow& view, const Pixel& pixel) {
        atomicMin(&zbuffer.at(view, v, pixel), static_cast<unsigned long long>(ordered_bits(pixel.depth)));
      },
      [](int64_t) {});
}

struct LabelMaps {
  const uint8_t *ade, *gestalt;  // [N]
  LabelTables tables;
};

struct VoteOutputs {
  uint8_t* visible_src;
  int16_t *visible_id, *behind;
  uint8_t *support, *n_views_voted;
  float* vote_frac;
};

__global__ void __launch_bounds__(kThreads)
    vote_kernel(Scenes scenes, LabelMaps maps, int parts, ZBuffer zbuffer, VoteOutputs out) {
  PointVotes votes;
  for_each_projection(
      scenes, parts,
      [&](int64_t v, const ViewRow& view, const Pixel& pixel) {
        if (zbuffer.cells) {
          const double nearest = from_ordered_bits(zbuffer.at(view, v, pixel));
          if (!zbuffer_sees(pixel.depth, nearest, zbuffer.tolerance)) return;
        }
        const int64_t at = view.labels + pixel.row * view.width + pixel.column;
        votes.add(maps.ade[at], maps.gestalt[at], maps.tables);
      },
      [&](int64_t i) {
        const PointLabel label = decide(votes);
        out.visible_src[i] = label.visible_src;
        out.visible_id[i] = label.visible_id;
        out.behind[i] = label.behind;
        out.support[i] = label.support;
        out.n_views_voted[i] = label.n_views_voted;
        out.vote_frac[i] = label.vote_frac;
        votes.visible.distinct = votes.behind.distinct = votes.support = votes.voted = 0;
      });
}

__global__ void __launch_bounds__(kThreads)
    tier_kernel(const uint8_t* visible_src, const int16_t* visible_id, const int16_t* behind, int64_t P,
                LabelTables tables, int8_t* group_id, uint8_t* class_id) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= P) return;
  const PointTier tier = tier_of(visible_src[i], visible_id[i], behind[i], tables);
  group_id[i] = tier.group;
  class_id[i] = tier.point_class;
}

ZBuffer take_zbuffer(Workspace& workspace, int64_t N, int64_t V, double tolerance) {
  if (!(tolerance >= 0.0)) return {nullptr, tolerance};
  return {workspace.take<unsigned long long>(ZBuffer::size(N, V)), tolerance};
}

}  // namespace

int64_t vote_labels_workspace(int64_t N, int64_t V, double tolerance) {
  Workspace workspace;
  take_zbuffer(workspace, N, V, tolerance);
  return workspace.used();
}

void vote_labels(int device, void* stream, uint8_t* memory, int64_t memory_bytes, const float* xyz, int64_t P,
                 const int64_t* offsets, const int64_t* view_offsets, int64_t B, const uint8_t* ade,
                 const uint8_t* gestalt, int64_t N, const ViewRow* views, int64_t V, const float* K, const float* R,
                 const float* t, const uint8_t* tables, double tolerance, uint8_t* visible_src, int16_t* visible_id,
                 int16_t* behind, uint8_t* support, uint8_t* n_views_voted, float* vote_frac) {
  Workspace workspace(memory, memory_bytes);
  const ZBuffer zbuffer = take_zbuffer(workspace, N, V, tolerance);
  workspace.check("vote_labels");
  const Launcher launch("vote_labels", device, stream);
  const Scenes scenes = {xyz, P, offsets, view_offsets, views, V, N, {K, R, t}};
  // A point a thread: this kernel has the most arithmetic.
  const int parts = parts_for(P, B, kThreads);
  if (zbuffer.cells) {
    fill(launch, reinterpret_cast<unsigned*>(zbuffer.cells), 2 * ZBuffer::size(N, V), ~0u);
    launch(zbuffer_kernel, B * parts, kThreads, scenes, parts, zbuffer);
  }
  launch(vote_kernel, B * parts, kThreads, scenes, LabelMaps{ade, gestalt, {tables}}, parts, zbuffer,
         VoteOutputs{visible_src, visible_id, behind, support, n_views_voted, vote_frac});
}

void point_tiers(int device, void* stream, const uint8_t* visible_src, const int16_t* visible_id,
                 const int16_t* behind, int64_t P, const uint8_t* tables, int8_t* group_id, uint8_t* class_id) {
  const Launcher launch("point_tiers", device, stream);
  launch(tier_kernel, (P + kThreads - 1) / kThreads, kThreads, visible_src, visible_id, behind, P,
         LabelTables{tables}, group_id, class_id);
}

}  // namespace wireframe
