"""The challenge's ``submission.json`` while it grows: at any moment a whole file with an answer for every scene."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from typing import Any

from wireframe.files import atomic_write, check_target

# Far more than a house has; the metric's time grows with the square.
MAX_PARTS = 10_000
WRITE_EVERY = 5.0
# Of the time that passes, a write may take so much.
_WRITE_SHARE = 0.05

EMPTY = ([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [[0, 1]])


class Answers:
    """One entry ``{order_id, wf_vertices, wf_edges}`` for each order_id, the empty solution until it is given.

    Args:
        path: the file. Nothing is written before ``write``.
        order_ids: in the order of the file; an id that comes again has the one entry.

    Raises:
        OSError: the path is a folder or no regular file, or its folder cannot be made.
    """

    def __init__(self, path: str | os.PathLike, order_ids: Iterable[str]) -> None:
        self.path = path
        check_target(path).parent.mkdir(parents=True, exist_ok=True)
        self._entries = {order_id: _entry(order_id, *EMPTY) for order_id in order_ids}
        self._given: set[str] = set()
        self._changed = True
        self._due = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def has(self, order_id: str) -> bool:
        """Whether an answer was given."""
        return order_id in self._given

    def give(self, order_id: str, vertices: Any, edges: Any) -> str | None:
        """Takes an answer; or says why it is none, and the entry stays what it was.

        Args:
            order_id: one of those above.
            vertices, edges: lists [V][3] of finite metres and [E][2] of ids of vertices.
        """
        problem = fault(vertices, edges)
        if problem is None:
            self._entries[order_id] = _entry(order_id, vertices, edges)
            self._given.add(order_id)
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
            self._due = end + max(WRITE_EVERY, (end - start) / _WRITE_SHARE)


def fault(vertices: Any, edges: Any) -> str | None:
    """Why two values that came as JSON are no wireframe of the challenge's schema; None where they are one."""
    if not isinstance(vertices, list) or not 2 <= len(vertices) <= MAX_PARTS:
        return f"wf_vertices must be a list of 2 to {MAX_PARTS} vertices"
    for vertex in vertices:
        if not isinstance(vertex, list) or len(vertex) != 3 or not all(map(_is_finite, vertex)):
            return f"wf_vertices must hold three finite numbers each, not {str(vertex)[:60]}"
    if not isinstance(edges, list) or not 1 <= len(edges) <= MAX_PARTS:
        return f"wf_edges must be a list of 1 to {MAX_PARTS} edges"
    for edge in edges:
        if not isinstance(edge, list) or len(edge) != 2 or not all(type(end) is int for end in edge):
            return f"wf_edges must hold two whole numbers each, not {str(edge)[:60]}"
        if edge[0] == edge[1] or not all(0 <= end < len(vertices) for end in edge):
            return f"edge {edge} does not join two of the {len(vertices)} vertices"
    return None


def _is_finite(value: Any) -> bool:
    # Beyond that float32 overflows; a comparison, for an integer without end is no float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -3.4e38 <= value <= 3.4e38


def _entry(order_id: str, vertices: list, edges: list) -> str:
    return json.dumps({"order_id": order_id, "wf_vertices": vertices, "wf_edges": edges}, allow_nan=False)
