// The house mask of label maps (reference: wireframe/depth.py).
#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "pool.h"
#include "view_table.h"

namespace wireframe {
namespace {

// ORs windows of 1, 2, 4, ... elements, at `stride`, until each holds `window` of them; count = elements of the result.
void widen(uint8_t* data, int64_t window, int64_t stride, int64_t count) {
  // What lies behind the result is still read while the windows grow.
  for (int64_t have = 1; have < window;) {
    const int64_t step = std::min(have, window - have);
    const int64_t rest = count + (window - have - step) * stride;
    const uint8_t* ahead = data + step * stride;
    // Reading ahead of the writes is no obstacle to vectors.
#pragma GCC ivdep
    for (int64_t i = 0; i < rest; ++i) data[i] = uint8_t(data[i] | ahead[i]);
    have += step;
  }
}

// house[x] = 1 where a row of labels shows the house. Maps are patches of one label: a word of eight pixels like the last
// is not looked up.
void mark_house(const uint8_t* gestalt, int64_t width, const LabelTables& tables, uint8_t* house) {
  constexpr int64_t step = sizeof(uint64_t);
  uint8_t marks[step];
  std::fill_n(marks, step, uint8_t(tables.in_house(0)));
  uint64_t last = 0;
  int64_t x = 0;
  for (; x + step <= width; x += step) {
    uint64_t word;
    std::memcpy(&word, gestalt + x, step);
    if (word != last) {
      last = word;
      for (int64_t i = 0; i < step; ++i) marks[i] = tables.in_house(gestalt[x + i]);
    }
    std::memcpy(house + x, marks, step);
  }
  for (; x < width; ++x) house[x] = tables.in_house(gestalt[x]);
}

void mask_of(const uint8_t* gestalt, int64_t height, int64_t width, const LabelTables& tables, int64_t radius, bool* out) {
  // Beyond the map's own size a larger box changes nothing.
  const int64_t across = std::min(radius, width), down = std::min(radius, height);
  std::vector<uint8_t> rows(size_t((height + 2 * down) * width)), line(size_t(width + 2 * across));
  for (int64_t y = 0; y < height; ++y) {
    std::fill(line.begin(), line.end(), uint8_t(0));
    mark_house(gestalt + y * width, width, tables, line.data() + across);
    widen(line.data(), 2 * across + 1, 1, width);
    std::copy_n(line.begin(), width, rows.begin() + (down + y) * width);
  }
  widen(rows.data(), 2 * down + 1, width, height * width);
  for (int64_t i = 0; i < height * width; ++i) out[i] = rows[size_t(i)] != 0;
}

}  // namespace

void bind_mask(py::module_& module) {
  module.def(
      "house_mask",
      [](const py::object& gestalt, const py::object& views, const py::object& tables, int64_t radius,
         const py::object& out, int threads) {
        const auto maps = span<const uint8_t>(gestalt, "gestalt", {kAny});
        const ViewTable table = view_table(views, std::numeric_limits<int64_t>::max(), true, maps.size, false, 0);
        const auto table_data = span<const uint8_t>(tables, "tables", {7, 256});
        const auto mask = span<bool>(out, "out", {maps.size});
        if (radius < 0) throw std::invalid_argument("radius must not be negative, got " + std::to_string(radius));
        const LabelTables lookup = label_tables(table_data);
        py::gil_scoped_release release;
        parallel_for(threads, table.size, [&](int64_t v) {
          const ViewRow& view = table[v];
          mask_of(maps.data + view.labels, view.height, view.width, lookup, radius, mask.data + view.labels);
        });
      },
      py::arg("gestalt"), py::arg("views"), py::arg("tables"), py::arg("radius"), py::arg("out"), py::arg("threads"));
}

}  // namespace wireframe
