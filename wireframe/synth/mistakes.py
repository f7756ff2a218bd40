"""What a segmentation network gets wrong in one view: misses, shifts, mistaken classes, things that are not there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wireframe.classes import ADE_ID, GESTALT_ID
from wireframe.synth.building import Building, edge_gestalt
from wireframe.synth.cameras import Camera
from wireframe.synth.config import SynthConfig

_CORNERS = tuple(GESTALT_ID[name] for name in ("apex", "eave_end_point", "flashing_end_point"))
_STROKES = tuple(GESTALT_ID[name] for name in ("rake", "ridge", "eave", "hip", "valley", "flashing", "step_flashing"))
_PATCH_CLASSES = tuple(ADE_ID[name] for name in ("sky", "earth;ground", "mountain;mount", "tree"))


@dataclass(frozen=True)
class Mistakes:
    """One view's mistakes; lengths in pixels of the image.

    ``missed_strokes`` bool [E], ``missed_corners`` bool [V]; ``stroke_classes`` [E], ``corner_classes`` [V] gestalt
    ids; ``stroke_shifts`` [E, 2, 2] (end, uv), ``corner_shifts`` [V, 2]; ``gaps`` [E, 2], the part of a stroke from
    its first end (0) to its second (1) that is not painted, (0, 0) for none; ``false_strokes`` [n, 4] (place, angle,
    length, class) and ``false_corners`` [m, 2] (place, class), places as shares of the pixels of the house;
    ``ade_patches`` [k, 4] (place, half width, half height, class); ``ade_shift`` (u, v) of the whole map;
    ``house_class``, the ADE id that the house is mistaken for, None for none; ``blank``, whether the gestalt map is
    empty.
    """

    missed_strokes: np.ndarray
    missed_corners: np.ndarray
    stroke_classes: np.ndarray
    corner_classes: np.ndarray
    stroke_shifts: np.ndarray
    corner_shifts: np.ndarray
    gaps: np.ndarray
    false_strokes: np.ndarray
    false_corners: np.ndarray
    ade_patches: np.ndarray
    ade_shift: tuple[int, int]
    house_class: int | None
    blank: bool


def only_missed(building: Building, strokes: np.ndarray, corners: np.ndarray) -> Mistakes:
    """A view whose gestalt map lacks some strokes (bool [E]) and corners (bool [V]) and is right for the rest."""
    edges, vertices = len(building.edges), len(building.vertices)
    return Mistakes(
        missed_strokes=strokes,
        missed_corners=corners,
        stroke_classes=np.array([edge_gestalt(int(kind)) for kind in building.edge_classes], dtype=np.int64),
        corner_classes=building.vertex_classes,
        stroke_shifts=np.zeros((edges, 2, 2)),
        corner_shifts=np.zeros((vertices, 2)),
        gaps=np.zeros((edges, 2)),
        false_strokes=np.zeros((0, 4)),
        false_corners=np.zeros((0, 2)),
        ade_patches=np.zeros((0, 4)),
        ade_shift=(0, 0),
        house_class=None,
        blank=False,
    )


def draw_mistakes(rng: np.random.Generator, building: Building, camera: Camera, config: SynthConfig,
                  strokes: np.ndarray, corners: np.ndarray) -> Mistakes:
    """The view's mistakes, besides missing ``strokes`` (bool [E]) and ``corners`` (bool [V]) of whatever size."""
    if config.small_miss_px:
        small = _missed_for_size(rng, building, camera, config.pixels(config.small_miss_px))
        strokes, corners = strokes | small[0], corners | small[1]
    right = only_missed(building, strokes, corners)
    edges, vertices = len(building.edges), len(building.vertices)
    jitter = config.pixels(config.label_jitter_px)
    cut = rng.random(edges) < config.stroke_cut_prob
    shift = config.pixels(config.ade_shift_px) * rng.standard_normal(2)
    start, size = rng.uniform(0.1, 0.6, edges), rng.uniform(0.15, 0.5, edges)
    return Mistakes(
        missed_strokes=strokes,
        missed_corners=corners,
        stroke_classes=_mistaken(rng, right.stroke_classes, _STROKES, config.class_swap_prob),
        corner_classes=_mistaken(rng, right.corner_classes, _CORNERS, config.class_swap_prob),
        stroke_shifts=jitter * rng.standard_normal((edges, 2, 2)),
        corner_shifts=jitter * rng.standard_normal((vertices, 2)),
        gaps=np.where(cut[:, None], np.stack([start, np.minimum(start + size, 1.0)], axis=1), 0.0),
        false_strokes=_false_strokes(rng, int(rng.poisson(config.false_strokes)), config),
        false_corners=_false_corners(rng, int(rng.poisson(config.false_corners))),
        ade_patches=_patches(rng, int(rng.poisson(config.ade_patches)), config),
        blank=bool(rng.random() < config.gestalt_blank_prob),
        ade_shift=(round(shift[0]), round(shift[1])),
        house_class=_PATCH_CLASSES[int(rng.integers(3))] if rng.random() < config.ade_wrong_prob else None,
    )


