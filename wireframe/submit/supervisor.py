"""An answer for every scene in a given time, whatever the scenes are: the supervisor of ``wireframe submit``.

The complete file of fall-backs is there before a model is loaded. A process of its own then predicts, and this one,
which imports no torch, puts the answers into the file as they come, watches the clock, and replaces a process that
crashed or hangs. The rules:

- A scene that cannot be read, or whose answer is not of the schema, keeps the fall-back.
- When the process crashes, or answers nothing for ``patience`` seconds, the scenes that it had begun are tried again
  one by one; the one that brings this about again keeps the fall-back.
- No tar may take more than a quarter of the time that is left to list its scenes, and no scene to be answered. A
  process that is not ready after a quarter, but after a minute at least, is replaced.
- When the time is up the process is killed, and the file holds what there is.
"""

from __future__ import annotations

import contextlib
import os
import queue
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from wireframe import child
from wireframe.errors import Failure, ShardError, WireframeError
from wireframe.submit.answers import Answers
from wireframe.submit.tar_index import IndexedScene, index_tar

PATIENCE = 60.0
# At least so many seconds has a process to load the model: half of that is much on a busy laptop.
START_PATIENCE = 60.0
WORKER = "from wireframe.submit.worker import main; main()"
# Kept of the budget for the last write and the ends of the processes: a tenth, at most so many seconds.
_MOST_RESERVE = 30.0
_MOST_FRUITLESS_STARTS = 2


class Submitted(NamedTuple):
    """scenes: entries of the file; failures: those with the fall-back; damage: a line on each tar that cannot be read
    as a whole."""

    scenes: int
    failures: list[Failure]
    damage: list[str]


def submit(
    tars: Sequence[str],
    out: str | os.PathLike,
    *,
    model: str | os.PathLike | None = None,
    config: str | os.PathLike | None = None,
    threshold: float | None = None,
    budget: float = 7200.0,
    started: float | None = None,
    workers: int = 1,
    patience: float = PATIENCE,
    start_patience: float = START_PATIENCE,
    progress: Callable[[int, int], None] | None = None,
    start: list[str] | None = None,
) -> Submitted:
    """Answers every scene of the tars into one JSON file of ``{order_id, wf_vertices, wf_edges}``.

    Entries stand in the order of the tars. Where an order_id comes again, its first scene counts. Answers are those of
    ``wireframe predict``, bit for bit, whatever ``workers``.

    Args:
        tars: files, plain or gzipped.
        out: the file; whole at any moment from the first write on.
        model, config, threshold: as ``wireframe predict`` takes them.
        budget: seconds from ``started`` to the end of this call; a tenth, at most 30 seconds, is kept in reserve.
        started: of ``time.monotonic``; None = now.
        workers: threads that read ahead of the model.
        patience: seconds after which a scene hangs. start_patience: seconds before which a process that is not ready
            does not.
        progress: called with (scenes done, scenes) when a scene is done, in any manner.
        start: how the predicting process is started, as ``child.Child`` takes it; None for ours.

    Raises:
        ShardError: no tar holds a scene. OSError: ``out`` cannot be written. WireframeError: the model cannot be
            loaded, or the predicting process does not start; the file of fall-backs is there.
    """
    started = time.monotonic() if started is None else started
    deadline = started + budget - min(budget / 10, _MOST_RESERVE)
    run = _Run(out, deadline, patience, start_patience, progress)
    choice = {"model": model and os.fspath(model), "config": config and os.fspath(config), "threshold": threshold}
    try:
        run.index(tars)
        run.predict(choice, workers, start or child.command(WORKER))
    finally:
        run.answers.write()
    return run.result()


