// Kernels with one mistake each, which the emulation must find.
#include <cstring>

#include "cuda/launch.h"

namespace {

constexpr int kBlock = 64;

// Each thread adds its neighbour's number.
__global__ void neighbour_kernel(unsigned* out) {
  __shared__ unsigned numbers[kBlock];
  numbers[threadIdx.x] = threadIdx.x * threadIdx.x;
  __syncthreads();
  out[blockIdx.x * kBlock + threadIdx.x] = numbers[(threadIdx.x + 1) % kBlock];
}

__global__ void no_barrier_kernel(unsigned* out) {
  __shared__ unsigned numbers[kBlock];
  numbers[threadIdx.x] = threadIdx.x * threadIdx.x;
  out[blockIdx.x * kBlock + threadIdx.x] = numbers[(threadIdx.x + 1) % kBlock];
}

// The loop comes round to what others still read.
__global__ void no_second_barrier_kernel(unsigned* out) {
  __shared__ unsigned numbers[kBlock];
  unsigned sum = 0;
  for (unsigned round = 0; round < 2; ++round) {
    numbers[threadIdx.x] = threadIdx.x + round;
    __syncthreads();
    sum += numbers[(threadIdx.x + 1) % kBlock];
  }
  out[blockIdx.x * kBlock + threadIdx.x] = sum;
}

__global__ void blocks_race_kernel(unsigned* out) { out[threadIdx.x] = blockIdx.x; }

// No race, but which thread gets which place is left to chance.
__global__ void unordered_kernel(unsigned* out) {
  __shared__ unsigned places;
  if (threadIdx.x == 0) places = 0;
  __syncthreads();
  out[blockIdx.x * kBlock + atomicAdd(&places, 1u)] = threadIdx.x;
}

__global__ void ended_kernel(unsigned* out) {
  if (threadIdx.x == 7) return;
  __syncthreads();
  out[blockIdx.x * kBlock + threadIdx.x] = 1;
}

__global__ void two_barriers_kernel(unsigned* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[blockIdx.x * kBlock + threadIdx.x] = 1;
}

__global__ void outside_kernel(unsigned* out) { out[blockIdx.x * kBlock + threadIdx.x + 1] = 1; }

__global__ void before_kernel(unsigned* out) { out[int(blockIdx.x * kBlock + threadIdx.x) - 1] = 1; }

__global__ void shared_index_kernel(unsigned* out) {
  __shared__ unsigned numbers[kBlock];
  numbers[threadIdx.x + 1] = 1;
  __syncthreads();
  out[blockIdx.x * kBlock + threadIdx.x] = numbers[threadIdx.x];
}

__global__ void shift_kernel(unsigned* out) { out[blockIdx.x * kBlock + threadIdx.x] = 1u << (threadIdx.x + 1); }

__global__ void unwritten_kernel(unsigned* out) {
  __shared__ unsigned numbers[kBlock];
  if (threadIdx.x > 0) numbers[threadIdx.x] = 1;
  __syncthreads();
  out[blockIdx.x * kBlock + threadIdx.x] = numbers[threadIdx.x];
}

__global__ void unwritten_output_kernel(unsigned* out) { ++out[blockIdx.x * kBlock + threadIdx.x]; }

struct Toy {
  const char* name;
  void (*kernel)(unsigned*);
};

const Toy kToys[] = {
    {"neighbour", neighbour_kernel},
    {"no_barrier", no_barrier_kernel},
    {"no_second_barrier", no_second_barrier_kernel},
    {"blocks_race", blocks_race_kernel},
    {"unordered", unordered_kernel},
    {"ended", ended_kernel},
    {"two_barriers", two_barriers_kernel},
    {"outside", outside_kernel},
    {"before", before_kernel},
    {"shared_index", shared_index_kernel},
    {"shift", shift_kernel},
    {"unwritten", unwritten_kernel},
    {"unwritten_output", unwritten_output_kernel},
};

}  // namespace

// Two blocks of 64 threads on out [128]; the error as text, empty where there is none.
extern "C" __attribute__((visibility("default"))) void emulation_toy(const char* name, unsigned* out, char* error,
                                                                     size_t size) {
  error[0] = 0;
  try {
    for (const Toy& toy : kToys) {
      if (strcmp(toy.name, name) == 0) wireframe::Launcher("toy", 0, nullptr)(toy.kernel, 2, kBlock, out);
    }
  } catch (const std::exception& problem) {
    strncat(error, problem.what(), size - 1);
  }
}
