"""The thread pool of csrc/cpu by a small program of its own: no binding throws from within a chunk."""

import os
import resource
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

CPU = Path(__file__).resolve().parent.parent / "csrc" / "cpu"
COMPILER = shlex.split(os.environ.get("CXX") or "g++")
PROGRAM = r"""
#include "pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <set>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

using wireframe::parallel_for;

#define CHECK(what) \
  if (!(what)) std::printf("line %d: %s\n", __LINE__, #what), std::fflush(stdout), std::_Exit(1)

// Every chunk runs once, those that throw too.
void run(int threads, int64_t chunks, const std::set<int64_t>& throwing = {}) {
  std::vector<std::atomic<int>> ran(size_t(chunks) + 1);
  std::string said;
  try {
    parallel_for(threads, chunks, [&](int64_t chunk) {
      ++ran[size_t(chunk)];
      if (throwing.count(chunk)) throw std::runtime_error(std::to_string(chunk));
    });
  } catch (const std::runtime_error& error) {
    said = error.what();
  }
  if (throwing.empty()) {
    CHECK(said.empty());
  } else {
    CHECK(!said.empty() && throwing.count(std::stoll(said)));
  }
  if (throwing.empty() || threads > 1) {
    for (int64_t i = 0; i < chunks; ++i) CHECK(ran[size_t(i)] == 1);
  }
  CHECK(ran[size_t(chunks)] == 0);
}

void chunks() {
  for (int threads = -1; threads <= 8; ++threads) {
    for (int64_t count : {0, 1, 2, 3, 7, 8, 9, 1000}) run(threads, count);
  }
}

void exceptions() {
  for (int threads = 1; threads <= 8; ++threads) {
    for (int round = 0; round < 50; ++round) {
      run(threads, 20, {0});
      run(threads, 20, {19});
      run(threads, 20, {3, 4, 17});
      run(threads, 20);
    }
  }
  bool arrived = false;
  try {
    parallel_for(4, 9, [](int64_t chunk) {
      if (chunk == 5) throw std::bad_alloc();
    });
  } catch (const std::bad_alloc&) {
    arrived = true;
  }
  CHECK(arrived);
}

void callers() {
  std::vector<std::thread> all;
  for (int i = 0; i < 6; ++i) {
    all.emplace_back([i] {
      for (int round = 0; round < 200; ++round) i % 3 ? run(1 + i, 30) : run(1 + i, 30, {7});
    });
  }
  for (auto& one : all) one.join();
}

void forked() {
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop) run(4, 50);
  });
  for (int round = 0; round < 20; ++round) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);
      run(4, 100);
      run(4, 100, {50});
      _exit(0);
    }
    int status = 1;
    waitpid(child, &status, 0);
    CHECK(status == 0);
  }
  stop = true;
  busy.join();
}

long resident() {
  long pages = 0, ignored = 0;
  FILE* file = std::fopen("/proc/self/statm", "r");
  CHECK(file && std::fscanf(file, "%ld %ld", &ignored, &pages) == 2);
  std::fclose(file);
  return pages * sysconf(_SC_PAGESIZE);
}

// Without a thread to be had the caller does it all, and nothing piles up.
void alone() {
  bool refused = false;
  try {
    std::thread([] {}).join();
  } catch (const std::system_error&) {
    refused = true;
  }
  CHECK(refused);
  run(8, 100);
  const long before = resident();
  for (int round = 0; round < 20000; ++round) parallel_for(200, 200, [](int64_t) {});
  CHECK(resident() - before < 8 << 20);
}

int main(int, char** arguments) {
  const std::string wanted = arguments[1];
  if (wanted == "chunks") chunks();
  if (wanted == "exceptions") exceptions();
  if (wanted == "callers") callers();
  if (wanted == "forked") forked();
  if (wanted == "alone") alone();
  std::printf("done\n");
  std::fflush(stdout);
  std::_Exit(0);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if shutil.which(COMPILER[0]) is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("pool")
    (folder / "check.cpp").write_text(PROGRAM)
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{CPU}"]
    command = [*COMPILER, *flags, folder / "check.cpp", CPU / "pool.cpp", "-o", folder / "check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder / "check"


@pytest.mark.parametrize("what", ["chunks", "exceptions", "callers", "forked"])
def test_the_pool_runs_every_chunk_once_and_hands_on_exceptions(program, what):
    done = subprocess.run([program, what], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_the_pool_without_threads_does_not_grow(program):
    # No room for the stack of another thread: a limit on processes does not hold for root.
    def no_room():
        resource.setrlimit(resource.RLIMIT_STACK, (512 << 20, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_AS, (256 << 20, 256 << 20))

    done = subprocess.run([program, "alone"], capture_output=True, text=True, timeout=60, preexec_fn=no_room)
    assert (done.returncode, done.stdout) == (0, "done\n")
