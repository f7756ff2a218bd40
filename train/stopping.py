"""Ending a run from outside: SIGTERM and SIGINT let the step finish and the state be saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from wireframe.errors import WireframeError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(WireframeError):
    """The run was asked to stop, and what it had done is saved."""

    exit_status = 4


class GaveUp(WireframeError):
    """Too many steps in a row had a loss or a gradient that is not finite."""

    exit_status = 5


class StopRequest:
    """While used as a context manager, remembers SIGTERM and SIGINT; a second SIGINT ends the process at once.

    ``asked`` is read between steps. Inside ``with request.raising():`` a signal raises ``Stopped`` where it arrives:
    for work that may be broken off anywhere. Outside the main thread no signal can be caught; ``asked`` stays False.
    """

    def __init__(self) -> None:
        self.asked = False
        self._raise = False
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

    def raising(self) -> _Raising:
        """A block that a signal breaks off with ``Stopped``."""
        return _Raising(self)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        if self._raise:
            raise Stopped("stopped by a signal")


class _Raising:
    def __init__(self, request: StopRequest) -> None:
        self._request = request

    def __enter__(self) -> None:
        self._request._raise = True
        if self._request.asked:
            self.__exit__()
            raise Stopped("stopped by a signal")

    def __exit__(self, *_: object) -> None:
        self._request._raise = False
