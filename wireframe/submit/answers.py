"""The challenge's ``submission.json`` while it grows: at any moment a whole file with an answer for every scene."""

from __future__ import annotations

import json
import math
import os
import time
from typing import Any

from wireframe.files import atomic_write, check_target
from wireframe.submissions import answer_fault

WRITE_EVERY = 5.0
# So many times as long as a write took, none follows it.
_WRITE_PAUSE = 20.0


class Answers:
    """One entry ``{order_id, wf_vertices, wf_edges}`` for each order_id, the empty solution until it is given.

    Args:
        path: the file. Nothing is written before ``write``.

    Raises:
        OSError: the path is a folder or no regular file, or its folder cannot be made.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = path
        check_target(path).parent.mkdir(parents=True, exist_ok=True)
        self._entries: dict[str, str] = {}
        self._changed, self._due = False, 0.0

    def __contains__(self, order_id: str) -> bool:
        return order_id in self._entries

    def add(self, order_id: str) -> None:
        """A new entry, the last one of the file."""
        self.give(order_id, [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [[0, 1]])

    def give(self, order_id: str, vertices: Any, edges: Any) -> str | None:
        """Takes an answer, lists [V][3] of metres and [E][2]; or says why it is none, and the entry stays."""
        problem = answer_fault(vertices, edges)
        if problem is None:
            entry = {"order_id": order_id, "wf_vertices": vertices, "wf_edges": edges}
            self._entries[order_id] = json.dumps(entry, allow_nan=False)
            self._changed = True
        return problem

    def due(self) -> float:
        """The moment, of ``time.monotonic``, from which a write is worth its time; infinity where nothing changed."""
        return self._due if self._changed else math.inf

    def write(self) -> None:
        """Replaces the file, if anything changed. Raises OSError; an older file then stays."""
        if not self._changed:
            return
        start = time.monotonic()
        try:
            with atomic_write(self.path) as file:
                file.write(("[" + ", ".join(self._entries.values()) + "]").encode())
            self._changed = False
        finally:
            end = time.monotonic()
            self._due = end + max(WRITE_EVERY, _WRITE_PAUSE * (end - start))
