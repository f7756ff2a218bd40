"""What a run says while it runs: ``log.jsonl``, one JSON object a line, and a progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from wireframe.errors import WireframeError
from wireframe.files import atomic_write
from wireframe.train.loss import Losses


class RunLog:
    """Lines of ``path`` and a progress bar on stderr; used as a context manager.

    A line is a step, with ``step`` (finished steps), ``stage``, the loss terms, ``grad_norm``, ``lr``,
    ``seconds_per_step`` and ``bad_steps`` (skipped in a row), or an event, with ``step`` and ``event``.

    Args:
        path: appended to; lines behind ``step`` are dropped, for they will be written again. None: nothing is written,
            as in every process but the first.
        step: finished steps at the start; last: steps at the end; every: steps between two lines.
        progress: whether to show the bar.
    """

    def __init__(self, path: Path | None, step: int, last: int, every: int, progress: bool) -> None:
        from tqdm import tqdm

        self._path = path
        self._file = None if path is None else _continue(path, step)
        self._every, self._last = every, last
        self._bar = tqdm(total=last, initial=step, disable=path is None or not progress, desc="train", unit="step")
        self._clock, self._clock_step = time.perf_counter(), step

    def step(self, step: int, fields: dict) -> None:
        """Records a finished step; every so many it is written down."""
        self._bar.update()
        if step % self._every and step != self._last:
            return
        now = time.perf_counter()
        pace = (now - self._clock) / max(step - self._clock_step, 1)
        self._clock, self._clock_step = now, step
        self._write({"step": step, **fields, "seconds_per_step": round(pace, 5)})
        terms = {name: f"{fields[name]:.4f}" for name in Losses._fields}
        self._bar.set_postfix(stage=fields["stage"], **terms)

    def event(self, step: int, event: str, **fields: object) -> None:
        """Records what happened after ``step`` finished steps."""
        self._write({"step": step, "event": event, **fields})

    def restart_clock(self, step: int) -> None:
        """Leaves out of the next pace what took time between two steps, an evaluation say."""
        self._clock, self._clock_step = time.perf_counter(), step

    def _write(self, line: dict) -> None:
        if self._file is None:
            return
        try:
            # JSON knows no NaN.
            clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            self._file.write(json.dumps(clean, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as problem:
            raise WireframeError(f"cannot write {self._path}: {problem.strerror}; make room and run it again") from None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        # Its text was flushed, or that it could not be was reported.
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()


def _continue(path: Path, step: int) -> TextIO:
    """The log opened behind its last line of at most ``step`` finished steps."""
    kept = []
    if path.exists():
        kept = [line for line in path.read_text(errors="replace").splitlines() if _line_step(line) <= step]
    with atomic_write(path) as file:
        file.writelines(line.encode() + b"\n" for line in kept)
    return open(path, "a", encoding="utf-8")


def _line_step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")


class SteadyStream:
    """A terminal that may go away: what can no longer be written is dropped, and the run goes on.

    Args:
        stream: sys.stdout or sys.stderr; None where it was closed from the start.
    """

    encoding = "utf-8"

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._attempt(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(lambda stream: stream.flush())

    def isatty(self) -> bool:
        return bool(self._attempt(lambda stream: stream.isatty()))

    def _attempt(self, use: Callable[[TextIO], object]) -> object:
        if self._stream is None:
            return None
        try:
            return use(self._stream)
        except (OSError, ValueError):
            # What is still in its buffer must not fail at the end of the process either.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            self._stream = None
            return None
