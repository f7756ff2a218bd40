"""From segments to a wireframe: merge, snap, level (S23DR 2026 baseline, post-processing).

1. Each segment gives two vertices and an edge.
2. Vertices are merged by single linkage in passes of widening threshold. A pass links vertices at most its
   threshold apart and replaces each connected cluster by the plain mean of the vertices the pass started from
   (the means of the pass before), however many endpoints stand behind each of them.
3. A vertex with enough points of a corner class nearby moves to their mean.
4. Nearly horizontal edges become horizontal. Which edges are is decided before anything moves, and vertices
   that such edges connect share the mean of their heights, so the result does not depend on the order of the
   edges.
5. Vertices that coincide become one, self-loops, repeated edges and vertices without an edge are dropped.

Everything is float64 inside and summed in one canonical order (ascending x, y, z): the result has the same
bits whatever the order of the segments, of their endpoints and of the points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from wireframe.classes import POINT_CLASSES
from wireframe.errors import ConfigError
from wireframe.merging import cluster_means, components, merge_vertices, near_pairs, unique_edges


class Wireframe(NamedTuple):
    """``vertices`` float32 [V, 3], world metres, y up; ``edges`` int64 [E, 2], ids of vertices."""

    vertices: np.ndarray
    edges: np.ndarray


def empty_wireframe() -> Wireframe:
    """The solution where nothing is found: two vertices at the origin and the edge (0, 1)."""
    return Wireframe(np.zeros((2, 3), dtype=np.float32), np.array([[0, 1]], dtype=np.int64))


@dataclass(frozen=True)
class GraphConfig:
    """How segments become a wireframe. Lengths are metres; the defaults are the S23DR 2026 baseline's.

    Attributes:
        confidence: segments whose confidence (a probability) is above this are kept; applied by the caller.
        merge_thresholds: one distance per merging pass, not decreasing.
        snap_radius: corner points this near to a vertex pull it to their mean; 0 turns snapping off.
        snap_min_points: the fewest corner points that do.
        snap_classes: names of ``classes.POINT_CLASSES`` that count as corners.
        horizontal_min_run: an edge is levelled only if its horizontal run is greater than this,
        horizontal_max_slope: and its rise / run less than this; 0 turns levelling off.
    """

    confidence: float = 0.5
    merge_thresholds: tuple[float, ...] = (0.15, 0.2625, 0.375, 0.4875, 0.6)
    snap_radius: float = 0.5
    snap_min_points: int = 2
    snap_classes: tuple[str, ...] = ("apex", "eave_end_point", "flashing_end_point")
    horizontal_min_run: float = 0.1
    horizontal_max_slope: float = 0.05

    def __post_init__(self) -> None:
        for name in ("merge_thresholds", "snap_classes"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, (list, tuple)):
                raise ConfigError(f"graph.{name} must be a list, not {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name in ("snap_radius", "horizontal_min_run", "horizontal_max_slope"):
            _check_length(name, getattr(self, name))
        for value in self.merge_thresholds:
            _check_length("merge_thresholds", value)
        if list(self.merge_thresholds) != sorted(self.merge_thresholds):
            raise ConfigError(f"graph.merge_thresholds must not decrease, got {list(self.merge_thresholds)}")
        if not _is_number(self.confidence) or not 0.0 <= self.confidence <= 1.0:
            raise ConfigError(f"graph.confidence must be a probability from 0 to 1, not {self.confidence!r}")
        if type(self.snap_min_points) is not int or self.snap_min_points < 1:
            raise ConfigError(f"graph.snap_min_points must be a count above 0, got {self.snap_min_points!r}")
        for value in self.snap_classes:
            if value not in POINT_CLASSES:
                raise ConfigError(f"graph.snap_classes: {value!r} is none of {', '.join(POINT_CLASSES)}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_length(name: str, value: object) -> None:
    if not _is_number(value) or not 0.0 <= value < float("inf"):
        raise ConfigError(f"graph.{name} must be finite and not negative, got {value!r}")


def segments_to_wireframe(
    segments: np.ndarray,  # [S, 2, 3]
    points: np.ndarray,  # [P, 3]
    class_id: np.ndarray,  # [P]
    config: GraphConfig = GraphConfig(),
) -> Wireframe:
    """The wireframe of the segments that were confident enough (S23DR 2026 baseline, post-processing).

    Args:
        segments: float [S, 2, 3], endpoints in world metres; those with a coordinate that is not finite are
        dropped.
        points: float [P, 3], world metres, without padding.
        class_id: integer [P], positions in ``classes.POINT_CLASSES``.

    Returns:
        Vertices in ascending (x, y, z), each with an edge; edges (i, j) with i < j, ascending, each once.
        ``empty_wireframe()`` where no edge is left. Time and memory grow with the square of S.

    Raises:
        ValueError: an argument has the wrong shape.
    """
    segments = _as_float32("segments", segments, (None, 2, 3))
    points = _as_float32("points", points, (None, 3))
    class_id = np.asarray(class_id)
    if class_id.shape != points.shape[:1]:
        raise ValueError(f"class_id must have shape [{len(points)}] like points, not {list(class_id.shape)}")
    segments = segments[np.isfinite(segments).all(axis=(1, 2))]
    vertices, edges = _split(segments)
    vertices, edges = merge_vertices(vertices, edges, config.merge_thresholds)
    corner = np.isin(class_id, [POINT_CLASSES.index(name) for name in config.snap_classes])
    corners = points[corner & np.isfinite(points).all(axis=1)]
    vertices = _snap(vertices, corners, config)
    vertices = _level(vertices, edges, config)
    return _canonical(vertices, edges)


def _as_float32(name: str, value: np.ndarray, shape: tuple[int | None, ...]) -> np.ndarray:
    array = np.asarray(value)
    wanted = ", ".join("N" if size is None else str(size) for size in shape)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} must be numbers of shape [{wanted}], not {array.dtype}")
    if array.size == 0 and array.ndim <= 1:
        array = array.reshape(0, *shape[1:])
    if array.ndim != len(shape) or array.shape[1:] != shape[1:]:
        raise ValueError(f"{name} must have shape [{wanted}], not {list(array.shape)}")
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _ascending(rows: np.ndarray) -> np.ndarray:
    """The order of rows [N, 3] by x, then y, then z."""
    return np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))


def _split(segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Endpoints [2 S, 3] in ascending order and the edge of each segment."""
    endpoints = segments.reshape(-1, 3).astype(np.float64)
    order = _ascending(endpoints)
    position = np.empty(order.size, dtype=np.int64)
    position[order] = np.arange(order.size)
    return endpoints[order], position.reshape(-1, 2)


