"""The roof types, drawn at random: each function returns a ``Roof`` over a plan starting at (0, 0)."""

from __future__ import annotations

import numpy as np

from wireframe.synth.config import SynthConfig
from wireframe.synth.roofs import Roof


def _rect(a0: float, b0: float, a1: float, b1: float) -> list[tuple[float, float]]:
    return [(a0, b0), (a1, b0), (a1, b1), (a0, b1)]


def _pitch(rng: np.random.Generator, config: SynthConfig) -> float:
    return float(rng.uniform(*config.pitch_range))


def gable(rng: np.random.Generator, config: SynthConfig, eave: float, overhang: float) -> Roof:
    """Two slopes and a ridge; now and then a saltbox with the ridge off the middle."""
    length, width = float(rng.uniform(8, 17)), float(rng.uniform(6.5, 10.5))
    pitch, split = _pitch(rng, config), float(rng.uniform(0.34, 0.42))
    middle = split * width if rng.random() < 0.15 else width / 2
    top = eave + pitch * width / 2
    roof = Roof()
    roof.face((0, eave, 0), (length, eave, 0), (length, top, middle), (0, top, middle))
    roof.face((length, eave, width), (0, eave, width), (0, top, middle), (length, top, middle))
    roof.stand_on(_rect(0, 0, length, width), overhang)
    return roof


def hip(rng: np.random.Generator, config: SynthConfig, eave: float, overhang: float) -> Roof:
    """Four slopes; sometimes one end is a gable, sometimes the ridge shrinks to a point."""
    width, pitch = float(rng.uniform(7, 11)), _pitch(rng, config)
    extra, kind = float(rng.uniform(1.5, 8)), float(rng.random())
    length = width if kind < 0.15 else width + extra
    half, top = width / 2, eave + pitch * width / 2
    right = (length, top, half) if kind > 0.85 else (length - half, top, half)
    left = (half, top, half)
    roof = Roof()
    roof.face((0, eave, 0), (length, eave, 0), right, left)
    roof.face((length, eave, width), (0, eave, width), left, right)
    roof.face((0, eave, width), (0, eave, 0), left)
    if kind <= 0.85:
        roof.face((length, eave, 0), (length, eave, width), right)
    roof.stand_on(_rect(0, 0, length, width), overhang)
    return roof


def shed(rng: np.random.Generator, config: SynthConfig, eave: float, overhang: float) -> Roof:
    """One slope: eave below, ridge above, rakes at the sides."""
    length, width = float(rng.uniform(7, 14)), float(rng.uniform(5, 8))
    top = eave + float(rng.uniform(0.2, 0.45)) * width
    roof = Roof()
    roof.face((0, eave, 0), (length, eave, 0), (length, top, width), (0, top, width))
    roof.stand_on(_rect(0, 0, length, width), overhang)
    return roof


def flat(rng: np.random.Generator, config: SynthConfig, eave: float, overhang: float) -> Roof:
    """A level plane over a rectangle or an L; every edge is an eave."""
    length, width = float(rng.uniform(8, 15)), float(rng.uniform(7, 10))
    notch_a, notch_b = float(rng.uniform(0.35, 0.6)) * length, float(rng.uniform(0.35, 0.6)) * width
    outline = _rect(0, 0, length, width)
    if rng.random() < 0.5:
        outline = [(0, 0), (length, 0), (length, width), (notch_a, width), (notch_a, notch_b), (0, notch_b)]
    roof = Roof()
    roof.face(*[(a, eave, b) for a, b in outline])
    roof.stand_on(outline, overhang)
    return roof


