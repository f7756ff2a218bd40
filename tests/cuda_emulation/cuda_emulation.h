// Enough of CUDA to run the kernels of csrc/cuda on the CPU: they are compiled as C++ with this header in place of
// cuda_runtime.h. Blocks run one after another and the threads of a block as fibers, in an order that the test
// chooses; a thread runs until it ends or reaches a barrier. What a kernel may not do is an error of the launch: a
// barrier that some threads reach and others do not, two threads that touch the same memory without a barrier between
// them (one of them writing, not both atomically), an access outside the buffers, a read of what nobody has written.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// Blocks do not overlap in time, so one copy serves them all.
#define __shared__ static
#define threadIdx ::emulation::now.thread
#define blockIdx ::emulation::now.block
#define blockDim ::emulation::now.block_size
#define gridDim ::emulation::now.grid_size
#define __syncthreads() ::emulation::barrier(__FILE__, __LINE__)

namespace emulation {

struct Index {
  unsigned x;
};

// Of the thread that runs.
struct Now {
  Index thread, block, block_size, grid_size;
};
extern Now now;

void barrier(const char* file, int line);

// A piece of a workspace, not yet written, of elements of so many bytes.
void piece(void* memory, int64_t bytes, size_t element);

// Runs thread(context) for every thread of every block. Throws std::runtime_error.
void run(const char* name, void (*thread)(void*), void* context, int64_t blocks, int threads);

template <class Body>
void launch(const char* name, Body body, int64_t blocks, int threads) {
  run(name, [](void* context) { (*static_cast<Body*>(context))(); }, &body, blocks, threads);
}

}  // namespace emulation

int atomicAdd(int* place, int value);
unsigned atomicAdd(unsigned* place, unsigned value);
unsigned long long atomicMin(unsigned long long* place, unsigned long long value);
