// Colour-coded label maps to class ids (wireframe/classes.py).
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "../point_math.h"
#include "buffers.h"
#include "pool.h"

namespace wireframe {
namespace {

constexpr int64_t kChunkPixels = 1 << 16;
constexpr int64_t kBlock = 16;  // pixels

uint32_t packed(const uint8_t* rgb) { return uint32_t(rgb[0]) << 16 | uint32_t(rgb[1]) << 8 | rgb[2]; }

// Ids by colour: open addressing, at most a quarter full.
class ColorTable {
 public:
  ColorTable(const uint8_t* colors, int64_t count) {
    std::fill_n(color_, kSlots, kFree);
    for (int64_t id = 0; id < count; ++id) {
      const uint32_t color = packed(colors + 3 * id);
      const uint32_t slot = slot_of(color);
      // Colours that two classes share go to the later class.
      color_[slot] = color, id_[slot] = uint8_t(id);
    }
  }

  uint8_t id(uint32_t color) const {
    const uint32_t slot = slot_of(color);
    return color_[slot] == kFree ? uint8_t(kUnknown) : id_[slot];
  }

 private:
  static constexpr uint32_t kSlots = 1024;
  static constexpr uint32_t kFree = 1u << 24;  // no colour

  uint32_t slot_of(uint32_t color) const {
    uint32_t slot = (color * 0x9E3779B1u) >> 22;
    while (color_[slot] != color && color_[slot] != kFree) slot = (slot + 1) % kSlots;
    return slot;
  }

  uint32_t color_[kSlots];
  uint8_t id_[kSlots];
};

// Whether a block of pixels has the colour of the pixel before it.
bool continues(const uint8_t* rgb) {
  uint64_t difference = 0;
  for (int64_t i = 0; i < 3 * kBlock; i += 8) {
    uint64_t here, before;
    std::memcpy(&here, rgb + i, 8);
    std::memcpy(&before, rgb + i - 3, 8);
    difference |= here ^ before;
  }
  return difference == 0;
}

// Label maps are long runs of one colour, so the table is asked at their beginnings alone.
void label(const uint8_t* rgb, int64_t pixels, const ColorTable& table, uint8_t* ids) {
  uint32_t color = 0;
  uint8_t id = table.id(color);
  for (int64_t i = 0; i < pixels;) {
    if (i > 0 && pixels - i >= kBlock && continues(rgb + 3 * i)) {
      std::memset(ids + i, id, kBlock);
      i += kBlock;
      continue;
    }
    const int64_t stop = std::min(pixels, i + kBlock);
    for (; i < stop; ++i) {
      const uint32_t next = packed(rgb + 3 * i);
      if (next != color) color = next, id = table.id(color);
      ids[i] = id;
    }
  }
}

void colors_to_ids(const py::object& image_object, const py::object& colors_object, const py::object& ids_object,
                   int threads) {
  const auto image = span<const uint8_t>(image_object, "image", {kAny, 3});
  const auto colors = span<const uint8_t>(colors_object, "colors", {kAny, 3});
  const auto ids = span<uint8_t>(ids_object, "ids", {image.shape(0)});
  if (colors.shape(0) > kUnknown) throw std::invalid_argument("colors must be at most 255");
  py::gil_scoped_release release;
  const ColorTable table(colors.data, colors.shape(0));
  parallel_for(threads, (ids.size + kChunkPixels - 1) / kChunkPixels, [&](int64_t chunk) {
    const int64_t first = chunk * kChunkPixels;
    label(image.data + 3 * first, std::min(kChunkPixels, ids.size - first), table, ids.data + first);
  });
}

}  // namespace

void bind_colors(py::module_& module) {
  module.def("colors_to_ids", &colors_to_ids, py::arg("image"), py::arg("colors"), py::arg("ids"), py::arg("threads"),
             "ids [N] of the pixels of image [N, 3]: the last position of their colour in colors [C, 3], or 255.");
}

}  // namespace wireframe