class _Run:
    """One submission: what is known of the tars, what was answered, what is left to do and until when."""

    def __init__(
        self, out: str | os.PathLike, deadline: float, patience: float, start_patience: float,
        progress: Callable[[int, int], None] | None,
    ) -> None:  # fmt: skip
        self.answers = Answers(out)
        self._deadline, self._patience, self._progress = deadline, patience, progress
        self._start_patience, self._ready = start_patience, False
        self._damage: list[str] = []
        self._scenes: list[IndexedScene] = []
        # Numbers of scenes: not done yet; of these, begun by this process, and begun by one that came to a bad end.
        self._pending: dict[int, None] = {}
        self._begun: set[int] = set()
        self._suspects: set[int] = set()
        self._reasons: dict[int, str] = {}
        self._fruitless_starts = 0

    def index(self, tars: Sequence[str]) -> None:
        """Lists the scenes, and writes their fall-backs on the way, too: a kill may come before the last tar."""
        for tar in tars:
            for scene in index_tar(tar, self._damage, time.monotonic() + self._quarter()):
                if scene.order_id not in self.answers:
                    self.answers.add(scene.order_id)
                    self._scenes.append(scene)
                    self._write_if_due()
        self.answers.write()
        if not self._scenes:
            raise ShardError(self._damage[0] if self._damage else "the tars hold no scene")
        self._pending = dict.fromkeys(range(len(self._scenes)))

    def predict(self, choice: dict, workers: int, start: list[str]) -> None:
        while self._pending and time.monotonic() < self._deadline:
            alone = [number for number in self._pending if number in self._suspects]
            scenes = [(number, self._scenes[number]) for number in alone or self._pending]
            problem = self._attend({**choice, "workers": 1 if alone else workers, "scenes": scenes}, start)
            if problem is None:
                continue
            suspects = self._begun & self._pending.keys()
            if not suspects:
                self._fruitless_starts += 1
                if self._fruitless_starts == _MOST_FRUITLESS_STARTS:
                    raise WireframeError(f"the predicting process does not come to a scene: {problem}")
            elif alone:
                self._done(suspects.pop(), problem)
            else:
                self._suspects = suspects

    def result(self) -> Submitted:
        late = "no time was left for it" + ("" if self._ready else ", before the predicting process was ready")
        reasons = {**self._reasons, **dict.fromkeys(self._pending, late)}
        failures = [Failure(self._scenes[number].order_id, reasons[number]) for number in sorted(reasons)]
        return Submitted(len(self._scenes), failures, self._damage)

    def _attend(self, job: dict, start: list[str]) -> str | None:
        """One predicting process; what was wrong, where it ended neither with its scenes nor with the time."""
        self._begun, self._ready = set(), False
        patience = max(self._start_patience, self._quarter())
        limit = time.monotonic() + patience
        try:
            worker = child.Child(
                # Threads of the model that wait must sleep, not spin on a core that a reader, or anybody, needs.
                start, {"OMP_WAIT_POLICY": "passive", **os.environ},
                {**job, "seconds": self._deadline - time.monotonic()},
            )  # fmt: skip
        except OSError as problem:
            raise WireframeError(f"the predicting process cannot be started: {problem.strerror}") from None
        try:
            while (now := time.monotonic()) < self._deadline:
                self._write_if_due()
                if now >= limit:
                    return f"{'no answer' if self._ready else 'not ready'} in {patience:.1f} seconds"
                try:
                    event = worker.receive(min(limit, self._deadline, self.answers.due()) - now)
                except queue.Empty:
                    continue
                if event is None:
                    left = any(number in self._pending for number, _ in job["scenes"])
                    return f"the process ended ({worker.end()})" if left else None
                if "begun" in event:
                    self._begun.add(event["begun"])
                    continue
                self._take(event)
                self._ready = True
                patience = min(self._patience, self._quarter())
                limit = time.monotonic() + patience
            return None
        finally:
            worker.end()

    def _take(self, event: dict) -> None:
        if "fatal" in event:
            raise WireframeError(event["fatal"])
        if "answer" in event:
            order_id = self._scenes[event["answer"]].order_id
            self._done(event["answer"], self.answers.give(order_id, event["vertices"], event["edges"]))
        elif "failure" in event:
            self._done(event["failure"], event["reason"])

    def _done(self, number: int, reason: str | None) -> None:
        self._pending.pop(number, None)
        self._suspects.discard(number)
        self._fruitless_starts = 0
        if reason is not None:
            self._reasons[number] = reason
        if self._progress is not None:
            self._progress(len(self._scenes) - len(self._pending), len(self._scenes))

    def _quarter(self) -> float:
        return (self._deadline - time.monotonic()) / 4

    def _write_if_due(self) -> None:
        if time.monotonic() >= self.answers.due():
            # The disk may have room again by the next time; the last write says what is wrong.
            with contextlib.suppress(OSError):
                self.answers.write()