def _missed_for_size(rng: np.random.Generator, building: Building, camera: Camera,
                     scale: float) -> tuple[np.ndarray, np.ndarray]:
    """bool [E], bool [V]: strokes missed with probability exp(-length / scale) in pixels, corners likewise by the
    longest stroke that they end."""
    u, v, z = camera.project(building.vertices)
    start, end = building.edges.T
    length = np.sqrt(np.square(u[start] - u[end]) + np.square(v[start] - v[end]))
    # Behind the camera there is nothing to miss.
    length[np.minimum(z[start], z[end]) < 0.2] = np.inf
    longest = np.zeros(len(z))
    np.maximum.at(longest, building.edges.ravel(), np.repeat(length, 2))
    missed = (rng.random(len(x)) < np.exp(-x / scale) for x in (length, longest))
    return next(missed), next(missed)


def _mistaken(rng: np.random.Generator, classes: np.ndarray, among: tuple[int, ...], share: float) -> np.ndarray:
    """The classes, each replaced with probability ``share`` by one of ``among`` drawn evenly."""
    drawn = np.array(among)[rng.integers(len(among), size=len(classes))]
    return np.where(rng.random(len(classes)) < share, drawn, classes)


def _false_strokes(rng: np.random.Generator, count: int, config: SynthConfig) -> np.ndarray:
    place, angle = rng.random(count), rng.uniform(0, 2 * np.pi, count)
    length = config.pixels(1.0) * rng.uniform(25, 110, count)
    return np.stack([place, angle, length, np.array(_STROKES)[rng.integers(len(_STROKES), size=count)]], axis=1)


def _false_corners(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.stack([rng.random(count), np.array(_CORNERS)[rng.integers(len(_CORNERS), size=count)]], axis=1)


def _patches(rng: np.random.Generator, count: int, config: SynthConfig) -> np.ndarray:
    half = config.pixels(1.0) * rng.uniform(25, 190, (2, count))
    return np.stack([rng.random(count), *half, np.array(_PATCH_CLASSES)[rng.integers(4, size=count)]], axis=1)


def shifted(ade: np.ndarray, shift: tuple[int, int]) -> np.ndarray:
    """The map [H, W] moved by (u, v) pixels, the border repeated where it leaves a gap."""
    if shift == (0, 0):
        return ade
    rows, cols = (np.clip(np.arange(size) - by, 0, size - 1) for size, by in zip(ade.shape, shift[::-1]))
    return ade[rows[:, None], cols]


def paint_patches(ade: np.ndarray, house: np.ndarray, patches: np.ndarray) -> None:
    """Paints ellipses of a wrong class into an ADE map [H, W], centred on pixels where ``house`` is True."""
    pixels = np.flatnonzero(house)
    for place, half_u, half_v, kind in patches if len(pixels) else ():
        row, col = divmod(int(pixels[int(place * len(pixels))]), ade.shape[1])
        top, left = max(0, int(row - half_v)), max(0, int(col - half_u))
        box = ade[top : int(row + half_v) + 1, left : int(col + half_u) + 1]
        v = (np.arange(top, top + box.shape[0]) - row)[:, None] / half_v
        u = (np.arange(left, left + box.shape[1]) - col) / half_u
        box[u * u + v * v <= 1] = int(kind)
