// The `wanted` smallest keys of each of many segments, exactly, by radix select: histograms of one digit at a time,
// from the top, over the keys that still may be the last one chosen. A key is (tier, 64-bit hash); digits are the
// tier, then 11 bits of the hash at a time. Uniform hashes are settled after two digits of the hash, and the passes
// after that end at once.
//
// A kind of keys is a struct K with K::kFirstPass (0, or 1 where all tiers are equal) and K::open(segment), which
// gives
//   int size, int64_t wanted, bool key(int i, Key* key)   // false: element i takes no part
// Keys of a segment must differ from one another.
#pragma once

#include "block.cuh"

namespace wireframe {

constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kPasses = 7;  // the tier and 5 x 11 + 9 bits of the hash

struct Key {
  uint64_t hash;
  int tier;  // 0-255
};

enum class Search : int { kOpen, kFound, kNone };

// How far the search in a segment has come.
struct Cut {
  uint64_t hash;   // the digits known so far; kFound: chosen are the keys up to (tier, hash), this one included
  int64_t wanted;  // how many of the keys that begin with them are still to be chosen
  int tier;
  Search state;

  __device__ bool chooses(const Key& key) const {
    return state == Search::kFound && (key.tier < tier || (key.tier == tier && key.hash <= hash));
  }
};

// pass >= 1
__device__ inline int shift_of(int pass) { return pass == kPasses - 1 ? 0 : 64 - kDigitBits * pass; }

__device__ inline int digit_of(const Key& key, int pass) {
  if (pass == 0) return key.tier;
  const int bits = pass == kPasses - 1 ? 64 - kDigitBits * (kPasses - 2) : kDigitBits;
  return int((key.hash >> shift_of(pass)) & ((1u << bits) - 1u));
}

__device__ inline bool still_open(const Key& key, const Cut& cut, int pass) {
  if (pass == 0) return true;
  return key.tier == cut.tier && (pass == 1 || (key.hash ^ cut.hash) >> shift_of(pass - 1) == 0);
}

struct SelectWork {
  Cut* cuts;             // [segments, kPasses + 1], before each pass and after the last
  unsigned* histograms;  // [segments, kPasses, kBins]
  unsigned* counters;    // what the caller wants cleared too
  int64_t cleared;       // elements of histograms and counters together

  SelectWork(Workspace& workspace, int64_t segments, int64_t counter_count) {
    const int64_t bins = segments * kPasses * kBins;
    cleared = bins + counter_count;
    cuts = workspace.take<Cut>(segments * (kPasses + 1));
    histograms = workspace.take<unsigned>(cleared);
    counters = histograms ? histograms + bins : nullptr;
  }

  __device__ Cut& cut(int64_t segment, int pass) const { return cuts[segment * (kPasses + 1) + pass]; }
  __device__ unsigned* histogram(int64_t segment, int pass) const {
    return histograms + (segment * kPasses + pass) * kBins;
  }
};

// The cut after `cut`, from the histogram of digit `pass`. Once in a kernel: it does not wait for those that read it.
__device__ inline Cut advance(const Cut& cut, const unsigned* histogram, int pass, bool first) {
  constexpr int kOwn = kBins / kThreads;
  __shared__ Cut next;
  const unsigned* own = histogram + threadIdx.x * kOwn;
  int sum = 0;
  for (int i = 0; i < kOwn; ++i) sum += int(own[i]);
  const Scan scan = block_scan<kThreads>(sum);
  if (first && scan.total < cut.wanted) return {~uint64_t(0), 0, 255, Search::kFound};
  int64_t below = scan.before;
  for (int i = 0; i < kOwn; ++i) {
    const int64_t here = own[i];
    if (below < cut.wanted && cut.wanted <= below + here) {
      const uint64_t bin = threadIdx.x * kOwn + unsigned(i);
      next = cut;
      if (pass == 0) next.tier = int(bin);
      if (pass > 0) next.hash |= bin << shift_of(pass);
      next.wanted = cut.wanted - below;
      if (next.wanted == here) {
        // The whole bin is chosen: everything below its upper end.
        next.hash |= pass == 0 ? ~uint64_t(0) : (uint64_t(1) << shift_of(pass)) - 1;
        next.state = Search::kFound;
      }
    }
    below += here;
  }
  __syncthreads();
  return next;
}

// The cut before `pass`. Every block of the segment works it out for itself, and the first one notes it for the next.
template <class Keys>
__device__ Cut cut_before(const SelectWork& work, int64_t wanted, int64_t segment, int pass, bool note) {
  Cut cut;
  if (pass == Keys::kFirstPass) {
    cut = {0, wanted, 0, wanted > 0 ? Search::kOpen : Search::kNone};
  } else {
    cut = work.cut(segment, pass - 1);
    if (cut.state == Search::kOpen) {
      cut = advance(cut, work.histogram(segment, pass - 1), pass - 1, pass - 1 == Keys::kFirstPass);
    }
  }
  if (note && threadIdx.x == 0) work.cut(segment, pass) = cut;
  return cut;
}

template <class Keys>
__global__ void __launch_bounds__(kThreads) select_pass_kernel(Keys keys, SelectWork work, int pass, int parts) {
  __shared__ unsigned counts[kBins];
  const int64_t segment = blockIdx.x / unsigned(parts);
  const int part = int(blockIdx.x % unsigned(parts));
  const auto elements = keys.open(segment);
  const Cut cut = cut_before<Keys>(work, elements.wanted, segment, pass, part == 0);
  if (cut.state != Search::kOpen) return;
  for (int i = int(threadIdx.x); i < kBins; i += kThreads) counts[i] = 0;
  __syncthreads();
  const Range range = piece_of(elements.size, part, parts);
  for (int i = range.begin + int(threadIdx.x); i < range.end; i += kThreads) {
    Key key;
    if (elements.key(i, &key) && still_open(key, cut, pass)) atomicAdd(&counts[digit_of(key, pass)], 1u);
  }
  __syncthreads();
  unsigned* histogram = work.histogram(segment, pass);
  for (int i = int(threadIdx.x); i < kBins; i += kThreads) {
    if (counts[i] > 0) atomicAdd(&histogram[i], counts[i]);
  }
}

// Afterwards cut_before(..., kPasses, ...) gives each segment's cut. The work must have been cleared.
template <class Keys>
void select(const Launcher& launch, const Keys& keys, const SelectWork& work, int64_t segments, int parts) {
  for (int pass = Keys::kFirstPass; pass < kPasses; ++pass) {
    launch(select_pass_kernel<Keys>, segments * parts, kThreads, keys, work, pass, parts);
  }
}

}  // namespace wireframe
