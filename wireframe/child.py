"""Python processes of our own that speak JSON lines with the one that started them, and that may crash or hang."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any, TextIO

# A process is to find only what its parent finds.
_FLAGS = {"no_site": "-S", "ignore_environment": "-E", "isolated": "-I"}
_PATH = "import json, sys; sys.path[:] = json.loads(sys.argv[1])"


def command(main: str) -> list[str]:
    """How a ``Child`` runs Python statements: never from the caller's script, which may have no main guard."""
    flags = [flag for name, flag in _FLAGS.items() if getattr(sys.flags, name)]
    return [sys.executable, *flags, "-c", f"{_PATH}\n{main}"]


class Child:
    """A process with pipes to its input, open for as long as this one is there, and from its output.

    ``process`` is its ``subprocess.Popen``, which any thread may kill; the rest is for one thread at a time.

    Args:
        start: the command; it gets our ``sys.path`` as JSON for its last argument.
        environment: its variables.
        first: a message that it gets when it comes to listen; nothing waits for that.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, start: list[str], environment: Mapping[str, str] = os.environ, first: Any = None) -> None:
        path = json.dumps([entry for entry in sys.path if isinstance(entry, str)])
        self.process = subprocess.Popen(
            [*start, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        self._messages: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._listen, args=(first,), daemon=True)
        self._thread.start()

    def send(self, message: Any) -> None:
        # Where it is gone, receiving tells how.
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def receive(self, seconds: float) -> Any:
        """Its next message; None once it has ended. Raises queue.Empty after so many seconds."""
        return self._messages.get(timeout=max(seconds, 0.0))

    def end(self) -> str:
        """Kills it, unless it has ended, and says how it ended: "signal 11" or "exit code 1"."""
        self.process.kill()
        code = self.process.wait()
        self._thread.join()
        self.process.stdout.close()
        # What was still to be written has no reader.
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def _listen(self, first: Any) -> None:
        if first is not None:
            self.send(first)
        # It may end in the middle of a line.
        with contextlib.suppress(ValueError):
            for line in self.process.stdout:
                self._messages.put(json.loads(line))
        self._messages.put(None)


def end_with(requests: TextIO) -> None:
    """From now on this process ends when there is nothing more in ``requests``: with its parent, whatever it does."""
    threading.Thread(target=lambda: (requests.read(), os._exit(0)), daemon=True).start()


def pipes() -> tuple[TextIO, TextIO]:
    """The pipes from and to the parent, for the process itself; whatever libraries print goes to stderr from now on."""
    # Ctrl-C reaches every process of the terminal; the parent decides what becomes of this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return requests, answers
