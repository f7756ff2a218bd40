// Checks of every memory access of the emulated threads, and of what the language leaves undefined. The kernels are
// compiled with sanitizers but linked without their libraries: the compiler's calls end here.
#include <link.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "cuda_emulation.h"
#include "scheduler.h"

namespace emulation {
namespace {

// Who touched a unit of memory last. Two accesses of one launch are ordered only if they are of one block, in
// different epochs.
struct Access {
  uint64_t launch : 23, block : 16, epoch : 12, thread : 10;
  uint64_t atomic : 1;
  uint64_t many_threads : 1;  // reads: of this block and epoch
  uint64_t many_blocks : 1;   // reads: of this launch
};
static_assert(sizeof(Access) == 8 && kMaxBlocks <= 1 << 16 && kMaxEpochs <= 1 << 12, "fields that are wide enough");

struct Unit {
  Access write, read;
};

struct Region {
  uintptr_t begin, end;
  size_t unit;  // bytes: 4 where no element is smaller, else 1
  bool writable;
  bool written_before;  // an input
  std::vector<Unit> units;
};

enum class Checks : int { kNone, kBounds, kAll };
Checks checks = Checks::kAll;
std::vector<Region> regions;
Region shared_memory = {0, 0, 4, true, false, {}};
uintptr_t constants_begin = 0, constants_end = 0;

int find_module(dl_phdr_info* info, size_t, void*) {
  const auto self = reinterpret_cast<uintptr_t>(&find_module);
  uintptr_t begin = UINTPTR_MAX, end = 0, data_begin = 0, data_end = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    const uintptr_t first = info->dlpi_addr + header.p_vaddr, last = first + header.p_memsz;
    begin = std::min(begin, first);
    end = std::max(end, last);
    if (header.p_flags & PF_W) data_begin = first / 16 * 16, data_end = (last + 15) / 16 * 16;
  }
  if (self < begin || self >= end) return 0;
  // Shared memory is static, so it lies among the module's data.
  shared_memory.begin = data_begin, shared_memory.end = data_end;
  shared_memory.units.resize((data_end - data_begin) / shared_memory.unit);
  constants_begin = begin, constants_end = end;
  return 1;
}

Region* region_of(uintptr_t address) {
  static size_t last = 0;
  if (last < regions.size() && address >= regions[last].begin && address < regions[last].end) return &regions[last];
  if (shared_memory.end == 0) dl_iterate_phdr(find_module, nullptr);
  if (address >= shared_memory.begin && address < shared_memory.end) return &shared_memory;
  for (size_t i = 0; i < regions.size(); ++i) {
    if (address >= regions[i].begin && address < regions[i].end) return &regions[last = i];
  }
  return nullptr;
}

void outside(uintptr_t address, size_t size, bool write) {
  char where[32];
  snprintf(where, sizeof where, "%#llx", static_cast<unsigned long long>(address));
  std::string text = where;
  for (const Region& region : regions) {
    const std::string buffer = "a buffer of " + std::to_string(region.end - region.begin);
    if (address >= region.end && address - region.end < 4096) {
      text = std::to_string(address - region.end) + " bytes behind " + buffer;
    } else if (address < region.begin && region.begin - address <= 4096) {
      text = std::to_string(region.begin - address) + " bytes before " + buffer;
    }
  }
  fail((write ? "writes " : "reads ") + std::to_string(size) + " bytes outside the buffers, at " + text);
}

Access access_now(bool atomic) {
  Access access = {};
  access.launch = position.launch, access.block = position.block;
  access.epoch = position.epoch, access.thread = position.thread;
  access.atomic = atomic;
  return access;
}

bool same_launch(const Access& a, const Access& b) { return a.launch == b.launch; }

bool concurrent(const Access& before, const Access& access) {
  if (!same_launch(before, access)) return false;
  if (before.block != access.block || before.many_blocks) return true;
  return before.epoch == access.epoch && (before.thread != access.thread || before.many_threads);
}

void note_read(Access& read, Access access) {
  if (same_launch(read, access)) {
    access.many_blocks = read.many_blocks || read.block != access.block;
    const bool same_epoch = read.block == access.block && read.epoch == access.epoch;
    access.many_threads = same_epoch && (read.many_threads || read.thread != access.thread);
  }
  read = access;
}

[[noreturn]] void fail_race(const char* what, const char* kind, const Access& other, const char* what_other) {
  fail(std::string("race: ") + what + " " + kind + " memory that thread " + std::to_string(other.thread) +
       " of block " + std::to_string(other.block) + " " + what_other + ", without a barrier between");
}

void check_unit(Region& region, Unit& unit, const Access& access, bool write) {
  const bool shared = &region == &shared_memory;
  // The next block's shared memory is another one.
  const auto stale = [&](const Access& a) { return !same_launch(a, access) || a.block != access.block; };
  if (shared && stale(unit.write)) unit.write = {};
  if (shared && stale(unit.read)) unit.read = {};
  const char* kind = shared ? "shared" : "global";
  if ((!write || access.atomic) && unit.write.launch == 0 && !region.written_before) {
    fail(std::string("reads ") + kind + " memory that nobody has written");
  }
  if (concurrent(unit.write, access) && !(access.atomic && unit.write.atomic)) {
    fail_race(write ? "writes" : "reads", kind, unit.write, "writes");
  }
  if (write && concurrent(unit.read, access)) fail_race("writes", kind, unit.read, "reads");
  if (write) {
    unit.write = access;
  } else {
    note_read(unit.read, access);
  }
}

void add_region(uintptr_t begin, int64_t bytes, size_t element, bool writable, bool written_before) {
  if (bytes <= 0) return;
  const size_t unit = element >= 4 ? 4 : 1;
  regions.push_back({begin, begin + size_t(bytes), unit, writable, written_before, {}});
  regions.back().units.resize((size_t(bytes) + unit - 1) / unit);
}

}  // namespace

