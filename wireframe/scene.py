"""Raw scenes: one row of the S23DR 2026 data, checked and decoded.

A row is a mapping with the columns of ``usm3d/hoho22k_2026_trainval``: lists with one entry per view (``image_ids``,
``ade``, ``gestalt``, ``depth``, ``K``, ``R``, ``t``, ``pose_only_in_colmap``), the bytes of a COLMAP ZIP (``colmap``)
and the ground truth (``wf_vertices``, ``wf_edges``, ``wf_classifications``). It comes from ``wireframe.shards`` or from
any loader that gives such dicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from wireframe.classes import colors_to_ids
from wireframe.colmap import read_points3d
from wireframe.errors import SceneError
from wireframe.images import ImageError, depth_millimetres, label_rgb

# The vote of fusion takes time quadratic in the views.
MAX_VIEWS = 256
ORTHONORMAL_TOLERANCE = 1e-3


@dataclass(frozen=True)
class View:
    """A usable view. camera = R @ world + t (metres, z forward); pixel = K @ camera / z without the skew K[0, 1],
    which nothing here reads: u = K[0, 0] x / z + K[0, 2], v = K[1, 1] y / z + K[1, 2]."""

    image_id: str
    # Position in the raw row; it keys this view's random stream.
    index: int
    K: np.ndarray  # float32 [3, 3]
    R: np.ndarray  # float32 [3, 3]
    t: np.ndarray  # float32 [3]
    ade: np.ndarray  # uint8 [H, W], ids of classes.ADE_NAMES, classes.UNKNOWN for a colour outside the table
    gestalt: np.ndarray  # uint8 [H, W], ids of classes.GESTALT_NAMES, likewise
    depth: np.ndarray | None  # uint16 [Hd, Wd] millimetres, 0 = no depth


class DroppedView(NamedTuple):
    """A view that is not used, and why."""

    image_id: str
    index: int
    reason: str


@dataclass(frozen=True)
class Scene:
    """The usable views, COLMAP points and ground truth of one scene."""

    order_id: str
    views: tuple[View, ...]
    points: np.ndarray  # float32 [P, 3], world, metres
    vertices: np.ndarray  # float32 [V, 3], [0, 3] when there is no ground truth
    edges: np.ndarray  # int64 [E, 2]
    edge_classes: np.ndarray  # int64 [E], -1 where the row has edges and no classifications
    dropped: tuple[DroppedView, ...]


class _ViewError(ValueError):
    pass


def read_scene(row: Mapping) -> Scene:
    """Check and decode a raw row.

    A view is dropped, with a reason, when it is pose-only in COLMAP, lacks a column, has a camera that is all-zero,
    not finite, not a pinhole or not a rotation, or has a label map that is missing, undecodable, empty, or of another
    size than its fellow. A depth map that cannot be read counts as none; the skew of K is ignored. ``colmap_binary``
    and ``__key__`` are taken for ``colmap`` and ``order_id``.

    Args:
        row: the columns above; images as PIL images, RGB uint8 arrays, encoded bytes or ``{"bytes": ...}``; K, R
            [3, 3] and t [3] or [3, 1] as lists or arrays; depth in millimetres.

    Raises:
        SceneError: no order id, no usable view, a broken COLMAP ZIP, or ground truth that is not a graph.
    """
    if not isinstance(row, Mapping):
        raise SceneError(f"a raw row must be a dict of columns, got a {type(row).__name__}")
    order_id = _order_id(row)
    try:
        _refuse_unreadable(row)
        views, dropped = _read_views(row)
        points = _points(row)
        vertices, edges, edge_classes = read_ground_truth(row)
    except SceneError as error:
        raise SceneError(f"scene {order_id!r}: {error}") from None
    return Scene(order_id, views, points, vertices, edges, edge_classes, dropped)


def _order_id(row: Mapping) -> str:
    value = row.get("order_id")
    value = row.get("__key__") if value is None else value
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str) or not value:
        raise SceneError("a raw row needs its order_id, a non-empty string, in the column order_id (or __key__)")
    if not value.isprintable():
        raise SceneError(f"order_id {value[:100]!a} holds unprintable characters")
    return str(value)


def _refuse_unreadable(row: Mapping) -> None:
    # wireframe.shards lists here the members that hold a whole column and cannot be decoded.
    unreadable = row.get("unreadable")
    if isinstance(unreadable, Mapping):
        for member, reason in unreadable.items():
            raise SceneError(f"member {member!r} cannot be read: {reason}")


def _column(row: Mapping, name: str) -> list:
    value = row.get(name)
    if value is None:
        return []
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim > 0):
        return list(value)
    raise SceneError(f"column {name} is a {type(value).__name__}, expected a list with one entry per view")


def _read_views(row: Mapping) -> tuple[tuple[View, ...], tuple[DroppedView, ...]]:
    names = ("image_ids", "ade", "gestalt", "depth", "K", "R", "t", "pose_only_in_colmap")
    columns = {name: _column(row, name) for name in names}
    count = max(len(column) for column in columns.values())
    if count > MAX_VIEWS:
        raise SceneError(f"{count} views, above the cap of {MAX_VIEWS}")
    views, dropped = [], []
    for index in range(count):
        entries = {name: column[index] if index < len(column) else None for name, column in columns.items()}
        image_id = str(index) if entries["image_ids"] is None else _text(entries["image_ids"])
        try:
            views.append(_read_view(image_id, index, entries))
        except _ViewError as error:
            dropped.append(DroppedView(image_id, index, str(error)))
    if not views:
        listed = "; ".join(f"{view.image_id!r}: {view.reason}" for view in dropped[:8])
        more = f"; and {len(dropped) - 8} more" if len(dropped) > 8 else ""
        raise SceneError(f"no usable view ({listed}{more})" if dropped else "no usable view (the row has no views)")
    return tuple(views), tuple(dropped)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _read_view(image_id: str, index: int, entries: Mapping[str, Any]) -> View:
    if is_true(entries["pose_only_in_colmap"]):
        raise _ViewError("pose only in COLMAP")
    k, r, t = _camera(entries)
    ade = _labels(entries, "ade")
    gestalt = _labels(entries, "gestalt")
    if ade.shape != gestalt.shape:
        raise _ViewError(f"gestalt is {_size(gestalt)} and ade is {_size(ade)}, expected one size")
    try:
        depth = depth_millimetres(entries["depth"])
    except ImageError:
        depth = None
    return View(image_id, index, k, r, t, ade, gestalt, depth)


def is_true(value: Any) -> bool:
    """Whether an entry of ``pose_only_in_colmap``, a truth value, number or text, says yes; False for anything else."""
    if isinstance(value, (str, bytes)):
        return _text(value).strip().lower() in ("true", "1", "1.0")
    return isinstance(value, (bool, int, float, np.generic)) and bool(value)


def _size(labels: np.ndarray) -> str:
    return f"{labels.shape[1]} x {labels.shape[0]}"


def _labels(entries: Mapping[str, Any], name: str) -> np.ndarray:
    try:
        return colors_to_ids(label_rgb(entries[name]), name)
    except ImageError as error:
        raise _ViewError(f"{name}: {error}") from None


def _camera(entries: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    k = _matrix(entries["K"], "K", (3, 3))
    r = _matrix(entries["R"], "R", (3, 3))
    t = _matrix(entries["t"], "t", (3,))
    if not (k.any() or r.any() or t.any()):
        raise _ViewError("camera is all zero")
    if k[0, 0] <= 0 or k[1, 1] <= 0:
        raise _ViewError(f"K has focal lengths {k[0, 0]:g} and {k[1, 1]:g}, expected positive ones")
    if np.abs(k[2] - np.array([0.0, 0.0, 1.0])).max() > ORTHONORMAL_TOLERANCE:
        raise _ViewError("K does not end in the row 0 0 1")
    wide = r.astype(np.float64)
    if np.abs(wide @ wide.T - np.eye(3)).max() > ORTHONORMAL_TOLERANCE or np.linalg.det(wide) < 0:
        raise _ViewError("R is not a rotation")
    return k, r, t


def _matrix(value: Any, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if value is None:
        raise _ViewError(f"{name} is missing")
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            array = np.asarray(value, dtype=np.float64).astype(np.float32)
    except Exception:  # A foreign object's conversion to an array may raise anything.
        raise _ViewError(f"{name} does not hold numbers") from None
    if array.size != int(np.prod(shape)):
        raise _ViewError(f"{name} has shape {list(array.shape)}, expected {list(shape)}")
    if not np.isfinite(array).all():
        raise _ViewError(f"{name} is not finite")
    return array.reshape(shape)


def _points(row: Mapping) -> np.ndarray:
    value = row.get("colmap")
    value = row.get("colmap_binary") if value is None else value
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if value is None or (isinstance(value, bytes) and not value):
        return np.zeros((0, 3), dtype=np.float32)
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise SceneError(f"column colmap is a {type(value).__name__}, expected the bytes of a ZIP")
    return read_points3d(bytes(value))


def read_ground_truth(row: Mapping) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertices float32 [V, 3], edges int64 [E, 2] and edge classes int64 [E] (-1 where absent) of a raw row.

    Raises:
        SceneError: not numbers, not finite, of another shape, or edges that name no vertex.
    """
    vertices = _numbers(row, "wf_vertices", (-1, 3), np.float32)
    edges = _numbers(row, "wf_edges", (-1, 2), np.int64)
    if edges.size and (edges.min() < 0 or edges.max() >= len(vertices)):
        raise SceneError(f"wf_edges names vertex {edges.max() if edges.min() >= 0 else edges.min()}, "
                         f"but wf_vertices has {len(vertices)}")
    if row.get("wf_classifications") is None:
        return vertices, edges, np.full(len(edges), -1, dtype=np.int64)
    edge_classes = _numbers(row, "wf_classifications", (-1,), np.int64)
    if len(edge_classes) != len(edges):
        raise SceneError(f"wf_classifications has {len(edge_classes)} entries for {len(edges)} edges")
    return vertices, edges, edge_classes


def _numbers(row: Mapping, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    value = row.get(name)
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            wide = np.asarray([] if value is None else value, dtype=np.float64)
            array = wide.astype(dtype)
    except Exception:  # A foreign object's conversion to an array may raise anything.
        raise SceneError(f"{name} does not hold numbers") from None
    if not np.isfinite(wide).all() or not np.isfinite(array).all():
        raise SceneError(f"{name} is not finite")
    if dtype is np.int64 and (array != wide).any():
        raise SceneError(f"{name} does not hold whole numbers")
    expected = f"[{', '.join('N' if side < 0 else str(side) for side in shape)}]"
    if wide.size and (wide.ndim != len(shape) or wide.shape[1:] != shape[1:]):
        raise SceneError(f"{name} has shape {list(wide.shape)}, expected {expected}")
    return array.reshape(shape)
