// Between the scheduler of the emulated threads and the checks of their memory.
#pragma once

#include <cstdint>
#include <string>

namespace emulation {

// Where a thread stands: memory accesses of one block are ordered by its barriers, those of two blocks by nothing.
struct Position {
  uint32_t launch;  // from 1
  uint32_t block;
  uint32_t epoch;  // barriers that the block has passed
  uint32_t thread;
};

constexpr uint32_t kMaxBlocks = 1 << 16, kMaxEpochs = 1 << 12;

extern bool in_thread;  // an emulated thread runs
extern Position position;

// Ends the launch with this error. Called by an emulated thread.
[[noreturn]] void fail(const std::string& what);

bool on_a_stack(uintptr_t address);

// Checks an access of the running thread.
void touch(const void* address, size_t size, bool write, bool atomic);

}  // namespace emulation
