"""Farthest point and voxel sampling in plain NumPy: the oracle of ``wireframe.kernels.point_subsets``."""

from __future__ import annotations

import sys

import numpy as np

# floor(x / size) below it fits an int64.
MOST_CELLS = 2.0**62


def farthest_point_sample(xyz: np.ndarray, count: int, start: int = 0) -> np.ndarray:
    """Indices of ``count`` points, each the farthest from those before it.

    Squared distances are float64, (dx dx + dy dy) + dz dz in this order. Ties go to the lowest index; a chosen point
    is not chosen again, so points that repeat others come last, by index.

    Args:
        xyz: float32 [P, 3], finite.
        count: how many, at least 1; all P where there are fewer.
        start: index of the first one.

    Returns:
        int64 [min(count, P)].

    Raises:
        ValueError: ``count`` < 1, ``start`` is not a point, or a coordinate is not finite.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    points = len(xyz)
    if not 0 <= start < max(points, 1):
        raise ValueError(f"start must be the index of one of the {points} points, got {start}")
    if not np.isfinite(xyz).all():
        raise ValueError("xyz must be finite")
    x, y, z = xyz.astype(np.float64).T
    chosen = np.empty(min(count, points), dtype=np.int64)
    distance = np.full(points, np.inf)
    following = start
    for k in range(len(chosen)):
        chosen[k] = following
        dx, dy, dz = x - x[following], y - y[following], z - z[following]
        distance = np.minimum(distance, (dx * dx + dy * dy) + dz * dz)
        # Below every distance that is left, and it stays so.
        distance[following] = -1.0
        following = int(distance.argmax())
    return chosen


def checked_size(size: float) -> float:
    """``size`` as a float.

    Raises:
        ValueError: it is not the edge of a voxel.
    """
    # Compared as it is: float() of a large integer overflows.
    if not 0 < size <= sys.float_info.max:
        raise ValueError(f"size must be positive and finite, got {size}")
    return float(size)


def voxel_sample(xyz: np.ndarray, size: float, priority: np.ndarray | None = None) -> np.ndarray:
    """Indices of one point for every occupied voxel of a cubic grid.

    The voxel of a point is floor(x / size) on each axis, in float64. Of its points the one with the lowest priority is
    taken, ties (and all, without priorities) to the lowest index.

    Args:
        xyz: float32 [P, 3], finite.
        size: edge of a voxel in the units of ``xyz``.
        priority: int64 [P] or None.

    Returns:
        int64 [voxels], ascending.

    Raises:
        ValueError: ``size`` is not positive and finite or so small that x / size leaves 2^62, or a coordinate is not
            finite.
    """
    size = checked_size(size)
    if not np.isfinite(xyz).all():
        raise ValueError("xyz must be finite")
    with np.errstate(over="ignore"):
        quotient = xyz.astype(np.float64) / size
    if not (np.abs(quotient) < MOST_CELLS).all():
        raise ValueError("size is too small: xyz / size must stay within 2^62")
    cells = np.floor(quotient).astype(np.int64)
    order = np.arange(len(xyz)) if priority is None else np.argsort(priority, kind="stable")
    # np.unique gives the first of each kind in the order of its input.
    _, first = np.unique(cells[order], axis=0, return_index=True)
    return np.sort(order[first])
