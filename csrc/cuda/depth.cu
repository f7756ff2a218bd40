// Depth maps: clip limit of each view, choice of pixels, unprojection (reference: wireframe/depth.py).
#include "batch.cuh"
#include "block.cuh"
#include "fill.h"
#include "operations.h"
#include "select.cuh"

namespace wireframe {
namespace {

constexpr int kDepths = 1 << 16;
constexpr int kOwnDepths = kDepths / kThreads;

// The bin of a depth, so that a block whose threads each go through neighbouring depths reads neighbouring bins.
__device__ int bin_of(int millimetres) { return millimetres % kOwnDepths * kThreads + millimetres / kOwnDepths; }

__global__ void __launch_bounds__(kThreads)
    depth_histogram_kernel(const uint16_t* depth, int64_t M, const ViewRow* views, int parts, unsigned* histograms) {
  const int64_t v = blockIdx.x / unsigned(parts);
  const ViewRow view = depth_view(views, v, M);
  const Range range = piece_of(int(view.depth_height * view.depth_width), int(blockIdx.x % unsigned(parts)), parts);
  for (int i = range.begin + int(threadIdx.x); i < range.end; i += kThreads) {
    const int millimetres = depth[view.depth + i];
    if (millimetres > 0) atomicAdd(&histograms[v * kDepths + bin_of(millimetres)], 1u);
  }
}

// One block a view.
__global__ void __launch_bounds__(kThreads) clip_limit_kernel(const unsigned* histograms, double* limits) {
  __shared__ int found[2];
  const unsigned* histogram = histograms + int64_t(blockIdx.x) * kDepths;
  const int first = int(threadIdx.x) * kOwnDepths;
  int sum = 0;
  for (int i = 0; i < kOwnDepths; ++i) sum += int(histogram[bin_of(first + i)]);
  const Scan scan = block_scan<kThreads>(sum);
  if (scan.total == 0) {
    if (threadIdx.x == 0) limits[blockIdx.x] = 0.0;
    return;
  }
  const ClipPosition at = clip_position(scan.total);
  int64_t below = scan.before;
  for (int i = 0; i < kOwnDepths; ++i) {
    const int64_t end = below + histogram[bin_of(first + i)];
    if (below <= at.low && at.low < end) found[0] = first + i;
    if (below <= at.high && at.high < end) found[1] = first + i;
    below = end;
  }
  __syncthreads();
  if (threadIdx.x == 0) limits[blockIdx.x] = clip_limit(double(found[0]), double(found[1]), at.t);
}

// The candidate pixels of each view: depth above 0, in the mask.
struct PixelKeys {
  static constexpr int kFirstPass = 1;

  const uint16_t* depth;
  int64_t M;
  const bool* mask;
  int64_t N;
  const ViewRow* views;
  const int64_t* keys;
  int64_t scenes, count;
  uint64_t seed;

  struct View {
    ViewRow row;
    const uint16_t* depth;
    const bool* mask;
    uint64_t stream;
    int64_t wanted;
    int size;
    bool same_size;

    __device__ bool key(int i, Key* key) const {
      if (depth[i] == 0) return false;
      int64_t pixel = i;
      if (!same_size) {
        const int width = int(row.depth_width);
        pixel = nearest_label(i / width, row.depth_height, row.height) * row.width +
                nearest_label(i % width, row.depth_width, row.width);
      }
      if (!mask[pixel]) return false;
      *key = {hash64(stream, uint64_t(i)), 0};
      return true;
    }
  };