def _snap(vertices: np.ndarray, corners: np.ndarray, config: GraphConfig) -> np.ndarray:
    """Vertices moved to the mean of the corner points [C, 3] within the radius, where there are enough."""
    if config.snap_radius == 0.0 or len(corners) < config.snap_min_points or len(vertices) == 0:
        return vertices
    corners = corners[_ascending(corners)].astype(np.float64)
    near = near_pairs(vertices, corners, config.snap_radius)
    vertex, corner = np.nonzero(near)
    means = cluster_means(corners[corner], vertex, len(vertices))
    enough = near.sum(axis=1) >= config.snap_min_points
    return np.where(enough[:, None], means, vertices)


def _level(vertices: np.ndarray, edges: np.ndarray, config: GraphConfig) -> np.ndarray:
    """Vertices joined by nearly horizontal edges, moved to their common mean height (y)."""
    delta = vertices[edges[:, 1]] - vertices[edges[:, 0]]
    run = np.hypot(delta[:, 0], delta[:, 2])
    # A product, not a quotient: the run may be zero.
    flat = (run > config.horizontal_min_run) & (np.abs(delta[:, 1]) < config.horizontal_max_slope * run)
    if not flat.any():
        return vertices
    linked = np.eye(len(vertices), dtype=bool)
    linked[edges[flat, 0], edges[flat, 1]] = True
    linked[edges[flat, 1], edges[flat, 0]] = True
    roots, label = np.unique(components(linked), return_inverse=True)
    levelled = vertices.copy()
    levelled[:, 1] = cluster_means(vertices[:, 1:2], label, roots.size)[label, 0]
    return levelled


def _canonical(vertices: np.ndarray, edges: np.ndarray) -> Wireframe:
    """float32, coinciding vertices made one, without orphans, in ascending order."""
    # Adding zero turns -0 into 0, so that the two count as the same coordinate.
    rounded = vertices.astype(np.float32) + np.float32(0.0)
    unique, label = np.unique(rounded, axis=0, return_inverse=True)
    edges = unique_edges(label.reshape(-1)[edges])
    if len(edges) == 0:
        return empty_wireframe()
    used, edges = np.unique(edges, return_inverse=True)
    return Wireframe(unique[used], edges.reshape(-1, 2).astype(np.int64))
