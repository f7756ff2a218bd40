// The threads of a block as fibers. A fiber runs one thread after another for as long as none waits at a barrier, so
// a kernel without barriers costs one fiber; a thread that waits keeps its fiber, and another one goes on with the
// rest.
#include <pthread.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "cuda_emulation.h"
#include "scheduler.h"

namespace emulation {

Now now;
bool in_thread = false;
Position position;

namespace {

constexpr size_t kStack = 64 * 1024;
constexpr size_t kMaxThreads = 1024;

enum class Order : int { kAscending, kDescending, kShuffled };
Order order = Order::kAscending;
uint64_t random_state = 0;

struct Fiber {
  void* resume[5];  // of __builtin_setjmp
  bool started;
  bool waiting;
  uint32_t thread;
  const char* file;
  int line;
};

std::vector<Fiber> fibers;
char* stacks = nullptr;
uintptr_t main_stack_begin = 0, main_stack_end = 0;

void* back_to_scheduler[5];
Fiber* running = nullptr;

// The launch.
void (*thread_body)(void*);
void* thread_context;
std::string error;

// The block.
std::vector<uint32_t> threads_to_start;
size_t started = 0, ended = 0;

uint64_t random_number() {
  random_state += 0x9E3779B97F4A7C15ull;
  uint64_t x = random_state;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

template <class T>
void arrange(std::vector<T>& items) {
  if (order == Order::kDescending) std::reverse(items.begin(), items.end());
  if (order == Order::kShuffled) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random_number() % i]);
  }
}

// The builtins leave signal masks alone and no sanitizer intercepts them. A jump and the place it leads to may not be
// in one function.
[[noreturn, gnu::noinline]] void jump(void** to) { __builtin_longjmp(to, 1); }

[[gnu::noinline]] void leave_fiber() {
  in_thread = false;
  if (__builtin_setjmp(running->resume) == 0) jump(back_to_scheduler);
}

void enter_thread(uint32_t thread) {
  now.thread.x = position.thread = thread;
  in_thread = true;
}

void fiber_main() {
  for (;;) {
    while (started < threads_to_start.size()) {
      running->thread = threads_to_start[started++];
      enter_thread(running->thread);
      thread_body(thread_context);
      in_thread = false;
      ++ended;
    }
    running->waiting = false;
    leave_fiber();
  }
}

[[gnu::noinline]] void start_fiber(Fiber& fiber) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stacks + size_t(&fiber - fibers.data()) * kStack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

// Runs the fiber until its thread waits or there is no thread left to run.
[[gnu::noinline]] void run_fiber(Fiber* fiber) {
  running = fiber;
  if (__builtin_setjmp(back_to_scheduler) == 0) {
    if (fiber->started) {
      if (fiber->waiting) enter_thread(fiber->thread);
      jump(fiber->resume);
    }
    fiber->started = true;
    start_fiber(*fiber);
  }
}

std::string place_of(const Fiber& fiber) {
  return "thread " + std::to_string(fiber.thread) + " waits at " + fiber.file + ":" + std::to_string(fiber.line);
}

// All threads of the block must wait at the same barrier.
void check_barrier(const std::vector<Fiber*>& waiting) {
  if (ended > 0) {
    error = "barrier divergence: " + place_of(*waiting[0]) + ", " + std::to_string(ended) + " threads have ended";
  }
  for (const Fiber* fiber : waiting) {
    if (fiber->line != waiting[0]->line || std::string(fiber->file) != waiting[0]->file) {
      error = "barrier divergence: " + place_of(*waiting[0]) + ", " + place_of(*fiber);
    }
  }
}

