// Which hashes the smallest of many may have: what lies above need not be ordered, nor even kept.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace wireframe {

// No hash exceeds it.
constexpr uint64_t kEverything = std::numeric_limits<uint64_t>::max();

// Where the count-th smallest of n uniform hashes (0 < count < n) lies, give or take eight standard deviations: hardly
// ever at or below `low` or above `high`, which is to be checked all the same.
struct HashBounds {
  uint64_t low, high;
};

inline uint64_t hash_quantile(double share) {
  // The largest double below 2^64, times a share below 1, fits.
  return share <= 0.0 ? 0 : share < 1.0 ? uint64_t(share * 18446744073709549568.0) : kEverything;
}

inline HashBounds hash_bounds(int64_t count, int64_t n) {
  const double margin = 8.0 * std::sqrt(double(count)) + 16.0;
  return {hash_quantile((double(count) - margin) / double(n)), hash_quantile((double(count) + margin) / double(n))};
}

}  // namespace wireframe
