"""COLMAP points out of the ZIP of a raw row, in memory."""

from __future__ import annotations

import array
import struct
import zipfile

import numpy as np

from wireframe.archives import ArchiveError, open_zip, read_member
from wireframe.errors import SceneError

MAX_MEMBERS = 4096
MAX_POINTS_BYTES = 256 << 20
MAX_RATIO = 200
MAX_POINTS = 2_000_000


def read_points3d(zip_bytes: bytes) -> np.ndarray:
    """The points of a COLMAP reconstruction.

    The ZIP holds ``points3D.txt`` (columns id X Y Z R G B error track...) or ``points3D.bin``, in the root or in a
    folder such as ``sparse/0``; the one nearest to the root is read, text before binary. No member is extracted.

    Returns:
        float32 [P, 3], world coordinates in metres, in file order; [0, 3] where the file lists no points.

    Raises:
        SceneError: not a ZIP, no points file or two of them, a cap exceeded (``MAX_MEMBERS``, ``MAX_POINTS_BYTES``
            announced or actual, ``MAX_RATIO``, ``MAX_POINTS``), an encrypted or corrupt member, or a malformed line.
    """
    try:
        archive, infos = open_zip(zip_bytes, MAX_MEMBERS)
        info = _points_member(infos)
        data = read_member(archive, info, MAX_POINTS_BYTES, MAX_RATIO)
    except ArchiveError as error:
        raise SceneError(f"COLMAP: {error}") from None
    # Here, not above: that module takes its references and caps from this one.
    from wireframe.kernels.points3d import parse_points3d, parse_points3d_binary

    # Scenes are read side by side, so each takes one thread.
    return parse_points3d_binary(data) if info.filename.lower().endswith(".bin") else parse_points3d(data, threads=1)


def _points_member(infos: list[zipfile.ZipInfo]) -> zipfile.ZipInfo:
    found = []
    for info in infos:
        folder, _, base = info.filename.replace("\\", "/").rpartition("/")
        if base.lower() in ("points3d.txt", "points3d.bin"):
            found.append(((folder.count("/") + 1 if folder else 0, base.lower().endswith(".bin")), info))
    if not found:
        listed = ", ".join(repr(info.filename[:60]) for info in infos[:5])
        raise ArchiveError(f"ZIP without points3D.txt (members: {listed or 'none'})")
    nearest = min(rank for rank, _ in found)
    best = [info for rank, info in found if rank == nearest]
    if len(best) > 1:
        raise ArchiveError(f"ZIP with two points files, {best[0].filename!r} and {best[1].filename!r}")
    return best[0]


def parse_points3d_reference(data: bytes) -> np.ndarray:
    """The points of a points3D.txt; ``wireframe.kernels.points3d.parse_points3d`` describes it."""
    if data.count(b"\n") > MAX_POINTS:
        raise SceneError(f"COLMAP: points3D.txt has more than {MAX_POINTS} lines")
    flat = array.array("d")
    try:
        for line in data.split(b"\n"):
            # Tracks have no fixed length: the rest of a line stays one piece, which is much faster than full columns.
            # No row is kept: 40k small lists would wake the garbage collector, at three times the cost.
            row = line.split(None, 4)
            if row and not row[0].startswith(b"#"):
                flat.extend((float(row[1]), float(row[2]), float(row[3])))
    except (ValueError, IndexError):
        raise SceneError(_bad_line(data)) from None
    points = _stored(flat)
    if not np.isfinite(points).all():
        raise SceneError(_bad_line(data))
    return points


def _stored(values: list | array.array) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.array(values, dtype=np.float64).astype(np.float32).reshape(-1, 3)


def _bad_line(data: bytes) -> str:
    for number, line in enumerate(data.split(b"\n"), start=1):
        row = line.split(None, 4)
        if not row or row[0].startswith(b"#"):
            continue
        shown = repr(line[:60])[1:]
        try:
            finite = np.isfinite(_stored([float(value) for value in (row[1], row[2], row[3])])).all()
        except (ValueError, IndexError):
            return f"COLMAP: line {number} of points3D.txt is not 'id X Y Z ...': {shown}"
        if not finite:
            return f"COLMAP: line {number} of points3D.txt is not finite: {shown}"
    return "COLMAP: points3D.txt is malformed"


def parse_points3d_binary_reference(data: bytes) -> np.ndarray:
    """The points of a points3D.bin; ``wireframe.kernels.points3d.parse_points3d_binary`` describes it."""
    points, offset = [], 8
    try:
        (count,) = struct.unpack_from("<Q", data)
        if count > MAX_POINTS:
            raise SceneError(f"COLMAP: points3D.bin announces {count} points, above the cap of {MAX_POINTS}")
        for _ in range(count):
            # id u64, X Y Z f64, R G B u8, error f64, track length u64, then (image id, point index) u32 pairs.
            _, x, y, z, _, _, _, _, track = struct.unpack_from("<Q3d3BdQ", data, offset)
            points.append((x, y, z))
            offset += 51 + 8 * track
    except (struct.error, OverflowError):  # OverflowError: a track that ends beyond the address space.
        raise SceneError(f"COLMAP: points3D.bin ends inside point {len(points) + 1}") from None
    if offset != len(data):
        raise SceneError(f"COLMAP: points3D.bin holds {len(data)} bytes, its points take {offset}")
    stored = _stored(points)
    if not np.isfinite(stored).all():
        first = int(np.argmin(np.isfinite(stored).all(axis=1))) + 1
        raise SceneError(f"COLMAP: point {first} of points3D.bin is not finite")
    return stored
