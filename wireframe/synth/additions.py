"""What is added to a house: dormers on its slopes, low annexes on any of its sides."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from wireframe.synth.panels import Panel, Place, make_panel, roof_panels
from wireframe.synth.roofs import Plan, Roof, inside
from wireframe.synth.shapes import garage

_TRIES = 12
# Around a dormer its slope must go on for so long (metres).
_MARGIN = 0.4
_INSET = 0.12


class Dormer(NamedTuple):
    """A small roof on a slope that is ``base`` high at the dormer's front; the footprint's first side is the front."""

    roof: Roof
    base: float


def annex(rng: np.random.Generator, main: Roof, eave: float, overhang: float, side: int) -> Roof | None:
    """A ``shapes.garage`` on the side 0 to 3 (quarter turns from a = 0) of a roof; None where it does not fit."""
    turned = main
    extents = []
    for _ in range(side):
        extents.append(max(p[2] for p in turned.points))
        turned = _mapped(turned, lambda a, b, far=extents[-1]: (far - b, a))
    # The function expects an outline that starts at 0.
    shift = min(p[0] for p in turned.points)
    found = garage(rng, _mapped(turned, lambda a, b: (a - shift, b)), eave, overhang)
    if found is None:
        return None
    found = _mapped(found, lambda a, b: (a + shift, b))
    for extent in reversed(extents):
        found = _mapped(found, lambda a, b, far=extent: (b, far - a))
    return found


def _mapped(roof: Roof, plan: Callable[[float, float], Plan]) -> Roof:
    """The roof with its plan turned or moved, which keeps every ring counter-clockwise."""
    moved = [(plan(a, b), y) for a, y, b in roof.points]
    footprint = [plan(a, b) for a, b in roof.footprint]
    return Roof([(a, y, b) for (a, b), y in moved], roof.faces, footprint, roof.walled, dict(roof.forced))


def dormer(rng: np.random.Generator, main: Roof, others: list[Roof], distance: float) -> Dormer | None:
    """A gabled or hipped dormer on a slope of the main roof; None where it does not fit.

    Its corners keep ``distance`` from one another and from those of the main roof and of ``others``.
    """
    taken = np.array([p for roof in (main, *others) for p in roof.points])
    for _ in range(_TRIES):
        number, place = int(rng.integers(len(main.faces))), rng.random(2)
        half, wall = float(rng.uniform(0.8, 1.5)), float(rng.uniform(0.8, 1.4))
        pitch, hipped = float(rng.uniform(0.5, 1.0)), bool(rng.random() < 0.25)
        found = _dormer_on(main, number, place, half, wall, pitch, hipped)
        if found is None:
            continue
        corners = np.array(found.roof.points)
        gap, inner = corners[:, None] - taken, corners[:, None] - corners
        apart = np.sqrt((inner * inner).sum(axis=-1))[np.triu_indices(len(corners), 1)]
        if min(np.sqrt((gap * gap).sum(axis=-1)).min(), apart.min()) >= distance:
            return found
    return None


def _dormer_on(main: Roof, number: int, place: np.ndarray, half: float, wall: float, pitch: float,
               hipped: bool) -> Dormer | None:
    face = main.faces[number]
    ga, gb, c = main.plane(face)
    slope = math.hypot(ga, gb)
    if slope < 0.3:
        return None
    up, ring = (ga / slope, gb / slope), [(main.points[i][0], main.points[i][2]) for i in face]
    across = (-up[1], up[0])
    low = [min(p[k] for p in ring) for k in (0, 1)]
    high = [max(p[k] for p in ring) for k in (0, 1)]
    front = [low[k] + float(place[k]) * (high[k] - low[k]) for k in (0, 1)]

    def at(side: float, run: float) -> Plan:
        return front[0] + side * across[0] + run * up[0], front[1] + side * across[1] + run * up[1]

    base = ga * front[0] + gb * front[1] + c
    eave, top = base + wall, base + wall + pitch * half
    cheek, back = wall / slope, (wall + pitch * half) / slope
    wide = half + _MARGIN
    needed = [(-wide, -_MARGIN), (wide, -_MARGIN), (-wide, cheek), (wide, cheek), (0.0, back + _MARGIN)]
    if not all(inside(ring, at(*p)) for p in needed) or back - half < 1.0:
        return None

    def point(side: float, y: float, run: float) -> tuple[float, float, float]:
        a, b = at(side, run)
        return a, y, b

    left, right, tip = point(-half, eave, 0), point(half, eave, 0), point(0, top, half if hipped else 0)
    end, end_left, end_right = point(0, top, back), point(-half, eave, cheek), point(half, eave, cheek)
    roof = Roof()
    roof.face(left, tip, end, end_left)
    roof.face(tip, right, end_right, end)
    if hipped:
        roof.face(left, right, tip)
    for corner in (end_left, end_right):
        pair = sorted((roof.point(*corner), roof.point(*end)))
        roof.forced[pair[0], pair[1]] = "valley"
    roof.footprint = [at(-half, 0), at(half, 0), at(half, cheek), at(-half, cheek)]
    roof.walled = [False] * 4
    return Dormer(roof, base)


def dormer_panels(found: Dormer, place: Place, siding: str) -> list[Panel]:
    """The dormer's roof, its front with a window, and its cheeks."""
    roof, base = found
    left, right, end_right, end_left = roof.footprint
    eave, top = min(p[1] for p in roof.points), max(p[1] for p in roof.points)
    length = math.dist(left, end_left)
    inner = (end_left[0] - left[0]) / length, (end_left[1] - left[1]) / length
    middle = (left[0] + right[0]) / 2, (left[1] + right[1]) / 2
    hipped = len(roof.faces) == 3
    panels = roof_panels(roof, place)

    def on(p: Plan, y: float, depth: float = _INSET) -> tuple[float, float, float]:
        return p[0] + depth * inner[0], y, p[1] + depth * inner[1]

    outward = place.world([(-inner[0], 0, -inner[1])])[0] - place.world([(0, 0, 0)])[0]
    gable = [] if hipped else [on(middle, top - 0.02)]
    ring = [on(left, base), on(right, base), on(right, eave - 0.02), *gable, on(left, eave - 0.02)]
    panels.append(make_panel(place.world(ring), siding, "house", towards=outward))
    a, b = (tuple(middle[k] + share * (right[k] - left[k]) for k in (0, 1)) for share in (-0.28, 0.28))
    low, high = base + 0.3 * (eave - base), eave - 0.12
    window = [on(p, y, _INSET - 0.03) for p, y in ((a, low), (b, low), (b, high), (a, high))]
    panels.append(make_panel(place.world(window), "window", "windowpane;window", towards=outward))
    for corner, far, sign in ((left, end_left, 1.0), (right, end_right, -1.0)):
        side = place.world([(sign * (left[0] - right[0]), 0, sign * (left[1] - right[1]))])[0]
        ring = [on(corner, base), on(corner, eave - 0.02), on(far, eave - 0.02, 0.0)]
        panels.append(make_panel(place.world(ring), siding, "house", towards=side - place.world([(0, 0, 0)])[0]))
    return panels
