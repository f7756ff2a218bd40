"""Paints strokes and corners into a gestalt map where the house does not hide them, and those that are not there."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from wireframe.synth.cameras import Camera
from wireframe.synth.mistakes import Mistakes

# A stroke is seen where no surface of the house lies nearer than this (relative, metres).
_TOLERANCE = (0.01, 0.05)
_NEAR = 0.2
_MAX_LENGTH = 1e5


def paint_strokes(
    image: np.ndarray,  # [H, W] uint8
    camera: Camera,
    behind: np.ndarray,  # [H, W]
    lines: np.ndarray,  # [S, 2, 3]
    widths: np.ndarray,  # [S]
    values: np.ndarray,  # [S]
    shifts: np.ndarray,  # [S, 2, 2]
    gaps: np.ndarray,  # [S, 2]
) -> None:
    """Paints lines (world, metres) in their order, ``widths`` pixels wide, where the house does not hide them.

    Args:
        behind: ``Raster.farthest_near`` of the house.
        shifts: pixels (u, v) by which the two ends are moved in the image.
        gaps: the part of a line, from 0 at its first end to 1, that is left out; none where the two are equal.
    """
    u, v, z = (part.reshape(-1, 2) for part in camera.project(lines.reshape(-1, 3)))
    du, dv = u[:, 1] - u[:, 0], v[:, 1] - v[:, 0]
    length = np.sqrt(du * du + dv * dv)
    drawn = (z.min(axis=1) >= _NEAR) & (length >= 1e-6) & (length <= _MAX_LENGTH)
    # About one step a pixel, of all lines in one go.
    counts = np.where(drawn, np.where(drawn, length, 0).astype(np.int64) + 2, 0)
    ends = np.cumsum(counts)
    line = np.repeat(np.arange(len(lines)), counts)
    steps = (np.arange(len(line)) - (ends - counts)[line]) / (counts[line] - 1)
    inverse = (1 - steps) / z[line, 0] + steps / z[line, 1]
    shown = visible(behind, u[line, 0] + steps * du[line], v[line, 0] + steps * dv[line], 1 / inverse)
    low, high = gaps[line, 0], gaps[line, 1]
    shown &= (low >= high) | (steps < low) | (steps > high)
    u, v = u + shifts[:, :, 0], v + shifts[:, :, 1]
    for k in np.flatnonzero(np.bincount(line, shown, len(lines))):
        part = shown[ends[k] - counts[k] : ends[k]]
        _paint_line(image, (u[k, 0], v[k, 0]), (u[k, 1], v[k, 1]), widths[k], values[k],
                    lambda share, part=part: part[np.rint(share * (len(part) - 1)).astype(np.int64)])


def paint_corners(image: np.ndarray, camera: Camera, behind: np.ndarray, points: np.ndarray, radius: float,
                  values: np.ndarray, shifts: np.ndarray) -> None:
    """Paints discs at points [V, 3] (world), moved by ``shifts`` [V, 2] pixels, that the house does not hide."""
    u, v, z = camera.project(points)
    shown = visible(behind, u, v, z)
    u, v = u + shifts[:, 0], v + shifts[:, 1]
    # Far ones first, so that a near one covers them.
    for k in np.argsort(-z, kind="stable"):
        if shown[k]:
            _paint_disc(image, u[k], v[k], radius, values[k])


def paint_false(image: np.ndarray, house: np.ndarray, mistakes: Mistakes, width: float, radius: float) -> None:
    """Paints the strokes and corners that are not there, on the house: bool [H, W]."""
    pixels = np.flatnonzero(house)
    if not len(pixels):
        return
    for place, angle, length, kind in mistakes.false_strokes:
        row, col = divmod(int(pixels[int(place * len(pixels))]), image.shape[1])
        across, down = length / 2 * math.cos(angle), length / 2 * math.sin(angle)
        ends = (col - across, row - down), (col + across, row + down)
        _paint_line(image, *ends, width, kind, lambda share: np.ones(len(share), dtype=bool))
    for place, kind in mistakes.false_corners:
        row, col = divmod(int(pixels[int(place * len(pixels))]), image.shape[1])
        _paint_disc(image, float(col), float(row), radius, kind)


def visible(behind: np.ndarray, u: np.ndarray, v: np.ndarray, z: np.ndarray) -> np.ndarray:
    """bool [n]: whether the house leaves a point at (u, v), depth z free somewhere in a 3 x 3 window.

    ``behind`` [H, W] is ``Raster.farthest_near`` of the house.
    """
    height, width = behind.shape
    column, row = np.rint(u), np.rint(v)
    framed = (z > _NEAR) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    column, row = np.where(framed, column, 0).astype(np.int64), np.where(framed, row, 0).astype(np.int64)
    nearest = 1.0 / np.maximum(z * (1 - _TOLERANCE[0]) - _TOLERANCE[1], 0.05)
    return framed & (behind[row, column] <= nearest)


def _paint_line(image: np.ndarray, start: tuple[float, float], end: tuple[float, float], width: float, value: int,
                shown: Callable[[np.ndarray], np.ndarray]) -> None:
    """Paints the pixels of a line from ``start`` to ``end`` (u, v) for whose share of the way ``shown`` says True."""
    (u0, v0), (u1, v1) = start, end
    du, dv = u1 - u0, v1 - v0
    length = float(np.sqrt(du * du + dv * dv))
    half = width / 2
    box = _box(image, min(u0, u1) - half, max(u0, u1) + half, min(v0, v1) - half, max(v0, v1) + half)
    if box is None or length < 1e-6:
        return
    rows, cols = box
    u = np.arange(cols.start, cols.stop) - u0
    v = np.arange(rows.start, rows.stop)[:, None] - v0
    near_line = np.abs(u * dv - v * du) <= half * length
    row, col = np.nonzero(near_line)
    along = (u[col] * du + v[row, 0] * dv) / length
    kept = (along >= 0) & (along <= length)
    row, col, along = row[kept], col[kept], along[kept]
    kept = shown(along / length)
    image[rows.start + row[kept], cols.start + col[kept]] = value


def _paint_disc(image: np.ndarray, u: float, v: float, radius: float, value: int) -> None:
    box = _box(image, u - radius, u + radius, v - radius, v + radius)
    if box is None:
        return
    rows, cols = box
    x = np.arange(cols.start, cols.stop) - u
    y = np.arange(rows.start, rows.stop)[:, None] - v
    image[rows, cols][x * x + y * y <= radius * radius] = value


def _box(image: np.ndarray, u0: float, u1: float, v0: float, v1: float) -> tuple[slice, slice] | None:
    height, width = image.shape
    left, right = max(0, int(np.floor(max(u0, -1.0)))), min(width - 1, int(np.ceil(min(u1, width))))
    top, bottom = max(0, int(np.floor(max(v0, -1.0)))), min(height - 1, int(np.ceil(min(v1, height))))
    if left > right or top > bottom:
        return None
    return slice(top, bottom + 1), slice(left, right + 1)