void run_block(int threads) {
  threads_to_start.clear();
  for (int i = 0; i < threads; ++i) threads_to_start.push_back(uint32_t(i));
  arrange(threads_to_start);
  started = ended = 0;
  position.epoch = 0;
  std::vector<Fiber*> waiting;
  while (started < threads_to_start.size() && error.empty()) {
    Fiber* fiber = &fibers[waiting.size()];
    run_fiber(fiber);
    if (fiber->waiting) waiting.push_back(fiber);
  }
  while (!waiting.empty() && error.empty()) {
    check_barrier(waiting);
    if (++position.epoch == kMaxEpochs) error = "more barriers than the emulation can count";
    arrange(waiting);
    std::vector<Fiber*> still;
    for (size_t i = 0; i < waiting.size() && error.empty(); ++i) {
      run_fiber(waiting[i]);
      if (waiting[i]->waiting) still.push_back(waiting[i]);
    }
    waiting = std::move(still);
  }
}

void prepare() {
  if (stacks) return;
  void* memory =
      mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stacks of the emulated threads");
  stacks = static_cast<char*>(memory);
  fibers.resize(kMaxThreads);
}

void find_main_stack() {
  static pthread_t owner;
  if (main_stack_end != 0 && pthread_equal(owner, pthread_self())) return;
  owner = pthread_self();
  pthread_attr_t attributes;
  void* begin = nullptr;
  size_t size = 0;
  if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
    pthread_attr_getstack(&attributes, &begin, &size);
    pthread_attr_destroy(&attributes);
  }
  main_stack_begin = reinterpret_cast<uintptr_t>(begin);
  main_stack_end = main_stack_begin + size;
}

}  // namespace

void barrier(const char* file, int line) {
  running->file = file;
  running->line = line;
  running->waiting = true;
  leave_fiber();
}

void fail(const std::string& what) {
  error = what + " (block " + std::to_string(position.block) + ", thread " + std::to_string(position.thread) + ")";
  leave_fiber();
  __builtin_unreachable();
}

bool on_a_stack(uintptr_t address) {
  const auto begin = reinterpret_cast<uintptr_t>(stacks);
  return (address >= begin && address < begin + kStack * kMaxThreads) ||
         (address >= main_stack_begin && address < main_stack_end);
}

void run(const char* name, void (*thread)(void*), void* context, int64_t blocks, int threads) {
  prepare();
  find_main_stack();
  thread_body = thread;
  thread_context = context;
  error.clear();
  if (threads < 1 || size_t(threads) > kMaxThreads) error = "a block of " + std::to_string(threads) + " threads";
  if (blocks > int64_t(kMaxBlocks)) error = std::to_string(blocks) + " blocks are more than the emulation can count";
  ++position.launch;
  now.block_size.x = unsigned(threads);
  now.grid_size.x = unsigned(blocks);
  std::vector<uint32_t> blocks_to_run;
  for (int64_t i = 0; i < blocks; ++i) blocks_to_run.push_back(uint32_t(i));
  arrange(blocks_to_run);
  for (size_t i = 0; i < blocks_to_run.size() && error.empty(); ++i) {
    now.block.x = position.block = blocks_to_run[i];
    run_block(threads);
  }
  if (!error.empty()) {
    // What waits in the fibers is given up.
    for (Fiber& fiber : fibers) fiber.started = fiber.waiting = false;
    throw std::runtime_error(std::string(name) + ": " + error);
  }
}

}  // namespace emulation

template <class T>
static T atomic_add(T* place, T value) {
  emulation::touch(place, sizeof(T), true, true);
  const T before = *place;
  *place = before + value;
  return before;
}

int atomicAdd(int* place, int value) { return atomic_add(place, value); }
unsigned atomicAdd(unsigned* place, unsigned value) { return atomic_add(place, value); }

unsigned long long atomicMin(unsigned long long* place, unsigned long long value) {
  emulation::touch(place, sizeof value, true, true);
  const unsigned long long before = *place;
  if (value < before) *place = value;
  return before;
}

extern "C" {

// 0 ascending, 1 descending, 2 shuffled by the seed.
__attribute__((visibility("default"))) void emulation_order(int kind, uint64_t seed) {
  emulation::order = emulation::Order(kind);
  emulation::random_state = seed;
}
}