def l_shaped(rng: np.random.Generator, config: SynthConfig, eave: float, overhang: float) -> Roof:
    """Two wings of one pitch at a corner: a hip to the outer corner, a valley to the inner one."""
    width, pitch = float(rng.uniform(7, 9.5)), _pitch(rng, config)
    length, reach = width + float(rng.uniform(4, 8)), float(rng.uniform(4, 7))
    narrow = width - float(rng.uniform(1.3, 2.5))
    wing = width if rng.random() < 0.3 else narrow
    hip_main, hip_wing = rng.random() < 0.4, rng.random() < 0.4
    top, low = eave + pitch * width / 2, eave + pitch * wing / 2
    far = width + reach
    start = (width / 2 if hip_main else 0.0, top, width / 2)
    turn = (length - width / 2, top, width / 2)
    join = (length - wing / 2, low, width - wing / 2)
    finish = (length - wing / 2, low, far - wing / 2 if hip_wing else far)
    inner = (length - wing, eave, width)
    roof = Roof()
    roof.face((0, eave, 0), (length, eave, 0), turn, start)
    roof.face((length, eave, 0), (length, eave, far), finish, join, turn)
    roof.face(inner, (0, eave, width), start, turn, join)
    roof.face((length - wing, eave, far), inner, join, finish)
    if hip_main:
        roof.face((0, eave, width), (0, eave, 0), start)
    if hip_wing:
        roof.face((length, eave, far), (length - wing, eave, far), finish)
    outline = [(0, 0), (length, 0), (length, far), (length - wing, far), (length - wing, width), (0, width)]
    roof.stand_on(outline, overhang)
    return roof


def cross_gable(rng: np.random.Generator, config: SynthConfig, eave: float, overhang: float) -> Roof:
    """A main ridge crossed on one or both sides by gabled wings that meet it in two valleys each."""
    width, pitch = float(rng.uniform(7, 10)), _pitch(rng, config)
    length = width + float(rng.uniform(5, 9))
    full, both = rng.random() < 0.3, rng.random() < 0.4
    hip_left, hip_right = rng.random() < 0.25, rng.random() < 0.25
    top, half = eave + pitch * width / 2, width / 2
    left = (half if hip_left else 0.0, top, half)
    right = (length - half if hip_right else length, top, half)
    wings = [_draw_wing(rng, width, length, pitch, full) for _ in range(2)]
    if full:
        wings[1]["middle"] = wings[0]["middle"]
    roof = Roof()
    outline: list[tuple[float, float]] = []
    for side, wing in zip((1, -1), wings if both else [wings[0], None]):
        size, crossing = (length, width, eave, top), wings[0] if full else None
        outline += _cross_side(roof, side, wing, size, left, right, crossing)
    if hip_left:
        roof.face((0, eave, width), (0, eave, 0), left)
    if hip_right:
        roof.face((length, eave, 0), (length, eave, width), right)
    roof.stand_on(outline, overhang)
    return roof


def _draw_wing(rng: np.random.Generator, width: float, length: float, pitch: float, full: bool) -> dict:
    span, steeper = float(rng.uniform(3.2, max(3.3, width - 2.2))), float(rng.uniform(0.9, 1.25))
    place, reach, hipped = float(rng.uniform(0, 1)), float(rng.uniform(1.5, 5)), bool(rng.random() < 0.2)
    if full:
        span, steeper = width, 1.0
    rise = min(pitch * steeper * span / 2, pitch * width / 2 if full else pitch * width / 2 - 0.5)
    low = max(span / 2 + 1.2, width / 2 + 1.0)
    return {"span": span, "rise": rise, "run": rise / pitch, "reach": reach, "hipped": hipped,
            "middle": low + place * max(0.0, length - 2 * low)}


def _cross_side(roof: Roof, side: int, wing: dict | None, size: tuple[float, float, float, float],
                left: tuple, right: tuple, crossing: dict | None) -> list[tuple[float, float]]:
    """Adds the slope on one side (1: b = width, -1: b = 0) with its wing; returns its part of the outline."""
    length, width, eave, top = size

    def at(a: float, y: float, run: float) -> tuple[float, float, float]:
        # ``run`` is measured inwards from this side's eave, negative on the wing.
        return (a, y, width - run) if side > 0 else (length - a, y, run)

    def ridge(a: float) -> tuple[float, float, float]:
        return at(a, top, width / 2)

    first, last = (left, right) if side > 0 else (right, left)
    split = None
    if crossing is not None:
        split = ridge(crossing["middle"] if side > 0 else length - crossing["middle"])
    if wing is None:
        roof.face(at(length, eave, 0), at(0, eave, 0), first, *([split] if split else []), last)
        return [_flat(at(length, 0, 0)), _flat(at(0, 0, 0))]
    middle = wing["middle"] if side > 0 else length - wing["middle"]
    near, far = middle - wing["span"] / 2, middle + wing["span"] / 2
    reach, low = wing["reach"], eave + wing["rise"]
    peak = split or at(middle, low, wing["run"])
    back = wing["span"] / 2 if wing["hipped"] and reach + wing["run"] - wing["span"] / 2 > 1.0 else 0.0
    end = at(middle, low, back - reach)
    if split:
        roof.face(at(near, eave, 0), at(0, eave, 0), first, peak)
        roof.face(at(length, eave, 0), at(far, eave, 0), peak, last)
    else:
        roof.face(at(length, eave, 0), at(far, eave, 0), peak, at(near, eave, 0), at(0, eave, 0), first, last)
    roof.face(at(near, eave, -reach), at(near, eave, 0), peak, end)
    roof.face(at(far, eave, 0), at(far, eave, -reach), end, peak)
    if back:
        roof.face(at(near, eave, -reach), at(far, eave, -reach), end)
    return [_flat(at(a, 0, run)) for a, run in
            ((length, 0), (far, 0), (far, -reach), (near, -reach), (near, 0), (0, 0))]


