// What the threads of a block do together, with shared memory and barriers alone. All threads of the block call these
// functions; each ends with a barrier, so that it may be called again at once.
#pragma once

#include "launch.h"

namespace wireframe {

struct Range {
  int begin, end;
};

// The part-th of `parts` equal pieces of [0, size); no barrier.
__device__ inline Range piece_of(int size, int part, int parts) {
  return {int(int64_t(size) * part / parts), int(int64_t(size) * (part + 1) / parts)};
}

struct Scan {
  int before;  // the sum over the threads before this one
  int total;
};

template <int kBlock>
__device__ Scan block_scan(int value) {
  constexpr int kGroup = 32;
  constexpr int kGroups = kBlock / kGroup;
  // A gap after every group keeps the threads that add up groups on different banks.
  __shared__ int values[kBlock + kGroups];
  __shared__ int sums[kGroups];
  const int self = int(threadIdx.x), group = self / kGroup, first = group * (kGroup + 1);
  values[self + group] = value;
  __syncthreads();
  if (self < kGroups) {
    int sum = 0;
    for (int i = 0; i < kGroup; ++i) sum += values[self * (kGroup + 1) + i];
    sums[self] = sum;
  }
  __syncthreads();
  Scan scan = {0, 0};
  for (int i = 0; i < kGroups; ++i) {
    if (i < group) scan.before += sums[i];
    scan.total += sums[i];
  }
  for (int i = first; i < self + group; ++i) scan.before += values[i];
  __syncthreads();
  return scan;
}

// The smallest of the threads' values.
template <int kBlock>
__device__ uint64_t block_min(uint64_t value) {
  constexpr int kGroup = 32;
  constexpr int kGroups = kBlock / kGroup;
  __shared__ uint64_t values[kBlock + kGroups];
  __shared__ uint64_t least[kGroups];
  const int self = int(threadIdx.x);
  values[self + self / kGroup] = value;
  __syncthreads();
  if (self < kGroups) {
    uint64_t smallest = values[self * (kGroup + 1)];
    for (int i = 1; i < kGroup; ++i) {
      const uint64_t other = values[self * (kGroup + 1) + i];
      if (other < smallest) smallest = other;
    }
    least[self] = smallest;
  }
  __syncthreads();
  uint64_t smallest = least[0];
  for (int i = 1; i < kGroups; ++i) {
    if (least[i] < smallest) smallest = least[i];
  }
  __syncthreads();
  return smallest;
}

// The sum of counts[0 .. end) and, as `before`, that of counts[0 .. part).
template <int kBlock>
__device__ Scan sum_of_parts(const int* counts, int part, int end) {
  int before = 0, total = 0;
  for (int i = int(threadIdx.x); i < end; i += kBlock) {
    if (i < part) before += counts[i];
    total += counts[i];
  }
  before = block_scan<kBlock>(before).total;
  total = block_scan<kBlock>(total).total;
  return {before, total};
}

// Room for `count` items of this thread at the end of a list that blocks append to in any order.
template <int kBlock>
__device__ int append(unsigned* length, int count) {
  __shared__ unsigned base;
  const Scan scan = block_scan<kBlock>(count);
  if (threadIdx.x == 0) base = scan.total > 0 ? atomicAdd(length, unsigned(scan.total)) : 0u;
  __syncthreads();
  const int place = int(base) + scan.before;
  __syncthreads();
  return place;
}

}  // namespace wireframe
