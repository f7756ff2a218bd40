"""A pool of scoring processes that survives crashes and hangs of the metric.

Each slot is a thread that owns one process (``wireframe.scoring_worker``) and speaks JSON lines with it over
pipes.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed

from wireframe import child
from wireframe.errors import ScoreError
from wireframe.graph import Wireframe
from wireframe.scoring import ZERO, Outcome, Score, check_pair, require_hoho

_START_TIMEOUT = 300.0
_START_ATTEMPTS = 3
_ONE_THREAD = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "NUMEXPR_NUM_THREADS",
)  # fmt: skip


def usable_cores() -> int:
    """Cores this process may run on, at most 8 (each worker takes about 400 MB)."""
    try:
        return min(8, len(os.sched_getaffinity(0)))
    except AttributeError:
        return min(8, os.cpu_count() or 1)


class ScorePool:
    """Worker processes that score scenes; reusable, best as a context manager.

    Workers start one by one with the first scenes, or all at ``start()``, which returns at once so that their
    imports (some seconds) overlap other work. ``submit`` hands over one scene and returns a future,
    ``score_many`` waits for many.

    Args:
        workers: number of processes; None for one per usable core, at most 8.
        timeout: seconds a scene may take before its worker is killed.

    Raises:
        ScoreError: impossible arguments.
        MissingPackageError: hoho2025 is not installed.
    """

    def __init__(self, workers: int | None = None, timeout: float = 60.0) -> None:
        workers = usable_cores() if workers is None else workers
        if workers < 1 or not 0.0 < timeout < threading.TIMEOUT_MAX:
            raise ScoreError(f"a score pool needs workers >= 1 and timeout > 0, not {workers} and {timeout}")
        require_hoho()
        self._size = workers
        self._timeout = timeout
        self._command = child.command("from wireframe.scoring_worker import main; main()")
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._slots: list[_Slot] = []
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> ScorePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Launches the workers without waiting for them."""
        with self._lock:
            if self._closed:
                raise ScoreError("the score pool is closed; make a new one")
            while len(self._slots) < self._size:
                self._add_slot()

    def _add_slot(self) -> None:
        self._slots.append(_Slot(self._command, self._queue, self._timeout))

    def submit(self, predicted: Wireframe, truth: Wireframe) -> Future:
        """A future of the scene's ``Outcome``; it raises ScoreError only where no worker can be started."""
        future: Future = Future()
        request, failure = check_pair(predicted, truth)
        if request is None:
            future.set_result(Outcome(ZERO, failure))
            return future
        with self._lock:
            if self._closed:
                raise ScoreError("the score pool is closed; make a new one")
            if len(self._slots) < self._size:
                self._add_slot()
            self._queue.put((future, [array.tolist() for array in request]))
        return future

    def score_many(
        self,
        pairs: Sequence[tuple[Wireframe, Wireframe]],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Outcome]:
        """Outcomes of (predicted, truth) pairs in their order; see ``scoring.score_many``."""
        futures = [self.submit(predicted, truth) for predicted, truth in pairs]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                if progress is not None:
                    progress(done, len(futures))
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return [future.result() for future in futures]

    def close(self) -> None:
        """Ends the workers; a scene that was not finished is cancelled or counted as a crash."""
        with self._lock:
            self._closed = True
            slots, self._slots = self._slots, []
        try:
            while True:
                item = self._queue.get_nowait()
                if item is not None:
                    item[0].cancel()
        except queue.Empty:
            pass
        for _ in slots:
            self._queue.put(None)
        for slot in slots:
            slot.close()


class _Slot:
    """A thread that takes scenes off the queue and the process it has them scored by."""

    def __init__(self, command: list[str], tasks: queue.SimpleQueue, timeout: float) -> None:
        self._command = command
        self._tasks = tasks
        self._timeout = timeout
        self._closed = False
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._renew()
        self._thread = threading.Thread(target=self._serve, name="score-worker", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._worker is not None:
                self._worker.kill()
        self._thread.join()

    def _renew(self) -> None:
        with self._lock:
            if self._worker is not None:
                self._worker.close()
            self._worker = None
            if not self._closed:
                self._worker = _Worker(self._command)

    def _serve(self) -> None:
        try:
            while (task := self._tasks.get()) is not None:
                future, request = task
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    future.set_result(self._score(request))
                except Exception as error:
                    future.set_exception(error)
        finally:
            if self._worker is not None:
                self._worker.close()

    def _score(self, request: list) -> Outcome:
        problem = "its process cannot be launched"
        for _ in range(_START_ATTEMPTS):
            worker = self._worker
            if worker is None:
                break
            problem = worker.wait_until_ready()
            if problem is None:
                outcome = worker.ask(request, self._timeout)
                if worker.dead:
                    self._renew()
                return outcome
            self._renew()
        if self._closed:
            return Outcome(ZERO, "the score pool was closed")
        raise ScoreError(f"the scoring worker cannot be started: {problem}")


class _Worker:
    """One scoring process. Only the thread of its slot uses it, but for ``kill``."""

    def __init__(self, command: list[str]) -> None:
        try:
            self._child = child.Child(command, {**os.environ, **dict.fromkeys(_ONE_THREAD, "1")})
        except OSError as error:
            raise ScoreError(f"the scoring worker cannot be started: {error}") from error
        self._ready = False
        self.dead = False

    def wait_until_ready(self) -> str | None:
        """None once the worker serves, else why it does not."""
        if self._ready:
            # One that died while idle must not cost the next scene its score.
            return None if self._child.process.poll() is None else "it died while idle"
        answer, reason = self._read(_START_TIMEOUT)
        if answer is not None and "error" in answer:
            reason = answer["error"]
        self._ready = reason is None
        return reason

    def ask(self, request: list, timeout: float) -> Outcome:
        self._child.send({"request": request, "timeout": timeout})
        answer, reason = self._read(timeout)
        if answer is None:
            return Outcome(ZERO, reason)
        if "failure" in answer:
            return Outcome(ZERO, answer["failure"])
        return Outcome(Score(*answer["score"]), None)

    def kill(self) -> None:
        """Ends the process; safe from any thread."""
        self.dead = True
        self._child.process.kill()

    def close(self) -> None:
        self.dead = True
        self._child.end()

    def _read(self, timeout: float) -> tuple[dict | None, str | None]:
        """The next answer and None, or None and what became of the worker; ``dead`` says if it can go on."""
        try:
            answer = self._child.receive(timeout)
        except queue.Empty:
            self.kill()
            return None, "timed out"
        if answer is not None:
            return answer, None
        self.dead = True
        return None, f"crashed ({self._child.end()})"
