// Robust centre and scale of every scene (reference: wireframe/normalisation.py).
#include "block.cuh"
#include "fill.h"
#include "operations.h"
#include "ordered_bits.cuh"
#include "ranks.cuh"
#include "select.cuh"

namespace wireframe {
namespace {

// A scene's order statistics are found by one block.
constexpr int kStatThreads = 1024;
constexpr int kDigits = 6;  // 5 x 11 + 9 bits of ordered_bits

// The reference points of each scene: its kept depth points, or all kept ones where there are none.
struct ReferenceKeys {
  static constexpr int kFirstPass = 1;

  Points points;
  const int* ranks;
  const Kept* kept;
  const int64_t* keys;
  uint64_t seed;

  struct Scene {
    const int* ranks;
    const uint8_t* source;
    uint64_t stream;
    int64_t wanted;
    int64_t begin;
    int size;
    bool depth_alone;

    __device__ bool key(int i, Key* key) const {
      if (ranks[i] < 0 || (depth_alone && source[i] == kColmap)) return false;
      *key = {hash64(stream, uint64_t(ranks[i])), 0};
      return true;
    }
  };

  __device__ Scene open(int64_t b) const {
    const Segment scene = points.scene(b);
    const uint64_t stream = stream_key(seed, uint64_t(keys[b]), kCentreScale);
    return {ranks + scene.begin, points.source + scene.begin, stream, kReferencePoints, scene.begin, scene.size,
            kept[b].depth > 0};
  }
};

struct Cloud {
  float* xyz;         // [B, 3, kReferencePoints], in any order
  unsigned* sizes;    // [B]
  double* distances;  // [B, kReferencePoints]
};

// Copies the chosen reference points. Their order is open: everything after this is an order statistic.
__global__ void __launch_bounds__(kThreads)
    reference_kernel(ReferenceKeys keys, SelectWork work, int parts, const float* xyz, Cloud cloud) {
  const int64_t b = blockIdx.x / unsigned(parts);
  const ReferenceKeys::Scene scene = keys.open(b);
  const Cut cut = cut_before<ReferenceKeys>(work, scene.wanted, b, kPasses, false);
  const Range range = piece_of(scene.size, int(blockIdx.x % unsigned(parts)), parts);
  Key key;
  int count = 0;
  for (int i = range.begin + int(threadIdx.x); i < range.end; i += kThreads) {
    count += scene.key(i, &key) && cut.chooses(key);
  }
  float* out = cloud.xyz + 3 * kReferencePoints * b + append<kThreads>(cloud.sizes + b, count);
  for (int i = range.begin + int(threadIdx.x); i < range.end; i += kThreads) {
    if (!(scene.key(i, &key) && cut.chooses(key))) continue;
    for (int axis = 0; axis < 3; ++axis) out[axis * kReferencePoints] = xyz[3 * (scene.begin + i) + axis];
    ++out;
  }
}

// Lists of numbers of which some are left out: get(i, &value) is false for those.
struct Coordinates {
  const float* values;
  __device__ bool get(int i, double* value) const {
    *value = values[i];
    return true;
  }
};

struct Distances {
  const double* values;
  __device__ bool get(int i, double* value) const {
    *value = values[i];
    return true;
  }
};

struct Deviations {
  const double* values;
  double middle;
  __device__ bool get(int i, double* value) const {
    *value = fabs(values[i] - middle);
    return true;
  }
};

struct NearCoordinates {
  const float* values;
  const double* distances;
  double limit;
  __device__ bool get(int i, double* value) const {
    *value = values[i];
    return distances[i] <= limit;
  }
};

struct Statistics {
  unsigned counts[kBins];
  int bin, below, here;  // the bin of the k-th number, how many lie below it and in it
  uint64_t found;
};

// The k-th smallest (from 0) of a list of n places, with more than k numbers in it. Between what one call reads of
// `shared` and what the next one writes there lie barriers of the next.
template <class List>
__device__ double order_statistic(Statistics& shared, const List& list, int n, int k) {
  constexpr int kOwn = kBins / kStatThreads;
  uint64_t prefix = 0;
  for (int digit = 1; digit <= kDigits; ++digit) {
    for (int i = int(threadIdx.x); i < kBins; i += kStatThreads) shared.counts[i] = 0;
    __syncthreads();
    for (int i = int(threadIdx.x); i < n; i += kStatThreads) {
      double value;
      if (!list.get(i, &value)) continue;
      const Key key = {ordered_bits(value), 0};
      const bool open = digit == 1 || (key.hash ^ prefix) >> shift_of(digit - 1) == 0;
      if (open) atomicAdd(&shared.counts[digit_of(key, digit)], 1u);
    }
    __syncthreads();
    int sum = 0;
    for (int i = 0; i < kOwn; ++i) sum += int(shared.counts[threadIdx.x * kOwn + i]);
    int start = block_scan<kStatThreads>(sum).before;
    for (int i = 0; i < kOwn; ++i) {
      const int own = int(shared.counts[threadIdx.x * kOwn + i]);
      if (start <= k && k < start + own) {
        shared.bin = int(threadIdx.x) * kOwn + i, shared.below = start, shared.here = own;
      }
      start += own;
    }
    __syncthreads();
    prefix |= uint64_t(shared.bin) << shift_of(digit);
    k -= shared.below;
    if (shared.here == 1) {
      // The thread that meets the one number left says what it is.
      for (int i = int(threadIdx.x); i < n; i += kStatThreads) {
        double value;
        if (!list.get(i, &value)) continue;
        const uint64_t bits = ordered_bits(value);
        if ((bits ^ prefix) >> shift_of(digit) == 0) shared.found = bits;
      }
      __syncthreads();
      prefix = shared.found;
      break;
    }
  }
  return from_ordered_bits(prefix);
}

// The k-th smallest number of a list where `value` is the one before it.
template <class List>
__device__ double next_statistic(const List& list, int n, int k, double value) {
  int not_above = 0;
  uint64_t above = ~uint64_t(0);
  for (int i = int(threadIdx.x); i < n; i += kStatThreads) {
    double other;
    if (!list.get(i, &other)) continue;
    const uint64_t bits = ordered_bits(other);
    if (bits <= ordered_bits(value)) {
      ++not_above;
    } else if (bits < above) {
      above = bits;
    }
  }
  const uint64_t next = block_min<kStatThreads>(above);
  return block_scan<kStatThreads>(not_above).total > k ? value : from_ordered_bits(next);
}

// Mean of the two middle values, of the middle one twice for an odd count.
template <class List>
__device__ double median(Statistics& shared, const List& list, int n) {
  const double low = order_statistic(shared, list, n, (n - 1) / 2);
  return middle_of(low, n % 2 ? low : next_statistic(list, n, n / 2, low));
}

// One block a scene.
__global__ void __launch_bounds__(kStatThreads) centre_kernel(Cloud cloud, float* center, float* scale) {
  __shared__ Statistics shared;
  const int64_t b = blockIdx.x;
  const int n = int(cloud.sizes[b]);
  const float* xyz = cloud.xyz + 3 * kReferencePoints * b;
  double* distances = cloud.distances + kReferencePoints * b;
  if (n == 0) {
    if (threadIdx.x < 3) center[3 * b + threadIdx.x] = 0.0f;
    if (threadIdx.x == 0) scale[b] = 1.0f;
    return;
  }
  double middle[3], low[3], high[3];
  for (int axis = 0; axis < 3; ++axis) middle[axis] = median(shared, Coordinates{xyz + axis * kReferencePoints}, n);
  for (int i = int(threadIdx.x); i < n; i += kStatThreads) {
    const double point[3] = {xyz[i], xyz[kReferencePoints + i], xyz[2 * kReferencePoints + i]};
    distances[i] = distance(point, middle);
  }
  const double typical = median(shared, Distances{distances}, n);
  const double limit = typical + kMadFactor * median(shared, Deviations{distances, typical}, n);
  int own = 0;
  for (int i = int(threadIdx.x); i < n; i += kStatThreads) own += distances[i] <= limit;
  const int near = block_scan<kStatThreads>(own).total;
  // None is near only where coordinates are not finite.
  for (int axis = 0; axis < 3; ++axis) {
    const NearCoordinates list = {xyz + axis * kReferencePoints, distances, limit};
    low[axis] = near > 0 ? order_statistic(shared, list, n, int(kBoxLow * double(near - 1))) : 0.0;
    high[axis] = near > 0 ? order_statistic(shared, list, n, int(kBoxHigh * double(near - 1))) : 0.0;
  }
  if (threadIdx.x == 0) centre_of_box(low, high, center + 3 * b, scale + b);
}

struct CentreWork {
  RankWork ranks;
  SelectWork select;
  Cloud cloud;

