"""What is not the house: trees, bushes and fences around it, some of them in front of a camera."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from wireframe.classes import ADE_ID
from wireframe.synth.building import Building
from wireframe.synth.cameras import Camera
from wireframe.synth.config import SynthConfig
from wireframe.synth.panels import Panel, crossed_quads, make_panel

_CLEARANCE = 4.0


@dataclass(frozen=True)
class Blob:
    """An ellipsoid: centre, radii float64 [3] (world metres), ADE id."""

    centre: np.ndarray
    radii: np.ndarray
    ade: int


@dataclass(frozen=True)
class Surroundings:
    """Occluders and the ADE id of the ground."""

    panels: tuple[Panel, ...]
    blobs: tuple[Blob, ...]
    ground_ade: int


def draw_surroundings(rng: np.random.Generator, building: Building, cameras: list[Camera],
                      config: SynthConfig) -> Surroundings:
    """Trees between house and cameras, bushes along the walls, perhaps a fence; none of them at a camera."""
    panels: list[Panel] = []
    blobs: list[Blob] = []
    for _ in range(int(rng.integers(config.trees_range[0], config.trees_range[1] + 1))):
        spot = _spot(rng, building, 1.5, 8.0)
        height, width = float(rng.uniform(3.5, 8.0)), float(rng.uniform(0.9, 1.8))
        offsets = rng.uniform(-0.5, 0.5, size=(3, 3))
        if _clear(spot, width + 1.0, building, cameras):
            panels += crossed_quads(spot, 0.15, 0.6 * height, "unclassified", "tree")
            blobs += _crown(spot, height, width, offsets)
    for _ in range(int(rng.integers(config.bushes_range[0], config.bushes_range[1] + 1))):
        spot = _spot(rng, building, -1.0, 2.0)
        radii = rng.uniform(0.4, 0.9, size=3)
        if _clear(spot, 1.0, building, cameras):
            blobs.append(Blob(spot + [0, 0.7 * radii[1], 0], radii, ADE_ID["plant;flora;plant;life"]))
    fenced, start = rng.random() < config.fence_prob, float(rng.uniform(0, 2 * math.pi))
    if fenced:
        panels += _fence(building, start, cameras)
    ground = ("grass", "grass", "earth;ground", "road;route")[int(rng.integers(4))]
    return Surroundings(tuple(panels), tuple(blobs), ADE_ID[ground])


def _spot(rng: np.random.Generator, building: Building, low: float, high: float) -> np.ndarray:
    azimuth, extra = float(rng.uniform(0, 2 * math.pi)), float(rng.uniform(low, high))
    reach = 0.8 * building.radius + extra
    return np.array([building.centre[0] + reach * math.cos(azimuth), 0.0,
                     building.centre[2] + reach * math.sin(azimuth)])


def _clear(spot: np.ndarray, margin: float, building: Building, cameras: list[Camera]) -> bool:
    """Whether an occluder ``margin`` wide stands free of the walls' feet and of every camera."""
    start, end = building.ground_lines[:, 0, ::2], building.ground_lines[:, 1, ::2]
    along = end - start
    share = ((spot[::2] - start) * along).sum(axis=1) / np.maximum((along * along).sum(axis=1), 1e-9)
    gap = start + np.clip(share, 0, 1)[:, None] * along - spot[::2]
    if np.sqrt((gap * gap).sum(axis=1)).min() < margin:
        return False
    return all(_distance(camera.centre, spot) > margin + _CLEARANCE for camera in cameras)


def _distance(p: np.ndarray, q: np.ndarray) -> float:
    return math.hypot(float(p[0] - q[0]), float(p[2] - q[2]))


def _crown(spot: np.ndarray, height: float, width: float, offsets: np.ndarray) -> list[Blob]:
    blobs = []
    for share, offset in zip((0.55, 0.7, 0.85), offsets):
        centre = spot + np.array([0.0, share * height, 0.0]) + width * offset * [1, 0.5, 1]
        size = width * (1.2 - 0.5 * share)
        blobs.append(Blob(centre, np.array([size, 0.25 * height, size]), ADE_ID["tree"]))
    return blobs


def _fence(building: Building, start: float, cameras: list[Camera]) -> list[Panel]:
    panels = []
    reach = building.radius + 1.0
    for k in range(3):
        ends = [start + 0.4 * k, start + 0.4 * (k + 1)]
        feet = np.array([[building.centre[0] + reach * math.cos(angle), 0.0,
                          building.centre[2] + reach * math.sin(angle)] for angle in ends])
        if any(_distance(camera.centre, foot) < _CLEARANCE for camera in cameras for foot in feet):
            continue
        ring = np.concatenate([feet, feet[::-1] + [0, 1.2, 0]])
        panels.append(make_panel(ring, "unclassified", "fence;fencing"))
    return panels
