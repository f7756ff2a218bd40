"""Scores written down scene by scene, so that an evaluation that was killed goes on where it stopped.

The file holds JSON lines: first what the scores are of, then one line a scene. Lines are appended and flushed as scenes
finish; one that was cut off while it was written is dropped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from wireframe.files import atomic_write
from wireframe.graph import Wireframe
from wireframe.scoring import Outcome, Score

# Far more than a line of 64 segments takes.
_MAX_LINE_BYTES = 1 << 20


class ScoredScene(NamedTuple):
    """index: position of its row in the source; at: scores at each threshold asked for, empty where none was."""

    index: int
    order_id: str
    outcome: Outcome
    predicted: Wireframe
    at: tuple[Score, ...]


class PartialScores:
    """The scenes scored so far, in a file or, without a path, nowhere; used as a context manager.

    Args:
        path: of the file, which is removed by ``finish``. A file of something else is started over.
        about: what the scores depend on, in plain JSON values.

    Raises:
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path | None, about: Mapping) -> None:
        self.path = path
        self.scenes: dict[int, ScoredScene] = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        head = _encode(about)
        if path.exists():
            self.scenes = _read(path, head)
        # Written anew: the next line must not continue one that was cut off.
        with atomic_write(path) as file:
            file.writelines([head, *(_encode(_as_json(scene)) for scene in self.scenes.values())])
        self._file = open(path, "ab")

    def add(self, scene: ScoredScene) -> None:
        """Writes a scene down, unless it already stands there."""
        if self._file is None or scene.index in self.scenes:
            return
        try:
            self._file.write(_encode(_as_json(scene)))
            self._file.flush()
        except OSError as problem:
            raise OSError(problem.errno, problem.strerror, os.fspath(self.path)) from None

    def finish(self) -> None:
        """Removes the file: its scenes stand elsewhere now."""
        self._close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                # What could not be written was reported by ``add``.
                pass
            self._file = None

    def __enter__(self) -> PartialScores:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


def _encode(line: Mapping) -> bytes:
    return json.dumps(line, sort_keys=True).encode() + b"\n"


def _read(path: Path, head: bytes) -> dict[int, ScoredScene]:
    """The scenes of the file by their index; none where its first line is not ``head``."""
    scenes = {}
    with open(path, "rb") as file:
        if file.readline(len(head) + 1) != head:
            return {}
        while line := file.readline(_MAX_LINE_BYTES):
            scene = _scene(line)
            if scene is not None:
                scenes[scene.index] = scene
    return scenes


def _as_json(scene: ScoredScene) -> dict:
    return {
        "index": scene.index,
        "order_id": scene.order_id,
        "score": list(scene.outcome.score),
        "failure": scene.outcome.failure,
        "at": list(scene.at),
        "wf_vertices": scene.predicted.vertices.tolist(),
        "wf_edges": scene.predicted.edges.tolist(),
    }


def _scene(line: bytes) -> ScoredScene | None:
    """The scene of a line; None where the line is cut off or holds something else."""
    try:
        values = json.loads(line)
        index, order_id, failure = values["index"], values["order_id"], values["failure"]
        score, *at = (Score(*map(float, given)) for given in (values["score"], *values["at"]))
        vertices = np.array(values["wf_vertices"], dtype=np.float32).reshape(-1, 3)
        edges = np.array(values["wf_edges"], dtype=np.int64).reshape(-1, 2)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    named = isinstance(order_id, str) and (failure is None or isinstance(failure, str))
    finite = all(math.isfinite(value) for values in (score, *at) for value in values)
    if type(index) is not int or not named or not finite:
        return None
    return ScoredScene(index, order_id, Outcome(score, failure), Wireframe(vertices, edges), tuple(at))