  CentreWork(Workspace& workspace, int64_t P, int64_t B, int parts)
      : ranks(workspace, P, B, parts), select(workspace, B, B) {
    cloud.xyz = workspace.take<float>(3 * kReferencePoints * B);
    cloud.sizes = select.counters;
    cloud.distances = workspace.take<double>(kReferencePoints * B);
  }
};

}  // namespace

int64_t centre_and_scale_workspace(int64_t P, int64_t B) {
  Workspace workspace;
  CentreWork(workspace, P, B, parts_for(P, B, kPointsPerBlock));
  return workspace.used();
}

void centre_and_scale(int device, void* stream, uint8_t* memory, int64_t memory_bytes, const float* xyz,
                      const uint8_t* source, const bool* keep, int64_t P, const int64_t* offsets,
                      const int64_t* scene_keys, int64_t B, uint64_t seed, float* center, float* scale) {
  const int parts = parts_for(P, B, kPointsPerBlock);
  Workspace workspace(memory, memory_bytes);
  const CentreWork work(workspace, P, B, parts);
  workspace.check("centre_and_scale");
  const Launcher launch("centre_and_scale", device, stream);
  const Points points = {offsets, P, source, keep};
  const ReferenceKeys keys = {points, work.ranks.ranks, work.ranks.kept, scene_keys, seed};
  fill(launch, work.select.histograms, work.select.cleared, 0u);
  find_ranks(launch, points, work.ranks, B, parts);
  select(launch, keys, work.select, B, parts);
  launch(reference_kernel, B * parts, kThreads, keys, work.select, parts, xyz, work.cloud);
  launch(centre_kernel, B, kStatThreads, work.cloud, center, scale);
}

}  // namespace wireframe
