"""Files of predictions in the challenge's schema: a JSON list of {order_id, wf_vertices [V][3], wf_edges [E][2]}."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from wireframe.errors import SubmissionError, one_line
from wireframe.files import atomic_write
from wireframe.graph import Wireframe

# Two thousand scenes of 64 edges take some 10 MB.
MAX_FILE_BYTES = 256 << 20
# Far more than a house has; the metric's time grows with the square.
MAX_PARTS = 10_000


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
    path = Path(path)
    if path.stat().st_size > MAX_FILE_BYTES:
        raise SubmissionError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, which no submission is")
    try:
        entries = json.loads(path.read_bytes())
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


def _wireframe(entry: Mapping) -> Wireframe:
    vertices = _table(entry, "wf_vertices", 3, (int, float), "numbers", np.float64)
    edges = _table(entry, "wf_edges", 2, int, "whole numbers", np.int64)
    with np.errstate(over="ignore"):
        return Wireframe(vertices.astype(np.float32), edges)


def _table(
    entry: Mapping, name: str, width: int, kind: type | tuple[type, ...], called: str, dtype: type
) -> np.ndarray:
    rows = entry.get(name)
    if not isinstance(rows, list) or len(rows) > MAX_PARTS:
        raise ValueError(f"{name} must be a list of at most {MAX_PARTS} rows of {width} {called}")
    for row in rows:
        good = isinstance(row, list) and len(row) == width
        if not good or not all(isinstance(value, kind) and not isinstance(value, bool) for value in row):
            raise ValueError(f"{name} must hold rows of {width} {called}, not {one_line(repr(row), 60)}")
    try:
        return np.array(rows, dtype=dtype).reshape(-1, width)
    except OverflowError:
        raise ValueError(f"{name} holds a number that no array can") from None
