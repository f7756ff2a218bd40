"""Clocks of calls and of their memory, on a CPU and on a CUDA device.

On a GPU short operations are timed by CUDA events behind a pause in which the host gets ahead: the device's own time.
Where the host's launches count, the clock is the one on the wall, with the device idle at both ends.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# Twice what a host beside an H200 took to launch forward and backward of a call of ours; others launch more, and get
# twice of that, up to a pause after which a GPU would have gone to rest.
_PAUSE_S, _MOST_PAUSE_S = 3e-3, 0.1
# A GPU at 2 GHz; at less the pause is longer.
_CYCLES_A_SECOND = 2e9


class _Stamp:
    """A moment of the current CUDA stream; the difference of two is in seconds."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, start: _Stamp) -> float:
        self._event.synchronize()
        return start._event.elapsed_time(self._event) / 1e3


def _idle_device() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def timer(device: str, host: bool) -> Callable[[], float | _Stamp]:
    """A clock for pytest-benchmark: the difference of two of its values is seconds."""
    if device == "cpu":
        return time.perf_counter
    return _idle_device if host else _Stamp


@functools.cache
def _flushed() -> Tensor:
    # 256 MiB: more than any L2 cache holds.
    return torch.empty(64 << 20, dtype=torch.int32, device="cuda")


def pause_s(launch_s: float) -> float:
    """Seconds for which the device waits while the host launches what took it ``launch_s``."""
    return min(max(_PAUSE_S, 2 * launch_s), _MOST_PAUSE_S)


def too_long(launch_s: float) -> bool:
    """Whether no pause hides the launches: then the host counts in what is timed."""
    return 2 * launch_s > _MOST_PAUSE_S


def preparation(device: str, host: bool, cache: str | None) -> Callable[[float], None]:
    """What goes before a timed call: a cold L2 cache where wanted, then the pause where the host is not to count.

    It takes the seconds that the host needs to launch the call.
    """

    def prepare(launch_s: float = 0.0) -> None:
        if device != "cpu":
            if cache == "cold":
                _flushed().zero_()
            if not host:
                torch.cuda._sleep(int(pause_s(launch_s) * _CYCLES_A_SECOND))

    return prepare


def device_ms(run: Callable[[], object]) -> float:
    """Milliseconds of the device for one call, from a cold L2 cache."""
    preparation("cuda", False, "cold")()
    start = _Stamp()
    run()
    return (_Stamp() - start) * 1e3


def peak_mib(run: Callable[[], object], device: str) -> float | None:
    """MiB that one call adds at its peak, result included; on a CPU resident memory, None where it is not known."""
    if device == "cpu":
        return _resident_mib(run)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def _resident_mib(run: Callable[[], object]) -> float | None:
    """How far the resident memory of the process rises above where it was; Linux alone, but ``run`` always runs."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        before = _status_kb("VmRSS")
        # Writing 5 resets the high-water mark (proc(5)).
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, StopIteration):
        run()
        return None
    kept = run()
    peak = _status_kb("VmHWM")
    del kept
    return round((peak - before) / 1024, 1)


def _status_kb(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])
