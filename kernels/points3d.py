"""The points of COLMAP's points3D.txt and points3D.bin, from their bytes.

The native parsers read what is usual in such a file. Whatever else they meet, they hand the whole file to the
reference, which reads it or says what is wrong with it: acceptance, values and messages are those of the reference.
"""

from __future__ import annotations

import numpy as np

from wireframe import colmap
from wireframe.kernels import dispatch, native


def parse_points3d(data: bytes, *, impl: str = "auto", threads: int | None = None) -> np.ndarray:
    """The points of a points3D.txt.

    A line is ``id X Y Z ...``, parted by ASCII white space; blank lines and those that begin with # are passed over.
    Coordinates are read as float64 and rounded once; only they are looked at.

    Args:
        data: the file.
        impl: "auto", "reference" or "native".
        threads: of the native implementation; None takes torch's number. The result does not depend on it.

    Returns:
        float32 [P, 3], in file order.

    Raises:
        SceneError: a line without three finite numbers, or more than ``colmap.MAX_POINTS`` line ends.
        TypeError: ``data`` is not ``bytes``.
        ValueError: an unknown ``impl``, or less than one thread.
        ImplementationError: an explicit ``impl`` that cannot run.
    """
    _check_bytes("parse_points3d", data)
    if dispatch.choose("parse_points3d", impl) == "reference":
        return colmap.parse_points3d_reference(data)
    # The shortest line of a point is "1 0 0 0" and its line end.
    points = _room((len(data) + 1) // 8, colmap.MAX_POINTS + 1)
    count = native.module().parse_points3d(data, colmap.MAX_POINTS, points, _threads(threads))
    return colmap.parse_points3d_reference(data) if count < 0 else points[:count].copy()


def parse_points3d_binary(data: bytes, *, impl: str = "auto") -> np.ndarray:
    """The points of a points3D.bin: a count, then id u64, X Y Z f64, R G B u8, error f64 and a track for each.

    Args, returns and errors are those of ``parse_points3d``; SceneError also where the file ends inside a point or
    goes on after the last one.
    """
    _check_bytes("parse_points3d_binary", data)
    if dispatch.choose("parse_points3d", impl) == "reference":
        return colmap.parse_points3d_binary_reference(data)
    points = _room(len(data) // 51, colmap.MAX_POINTS)
    count = native.module().parse_points3d_binary(data, colmap.MAX_POINTS, points)
    return colmap.parse_points3d_binary_reference(data) if count < 0 else points[:count].copy()


def _check_bytes(op: str, data: bytes) -> None:
    if not isinstance(data, bytes):
        raise TypeError(f"{op}: data must be bytes, got {type(data).__name__}")


def _threads(threads: int | None) -> int:
    if threads == 1:
        return 1
    # Loads torch, which the reading of scenes does without.
    from wireframe.kernels.checks import thread_count

    return thread_count(threads)


def _room(points: int, cap: int) -> np.ndarray:
    # Memory that is never written to costs nothing, so the bound need not be tight.
    return np.empty((min(points, cap), 3), dtype=np.float32)