def _flat(point: tuple[float, float, float]) -> tuple[float, float]:
    return point[0], point[2]


def garage(rng: np.random.Generator, main: Roof, eave: float, overhang: float) -> Roof | None:
    """A lower gabled block against the main wall on the side a = 0; None where it does not fit."""
    wall = [p for p in main.footprint if p[0] < overhang + 1e-6]
    low, high = min(p[1] for p in wall), max(p[1] for p in wall)
    depth, span = float(rng.uniform(3.5, 6.5)), float(rng.uniform(0.55, 0.95)) * (high - low)
    place, height = float(rng.uniform(0, 1)), float(rng.uniform(2.5, 2.9))
    pitch = float(rng.uniform(0.3, 0.6))
    hipped = bool(rng.random() < 0.3)
    b0 = low + place * (high - low - span)
    b1, middle = b0 + span, b0 + span / 2
    top = min(height + pitch * span / 2, eave - 0.7)
    if top < height + 0.7 or depth < span / 2 + 1.0:
        return None
    at_wall, tip = overhang, (span / 2 if hipped else 0.0) - depth
    roof = Roof()
    roof.face((-depth, height, b0), (at_wall, height, b0), (at_wall, top, middle), (tip, top, middle))
    roof.face((at_wall, height, b1), (-depth, height, b1), (tip, top, middle), (at_wall, top, middle))
    if hipped:
        roof.face((-depth, height, b1), (-depth, height, b0), (tip, top, middle))
    for i, j, _ in roof.edges():
        if roof.points[i][0] == roof.points[j][0] == at_wall:
            roof.forced[(i, j)] = "step_flashing"
    small = 0.3
    roof.footprint = _rect(-depth + small, b0 + small, at_wall, b1 - small)
    roof.walled = [True, False, True, True]
    return roof


def porch(rng: np.random.Generator, main: Roof, eave: float, overhang: float) -> Roof | None:
    """A lean-to roof on posts against the wall on the side b = 0; None where it does not fit."""
    wall = [p for p in main.footprint if p[1] < overhang + 1e-6]
    low, high = (min(p[0] for p in wall), max(p[0] for p in wall)) if wall else (0.0, 0.0)
    span, depth = float(rng.uniform(0.35, 0.7)) * (high - low), float(rng.uniform(1.8, 2.8))
    place, drop = float(rng.uniform(0, 1)), float(rng.uniform(0.15, 0.3))
    top = min(eave - 0.75, 3.2)
    if span < 2.5 or top - drop * depth < 2.05:
        return None
    a0 = low + 0.4 + place * (high - low - span - 0.8)
    a1 = a0 + span
    roof = Roof()
    roof.face((a0, top - drop * depth, overhang - depth), (a1, top - drop * depth, overhang - depth),
              (a1, top, overhang), (a0, top, overhang))
    for i, j, name in roof.edges():
        if name == "ridge":
            roof.forced[(i, j)] = "flashing"
    roof.footprint = _rect(a0 + 0.2, overhang - depth + 0.2, a1 - 0.2, overhang)
    roof.walled = [False] * 4
    return roof


SHAPES = {shape.__name__: shape for shape in (gable, hip, l_shaped, cross_gable, shed, flat)}
