"""Flat convex pieces of a scene: roof faces, fascias, walls, doors, windows, posts, fences, trunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from wireframe.classes import ADE_ID, GESTALT_ID
from wireframe.synth.roofs import Plan, Roof, triangulate

_FASCIA = 0.2
_GAP = 0.03


@dataclass(frozen=True)
class Panel:
    """A convex planar polygon.

    ``points`` float64 [n, 3] world; ``front`` (where ``normal`` points) and ``back`` gestalt ids; ``ade`` an
    ADE id. ``normal`` [3] need not be of unit length.
    """

    points: np.ndarray
    normal: np.ndarray
    front: int
    back: int
    ade: int


class Place(NamedTuple):
    """Where a plan stands in the world: turned about (pivot_a, pivot_b), which goes to (x, z)."""

    cos: float
    sin: float
    pivot_a: float
    pivot_b: float
    x: float
    z: float

    def world(self, points: list[tuple[float, float, float]]) -> np.ndarray:
        """World coordinates [n, 3] of local points (a, y, b)."""
        local = np.array(points, dtype=np.float64).reshape(-1, 3)
        a, b = local[:, 0] - self.pivot_a, local[:, 2] - self.pivot_b
        x, z = self.cos * a + self.sin * b + self.x, self.cos * b - self.sin * a + self.z
        return np.stack([x, local[:, 1], z], axis=1)


def polygon_normal(points: np.ndarray) -> np.ndarray:
    """Newell's normal [3] of a planar polygon [n, 3], twice its area long."""
    after = np.concatenate([points[1:], points[:1]])
    gap, total = points - after, points + after
    return np.array([(gap[:, (k + 1) % 3] * total[:, (k + 2) % 3]).sum() for k in range(3)])


def make_panel(points: np.ndarray, front: str, ade: str, back: str | None = None,
               towards: np.ndarray | None = None) -> Panel:
    """A panel of class names, its normal turned ``towards`` a direction [3] (default up)."""
    normal = polygon_normal(points)
    towards = np.array([0.0, 1.0, 0.0]) if towards is None else towards
    if (normal * towards).sum() < 0:
        normal = -normal
    return Panel(points, normal, GESTALT_ID[front], GESTALT_ID[back or front], ADE_ID[ade])


def roof_panels(roof: Roof, place: Place) -> list[Panel]:
    """The roof's faces, soffit-coloured from below, and a fascia under every free edge."""
    panels = []
    for face in roof.faces:
        corners = [roof.points[i] for i in face]
        for triangle in triangulate([(p[0], p[2]) for p in corners]):
            points = place.world([corners[k] for k in triangle])
            panels.append(make_panel(points, "roof", "house", back="soffit"))
    count: dict[tuple[int, int], int] = {}
    for face in roof.faces:
        for i, j in zip(face, face[1:] + face[:1]):
            count[min(i, j), max(i, j)] = count.get((min(i, j), max(i, j)), 0) + 1
    for (i, j), uses in count.items():
        if uses == 1 and (i, j) not in roof.forced:
            p, q = roof.points[i], roof.points[j]
            ring = [p, q, (q[0], q[1] - _FASCIA, q[2]), (p[0], p[1] - _FASCIA, p[2])]
            panels.append(make_panel(place.world(ring), "fascia", "house"))
    return panels


def wall_panels(rng: np.random.Generator, roof: Roof, place: Place, siding: str,
                is_main: bool) -> tuple[list[Panel], list[np.ndarray]]:
    """Walls with doors and windows below a roof, or posts where it has none; and the walls' feet [2, 3]."""
    if not any(roof.walled):
        return _posts(roof, place), []
    panels, feet, edges = [], [], roof.edges()
    sides = list(zip(roof.footprint, roof.footprint[1:] + roof.footprint[:1]))
    lengths = [abs(q[0] - p[0]) + abs(q[1] - p[1]) for p, q in sides]
    entrance = int(rng.integers(len(sides)))
    if not roof.walled[entrance] or lengths[entrance] < 3:
        entrance = int(np.argmax([n * w for n, w in zip(lengths, roof.walled)]))
    for number, ((p, q), walled) in enumerate(zip(sides, roof.walled)):
        if not walled:
            continue
        outward = place.world([(q[1] - p[1], 0, p[0] - q[0])])[0] - place.world([(0, 0, 0)])[0]
        profile = _profile(roof, edges, p, q)
        for (s0, y0), (s1, y1) in zip(profile, profile[1:]):
            ring = [_on(p, q, s, y) for s, y in ((s0, 0.0), (s1, 0.0), (s1, y1), (s0, y0))]
            panels.append(make_panel(place.world(ring), siding, "house", towards=outward))
        feet.append(place.world([_on(p, q, 0.0, 0.0), _on(p, q, 1.0, 0.0)]))
        low = min(y for _, y in profile)
        for kind, box in _openings(rng, lengths[number], low, number == entrance, is_main):
            panels.append(_opening(kind, box, p, q, lengths[number], outward, place))
    return panels, feet


