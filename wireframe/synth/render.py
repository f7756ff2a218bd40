"""The three maps of a view: ADE (what is seen), gestalt (the house, through what hides it) and depth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from wireframe.classes import ADE_ID, GESTALT_ID
from wireframe.synth.building import Building
from wireframe.synth.cameras import Camera
from wireframe.synth.config import SynthConfig
from wireframe.synth.mistakes import Mistakes, paint_patches, shifted
from wireframe.synth.raster import EMPTY, Raster
from wireframe.synth.surroundings import Surroundings

# A stroke is seen where no surface of the house lies nearer than this (relative, metres).
_TOLERANCE = (0.01, 0.05)


@dataclass(frozen=True)
class Maps:
    """One rendered view: ``ade``, ``gestalt`` uint8 ids [H, W]; ``depth`` float32 metres [H, W], 0 = sky;
    ``seen_house`` bool [H, W], True where the nearest surface is the house."""

    ade: np.ndarray
    gestalt: np.ndarray
    depth: np.ndarray
    seen_house: np.ndarray


def render(camera: Camera, building: Building, around: Surroundings, config: SynthConfig,
           mistakes: Mistakes) -> Maps:
    """Renders one view with the mistakes of its label maps."""
    house = Raster(camera, config.width, config.height)
    house.polygons([panel.points for panel in building.panels], 0)
    full = house.copy()
    first = len(building.panels)
    others = [panel.ade for panel in around.panels] + [blob.ade for blob in around.blobs]
    full.polygons([panel.points for panel in around.panels], first)
    for number, blob in enumerate(around.blobs):
        full.ellipsoid(blob.centre, blob.radii, first + len(around.panels) + number)
    full.ground(4 * config.depth_far, first + len(others))
    # The last entry is that of EMPTY = -1.
    known = [panel.ade for panel in building.panels] + others
    ade = np.array([*known, around.ground_ade, ADE_ID["sky"]], dtype=np.uint8)
    gestalt = _gestalt(house, camera, building, config, mistakes)
    depth = np.zeros_like(full.inverse_z)
    np.divide(np.float32(1), full.inverse_z, out=depth, where=full.inverse_z > 0)
    seen_house = (full.ident >= 0) & (full.ident < first)
    if mistakes.house_class is not None:
        ade[:first] = mistakes.house_class
    named = shifted(ade[full.ident], mistakes.ade_shift)
    paint_patches(named, seen_house, mistakes.ade_patches)
    return Maps(named, gestalt, depth, seen_house)


def _gestalt(house: Raster, camera: Camera, building: Building, config: SynthConfig,
             mistakes: Mistakes) -> np.ndarray:
    if mistakes.blank:
        return np.full(house.ident.shape, GESTALT_ID["unclassified"], dtype=np.uint8)
    table = []
    for panel in building.panels:
        facing = ((camera.centre - panel.points[0]) * panel.normal).sum() > 0
        table.append(panel.front if facing else panel.back)
    table.append(GESTALT_ID["unclassified"])
    image = np.array(table, dtype=np.uint8)[house.ident]
    width = max(1.0, config.pixels(config.stroke_px))
    behind = house.farthest_near()
    for line in building.ground_lines:
        _stroke(image, camera, behind, line, width / 2, GESTALT_ID["ground_line"])
    ends = building.vertices[building.edges]
    # Far strokes first, so that a near one crosses over them.
    depth = camera.to_camera(ends.mean(axis=1))[:, 2]
    for k in np.argsort(-depth, kind="stable"):
        if not mistakes.missed_strokes[k]:
            _stroke(image, camera, behind, ends[k], width, int(mistakes.stroke_classes[k]),
                    mistakes.stroke_shifts[k], mistakes.gaps[k])
    corners = np.flatnonzero(~mistakes.missed_corners)
    radius = max(1.0, config.pixels(config.corner_px))
    _discs(image, camera, behind, building.vertices[corners], mistakes.corner_classes[corners],
           radius, mistakes.corner_shifts[corners])
    _paint_false(image, house.ident, mistakes, width, radius)
    return image


def _paint_false(image: np.ndarray, house: np.ndarray, mistakes: Mistakes, width: float, radius: float) -> None:
    """Strokes and corners that are not there, on the house [H, W] (ident, EMPTY elsewhere)."""
    pixels = np.flatnonzero(house != EMPTY)
    if not len(pixels):
        return
    for place, angle, length, kind in mistakes.false_strokes:
        row, col = divmod(int(pixels[int(place * len(pixels))]), image.shape[1])
        half = length / 2 * math.cos(angle), length / 2 * math.sin(angle)
        ends = (col - half[0], row - half[1]), (col + half[0], row + half[1])
        _paint_line(image, *ends, width, int(kind), lambda share: np.ones(len(share), dtype=bool))
    for place, kind in mistakes.false_corners:
        row, col = divmod(int(pixels[int(place * len(pixels))]), image.shape[1])
        _paint_disc(image, float(col), float(row), radius, int(kind))


def visible(behind: np.ndarray, u: np.ndarray, v: np.ndarray, z: np.ndarray) -> np.ndarray:
    """bool [n]: whether the house leaves a point at (u, v), depth z free somewhere in a 3 x 3 window.

    ``behind`` [H, W] is ``Raster.farthest_near`` of the house.
    """
    height, width = behind.shape
    column, row = np.rint(u), np.rint(v)
    framed = (z > 0.2) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    column, row = np.where(framed, column, 0).astype(np.int64), np.where(framed, row, 0).astype(np.int64)
    nearest = 1.0 / np.maximum(z * (1 - _TOLERANCE[0]) - _TOLERANCE[1], 0.05)
    return framed & (behind[row, column] <= nearest)


def _stroke(image: np.ndarray, camera: Camera, behind: np.ndarray, ends: np.ndarray, width: float, value: int,
            shift: np.ndarray | None = None, gap: tuple[float, float] | np.ndarray = (0.0, 0.0)) -> None:
    """Paints a line [2, 3] (world), ``width`` pixels wide, where the house does not hide it.

    Its ends are shifted by ``shift`` [2, 2] pixels in the image; the part of it from ``gap[0]`` to ``gap[1]`` is left
    out.
    """
    u, v, z = camera.project(ends)
    if z.min() < 0.2:
        return
    length = float(np.sqrt((u[1] - u[0]) * (u[1] - u[0]) + (v[1] - v[0]) * (v[1] - v[0])))
    if length < 1e-6 or length > 1e5:
        return
    steps = np.arange(int(length) + 2) / (int(length) + 1)
    inverse = (1 - steps) / z[0] + steps / z[1]
    shown = visible(behind, u[0] + steps * (u[1] - u[0]), v[0] + steps * (v[1] - v[0]), 1 / inverse)
    if gap[1] > gap[0]:
        shown &= (steps < gap[0]) | (steps > gap[1])
    if not shown.any():
        return
    if shift is not None:
        u, v = u + shift[:, 0], v + shift[:, 1]
    _paint_line(image, (u[0], v[0]), (u[1], v[1]), width, value,
                lambda share: shown[np.rint(share * (len(steps) - 1)).astype(np.int64)])


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


def _discs(image: np.ndarray, camera: Camera, behind: np.ndarray, points: np.ndarray, values: np.ndarray,
           radius: float, shifts: np.ndarray) -> None:
    u, v, z = camera.project(points)
    shown = visible(behind, u, v, z)
    u, v = u + shifts[:, 0], v + shifts[:, 1]
    for k in np.argsort(-z, kind="stable"):
        if shown[k]:
            _paint_disc(image, u[k], v[k], radius, int(values[k]))


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


def monocular_depth(rng: np.random.Generator, depth: np.ndarray, config: SynthConfig) -> np.ndarray:
    """uint16 [H, W] millimetres as a single-image network guesses: wrong scale, smooth errors, vague sky."""
    unscaled = rng.random() < config.depth_unscaled_prob
    scale = float(rng.uniform(0.95, 1.05) if unscaled else rng.uniform(*config.depth_scale_range))
    waves = 1.0 + config.depth_sigma * rng.standard_normal((5, 6))
    sky = 0.0 if rng.random() < config.sky_is_zero_prob else config.depth_far
    height, width = depth.shape
    metres = depth * (scale * _stretch(waves, height, width)).astype(np.float32)
    metres = np.where(depth > 0, np.minimum(metres, np.float32(config.depth_far)), np.float32(sky))
    return np.rint(np.clip(metres * np.float32(1000), 0, 65535)).astype(np.uint16)


def _stretch(coarse: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear enlargement of a coarse grid to [height, width]."""
    rows = np.linspace(0, coarse.shape[0] - 1, height)
    cols = np.linspace(0, coarse.shape[1] - 1, width)
    i = np.minimum(rows.astype(np.int64), coarse.shape[0] - 2)
    j = np.minimum(cols.astype(np.int64), coarse.shape[1] - 2)
    r, c = (rows - i)[:, None], cols - j
    wide = [coarse[k][:, j] * (1 - c) + coarse[k][:, j + 1] * c for k in (i, i + 1)]
    return wide[0] * (1 - r) + wide[1] * r
