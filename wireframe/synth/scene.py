"""One synthetic scene as a raw row."""

from __future__ import annotations

import math

import numpy as np

from wireframe.classes import ids_to_colors
from wireframe.errors import ConfigError
from wireframe.hashing import SYNTH, generator
from wireframe.synth.building import make_building
from wireframe.synth.cameras import draw_cameras
from wireframe.synth.config import SynthConfig
from wireframe.synth.mistakes import draw_mistakes, only_missed
from wireframe.synth.patches import cell_seed
from wireframe.synth.points import colmap_zip, draw_points
from wireframe.synth.render import Maps, monocular_depth, render
from wireframe.synth.surroundings import draw_surroundings
from wireframe.synth.truth import ground_truth

# Streams of their own for what came later, so that a scene without it keeps its numbers; the views follow _LABELS.
_SEVERITY, _CELLS, _TRUTH, _LABELS = SYNTH + 1, SYNTH + 2, SYNTH + 3, SYNTH + 256
# How many times as severe a failed scene is.
_FAILURE = 6.0


def make_scene(seed: int, index: int, config: SynthConfig = SynthConfig()) -> dict:
    """The raw row of scene ``index`` of ``seed``: the same values in any process, in any order.

    Returns:
        order_id ``synth-{seed}-{index:06d}``; per view: image_ids str, ade and gestalt RGB images, depth
        (16-bit images, millimetres, None where missing), K and R float32 [3, 3], t float32 [3] (zeros where
        pose_only_in_colmap); wf_vertices float32 [V, 3] metres, wf_edges int64 [E, 2], wf_classifications
        int64 [E]; colmap ZIP bytes.

    Raises:
        ConfigError: ``index`` is negative, or no building fits the configuration.
    """
    if index < 0:
        raise ConfigError(f"scene index {index}: must be 0 or more")
    rng = generator(seed, index, SYNTH)
    building = make_building(rng, config)
    if config.severity_sigma or config.failure_prob:
        config = config.at_severity(scene_severity(seed, index, config))
    count = _draw_count(rng, config)
    pose_only = bool(rng.random() < config.pose_only_prob)
    cameras = draw_cameras(rng, building, count + pose_only, config)
    around = draw_surroundings(rng, building, cameras, config)
    maps = []
    for number, camera in enumerate(cameras):
        strokes = rng.random(len(building.edges)) < config.stroke_drop_prob
        corners = rng.random(len(building.vertices)) < config.corner_drop_prob
        mistakes = only_missed(building, strokes, corners)
        if config.mistakes_besides_misses:
            mistakes = draw_mistakes(generator(seed, index, _LABELS + number), building, camera, config, strokes,
                                     corners)
        maps.append(render(camera, building, around, config, mistakes))
    image_ids = [f"view_{number:03d}" for number in range(len(cameras))]
    hidden = [pose_only and number == count for number in range(len(cameras))]
    depth = _depth_images(rng, maps, config)
    cloud = draw_points(rng, cameras, maps, building, config, cell_seed(seed, index, _CELLS))
    blank = np.zeros((3, 3), dtype=np.float32)
    return {
        "order_id": f"synth-{seed}-{index:06d}",
        "image_ids": image_ids,
        "ade": [_image(ids_to_colors(view.ade, "ade")) for view in maps],
        "gestalt": [_image(ids_to_colors(view.gestalt, "gestalt")) for view in maps],
        "depth": depth,
        "K": [blank if hide else camera.K for camera, hide in zip(cameras, hidden)],
        "R": [blank if hide else camera.R for camera, hide in zip(cameras, hidden)],
        "t": [blank[0] if hide else camera.t for camera, hide in zip(cameras, hidden)],
        "pose_only_in_colmap": hidden,
        **ground_truth(rng, generator(seed, index, _TRUTH), building, config),
        "colmap": colmap_zip(cameras, image_ids, cloud, config),
    }


def scene_severity(seed: int, index: int, config: SynthConfig) -> float:
    """How many times as bad as configured the maps and the cloud of a scene are: log-normal, in a share of the
    scenes (``failure_prob``) ``_FAILURE`` times that; mean 1 over all.
    """
    rng, sigma = generator(seed, index, _SEVERITY), config.severity_sigma
    severity = math.exp(sigma * float(rng.standard_normal()) - sigma * sigma / 2)
    failed = float(rng.random()) < config.failure_prob
    return severity * (_FAILURE if failed else 1.0) / (1 + config.failure_prob * (_FAILURE - 1))


def _draw_count(rng: np.random.Generator, config: SynthConfig) -> int:
    low, high = config.views_range
    if config.views_skew == 1:
        return int(rng.integers(low, high + 1))
    return low + int((high + 1 - low) * float(rng.random()) ** config.views_skew)


def _depth_images(rng: np.random.Generator, maps: list[Maps], config: SynthConfig) -> list:
    """Depth images, None for the views that have none; at least one stays unless the whole scene has none."""
    none = rng.random() < config.depth_none_prob
    missing = rng.random(len(maps)) < config.depth_missing_prob
    if missing.all() and config.depth_missing_prob < 1:
        missing[int(rng.integers(len(maps)))] = False
    images = []
    for view, gone in zip(maps, missing):
        guess = monocular_depth(rng, view.depth, config)
        images.append(None if none or gone else _image(guess))
    return images


def _image(array: np.ndarray) -> object:
    from PIL import Image

    return Image.fromarray(array)
