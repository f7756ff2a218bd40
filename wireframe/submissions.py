"""Files of predictions in the challenge's schema: a JSON list of {order_id, wf_vertices [V][3], wf_edges [E][2]}."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from wireframe.errors import SubmissionError, one_line
from wireframe.files import atomic_write, read_at_most

if TYPE_CHECKING:
    from wireframe.graph import Wireframe

# Two thousand scenes of 64 edges take some 10 MB.
MAX_FILE_BYTES = 256 << 20
# Far more than a house has; the metric's time grows with the square.
MAX_PARTS = 10_000
_NUMBER = (int, float)


def write_submission(path: str | os.PathLike, predictions: Iterable[tuple[str, Wireframe]]) -> None:
    """Writes (order_id, wireframe) pairs, whole or not at all, in their order. Raises OSError."""
    entries = [
        {"order_id": order_id, "wf_vertices": found.vertices.tolist(), "wf_edges": found.edges.tolist()}
        for order_id, found in predictions
    ]
    with atomic_write(path) as file:
        file.write(json.dumps(entries).encode())


def read_submission(path: str | os.PathLike) -> dict[str, Wireframe]:
    """Wireframes by order_id, in the order of the file; of anybody's, so nothing in it is trusted.

    Values are not judged here: a coordinate that is not finite, or an edge that names no vertex, is left to the score,
    which is 0 for such a scene and says why.

    Raises:
        SubmissionError: the file is too large or no JSON list; or an entry has no order_id, one that was there before,
            vertices that are not numbers [V][3], edges that are not whole numbers [E][2], or too many of either.
        OSError: the file cannot be read.
    """
    data = read_at_most(path, MAX_FILE_BYTES)
    if data is None:
        raise SubmissionError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, which no submission is")
    try:
        entries = json.loads(data)
    except (ValueError, RecursionError) as problem:
        raise SubmissionError(f"{path}: not a JSON file ({one_line(problem)})") from None
    if not isinstance(entries, list):
        raise SubmissionError(f"{path}: expected a list of {{order_id, wf_vertices, wf_edges}}")
    found: dict[str, Wireframe] = {}
    for position, entry in enumerate(entries):
        order_id = entry.get("order_id") if isinstance(entry, Mapping) else None
        if not isinstance(order_id, str) or not order_id:
            raise SubmissionError(f"{path}: entry {position} has no order_id")
        if order_id in found:
            raise SubmissionError(f"{path}: {order_id} is there twice; leave one of the two")
        try:
            found[order_id] = _wireframe(entry)
        except ValueError as problem:
            raise SubmissionError(f"{path}: {one_line(order_id, 80)}: {problem}") from None
    return found


def answer_fault(vertices: Any, edges: Any) -> str | None:
    """Why two values out of JSON are no wireframe that the metric can score; None where they are one."""
    try:
        _rows(vertices, "wf_vertices", 3, _NUMBER)
        _rows(edges, "wf_edges", 2, int)
    except ValueError as problem:
        return str(problem)
    if len(vertices) < 2 or not edges:
        return "it takes two vertices and an edge"
    # Beyond that float32 overflows; a comparison, for an integer without end is no float.
    if not all(-3.4e38 <= value <= 3.4e38 for vertex in vertices for value in vertex):
        return "a vertex is not finite"
    for start, end in edges:
        if start == end or not (0 <= start < len(vertices) and 0 <= end < len(vertices)):
            return f"edge {one_line([start, end], 60)} does not join two of the {len(vertices)} vertices"
    return None


def _wireframe(entry: Mapping) -> Wireframe:
    # It imports torch, which nobody who only judges values needs.
    from wireframe.graph import Wireframe

    vertices = _array(_rows(entry.get("wf_vertices"), "wf_vertices", 3, _NUMBER), "wf_vertices", 3, np.float64)
    edges = _array(_rows(entry.get("wf_edges"), "wf_edges", 2, int), "wf_edges", 2, np.int64)
    with np.errstate(over="ignore"):
        return Wireframe(vertices.astype(np.float32), edges)


def _rows(value: Any, name: str, width: int, kind: type | tuple[type, ...]) -> list:
    """A value out of JSON that is a list of lists of so many numbers, or ValueError."""
    called = f"rows of {width} {'whole numbers' if kind is int else 'numbers'}"
    if not isinstance(value, list) or len(value) > MAX_PARTS:
        raise ValueError(f"{name} must be a list of at most {MAX_PARTS} {called}")
    for row in value:
        good = isinstance(row, list) and len(row) == width
        if not good or not all(isinstance(part, kind) and not isinstance(part, bool) for part in row):
            raise ValueError(f"{name} must hold {called}, not {one_line(repr(row), 60)}")
    return value


def _array(rows: list, name: str, width: int, dtype: type) -> np.ndarray:
    try:
        return np.array(rows, dtype=dtype).reshape(-1, width)
    except OverflowError:
        raise ValueError(f"{name} holds a number that no array can") from None