  __device__ View open(int64_t v) const {
    View view;
    view.row = depth_view(views, v, M);
    view.size = int(view.row.depth_height * view.row.depth_width);
    if (!fits(view.row.height, view.row.width, view.row.labels, N)) view.size = 0;
    if (view.row.scene < 0 || view.row.scene >= scenes) view.size = 0;
    view.depth = depth + (view.size > 0 ? view.row.depth : 0);
    view.mask = mask + (view.size > 0 ? view.row.labels : 0);
    const uint64_t scene = view.size > 0 ? uint64_t(keys[view.row.scene]) : 0;
    view.stream = stream_key(seed, scene, kDepthPixels + uint64_t(view.row.index));
    view.same_size = view.row.depth_height == view.row.height && view.row.depth_width == view.row.width;
    view.wanted = count;
    return view;
  }
};

// The pixels of one thread: neighbours, so that what it writes is in row-major order.
__device__ Range own_pixels(int size, int part, int parts) {
  const Range range = piece_of(size, part, parts);
  const Range own = piece_of(range.end - range.begin, int(threadIdx.x), kThreads);
  return {range.begin + own.begin, range.begin + own.end};
}

__device__ int count_chosen(const PixelKeys::View& view, const Cut& cut, Range own) {
  int chosen = 0;
  for (int i = own.begin; i < own.end; ++i) {
    Key key;
    chosen += view.key(i, &key) && cut.chooses(key);
  }
  return chosen;
}

__global__ void __launch_bounds__(kThreads)
    chosen_count_kernel(PixelKeys keys, SelectWork work, int parts, int* part_counts) {
  const int64_t v = blockIdx.x / unsigned(parts);
  const int part = int(blockIdx.x % unsigned(parts));
  const PixelKeys::View view = keys.open(v);
  const Cut cut = cut_before<PixelKeys>(work, view.wanted, v, kPasses, part == 0);
  const int chosen = count_chosen(view, cut, own_pixels(view.size, part, parts));
  const int total = block_scan<kThreads>(chosen).total;
  if (threadIdx.x == 0) part_counts[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads)
    depth_points_kernel(PixelKeys keys, SelectWork work, int parts, const int* part_counts, Cameras cameras,
                        const double* limits, float* xyz, int64_t* counts) {
  __shared__ Camera camera;
  const int64_t v = blockIdx.x / unsigned(parts);
  const int part = int(blockIdx.x % unsigned(parts));
  const PixelKeys::View view = keys.open(v);
  if (threadIdx.x == 0 && view.size > 0) camera = depth_camera(cameras.of(v), view.row);
  const Cut cut = work.cut(v, kPasses);
  const Scan blocks = sum_of_parts<kThreads>(part_counts + v * parts, part, parts);
  const Range own = own_pixels(view.size, part, parts);
  float* point =
      xyz + 3 * (v * keys.count + blocks.before + block_scan<kThreads>(count_chosen(view, cut, own)).before);
  for (int i = own.begin; i < own.end; ++i) {
    Key key;
    if (!(view.key(i, &key) && cut.chooses(key))) continue;
    const int width = int(view.row.depth_width);
    unproject(camera, i / width, i % width, double(view.depth[i]), limits[v], point);
    point += 3;
  }
  if (part == 0 && threadIdx.x == 0) counts[v] = blocks.total;
  // The places that no point takes, shared out among the blocks.
  const int64_t empty = keys.count - blocks.total, each = (empty + parts - 1) / parts;
  const int64_t end = (part + 1) * each < empty ? (part + 1) * each : empty;
  float* first_empty = xyz + 3 * (v * keys.count + blocks.total);
  for (int64_t i = 3 * part * each + threadIdx.x; i < 3 * end; i += kThreads) first_empty[i] = 0.0f;
}

struct ClipWork {
  unsigned* histograms;  // [V, kDepths]

  ClipWork(Workspace& workspace, int64_t V) : histograms(workspace.take<unsigned>(V * kDepths)) {}
};

struct DepthWork {
  SelectWork select;
  int* part_counts;  // [V, parts]

  DepthWork(Workspace& workspace, int64_t V, int parts) : select(workspace, V, 0) {
    part_counts = workspace.take<int>(V * parts);
  }
};

}  // namespace

int64_t clip_limits_workspace(int64_t V) {
  Workspace workspace;
  ClipWork(workspace, V);
  return workspace.used();
}

void clip_limits(int device, void* stream, uint8_t* memory, int64_t memory_bytes, const uint16_t* depth, int64_t M,
                 const ViewRow* views, int64_t V, double* limits) {
  Workspace workspace(memory, memory_bytes);
  const ClipWork work(workspace, V);
  workspace.check("clip_limits");
  const Launcher launch("clip_limits", device, stream);
  const int parts = parts_for(M, V, kPixelsPerBlock);
  fill(launch, work.histograms, V * kDepths, 0u);
  launch(depth_histogram_kernel, V * parts, kThreads, depth, M, views, parts, work.histograms);
  launch(clip_limit_kernel, V, kThreads, static_cast<const unsigned*>(work.histograms), limits);
}

int64_t depth_points_workspace(int64_t M, int64_t V) {
  Workspace workspace;
  DepthWork(workspace, V, parts_for(M, V, kPixelsPerBlock));
  return workspace.used();
}

void depth_points(int device, void* stream, uint8_t* memory, int64_t memory_bytes, const uint16_t* depth, int64_t M,
                  const bool* mask, int64_t N, const double* limits, const ViewRow* views, int64_t V, const float* K,
                  const float* R, const float* t, const int64_t* scene_keys, int64_t B, int64_t count, uint64_t seed,
                  float* xyz, int64_t* counts) {
  const int parts = parts_for(M, V, kPixelsPerBlock);
  Workspace workspace(memory, memory_bytes);
  const DepthWork work(workspace, V, parts);
  workspace.check("depth_points");
  const Launcher launch("depth_points", device, stream);
  const PixelKeys keys = {depth, M, mask, N, views, scene_keys, B, count, seed};
  fill(launch, work.select.histograms, work.select.cleared, 0u);
  select(launch, keys, work.select, V, parts);
  launch(chosen_count_kernel, V * parts, kThreads, keys, work.select, parts, work.part_counts);
  launch(depth_points_kernel, V * parts, kThreads, keys, work.select, parts,
         static_cast<const int*>(work.part_counts), Cameras{K, R, t}, limits, xyz, counts);
}

}  // namespace wireframe
