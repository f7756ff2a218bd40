"""All segments of many scenes in one file, with what graphs are made of: scored and tuned again without the model.

A file is an .npz without pickle: every array of all scenes one behind the other, and their lengths.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from wireframe.classes import POINT_CLASSES
from wireframe.errors import ConfigError, SampleError, one_line, printable
from wireframe.files import atomic_write
from wireframe.graph import GraphConfig, Wireframe
from wireframe.npy import MAX_ARRAY_BYTES, read_npz
from wireframe.predict import PredictedScene, SceneSegments

# Points of other classes cannot be corners, and are most of a scene.
CORNER_CLASSES = tuple(name for name in POINT_CLASSES if name in GraphConfig().snap_classes)
_CORNER_IDS = tuple(POINT_CLASSES.index(name) for name in CORNER_CLASSES)

# A scene takes some 30 kB.
_MAX_FILE_BYTES = 1 << 30

# name -> (dtype, shape behind the first axis, what it is counted by).
_ARRAYS = {
    "segments": (np.float32, (2, 3), "segments"),
    "probability": (np.float32, (), "segments"),
    "points": (np.float32, (3,), "points"),
    "class_id": (np.uint8, (), "points"),
    "gt_vertices": (np.float32, (3,), "vertices"),
    "gt_edges": (np.int64, (2,), "edges"),
}
_COUNTS = ("segments", "points", "vertices", "edges")


def write_segments(path: str | os.PathLike, scenes: Sequence[PredictedScene], about: dict) -> None:
    """Writes scenes, whole or not at all; ``about``: plain JSON values that say what they are of.

    Raises:
        SampleError: more scenes than ``read_segments`` would take. OSError: the file cannot be written.
    """
    kept = [np.isin(scene.class_id, _CORNER_IDS) for scene in scenes]
    columns = {
        "segments": [scene.found.segments for scene in scenes],
        "probability": [scene.found.probability for scene in scenes],
        "points": [scene.points[corner] for scene, corner in zip(scenes, kept)],
        "class_id": [scene.class_id[corner] for scene, corner in zip(scenes, kept)],
        "gt_vertices": [scene.truth.vertices for scene in scenes],
        "gt_edges": [scene.truth.edges for scene in scenes],
    }
    arrays = {}
    for name, (dtype, shape, count) in _ARRAYS.items():
        arrays[name] = np.concatenate([np.zeros((0, *shape)), *columns[name]]).astype(dtype)
        arrays[f"n_{count}"] = np.array([len(part) for part in columns[name]], dtype=np.int64)
        if arrays[name].nbytes > MAX_ARRAY_BYTES:
            raise SampleError(f"{len(scenes)} scenes are too many for one file of segments; split them (--limit)")
    head = {"about": about, "order_ids": [printable(scene.order_id) for scene in scenes]}
    arrays["head"] = np.frombuffer(json.dumps(head).encode(), dtype=np.uint8)
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)


def read_segments(path: str | os.PathLike) -> tuple[list[PredictedScene], dict]:
    """The scenes of a file and what it says that they are of. Points of ``CORNER_CLASSES`` alone are there.

    Raises:
        SampleError: it is no such file. OSError: it cannot be read.
    """
    path = Path(path)
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise SampleError(f"{path}: larger than {_MAX_FILE_BYTES >> 30} GiB, which no file of segments is")
    arrays = read_npz(path.read_bytes(), str(path), SampleError)
    try:
        return _scenes(arrays)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as problem:
        raise SampleError(
            f"{path}: no file of segments ({one_line(problem)}); `wireframe predict --format segments` writes one"
        ) from None


def _scenes(arrays: dict[str, np.ndarray]) -> tuple[list[PredictedScene], dict]:
    head = json.loads(arrays["head"].tobytes())
    order_ids, about = head["order_ids"], head["about"]
    if not all(isinstance(name, str) and name.isprintable() for name in order_ids) or not isinstance(about, dict):
        raise ValueError("its head")
    parts = {}
    for name, (dtype, shape, count) in _ARRAYS.items():
        array, counts = arrays[name], arrays[f"n_{count}"]
        sound = counts.dtype == np.int64 and counts.shape == (len(order_ids),) and (counts >= 0).all()
        if not sound or array.dtype != dtype or array.shape != (int(counts.sum()), *shape):
            raise ValueError(f"array {name}")
        # A segment that is not finite is the graph's to drop.
        if name in ("points", "gt_vertices") and not np.isfinite(array).all():
            raise ValueError(f"array {name} is not finite")
        parts[name] = np.split(array, np.cumsum(counts)[:-1]) if len(order_ids) else []
    return [
        PredictedScene(
            order_id, SceneSegments(parts["segments"][i], parts["probability"][i]), parts["points"][i],
            parts["class_id"][i], Wireframe(parts["gt_vertices"][i], parts["gt_edges"][i]),
        )
        for i, order_id in enumerate(order_ids)
    ], about  # fmt: skip


def check_snapping(graph: GraphConfig) -> None:
    """Raises ConfigError where the graph wants corners that a file of segments does not hold."""
    missing = [name for name in graph.snap_classes if name not in CORNER_CLASSES]
    if missing and graph.snap_radius > 0:
        raise ConfigError(f"a file of segments holds no points of class {missing[0]}: give the scenes and the model")


def _graph(name: str, about: dict) -> GraphConfig:
    """What the file says about its graphs; the defaults where it says nothing."""
    try:
        return GraphConfig(**about.get("graph", {}))
    except TypeError as problem:
        raise SampleError(f"{name}: its graph settings are none ({one_line(problem)}); write it again") from None


class SegmentSource:
    """The scenes of a file of segments, as ``scene_source.SceneSource`` gives those of shards.

    Raises SampleError, ConfigError and OSError as ``read_segments`` and ``GraphConfig``.
    """

    def __init__(self, path: str | os.PathLike, *, limit: int | None = None, workers: int = 1) -> None:
        self.name, self.workers, self.limit = os.fspath(path), workers, limit
        scenes, self.about = read_segments(path)
        self._scenes = scenes[:limit]
        self.graph = _graph(self.name, self.about)

    def identity(self) -> dict:
        status = os.stat(self.name)
        return {**self.describe(), "shards": [[os.path.abspath(self.name), status.st_size, status.st_mtime_ns]]}

    def describe(self) -> dict:
        return {"name": self.name, "segments_of": self.about}

    def title(self) -> str:
        return str(self.about.get("title", ""))

    def expected(self) -> int:
        return len(self._scenes)

    def read(
        self, known: Callable[[int, dict], object] = lambda index, row: None
    ) -> Iterator[tuple[int, PredictedScene | object]]:
        for index, scene in enumerate(self._scenes):
            there = known(index, {"order_id": scene.order_id})
            yield index, scene if there is None else there
