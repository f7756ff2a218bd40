"""A long main roof with several gabled wings on its slopes, as large houses have them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from wireframe.synth.config import SynthConfig
from wireframe.synth.roofs import Plan, Roof

_MAX_WINGS = 3
# Between two wings, and between a wing and the end of the slope (metres).
_GAP = 1.2


class _Wing(NamedTuple):
    """A gable on a slope: from ``near`` to ``far`` along the eave, its ridge ``rise`` above the eave meeting the slope
    ``run`` inside it, its front ``reach`` outside, hipped there or not."""

    near: float
    far: float
    rise: float
    run: float
    reach: float
    hipped: bool


def many_gables(rng: np.random.Generator, config: SynthConfig, eave: float, overhang: float) -> Roof:
    """A main ridge, gabled or hipped at its ends, with up to three wings on either slope, one at least in all."""
    width, pitch = float(rng.uniform(8, 11)), float(rng.uniform(*config.pitch_range))
    length = width + float(rng.uniform(5, 11))
    hip_left, hip_right = rng.random() < 0.2, rng.random() < 0.2
    top, half = eave + pitch * width / 2, width / 2
    left = (half if hip_left else 0.0, top, half)
    right = (length - half if hip_right else length, top, half)
    roof = Roof()
    outline: list[Plan] = []
    for side in (1, -1):
        number = int(rng.integers(1 if side > 0 else 0, _MAX_WINGS + 1))
        wings = _draw_wings(rng, number, length, width, pitch)
        first, last = (left, right) if side > 0 else (right, left)
        outline += _slope(roof, side, wings, (length, width, eave), (first, last))
    if hip_left:
        roof.face((0, eave, width), (0, eave, 0), left)
    if hip_right:
        roof.face((length, eave, 0), (length, eave, width), right)
    roof.stand_on(outline, overhang)
    return roof


def _draw_wings(rng: np.random.Generator, number: int, length: float, width: float, pitch: float) -> list[_Wing]:
    """Wings side by side from a = 0 on; as many of ``number`` as fit."""
    wings: list[_Wing] = []
    start = _GAP
    room = (length - _GAP) / max(number, 1) - _GAP
    for _ in range(number):
        span = float(rng.uniform(2.8, max(2.9, min(room, width - 1.5))))
        steeper, place = float(rng.uniform(0.9, 1.3)), float(rng.uniform(0, 1))
        reach, hipped = float(rng.uniform(1.0, 4.5)), bool(rng.random() < 0.12)
        rise = min(pitch * steeper * span / 2, pitch * width / 2 - 0.6)
        run = rise / pitch
        # On a hipped end the slope narrows by as much as it runs.
        low = max(start, run + 1.0 - span / 2)
        high = min(length - _GAP, length - run - 1.0 + span / 2) - span
        if low > high:
            break
        near = low + place * (min(high, low + max(0.0, room - span)) - low)
        wings.append(_Wing(near, near + span, rise, run, reach, hipped and reach + run - span / 2 > 1.0))
        start = near + span + _GAP
    return wings


def _slope(roof: Roof, side: int, wings: list[_Wing], size: tuple[float, float, float],
           ridge: tuple[tuple, tuple]) -> list[Plan]:
    """Adds one slope (1: b = width, -1: b = 0) with its wings; returns its part of the outline."""
    length, width, eave = size

    def at(a: float, y: float, run: float) -> tuple[float, float, float]:
        # Seen from outside: a runs to the left, ``run`` inwards from the eave, negative on a wing.
        return (a, y, width - run) if side > 0 else (length - a, y, run)

    ring, outline = [at(length, eave, 0)], [at(length, 0, 0)]
    for near, far, rise, run, reach, hipped in reversed(wings):
        middle, top = (near + far) / 2, eave + rise
        peak, end = at(middle, top, run), at(middle, top, (far - near) / 2 - reach if hipped else -reach)
        ring += [at(far, eave, 0), peak, at(near, eave, 0)]
        roof.face(at(near, eave, -reach), at(near, eave, 0), peak, end)
        roof.face(at(far, eave, 0), at(far, eave, -reach), end, peak)
        if hipped:
            roof.face(at(near, eave, -reach), at(far, eave, -reach), end)
        outline += [at(a, 0, depth) for a, depth in ((far, 0), (far, -reach), (near, -reach), (near, 0))]
    roof.face(*ring, at(0, eave, 0), *ridge)
    return [(a, b) for a, _, b in [*outline, at(0, 0, 0)]]
