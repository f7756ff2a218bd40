"""Roof shapes over a plan: shared vertices, planar faces, and edge classes that follow from the geometry.

Local coordinates are (a, y, b): a and b in the plan, y up, metres. Faces run counter-clockwise in (a, b).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Plan = tuple[float, float]

_FLAT = 1e-6


@dataclass
class Roof:
    """One roof and the walls below it.

    ``points`` (a, y, b); ``faces`` index them; ``footprint`` is the plan of the walls, counter-clockwise, and
    ``walled`` tells which of its sides (from corner i to i + 1) carry one; ``forced`` overrides edge classes.
    """

    points: list[tuple[float, float, float]] = field(default_factory=list)
    faces: list[list[int]] = field(default_factory=list)
    footprint: list[Plan] = field(default_factory=list)
    walled: list[bool] = field(default_factory=list)
    forced: dict[tuple[int, int], str] = field(default_factory=dict)

    def point(self, a: float, y: float, b: float) -> int:
        """Index of a point, shared with an equal one already there."""
        for index, other in enumerate(self.points):
            if max(abs(other[0] - a), abs(other[1] - y), abs(other[2] - b)) < 1e-6:
                return index
        self.points.append((a, y, b))
        return len(self.points) - 1

    def face(self, *corners: tuple[float, float, float]) -> None:
        """Adds a face; repeated corners collapse, the order is made counter-clockwise."""
        ring: list[int] = []
        for corner in corners:
            index = self.point(*corner)
            if index not in ring:
                ring.append(index)
        if signed_area([(self.points[i][0], self.points[i][2]) for i in ring]) < 0:
            ring.reverse()
        self.faces.append(ring)

    def stand_on(self, outline: list[Plan], overhang: float) -> None:
        """Puts walls ``overhang`` inside the outline of the roof (rectilinear, counter-clockwise)."""
        self.footprint = inset(outline, overhang)
        self.walled = [True] * len(outline)

    def plane(self, face: list[int]) -> tuple[float, float, float]:
        """(g_a, g_b, c) with y = g_a a + g_b b + c on the face (Newell's normal)."""
        na = ny = nb = 0.0
        corners = [self.points[i] for i in face]
        for p, q in zip(corners, corners[1:] + corners[:1]):
            na += (p[1] - q[1]) * (p[2] + q[2])
            ny += (p[2] - q[2]) * (p[0] + q[0])
            nb += (p[0] - q[0]) * (p[1] + q[1])
        ga, gb = -na / ny, -nb / ny
        count = len(corners)
        return ga, gb, sum(p[1] - ga * p[0] - gb * p[2] for p in corners) / count

    def height(self, a: float, b: float) -> float:
        """Height of the roof over a plan point; the nearest face's plane where none covers it."""
        best = None
        for face in self.faces:
            ring = [(self.points[i][0], self.points[i][2]) for i in face]
            if inside(ring, (a, b)):
                ga, gb, c = self.plane(face)
                y = ga * a + gb * b + c
                best = y if best is None else max(best, y)
        return min(p[1] for p in self.points) if best is None else best

    def edges(self) -> list[tuple[int, int, str]]:
        """Edges (i, j, class name), i < j, in the order the faces first name them."""
        owners: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for number, face in enumerate(self.faces):
            for i, j in zip(face, face[1:] + face[:1]):
                owners.setdefault((min(i, j), max(i, j)), []).append((number, i, j))
        return [(i, j, self.forced.get((i, j)) or self._edge_class(own)) for (i, j), own in owners.items()]

    def _edge_class(self, owners: list[tuple[int, int, int]]) -> str:
        _, i, j = owners[0]
        (a0, y0, b0), (a1, y1, b1) = self.points[i], self.points[j]
        # The first face lies to the left of i -> j, the second to the right.
        left = (b0 - b1, a1 - a0)
        rise = 0.0
        for sign, (number, _, _) in zip((1.0, -1.0), owners):
            ga, gb, _ = self.plane(self.faces[number])
            rise += sign * (ga * left[0] + gb * left[1])
        level = abs(y1 - y0) < _FLAT
        if len(owners) == 1:
            if not level:
                return "rake"
            return "ridge" if rise < -_FLAT else "eave"
        if rise > _FLAT:
            return "valley"
        if rise > -_FLAT:
            return "transition_line"
        return "ridge" if level else "hip"


def signed_area(ring: list[Plan]) -> float:
    """Twice the signed area of a plan polygon, positive when counter-clockwise."""
    return sum(p[0] * q[1] - q[0] * p[1] for p, q in zip(ring, ring[1:] + ring[:1]))


def inside(ring: list[Plan], p: Plan) -> bool:
    """Whether a plan point lies in a polygon (crossing number)."""
    odd = False
    for (a0, b0), (a1, b1) in zip(ring, ring[1:] + ring[:1]):
        if (b0 > p[1]) != (b1 > p[1]) and p[0] < (a1 - a0) * (p[1] - b0) / (b1 - b0) + a0:
            odd = not odd
    return odd


def inset(outline: list[Plan], distance: float) -> list[Plan]:
    """A rectilinear counter-clockwise outline moved inwards on every side."""
    result = []
    for k, (a, b) in enumerate(outline):
        before, after = outline[k - 1], outline[(k + 1) % len(outline)]
        da = sum(-np.sign(q[1] - p[1]) for p, q in ((before, (a, b)), ((a, b), after)))
        db = sum(np.sign(q[0] - p[0]) for p, q in ((before, (a, b)), ((a, b), after)))
        result.append((a + distance * float(da), b + distance * float(db)))
    return result


def triangulate(ring: list[Plan]) -> list[tuple[int, int, int]]:
    """Triangles (positions in the ring) of a simple counter-clockwise polygon, by ear clipping."""
    left = list(range(len(ring)))
    triangles = []
    while len(left) > 3:
        for k in range(len(left)):
            i, j, m = left[k - 1], left[k], left[(k + 1) % len(left)]
            corner = [ring[i], ring[j], ring[m]]
            others = [n for n in left if n not in (i, j, m)]
            if signed_area(corner) > 1e-9 and not any(_within(corner, ring[n]) for n in others):
                triangles.append((i, j, m))
                left.pop(k)
                break
        else:
            break
    if len(left) == 3 and signed_area([ring[n] for n in left]) > 1e-9:
        triangles.append((left[0], left[1], left[2]))
    return triangles


def _within(triangle: list[Plan], p: Plan) -> bool:
    return all(signed_area([triangle[k], triangle[(k + 1) % 3], p]) >= -1e-9 for k in range(3))
