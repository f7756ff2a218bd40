"""The Triton kernels under compute-sanitizer, where there is one and it works (marker ``gpu``)."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.gpu

TESTS = Path(__file__).resolve().parent
MEMCHECK = ("--tool", "memcheck", "--report-api-errors", "no")
# Options, what runs under them, and what the tool says of faultless kernels.
RUNS = {
    "planted": (MEMCHECK, "planted", ""),
    "memcheck": (MEMCHECK, "kernels", "ERROR SUMMARY: 0 errors"),
    "racecheck": (
        ("--tool", "racecheck"), "kernels", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
    ),
}  # fmt: skip
FOUND = 9
# For all runs together, below the limit of the step in bench/gpu_check.sh, so that a slow one can say how far it came.
SECONDS = 44
STARTED = time.monotonic()


class Run(NamedTuple):
    process: subprocess.Popen
    log: Path

    def output(self) -> str:
        """All that the run says; a failure with what it said so far if the time is over before its end."""
        try:
            self.process.wait(max(0.0, STARTED + SECONDS - time.monotonic()))
        except subprocess.TimeoutExpired:
            pytest.fail(f"not done after {SECONDS} s; it said:\n{self.log.read_text()[-4000:]}")
        return self.log.read_text()


def start(sanitizer, options, what, log):
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    # Allocations of their own, so that the end of a tensor is the end of one.
    environment = {**os.environ, "PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = [*options, "--error-exitcode", str(FOUND)]
    command = [sanitizer, *options, sys.executable, str(TESTS / "cuda_sanitized.py"), what]
    with log.open("w") as file:
        return Run(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT), log)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All at once: each takes long to start. Skips where there is no sanitizer."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    folder = tmp_path_factory.mktemp("sanitizer")
    started = {name: start(sanitizer, options, what, folder / name) for name, (options, what, _) in RUNS.items()}
    yield started
    for run in started.values():
        run.process.kill()
        run.process.wait()


@pytest.fixture(scope="module")
def works(runs):
    """Skips where the sanitizer misses a planted write beyond the end of a tensor."""
    output = runs["planted"].output()
    if runs["planted"].process.returncode != FOUND or "Invalid __global__ write" not in output:
        pytest.skip(f"compute-sanitizer does not work here: {' '.join(output.split())[:300]}")


@pytest.mark.parametrize("name", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(name, runs, works):
    output = runs[name].output()
    assert runs[name].process.returncode == 0 and "done" in output.splitlines(), output[-4000:]
    assert RUNS[name][2] in output, output[-4000:]
