"""Wireframes as OBJ or PLY meshes, a file a scene, which every 3D viewer shows."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wireframe.errors import MissingPackageError
from wireframe.files import atomic_write
from wireframe.graph import Wireframe

FORMATS = ("obj", "ply")

# Metres: thin beside a house, thick enough to be seen.
_RADIUS = 0.06
_SIDES = 12
# Letters that a file's name may hold on every system; a longer or another name gets a hash.
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", re.ASCII)
# What Windows takes for a device, whatever follows the first dot.
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.ASCII | re.IGNORECASE)


class Written(NamedTuple):
    """files: paths in the order of the scenes; empty: ids of scenes without an edge of any length, which get none."""

    files: list[Path]
    empty: list[str]


def require_trimesh() -> None:
    """Raises MissingPackageError where trimesh cannot be imported."""
    try:
        import trimesh  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(f"meshes need trimesh ({error}): pip install trimesh") from error


def write_meshes(
    folder: str | os.PathLike, predictions: Iterable[tuple[str, Wireframe]], file_format: str
) -> Written:
    """Writes ``folder``/ID.obj or .ply for each (order_id, wireframe), each whole or not at all.

    A mesh is a tube of 6 cm radius along every edge and a ball at every vertex, in world metres, y up. An id that is
    no plain file name is cut down to one, with a hash of the id that keeps it apart from others. The same wireframes
    give the same bytes.

    Args:
        folder: made where it is not there.
        file_format: "obj" or "ply" (binary).

    Raises:
        MissingPackageError: trimesh is not installed. ValueError: an unknown format. OSError: a file cannot be written.
    """
    if file_format not in FORMATS:
        raise ValueError(f"unknown format {file_format!r}; choose one of {', '.join(FORMATS)}")
    require_trimesh()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = Written([], [])
    for order_id, found in predictions:
        parts = list(_parts(found))
        if not parts:
            written.empty.append(order_id)
            continue
        path = folder / f"{file_name(order_id)}.{file_format}"
        with atomic_write(path) as file:
            file.write(_export(parts, file_format))
        written.files.append(path)
    return written


def file_name(order_id: str) -> str:
    """A plain file name, without extension, that no other id has, also where case does not count."""
    if _PLAIN.fullmatch(order_id) and not _DEVICE.fullmatch(order_id) and order_id == order_id.lower():
        return order_id
    digest = hashlib.sha256(order_id.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', order_id)[:60]}-{digest}"


def _parts(wireframe: Wireframe) -> Iterator:
    """Tubes and balls; edges of no length, or that cannot be drawn, are left out."""
    import trimesh

    vertices, edges = wireframe.vertices.astype(np.float64), wireframe.edges
    used = set()
    for first, second in edges.tolist():
        if not (0 <= first < len(vertices) and 0 <= second < len(vertices)):
            continue
        ends = vertices[[first, second]]
        if np.isfinite(ends).all() and np.linalg.norm(ends[1] - ends[0]) > 1e-6:
            used |= {first, second}
            yield trimesh.creation.cylinder(radius=_RADIUS, segment=ends, sections=_SIDES)
    for vertex in sorted(used):
        ball = trimesh.creation.icosphere(subdivisions=1, radius=1.6 * _RADIUS)
        ball.apply_translation(vertices[vertex])
        yield ball


def _export(parts: list, file_format: str) -> bytes:
    import trimesh

    data = trimesh.util.concatenate(parts).export(file_type=file_format)
    return data.encode() if isinstance(data, str) else data
