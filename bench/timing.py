"""Clocks, result rows and the description of the machine, for every benchmark of this folder."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent

# A part that takes microseconds is repeated beyond ``repeats``, until this much time is spent on it.
_MIN_MS = 200.0
_MAX_FACTOR = 20

_RESAMPLES = 2000
# Of fewer pairs the bootstrap knows little more than the least and the largest.
_LEAST_PAIRS = 6

# What ``wireframe bench`` itself writes; it changes nothing that is measured.
_NO_CODE = (":!bench/results", ":!docs", ":!README.md")


def measure(
    runs: Sequence[Callable[[], object]], repeats: int, clock: Callable[[Callable[[], object]], float], warmup: int = 3
) -> list[list[float]]:
    """Milliseconds of every call of every run; they take turns, so that a drift hits all of them.

    Args:
        repeats: rounds; up to 20 times as many where their sum stays short. clock: takes a function, runs it and gives
            milliseconds. warmup: rounds that do not count.
    """
    times: list[list[float]] = [[] for _ in runs]
    for number in range(warmup + repeats * _MAX_FACTOR):
        if number >= warmup + repeats and sum(map(sum, times)) >= _MIN_MS * len(runs):
            break
        for run, own in zip(runs, times):
            elapsed = clock(run)
            if number >= warmup:
                own.append(elapsed)
    return times


def percentiles(times: Sequence[float]) -> dict:
    """20th, 50th and 80th percentile of milliseconds as they stand in a row; None without times."""
    values = [round(float(value), 5) for value in np.percentile(times, (20, 50, 80))] if len(times) else [None] * 3
    return {**dict(zip(("p20_ms", "p50_ms", "p80_ms"), values)), "calls": len(times)}


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict:
    """The ratio of medians, with its 95 % interval by the bootstrap over pairs (equal places of both).

    Turns count as independent: on a machine whose speed drifts from turn to turn the interval is too narrow. low and
    high, its ends, are None where there are fewer than 6 pairs.
    """
    both = np.array([theirs, ours])
    drawn = np.random.default_rng(0).integers(both.shape[1], size=(_RESAMPLES, both.shape[1]))
    resampled = np.median(both[:, drawn], axis=2)
    low, high = np.percentile(resampled[0] / resampled[1], (2.5, 97.5))
    ends = {"low": low, "high": high} if both.shape[1] >= _LEAST_PAIRS else {"low": None, "high": None}
    found = {"p50": np.median(both[0]) / np.median(both[1]), **ends}
    return {name: value if value is None else float(f"{value:.4g}") for name, value in found.items()}


def describe_machine(device: str = "cpu") -> dict:
    """What a number depends on: device (name of CPU or GPU), threads, versions, commit, date (UTC)."""
    import torch

    gpu = device != "cpu"
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _triton(),
        "cuda": torch.version.cuda if gpu else None,
        "driver": _driver() if gpu else None,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "load": load(),
    }


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's."""
    import torch

    return cpu_name() if device == "cpu" else torch.cuda.get_device_name(device)


def load() -> float | None:
    """The load of the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def heading(machine: dict) -> str:
    """The machine in one line, with the load it had when it was described."""
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "triton", "numpy"))
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    return (
        f"{machine['device']}{driver}, threads {machine['threads']}, load {machine['load']}; {versions}, "
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
    changes = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", *_NO_CODE)
    return head[1] + ("-dirty" if changes.strip() else "")


def command(part: str, **options: object) -> str:
    """The command that measures the like of a row: ``--name value`` of what is given, ``--name`` of what is True."""
    words = ["wireframe", "bench", part]
    for name, value in options.items():
        if value is not None and value is not False:
            flag = f"-{name}" if len(name) == 1 else f"--{name}"
            words += [flag] if value is True else [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)


def slug(device: str) -> str:
    """A device as its file of rows is named."""
    return re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")[:80] or "unknown"


def default_out(device: str, small: bool) -> Path | None:
    """bench/results/<device>.jsonl of a checkout; None for small shapes, which are no results."""
    if small or commit() == "unknown":
        return None
    folder = ROOT / "bench" / "results"
    folder.mkdir(exist_ok=True)
    return folder / f"{slug(device)}.jsonl"


def append_rows(path: str | os.PathLike, rows: Iterable[dict]) -> None:
    """Appends JSON lines by one write, so that a stop, or another process, leaves whole lines or none of these."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    with open(path, "a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            # A line that was broken off stays one.
            lines = lines if file.read(1) == b"\n" else f"\n{lines}"
        file.write(lines.encode())


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