void piece(void* memory, int64_t bytes, size_t element) {
  memset(memory, 0xA5, size_t(bytes));
  add_region(reinterpret_cast<uintptr_t>(memory), bytes, element, true, false);
}

void undefined(const std::string& what) {
  if (in_thread && checks != Checks::kNone) fail(what);
}

void touch(const void* place, size_t size, bool write, bool atomic) {
  if (!in_thread || checks == Checks::kNone) return;
  const auto address = reinterpret_cast<uintptr_t>(place);
  const auto indices = reinterpret_cast<uintptr_t>(&now);
  if (on_a_stack(address) || (address >= indices && address < indices + sizeof now)) return;
  Region* region = region_of(address);
  if (!region) {
    if (!write && address >= constants_begin && address + size <= constants_end) return;
    outside(address, size, write);
  }
  if (address + size > region->end) outside(region->end, address + size - region->end, write);
  if (write && !region->writable) fail("writes an input");
  if (checks == Checks::kBounds) return;
  const Access access = access_now(atomic);
  const size_t first = (address - region->begin) / region->unit;
  const size_t last = (address + size - 1 - region->begin) / region->unit;
  for (size_t i = first; i <= last; ++i) check_unit(*region, region->units[i], access, write);
}

}  // namespace emulation

#define EXPORT __attribute__((visibility("default")))

#define ACCESSES(size)                                                                           \
  void __tsan_read##size(void* place) { emulation::touch(place, size, false, false); }           \
  void __tsan_write##size(void* place) { emulation::touch(place, size, true, false); }           \
  void __tsan_unaligned_read##size(void* place) { emulation::touch(place, size, false, false); } \
  void __tsan_unaligned_write##size(void* place) { emulation::touch(place, size, true, false); }

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(void* place, size_t size) { emulation::touch(place, size, false, false); }
void __tsan_write_range(void* place, size_t size) { emulation::touch(place, size, true, false); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

void __ubsan_handle_out_of_bounds(void*, void* index) {
  emulation::undefined("indexes an array at " + std::to_string(reinterpret_cast<intptr_t>(index)));
}
void __ubsan_handle_add_overflow(void*, void*, void*) { emulation::undefined("a sum overflows"); }
void __ubsan_handle_sub_overflow(void*, void*, void*) { emulation::undefined("a difference overflows"); }
void __ubsan_handle_mul_overflow(void*, void*, void*) { emulation::undefined("a product overflows"); }
void __ubsan_handle_negate_overflow(void*, void*) { emulation::undefined("a negation overflows"); }
void __ubsan_handle_divrem_overflow(void*, void*, void*) { emulation::undefined("a division has no result"); }
void __ubsan_handle_shift_out_of_bounds(void*, void*, void*) { emulation::undefined("a shift is too wide"); }
void __ubsan_handle_float_cast_overflow(void*, void*) { emulation::undefined("an integer cannot hold the number"); }

// 0 none: only what a kernel computes tells. 1 bounds. 2 races and what was never written too.
EXPORT void emulation_check(int checks) { emulation::checks = emulation::Checks(checks); }

EXPORT void emulation_forget_buffers() { emulation::regions.clear(); }

// An input that kernels may only read; element: bytes.
EXPORT void emulation_input(uint64_t address, int64_t bytes, size_t element) {
  emulation::add_region(address, bytes, element, false, true);
}

// What kernels have to write before they read it.
EXPORT void emulation_output(uint64_t address, int64_t bytes, size_t element) {
  emulation::add_region(address, bytes, element, true, false);
}
}
