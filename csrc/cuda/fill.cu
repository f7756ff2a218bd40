// Sets words of a workspace.
#include "fill.h"

namespace wireframe {
namespace {

constexpr int64_t kWordsPerBlock = 4096;

__global__ void __launch_bounds__(kThreads) fill_kernel(unsigned* words, int64_t count, unsigned value) {
  const int64_t first = blockIdx.x * kWordsPerBlock;
  const int64_t last = first + kWordsPerBlock < count ? first + kWordsPerBlock : count;
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads) words[i] = value;
}

}  // namespace

void fill(const Launcher& launch, unsigned* words, int64_t count, unsigned value) {
  launch(fill_kernel, (count + kWordsPerBlock - 1) / kWordsPerBlock, kThreads, words, count, value);
}

}  // namespace wireframe
