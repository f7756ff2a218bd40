"""Clocks, result rows and the description of the machine, for every benchmark of this folder."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent

# A part that takes microseconds is repeated beyond ``repeats``, until this much time is spent on it.
_MIN_MS = 200.0
_MAX_FACTOR = 20


class Case(NamedTuple):
    """One way (``provider``) to do one operation on one input; ``run`` does it once."""

    op: str
    provider: str
    shape: str
    run: Callable[[], object]


def wall_ms(run: Callable[[], object]) -> float:
    """Milliseconds of one call by the clock on the wall."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def measure(
    rivals: Sequence[Case],
    repeats: int,
    clock: Callable[[Callable[[], object]], float] = wall_ms,
    warmup: int = 2,
    least_ms: float = _MIN_MS,
) -> list[list[float]]:
    """Milliseconds of every call of every rival; the rivals take turns, so that a drift hits all of them.

    Args:
        rivals: cases of one operation on one input.
        repeats: rounds; up to 20 times as many where their sum stays below ``least_ms``.
        clock: takes a function, runs it and gives milliseconds.
        warmup: rounds that do not count.
        least_ms: time to spend on each rival on average.
    """
    times: list[list[float]] = [[] for _ in rivals]
    for number in range(warmup + repeats * _MAX_FACTOR):
        if number >= warmup + repeats and sum(map(sum, times)) >= least_ms * len(rivals):
            break
        for case, own in zip(rivals, times):
            elapsed = clock(case.run)
            if number >= warmup:
                own.append(elapsed)
    return times


def result(case: Case, times: Sequence[float], machine: dict, **more: object) -> dict:
    """The row of one case: what was run, 20th, 50th and 80th percentile in milliseconds, and where."""
    p20, p50, p80 = (round(float(value), 5) for value in np.percentile(times, (20, 50, 80)))
    names = {"op": case.op, "provider": case.provider, "shape": case.shape}
    return {**names, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "calls": len(times), **more, **machine}


def describe_machine(device: str = "cpu") -> dict:
    """What a number depends on: device (name of CPU or GPU), threads, versions, commit, date (UTC)."""
    import torch

    machine = {
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device != "cpu":
        machine.update(device=torch.cuda.get_device_name(device), driver=_driver(), triton=_triton())
    return machine


def heading(machine: dict) -> str:
    """The machine in one line, with the load it had when the measurement began."""
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "triton", "numpy") if name in machine
    )
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    driver = f", driver {machine['driver']}" if "driver" in machine else ""
    return (
        f"{machine['device']}{driver}, threads {machine['threads']}{load}; {versions}, "
        f"Python {machine['python']}; commit {machine['commit']}; {machine['date']}"
    )


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine() or "unknown CPU"


def commit() -> str:
    """Short hash of the checkout, with ``-dirty`` where files differ from it; else "unknown"."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "--show-toplevel", "--short", "HEAD").split()
    # An installed package may lie inside somebody else's repository.
    if len(head) != 2 or Path(head[0]) != ROOT:
        return "unknown"
    changes = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!bench/results")
    return head[1] + ("-dirty" if changes.strip() else "")


def append_rows(path: str | os.PathLike, rows: Iterable[dict]) -> None:
    """Appends JSON lines, so that what was measured is kept when a later part is stopped."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def milliseconds(value: float) -> str:
    """Three significant digits, never as a power of ten."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _driver() -> str:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split()
    return found[0] if found else "unknown"


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""
