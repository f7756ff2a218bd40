// SceneBatch.views and the cameras, checked against the maps they index.
#pragma once

#include <stdexcept>
#include <string>

#include "../point_math.h"
#include "buffers.h"

namespace wireframe {

struct ViewTable {
  Span<const int64_t> rows;
  int64_t size;

  const ViewRow& operator[](int64_t view) const { return reinterpret_cast<const ViewRow*>(rows.data)[view]; }
};

static_assert(sizeof(ViewRow) == 8 * sizeof(int64_t), "a row of the table is eight int64");

namespace detail {

// Whether a map ends within the `size` elements of all; begin is within them.
inline bool fits(int64_t height, int64_t width, int64_t begin, int64_t size) {
  constexpr int64_t most = int64_t(1) << 31;
  return height < most && width < most && height * width <= size - begin;
}

}  // namespace detail

// labels, depth: elements of the maps (0 where the operation does not read them and `reads_*` is false). The maps follow
// one another, those without a pixel too: maps that overlapped would be written by several threads at once.
inline ViewTable view_table(const py::object& views, int64_t scenes, bool reads_labels, int64_t labels, bool reads_depth,
                            int64_t depth) {
  ViewTable table{span<const int64_t>(views, "views", {kAny, 8}), 0};
  table.size = table.rows.shape(0);
  int64_t scene = 0, next_labels = 0, next_depth = 0;
  for (int64_t v = 0; v < table.size; ++v) {
    const ViewRow& row = table[v];
    const bool sized = row.height > 0 && row.width > 0 && row.depth_height >= 0 && row.depth_width >= 0 &&
                       (row.depth_height > 0) == (row.depth_width > 0) && row.index >= 0;
    const bool placed = sized && (!reads_labels || detail::fits(row.height, row.width, next_labels, labels)) &&
                        (!reads_depth || detail::fits(row.depth_height, row.depth_width, next_depth, depth));
    const bool follows = (!reads_labels || row.labels == next_labels) && (!reads_depth || row.depth == next_depth);
    const bool ordered = row.scene >= scene && row.scene < scenes;
    if (!sized || !placed || !follows || !ordered) {
      throw std::invalid_argument("views: row " + std::to_string(v) +
                                  (!sized     ? " has an impossible size or index"
                                   : !placed  ? " lies outside the maps"
                                   : !follows ? " does not begin where the maps before it end"
                                              : " names a scene out of order or outside the batch"));
    }
    scene = row.scene;
    if (reads_labels) next_labels += row.height * row.width;
    if (reads_depth) next_depth += row.depth_height * row.depth_width;
  }
  return table;
}

struct Cameras {
  Span<const float> K, R, t;

  Camera operator[](int64_t view) const { return load_camera(K.data + 9 * view, R.data + 9 * view, t.data + 3 * view); }
};

inline Cameras cameras(const py::object& K, const py::object& R, const py::object& t, int64_t views) {
  return {span<const float>(K, "K", {views, 3, 3}), span<const float>(R, "R", {views, 3, 3}),
          span<const float>(t, "t", {views, 3})};
}

// int64 [B + 1], from 0 to `size`, not decreasing.
inline Span<const int64_t> offsets_to(const py::object& object, const char* name, int64_t size) {
  auto offsets = span<const int64_t>(object, name, {kAny});
  bool good = offsets.size > 0 && offsets[0] == 0 && offsets[offsets.size - 1] == size;
  for (int64_t i = 1; good && i < offsets.size; ++i) good = offsets[i] >= offsets[i - 1];
  if (!good) throw std::invalid_argument(std::string(name) + " must not decrease and must go from 0 to " + std::to_string(size));
  return offsets;
}

inline LabelTables label_tables(const Span<const uint8_t>& tables) {
  int named = 0, occluders = 0;
  for (int id = 0; id < 256; ++id) {
    named += tables[256 + id] != 0;
    occluders += tables[512 + id] == 2;
  }
  if (named + occluders > kMaxDistinct) {
    throw std::invalid_argument("tables: more than " + std::to_string(kMaxDistinct) + " classes can be voted for");
  }
  return {tables.data};
}

}  // namespace wireframe
