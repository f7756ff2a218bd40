"""Ending a run from outside: SIGTERM, SIGINT and SIGHUP let the step finish and the state be saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from wireframe.errors import WireframeError

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(WireframeError):
    """The run was asked to stop, and what it had done is saved."""

    exit_status = 4


class GaveUp(WireframeError):
    """Too many steps in a row had a loss or a gradient that is not finite."""

    exit_status = 5


class _BrokenOff(BaseException):
    """A signal in a block that is broken off; nobody's handler for bad input takes it for a scene's fault."""


class StopRequest:
    """While used as a context manager, remembers SIGTERM, SIGINT and SIGHUP; a second SIGINT ends the process at once.

    ``asked`` is read between steps. A block ``with request.raising(line):`` is broken off where the signal arrives, and
    ends in ``Stopped(line)``: for work that may be broken off anywhere. Outside the main thread no signal can be
    caught; ``asked`` stays False.
    """

    def __init__(self) -> None:
        self.asked = False
        # What to say when the block that is being worked at is broken off; None outside of one.
        self._line: str | None = None
        self._breaks = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, _BrokenOff):
            # It came while a block was being left.
            raise Stopped(str(error)) from None

    def raising(self, line: str) -> _Raising:
        """A block that a signal breaks off: it ends in ``Stopped(line)``, at once where the signal came before it."""
        return _Raising(self, line)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        if self._breaks:
            # Only once: what is being cleaned up must not be broken off.
            self._breaks = False
            raise _BrokenOff(self._line)


class _Raising:
    def __init__(self, request: StopRequest, line: str) -> None:
        self._request, self._line = request, line

    def __enter__(self) -> None:
        request = self._request
        if request.asked:
            raise Stopped(self._line)
        request._line, request._breaks = self._line, True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        request = self._request
        request._breaks = False
        # Where a finaliser was running, or somebody catches everything, the interpreter has swallowed the exception.
        if request.asked and (error is None or isinstance(error, (Exception, _BrokenOff))):
            raise Stopped(self._line) from (None if isinstance(error, _BrokenOff) else error)
