"""The predicting process of ``wireframe submit`` as its supervisor sees it: something that is told once and may die."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading

from wireframe.errors import WireframeError

# Started as ``python -c``, never from the caller's script, so a script without a main guard is safe.
_BOOT = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from wireframe.submit.worker import main
main()
"""
# A worker that is to find only what its parent finds.
_FLAGS = {"no_site": "-S", "ignore_environment": "-E", "isolated": "-I"}


def command(boot: str = _BOOT) -> list[str]:
    """How a worker is started; its last argument is the parent's ``sys.path``."""
    flags = [flag for name, flag in _FLAGS.items() if getattr(sys.flags, name)]
    path = json.dumps([entry for entry in sys.path if isinstance(entry, str)])
    return [sys.executable, *flags, "-c", boot, path]


class Worker:
    """A process that works on one job; ``event`` gives what it says.

    Raises:
        WireframeError: it cannot be started.
    """

    def __init__(self, job: dict, start: list[str]) -> None:
        # Threads of the model that wait must sleep, not spin on a core that a reader, or anybody, needs.
        environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
        try:
            self._process = subprocess.Popen(
                start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
        except OSError as problem:
            raise WireframeError(f"the predicting process cannot be started: {problem.strerror}") from None
        self._events: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._listen, args=(job,), daemon=True)
        self._thread.start()

    def event(self, seconds: float) -> dict | None:
        """What it says next; None once it has ended. Raises queue.Empty after so many seconds."""
        return self._events.get(timeout=max(seconds, 0.0))

    def end(self) -> str:
        """Ends it, at once, and says how it had ended before, if it had."""
        if self._process.poll() is None:
            self._process.kill()
        code = self._process.wait()
        self._thread.join()
        for stream in (self._process.stdin, self._process.stdout):
            try:
                stream.close()
            except OSError:
                # What was still to be written has no reader.
                pass
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def _listen(self, job: dict) -> None:
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            # Its input stays open for as long as this process is there.
            self._process.stdin.flush()
            for line in self._process.stdout:
                self._events.put(json.loads(line))
        except (OSError, ValueError):
            # It is gone, in the middle of a line perhaps.
            pass
        self._events.put(None)
