"""The three maps of a view: ADE (what is seen), gestalt (the house, through what hides it) and depth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wireframe.classes import ADE_ID, GESTALT_ID
from wireframe.synth.building import Building, edge_gestalt
from wireframe.synth.cameras import Camera
from wireframe.synth.config import SynthConfig
from wireframe.synth.raster import Raster
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
           dropped: tuple[np.ndarray, np.ndarray]) -> Maps:
    """Renders one view.

    Args:
        dropped: bool [E], bool [V]: the edges and corners that this view's gestalt map misses.
    """
    house = Raster(camera, config.width, config.height)
    for number, panel in enumerate(building.panels):
        house.polygon(panel.points, number)
    full = house.copy()
    first = len(building.panels)
    others = [panel.ade for panel in around.panels] + [blob.ade for blob in around.blobs]
    for number, panel in enumerate(around.panels):
        full.polygon(panel.points, first + number)
    for number, blob in enumerate(around.blobs):
        full.ellipsoid(blob.centre, blob.radii, first + len(around.panels) + number)
    full.ground(4 * config.depth_far, first + len(others))
    # The last entry is index EMPTY = -1.
    known = [panel.ade for panel in building.panels] + others
    ade = np.array([*known, around.ground_ade, ADE_ID["sky"]], dtype=np.uint8)
    gestalt = _gestalt(house, camera, building, config, dropped)
    depth = np.zeros_like(full.inverse_z)
    np.divide(np.float32(1), full.inverse_z, out=depth, where=full.inverse_z > 0)
    return Maps(ade[full.ident], gestalt, depth, (full.ident >= 0) & (full.ident < first))


def _gestalt(house: Raster, camera: Camera, building: Building, config: SynthConfig,
             dropped: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    table = []
    for panel in building.panels:
        facing = ((camera.centre - panel.points[0]) * panel.normal).sum() > 0
        table.append(panel.front if facing else panel.back)
    table.append(GESTALT_ID["unclassified"])
    image = np.array(table, dtype=np.uint8)[house.ident]
    width = max(1.0, config.pixels(config.stroke_px))
    for line in building.ground_lines:
        _stroke(image, house, line, width / 2, GESTALT_ID["ground_line"])
    ends = building.vertices[building.edges]
    # Far strokes first, so that a near one crosses over them.
    depth = camera.to_camera(ends.mean(axis=1))[:, 2]
    for k in np.argsort(-depth, kind="stable"):
        if not dropped[0][k]:
            _stroke(image, house, ends[k], width, edge_gestalt(int(building.edge_classes[k])))
    corners = np.flatnonzero(~dropped[1])
    _discs(image, house, building.vertices[corners], building.vertex_classes[corners],
           max(1.0, config.pixels(config.corner_px)))
    return image


def visible(house: Raster, u: np.ndarray, v: np.ndarray, z: np.ndarray) -> np.ndarray:
    """bool [n]: whether the house leaves a point at (u, v), depth z free somewhere in a 3 x 3 window."""
    height, width = house.inverse_z.shape
    column, row = np.rint(u), np.rint(v)
    framed = (z > 0.2) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    column, row = np.where(framed, column, 0).astype(np.int64), np.where(framed, row, 0).astype(np.int64)
    nearest = 1.0 / np.maximum(z * (1 - _TOLERANCE[0]) - _TOLERANCE[1], 0.05)
    seen = np.zeros(len(u), dtype=bool)
    for dv in (-1, 0, 1):
        for du in (-1, 0, 1):
            at = house.inverse_z[np.clip(row + dv, 0, height - 1), np.clip(column + du, 0, width - 1)]
            seen |= at <= nearest
    return framed & seen


def _stroke(image: np.ndarray, house: Raster, ends: np.ndarray, width: float, value: int) -> None:
    """Paints a line [2, 3] (world), ``width`` pixels wide, where the house does not hide it."""
    near, far = house.camera.to_camera(ends)
    if min(near[2], far[2]) < 0.2:
        return
    (u0, u1), (v0, v1), z = house.camera.project(ends)
    du, dv = u1 - u0, v1 - v0
    length = float(np.sqrt(du * du + dv * dv))
    if length < 1e-6 or length > 1e5:
        return
    steps = np.arange(int(length) + 2) / (int(length) + 1)
    inverse = (1 - steps) / z[0] + steps / z[1]
    shown = visible(house, u0 + steps * du, v0 + steps * dv, 1 / inverse)
    half = width / 2
    box = _box(image, min(u0, u1) - half, max(u0, u1) + half, min(v0, v1) - half, max(v0, v1) + half)
    if box is None or not shown.any():
        return
    rows, cols = box
    u = np.arange(cols.start, cols.stop) - u0
    v = np.arange(rows.start, rows.stop)[:, None] - v0
    near_line = np.abs(u * dv - v * du) <= half * length
    row, col = np.nonzero(near_line)
    along = (u[col] * du + v[row, 0] * dv) / length
    kept = (along >= 0) & (along <= length)
    row, col, along = row[kept], col[kept], along[kept]
    kept = shown[np.rint(along / length * (len(steps) - 1)).astype(np.int64)]
    image[rows.start + row[kept], cols.start + col[kept]] = value


def _discs(image: np.ndarray, house: Raster, points: np.ndarray, values: np.ndarray, radius: float) -> None:
    u, v, z = house.camera.project(points)
    shown = visible(house, u, v, z)
    for k in np.argsort(-z, kind="stable"):
        box = _box(image, u[k] - radius, u[k] + radius, v[k] - radius, v[k] + radius) if shown[k] else None
        if box is None:
            continue
        rows, cols = box
        x = np.arange(cols.start, cols.stop) - u[k]
        y = np.arange(rows.start, rows.stop)[:, None] - v[k]
        image[rows, cols][x * x + y * y <= radius * radius] = values[k]


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
