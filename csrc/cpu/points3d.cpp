// COLMAP's points3D.txt and points3D.bin (wireframe/colmap.py): the coordinates of the points in file order.
//
// Nothing but the usual is read here. What is unusual (a number with underscores or out of range, a line without
// three numbers, a file cut short) is handed back, and the reference reads the file or says what is wrong with it: so
// both accept the same files and give the same values and messages.
#include <algorithm>
#include <atomic>
#include <charconv>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "buffers.h"
#include "pool.h"

namespace wireframe {
namespace {

// Positions in the file, not threads, divide the work.
constexpr int64_t kChunkBytes = 256 << 10;

constexpr int64_t kUnusual = -1;

// The lines that begin in one chunk.
struct Lines {
  std::vector<float> xyz;
  int64_t newlines = 0;
  bool usual = true;
};

// As in Python's bytes.split().
bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

const char* skip_spaces(const char* at, const char* end) {
  while (at < end && is_space(*at)) ++at;
  return at;
}

const char* skip_word(const char* at, const char* end) {
  while (at < end && !is_space(*at)) ++at;
  return at;
}

// Little-endian, as every platform of this extension: the first byte is the lowest.
template <class T>
T load(const void* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

constexpr int kMaxDigits = 19;  // below 2^64
constexpr double kPowers[kMaxDigits + 1] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,
                                            1e10, 1e11, 1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19};
constexpr float kSigns[2] = {1.0f, -1.0f};
constexpr uint64_t kWholePowers[9] = {1, 10, 100, 1000, 10000, 100000, 1000000, 10000000, 100000000};

constexpr uint64_t repeated(uint64_t byte) { return byte * 0x0101010101010101u; }

// The number with these eight digits (bytes 0 to 9, the lowest byte the first digit).
uint64_t from_digits(uint64_t digits) {
  const uint64_t pairs = digits * 10 + (digits >> 8);
  const uint64_t high = (pairs & 0x000000FF000000FFu) * (100 + (1000000ull << 32));
  const uint64_t low = ((pairs >> 16) & 0x000000FF000000FFu) * (1 + (10000ull << 32));
  return (high + low) >> 32;
}

// Both append the digits at `at` to *value and return where they end. This one suits the one or two digits before a
// point, whose number the processor predicts.
const char* read_few_digits(const char* at, const char* end, uint64_t* value) {
  for (; at < end && *at >= '0' && *at <= '9'; ++at) *value = 10 * *value + uint64_t(*at - '0');
  return at;
}

// This one takes eight characters at a time.
const char* read_many_digits(const char* at, const char* end, const char* file_end, uint64_t* value) {
  while (file_end - at >= 8) {
    const uint64_t bytes = load<uint64_t>(at) ^ repeated('0');
    // Marks what is no digit. The lowest mark is right; a carry may blur those above it.
    const uint64_t others = ((bytes + repeated(0x80 - 10)) | bytes) & repeated(0x80);
    if (others & 0x80) return at;
    const int count = others ? __builtin_ctzll(others) / 8 : 8;
    *value = *value * kWholePowers[count] + from_digits(bytes << (64 - 8 * count));
    at += count;
    if (count < 8) return at;
  }
  return read_few_digits(at, end, value);
}

// Whether all doubles within 4 units in the last place of `value` round to the same float: the midpoint between two
// floats, where the low 29 bits are 2^28, is not that near.
bool rounds_surely(double value) {
  const uint64_t low = load<uint64_t>(&value) & ((1u << 29) - 1);
  return low < (1u << 28) - 4 || low > (1u << 28) + 4;
}

// Reads the next word as a decimal number, rounded to double and then to float. Returns where it ends, or nullptr if
// it is no number that a float holds.
const char* read_number(const char* at, const char* end, const char* file_end, float* number) {
  at = skip_spaces(at, end);
  if (at == end) return nullptr;
  const bool negative = *at == '-';
  // Signs cannot be predicted, so nothing branches on them.
  const char* const first = at + int(negative | (*at == '+'));
  uint64_t digits = 0;
  at = read_few_digits(first, end, &digits);
  int64_t count = at - first, decimals = 0;
  if (at < end && *at == '.') {
    const char* const point = at + 1;
    at = read_many_digits(point, end, file_end, &digits);
    decimals = at - point;
    count += decimals;
  }
  // Keeps out inf, nan and a second sign.
  if (count == 0) return nullptr;
  if (count <= kMaxDigits && (at == end || is_space(*at))) {
    // Two roundings bring it within 2 units of the text, which is within half a unit of the nearest double.
    const double size = double(digits) / kPowers[decimals];
    if (rounds_surely(size)) {
      *number = kSigns[negative] * float(size);
      return at;
    }
  }
  double size;
  const auto [stop, problem] = std::from_chars(first, end, size);
  if (problem != std::errc() || (stop < end && !is_space(*stop))) return nullptr;
  *number = kSigns[negative] * float(size);
  return std::isfinite(*number) ? stop : nullptr;
}

// Appends the point of a line, if it has one. False where the line is not "id X Y Z ...".
bool read_line(const char* at, const char* end, const char* file_end, std::vector<float>* xyz) {
  at = skip_spaces(at, end);
  if (at == end || *at == '#') return true;
  at = skip_word(at, end);
  float point[3];
  for (float& coordinate : point) {
    at = read_number(at, end, file_end, &coordinate);
    if (!at) return false;
  }
  xyz->insert(xyz->end(), point, point + 3);
  return true;
}

const char* find_newline(const char* at, const char* end) {
  const void* found = at < end ? std::memchr(at, '\n', size_t(end - at)) : nullptr;
  return found ? static_cast<const char*>(found) : end;
}

const char* after(const char* newline, const char* end) { return newline < end ? newline + 1 : end; }

Lines read_chunk(const char* data, int64_t size, int64_t chunk) {
  Lines lines;
  const char* const end = data + size;
  const char* const limit = data + std::min(size, (chunk + 1) * kChunkBytes);
  const char* at = data + chunk * kChunkBytes;
  // A line that began before belongs to an earlier chunk. The search stops at the limit: one line may fill the file.
  if (chunk > 0) at = after(find_newline(at - 1, limit), limit);
  while (at < limit) {
    const char* stop = find_newline(at, end);
    lines.usual = read_line(at, stop, end, &lines.xyz);
    if (!lines.usual) break;
    lines.newlines += stop < end;
    at = after(stop, end);
  }
  return lines;
}

int64_t parse_points3d(const py::object& data_object, int64_t max_newlines, const py::object& out_object,
                       int threads) {
  const auto data = span<const uint8_t>(data_object, "data", {kAny});
  const auto out = span<float>(out_object, "out", {kAny, 3});
  py::gil_scoped_release release;
  const char* text = reinterpret_cast<const char*>(data.data);
  const int64_t chunks = (data.size + kChunkBytes - 1) / kChunkBytes;
  std::vector<Lines> parts{size_t(chunks)};
  std::atomic<int64_t> newlines{0};
  parallel_for(threads, chunks, [&](int64_t chunk) {
    // Beyond the cap nothing more is read: memory stays bounded.
    if (newlines > max_newlines) return;
    parts[size_t(chunk)] = read_chunk(text, data.size, chunk);
    newlines += parts[size_t(chunk)].newlines;
  });
  if (newlines > max_newlines) return kUnusual;
  int64_t filled = 0;
  for (const Lines& part : parts) {
    if (!part.usual) return kUnusual;
    const int64_t length = int64_t(part.xyz.size());
    if (length > out.size - filled) throw std::invalid_argument("out is too small");
    std::copy(part.xyz.begin(), part.xyz.end(), out.data + filled);
    filled += length;
  }
  return filled / 3;
}

// A point: id u64, X Y Z f64, R G B u8, error f64, track length u64, then (image id, point index) u32 pairs.
constexpr int64_t kPointBytes = 51, kTrackBytes = 8;

int64_t parse_points3d_binary(const py::object& data_object, int64_t max_points, const py::object& out_object) {
  const auto data = span<const uint8_t>(data_object, "data", {kAny});
  const auto out = span<float>(out_object, "out", {kAny, 3});
  py::gil_scoped_release release;
  if (data.size < 8) return kUnusual;
  const uint64_t count = load<uint64_t>(data.data);
  if (count > uint64_t(data.size / kPointBytes) || int64_t(count) > max_points) return kUnusual;
  if (int64_t(count) > out.shape(0)) throw std::invalid_argument("out is too small");
  const uint8_t* at = data.data + 8;
  const uint8_t* const end = data.data + data.size;
  for (int64_t i = 0; i < 3 * int64_t(count); i += 3) {
    if (end - at < kPointBytes) return kUnusual;
    for (int axis = 0; axis < 3; ++axis) {
      out[i + axis] = float(load<double>(at + 8 + 8 * axis));
      if (!std::isfinite(out[i + axis])) return kUnusual;
    }
    const uint64_t track = load<uint64_t>(at + 43);
    at += kPointBytes;
    if (track > uint64_t((end - at) / kTrackBytes)) return kUnusual;
    at += int64_t(track) * kTrackBytes;
  }
  return at == end ? int64_t(count) : kUnusual;
}

}  // namespace

void bind_points3d(py::module_& module) {
  module.def("parse_points3d", &parse_points3d, py::arg("data"), py::arg("max_newlines"), py::arg("out"),
             py::arg("threads"),
             "Fills the front of out; the number of points, or -1 where the reference has to read.");
  module.def("parse_points3d_binary", &parse_points3d_binary, py::arg("data"), py::arg("max_points"), py::arg("out"),
             "Like parse_points3d.");
}

}  // namespace wireframe