def _on(p: Plan, q: Plan, s: float, y: float) -> tuple[float, float, float]:
    return p[0] + s * (q[0] - p[0]), y, p[1] + s * (q[1] - p[1])


def _profile(roof: Roof, edges: list[tuple[int, int, str]], p: Plan, q: Plan) -> list[tuple[float, float]]:
    """The wall's top (s, y) from p (s = 0) to q (s = 1), broken where the roof's edges cross it."""
    breaks = {0.0, 1.0}
    for i, j, _ in edges:
        a0, b0 = roof.points[i][0] - p[0], roof.points[i][2] - p[1]
        da, db = roof.points[j][0] - roof.points[i][0], roof.points[j][2] - roof.points[i][2]
        wa, wb = q[0] - p[0], q[1] - p[1]
        cross = wa * db - wb * da
        if abs(cross) < 1e-9:
            continue
        s, r = (a0 * db - b0 * da) / cross, (a0 * wb - b0 * wa) / cross
        if 1e-6 < s < 1 - 1e-6 and -1e-9 <= r <= 1 + 1e-9:
            breaks.add(round(s, 9))
    # Heights are read a hair inside the wall, where exactly one face lies above.
    tops = []
    for s in sorted(breaks):
        a, _, b = _on(p, q, min(max(s, 1e-6), 1 - 1e-6), 0.0)
        tops.append((s, roof.height(a, b) - 0.02))
    return tops


def _openings(rng: np.random.Generator, length: float, top: float, entrance: bool,
              is_main: bool) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Doors and windows (kind, (s0, s1, y0, y1) in metres) of a wall ``length`` wide and ``top`` high."""
    found: list[tuple[str, tuple[float, float, float, float]]] = []
    taken = 0.6
    if entrance and not is_main and length > 3.4:
        width = min(length - 1.0, 4.8)
        return [("garage", ((length - width) / 2, (length + width) / 2, 0.0, min(2.15, top - 0.25)))]
    if entrance and length > 2.2:
        found.append(("door", (0.6, 1.55, 0.05, min(2.1, top - 0.25))))
        taken = 1.9
    spacing, width = float(rng.uniform(2.2, 3.4)), float(rng.uniform(0.9, 1.5))
    keep = rng.random(24)
    number = 0
    for floor in (0.0, 2.7):
        low, high = floor + 0.9, floor + 2.1
        s = taken if floor == 0.0 else 0.6
        while s + width < length - 0.5 and number < 24:
            if high < top - 0.25 and keep[number] < 0.8:
                found.append(("window", (s, s + width, low, high)))
            number += 1
            s += spacing
    return found


def _opening(kind: str, box: tuple[float, float, float, float], p: Plan, q: Plan, length: float,
             outward: np.ndarray, place: Place) -> Panel:
    s0, s1, y0, y1 = box
    points = place.world([_on(p, q, s / length, y) for s, y in ((s0, y0), (s1, y0), (s1, y1), (s0, y1))])
    points = points + _GAP * outward / np.sqrt((outward * outward).sum())
    ade = "windowpane;window" if kind == "window" else "door;double;door"
    return make_panel(points, kind, ade, towards=outward)


def _posts(roof: Roof, place: Place) -> list[Panel]:
    panels = []
    for a, b in roof.footprint[:2]:
        top = roof.height(a, b) - 0.02
        panels += crossed_quads(place.world([(a, 0.0, b)])[0], 0.07, top, "post", "house")
    return panels


def crossed_quads(foot: np.ndarray, half: float, height: float, gestalt: str, ade: str) -> list[Panel]:
    """Two upright rectangles that cross on the vertical over ``foot`` [3]."""
    panels = []
    for dx, dz in ((half, 0.0), (0.0, half)):
        ring = foot + np.array([[-dx, 0, -dz], [dx, 0, dz], [dx, height, dz], [-dx, height, -dz]])
        panels.append(make_panel(ring, gestalt, ade))
    return panels
