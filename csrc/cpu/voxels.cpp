// Voxel sampling: one point for every occupied cell of a cubic grid.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "../point_math.h"
#include "buffers.h"
#include "pool.h"

namespace wireframe {
namespace {

constexpr int64_t kChunk = 1 << 14;
constexpr double kMostCells = 4611686018427387904.0;  // 2^62: floor(x / size) fits an int64
constexpr uint32_t kVacant = std::numeric_limits<uint32_t>::max();

struct Cell {
  int64_t x[3];

  bool operator==(const Cell& other) const {
    return ((x[0] ^ other.x[0]) | (x[1] ^ other.x[1]) | (x[2] ^ other.x[2])) == 0;
  }
  uint64_t hash() const { return mix(mix(mix(uint64_t(x[0])) + uint64_t(x[1])) + uint64_t(x[2])); }
};

// The cells of points [begin, end); false where a quotient is not within 2^62 (or not a number).
bool cells_of(const float* xyz, double size, int64_t begin, int64_t end, Cell* cells) {
  bool inside = true;
  for (int64_t i = begin; i < end; ++i) {
    for (int a = 0; a < 3; ++a) {
      const double quotient = double(xyz[3 * i + a]) / size;
      const bool fits = std::fabs(quotient) < kMostCells;
      const double q = fits ? quotient : 0.0;
      // floor, without a call where the processor has no instruction for it.
      const int64_t towards_zero = int64_t(q);
      cells[i].x[a] = towards_zero - (double(towards_zero) > q);
      inside &= fits;
    }
  }
  return inside;
}

// The chosen point of each cell in an open-addressed table. Cells are compared, not their hashes: none ever merge.
std::vector<uint32_t> choose(const std::vector<Cell>& cells, const int64_t* priority) {
  size_t room = 16;
  while (room < 2 * cells.size()) room *= 2;
  std::vector<uint32_t> table(room, kVacant);
  for (size_t i = 0; i < cells.size(); ++i) {
    size_t slot = cells[i].hash() & (room - 1);
    while (table[slot] != kVacant && !(cells[table[slot]] == cells[i])) slot = (slot + 1) & (room - 1);
    // Points come by index: among equal priorities the first stays.
    if (table[slot] == kVacant || (priority && priority[i] < priority[table[slot]])) table[slot] = uint32_t(i);
  }
  return table;
}

// Writes the indices of the chosen points to the front of `out`, ascending, and returns how many there are.
int64_t voxel_sample(const py::object& xyz_object, double size, const py::object& priority_object,
                     const py::object& out_object, int threads) {
  const auto xyz = span<const float>(xyz_object, "xyz", {kAny, 3});
  const int64_t n = xyz.shape(0);
  const auto out = span<int64_t>(out_object, "out", {n});
  if (!(size > 0.0 && std::isfinite(size))) throw std::invalid_argument("size must be positive and finite");
  if (n >= int64_t(kVacant)) throw std::invalid_argument("xyz has over 2^32 - 2 points");
  const int64_t* priority = nullptr;
  Span<const int64_t> priorities;
  if (!priority_object.is_none()) {
    priorities = span<const int64_t>(priority_object, "priority", {n});
    priority = priorities.data;
  }
  py::gil_scoped_release released;
  bool finite = true;
  for (int64_t i = 0; i < xyz.size; ++i) finite &= std::isfinite(xyz[i]);
  if (!finite) throw std::invalid_argument("xyz must be finite");
  std::vector<Cell> cells(static_cast<size_t>(n));
  std::atomic<bool> inside{true};
  parallel_for(threads, (n + kChunk - 1) / kChunk, [&](int64_t chunk) {
    const int64_t begin = chunk * kChunk;
    if (!cells_of(xyz.data, size, begin, std::min(n, begin + kChunk), cells.data())) inside = false;
  });
  if (!inside) throw std::invalid_argument("size is too small: xyz / size must stay within 2^62");
  std::vector<char> chosen(static_cast<size_t>(n));
  for (uint32_t i : choose(cells, priority)) {
    if (i != kVacant) chosen[i] = 1;
  }
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    out[count] = i;
    count += chosen[size_t(i)];
  }
  return count;
}

}  // namespace

void bind_voxels(py::module_& module) {
  module.def("voxel_sample", &voxel_sample, py::arg("xyz"), py::arg("size"), py::arg("priority"), py::arg("out"),
             py::arg("threads"),
             "Writes the lowest-priority point (int64 [P] or None, ties by index) of each occupied voxel of xyz\n"
             "float32 [P, 3] to the front of out int64 [P]; returns how many.");
}

}  // namespace wireframe
