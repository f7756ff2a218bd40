"""An answer for every scene in a given time, whatever the scenes are: the supervisor of ``wireframe submit``.

The complete file of fall-backs is there before a model is loaded. A process of its own then predicts, and this one,
which imports no torch, puts the answers into the file as they come, watches the clock, and replaces a process that
crashed or hangs. The rules:

- A scene that cannot be read, whose answer is not of the schema, that crashed the process or hung keeps the fall-back.
- After a crash the scenes that were being worked on are tried again one by one, without the compiled module (same
  bits): one that ends the process again keeps the fall-back.
- When nothing was answered for ``patience`` seconds (less where scenes were quick so far, or where it is more than a
  quarter of the time left), the scene whose turn it is hangs.
- When the time is up the process is killed, and the file holds what there is. So it does after SIGTERM and Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from wireframe.errors import ShardError, WireframeError
from wireframe.submit.answers import Answers
from wireframe.submit.process import Worker, command
from wireframe.submit.tar_index import IndexedScene, index_tar

PATIENCE = 60.0
# Scenes take turns of some tenths of a second, so one that takes this long and five times the slowest so far hangs.
_LEAST_PATIENCE, _SLOWER = 10.0, 5.0
# Kept of the budget for the last write and the end of the processes: a tenth, at most so many seconds.
_MOST_RESERVE = 30.0
_START_ATTEMPTS = 2


class Unanswered(NamedTuple):
    """A scene that kept the fall-back, and why."""

    order_id: str
    reason: str


class Submitted(NamedTuple):
    """scenes: entries of the file; failures: those with the fall-back; repeated: scenes whose order_id was there
    before; damage: a line on each tar that cannot be read as a whole; stopped: SIGTERM came."""

    scenes: int
    failures: list[Unanswered]
    repeated: int
    damage: list[str]
    stopped: bool


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
    progress: Callable[[int, int], None] | None = None,
    start: list[str] | None = None,
) -> Submitted:
    """Answers every scene of the tars into one JSON file of ``{order_id, wf_vertices, wf_edges}``.

    Entries stand in the order of the tars. Where an order_id comes again, its first scene that can be answered counts.
    Answers are those of ``wireframe predict``, bit for bit, whatever ``workers``.

    Args:
        tars: files, plain or gzipped.
        out: the file; whole at any moment from the first write on.
        model, config, threshold: as ``wireframe predict`` takes them.
        budget: seconds from ``started`` to the end of this call; a tenth, at most 30 seconds, is kept in reserve.
        started: of ``time.monotonic``; None = now.
        workers: threads that read ahead of the model.
        patience: seconds after which a scene hangs.
        progress: called with (scenes done, scenes) when a scene is done, in any manner.
        start: how the predicting process is started; None as ``submit_process.command`` says.

    Raises:
        ShardError: no tar holds a scene. OSError: ``out`` cannot be written. WireframeError: the model cannot be
            loaded, or the predicting process does not start; the file of fall-backs is there.
    """
    started = time.monotonic() if started is None else started
    run = _Run(started + budget - min(budget / 10, _MOST_RESERVE), patience, progress)
    choice = {"model": _text(model), "config": _text(config), "threshold": threshold}
    with _Termination() as termination:
        try:
            run.index(tars)
            run.open(out)
            run.predict(choice, workers, command() if start is None else start)
        except _Terminated:
            pass
        finally:
            termination.defer()
            run.close(out)
    if run.answers is None:
        raise ShardError(run.damage[0] if run.damage else "there is no tar to read")
    return run.result(termination.came)


def _text(path: str | os.PathLike | None) -> str | None:
    return None if path is None else os.fspath(path)


class _Terminated(BaseException):
    """SIGTERM, wherever the main thread was; no ``except Exception`` holds it up."""


class _Termination:
    """SIGTERM raises ``_Terminated``, until ``defer``; in another thread than the main one it keeps its meaning."""

    def __init__(self) -> None:
        self.came, self._deferred, self._before = False, False, None

    def __enter__(self) -> _Termination:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def defer(self) -> None:
        """From now on it is only noted."""
        self._deferred = True

    def _take(self, *_: object) -> None:
        self.came = True
        if not self._deferred:
            self._deferred = True
            raise _Terminated


class _Run:
    """One submission: what is known of the tars, what was answered, what is left to do and until when."""

    def __init__(self, deadline: float, patience: float, progress: Callable[[int, int], None] | None) -> None:
        self.answers: Answers | None = None
        self.damage: list[str] = []
        self._scenes: list[IndexedScene] = []
        self._reasons: dict[str, str] = {}
        self._deadline, self._patience, self._progress = deadline, patience, progress
        # Numbers of scenes, in their order.
        self._pending: dict[int, None] = {}
        self._suspects: set[int] = set()
        self._compiled, self._failed_starts = True, 0
        # Seconds: the slowest start of a process, the slowest scene.
        self._start, self._slowest = 0.0, 0.0

    def index(self, tars: Sequence[str]) -> None:
        for tar in tars:
            try:
                found = index_tar(tar)
            except ShardError as problem:
                self.damage.append(str(problem))
                continue
            self._scenes += found.scenes
            if found.problem is not None:
                self.damage.append(found.problem)

    def open(self, out: str | os.PathLike) -> None:
        """Writes the fall-back for every scene found."""
        if self._scenes:
            self.answers = Answers(out, (scene.order_id for scene in self._scenes))
            self.answers.write()

    def close(self, out: str | os.PathLike) -> None:
        if self.answers is None:
            # Interrupted in the first pass: the scenes found so far get their fall-back.
            self.open(out)
        else:
            self.answers.write()

    def result(self, stopped: bool) -> Submitted:
        late = "stopped by SIGTERM" if stopped else "no time was left for it"
        ids = dict.fromkeys(scene.order_id for scene in self._scenes)
        failures = [Unanswered(i, self._reasons.get(i, late)) for i in ids if not self.answers.has(i)]
        return Submitted(len(ids), failures, len(self._scenes) - len(ids), self.damage, stopped)

    def predict(self, choice: dict, workers: int, start: list[str]) -> None:
        """Works through the scenes, then through the other scenes of ids that are still without an answer."""
        first: dict[str, int] = {}
        for number, scene in enumerate(self._scenes):
            first.setdefault(scene.order_id, number)
        again = [number for number, scene in enumerate(self._scenes) if first[scene.order_id] != number]
        for numbers in (list(first.values()), again):
            self._pending = {n: None for n in numbers if not self.answers.has(self._scenes[n].order_id)}
            while self._pending and time.monotonic() < self._deadline:
                careful = [number for number in self._pending if number in self._suspects]
                how = {"workers": 1 if careful else workers, "compiled": self._compiled and not careful}
                self._attend(careful or list(self._pending), {**choice, **how}, start)

    def _attend(self, numbers: list[int], job: dict, start: list[str]) -> None:
        """One predicting process, from its start to its end of whatever kind."""
        scenes = [(number, self._scenes[number]) for number in numbers]
        worker = Worker({**job, "seconds": self._deadline - time.monotonic(), "scenes": scenes}, start)
        begun: dict[int, None] = {}
        ready, warm, last = False, False, time.monotonic()
        try:
            while (now := time.monotonic()) < self._deadline:
                self._write_if(now)
                limit = last + self._limit(now, warm) if ready else self._deadline
                if now >= limit:
                    self._done(self._turn(numbers), reason=f"not done after {now - last:.0f} seconds")
                    return
                try:
                    event = worker.event(min(limit, self._deadline, self.answers.due()) - now)
                except queue.Empty:
                    continue
                if event is None:
                    self._crashed(worker.end(), numbers, begun, ready, last_try=not job["compiled"])
                    return
                if "end" in event:
                    return
                if "fatal" in event:
                    raise WireframeError(event["fatal"])
                if "begun" in event:
                    begun[event["begun"]] = None
                    continue
                passed = time.monotonic() - last
                if "ready" in event:
                    ready, self._start = True, max(self._start, passed)
                else:
                    # What a first call sets up is no measure of a scene.
                    self._slowest, warm = max(self._slowest, passed if warm else 0.0), True
                    self._take(event)
                last = time.monotonic()
        finally:
            worker.end()

    def _limit(self, now: float, warm: bool) -> float:
        """For how many seconds nothing may be answered, by a process that has answered (warm) or has not yet."""
        slow = _SLOWER * self._slowest
        quick = max(_LEAST_PATIENCE, slow) if warm else self._patience
        # With less time left than another process takes to start, waiting is the better chance.
        share = max((self._deadline - now) / 4, 2 * self._start, slow)
        return min(quick, self._patience, share)

    def _turn(self, numbers: list[int]) -> int:
        return next(number for number in numbers if number in self._pending)

    def _take(self, event: dict) -> None:
        self._failed_starts = 0
        if "failure" in event:
            self._done(event["failure"], reason=event["reason"])
            return
        number = event["answer"]
        problem = self.answers.give(self._scenes[number].order_id, event["vertices"], event["edges"])
        self._done(number, reason=problem)

    def _done(self, number: int, reason: str | None) -> None:
        self._pending.pop(number, None)
        self._suspects.discard(number)
        if reason is not None:
            self._reasons[self._scenes[number].order_id] = reason
        if self._progress is not None:
            self._progress(len(self.answers) - len(self._pending), len(self.answers))

    def _crashed(self, how: str, numbers: list[int], begun: dict[int, None], ready: bool, last_try: bool) -> None:
        if how == f"signal {signal.SIGILL.value}":
            self._compiled = False
        if not ready:
            self._failed_starts += 1
            if self._failed_starts >= _START_ATTEMPTS:
                raise WireframeError(f"the predicting process ended before it had loaded the model ({how})")
            return
        left = [number for number in numbers if number in self._pending]
        suspects = [number for number in left if number in begun] or left[:1]
        if last_try and suspects:
            # They were tried one by one, so this is the one.
            self._done(suspects[0], reason=f"it ended the process that worked on it ({how})")
        else:
            self._suspects.update(suspects)

    def _write_if(self, now: float) -> None:
        if now >= self.answers.due():
            # The disk may have room again by the next time; the last write says what is wrong.
            with contextlib.suppress(OSError):
                self.answers.write()
