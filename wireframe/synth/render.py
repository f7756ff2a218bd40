"""The three maps of a view: ADE (what is seen), gestalt (the house, through what hides it) and depth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wireframe.classes import ADE_ID, GESTALT_ID
from wireframe.synth.building import Building
from wireframe.synth.cameras import Camera
from wireframe.synth.config import SynthConfig
from wireframe.synth.mistakes import Mistakes, paint_patches, shifted
from wireframe.synth.raster import EMPTY, Raster
from wireframe.synth.strokes import paint_corners, paint_false, paint_strokes
from wireframe.synth.surroundings import Surroundings


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
    _paint_labels(image, house, camera, building, config, mistakes)
    return image


def _paint_labels(image: np.ndarray, house: Raster, camera: Camera, building: Building, config: SynthConfig,
                  mistakes: Mistakes) -> None:
    """The feet of the walls, the edges and the corners of the roof, and what is not there."""
    width, radius = max(1.0, config.pixels(config.stroke_px)), max(1.0, config.pixels(config.corner_px))
    behind = house.farthest_near()
    ends = building.vertices[building.edges]
    # Far strokes first, so that a near one crosses over them.
    order = np.argsort(-camera.to_camera(ends.mean(axis=1))[:, 2], kind="stable")
    order = order[~mistakes.missed_strokes[order]]
    feet = len(building.ground_lines)
    paint_strokes(
        image, camera, behind,
        lines=np.concatenate([building.ground_lines, ends[order]]),
        widths=np.repeat([width / 2, width], [feet, len(order)]),
        values=np.concatenate([np.full(feet, GESTALT_ID["ground_line"]), mistakes.stroke_classes[order]]),
        shifts=np.concatenate([np.zeros((feet, 2, 2)), mistakes.stroke_shifts[order]]),
        gaps=np.concatenate([np.zeros((feet, 2)), mistakes.gaps[order]]),
    )  # fmt: skip
    corners = np.flatnonzero(~mistakes.missed_corners)
    paint_corners(image, camera, behind, building.vertices[corners], radius, mistakes.corner_classes[corners],
                  mistakes.corner_shifts[corners])
    paint_false(image, house.ident != EMPTY, mistakes, width, radius)


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
