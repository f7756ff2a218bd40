"""The Triton kernels under compute-sanitizer, where there is one and it works (marker ``gpu``)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

TESTS = Path(__file__).resolve().parent
# Tool, what runs under it, and what it says of faultless kernels.
RUNS = {
    "planted": ("memcheck", "planted", ""),
    "memcheck": ("memcheck", "kernels", "ERROR SUMMARY: 0 errors"),
    "racecheck": ("racecheck", "kernels", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"),
}
FOUND = 9


def start(tool, what):
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    # Allocations of their own, so that the end of a tensor is the end of one.
    environment = {**os.environ, "PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--report-api-errors", "no"]
    command = [*options, sys.executable, str(TESTS / "cuda_sanitized.py"), what]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    return sanitizer and subprocess.Popen(
        [sanitizer, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def runs():
    """All at once: each takes long to start."""
    started = {name: start(tool, what) for name, (tool, what, _) in RUNS.items()}
    yield started
    for process in started.values():
        if process is not None:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def works(runs):
    """Skips where there is no sanitizer, or it misses a planted write beyond the end of a tensor."""
    if runs["planted"] is None:
        pytest.skip("compute-sanitizer is not installed")
    output, _ = runs["planted"].communicate(timeout=50)
    if runs["planted"].returncode != FOUND or "Invalid __global__ write" not in output:
        pytest.skip(f"compute-sanitizer does not work here: {' '.join(output.split())[:300]}")


@pytest.mark.parametrize("name", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(name, runs, works):
    output, _ = runs[name].communicate(timeout=50)
    assert runs[name].returncode == 0 and "done" in output.splitlines(), output[-4000:]
    assert RUNS[name][2] in output, output[-4000:]
