// How the host starts kernels: checked launches, parts of segments, pieces of the caller's workspace.
#pragma once

#if defined(WIREFRAME_EMULATE)
// tests/cuda_emulation: the same source, compiled for the CPU.
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../point_math.h"

namespace wireframe {

constexpr int kThreads = 256;

// A segment (a view, a scene) is cut into equal parts, one block each. How many follows from the sizes of the buffers
// alone: the true sizes of the segments are on the device, and the host does not wait for them.
constexpr int64_t kPixelsPerBlock = 4096;
// One scene fills a GPU.
constexpr int64_t kPointsPerBlock = 1024;
constexpr int64_t kMaxParts = 1024;

inline int parts_for(int64_t elements, int64_t segments, int64_t per_block) {
  if (segments <= 0) return 1;
  const int64_t parts = (elements + segments * per_block - 1) / (segments * per_block);
  return int(parts < 1 ? 1 : parts > kMaxParts ? kMaxParts : parts);
}

// Starts the kernels of one operation on a stream, and throws where a launch is refused.
class Launcher {
 public:
  Launcher(const char* operation, int device, void* stream) : operation_(operation), stream_(stream) {
#if defined(WIREFRAME_EMULATE)
    (void)device;
#else
    check(cudaSetDevice(device));
#endif
  }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, Arguments... arguments) const {
    if (blocks <= 0) return;
    if (blocks > INT32_MAX) throw std::invalid_argument(std::string(operation_) + ": too large for one launch");
#if defined(WIREFRAME_EMULATE)
    emulation::launch(operation_, [&] { kernel(arguments...); }, blocks, threads);
#else
    kernel<<<unsigned(blocks), unsigned(threads), 0, static_cast<cudaStream_t>(stream_)>>>(arguments...);
    check(cudaGetLastError());
#endif
  }

 private:
#if !defined(WIREFRAME_EMULATE)
  void check(cudaError_t status) const {
    if (status != cudaSuccess) throw std::runtime_error(std::string(operation_) + ": " + cudaGetErrorString(status));
  }
#endif

  const char* operation_;
  void* stream_;
};

// Hands out pieces of the caller's workspace. Without one it only adds up what they need.
class Workspace {
 public:
  Workspace() = default;
  Workspace(uint8_t* base, int64_t bytes) : base_(base), bytes_(bytes) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    const int64_t bytes = count * int64_t(sizeof(T));
#if defined(WIREFRAME_EMULATE)
    if (base_ && used_ + bytes <= bytes_) emulation::piece(piece, bytes, sizeof(T));
#endif
    // Never without a gap, so that the emulation sees what runs over the end of a piece.
    used_ += (bytes / kAlignment + 1) * kAlignment;
    return piece;
  }

  int64_t used() const { return used_; }

  void check(const char* operation) const {
    if (used_ > bytes_) {
      throw std::invalid_argument(std::string(operation) + ": workspace must have " + std::to_string(used_) +
                                  " bytes, got " + std::to_string(bytes_));
    }
  }

 private:
  static constexpr int64_t kAlignment = 256;
  uint8_t* base_ = nullptr;
  int64_t bytes_ = 0;
  int64_t used_ = 0;
};

}  // namespace wireframe
