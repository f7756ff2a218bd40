"""A small z-buffer rasteriser: convex planar polygons and ellipsoids, pixel centres at integer coordinates.

The inverse depth of a plane is affine in the pixel coordinates, so a polygon costs a few half-plane tests and
one affine map over its bounding box.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from wireframe.synth.cameras import Camera

_NEAR = 0.2
EMPTY = -1
# Up to so many pixels, testing every one against every edge is faster than searching.
_SMALL_BOX = 1500


class _Projected(NamedTuple):
    """P polygons of n corners in the image: corners ``u``, ``v`` and sides ``along``, ``across`` [P, n], turned so that
    the inside is on one side; ``affine`` [P, 3] inverse depth; ``boxes`` [P, 4] u0, u1, v0, v1; ``drawn`` bool [P],
    False for one that covers no pixel."""

    u: np.ndarray
    v: np.ndarray
    along: np.ndarray
    across: np.ndarray
    affine: np.ndarray
    boxes: np.ndarray
    drawn: np.ndarray


class Raster:
    """The nearest surface per pixel: ``inverse_z`` float32 [H, W] (0 = nothing), ``ident`` int16 [H, W]."""

    def __init__(self, camera: Camera, width: int, height: int) -> None:
        self.camera = camera
        self.inverse_z = np.zeros((height, width), dtype=np.float32)
        self.ident = np.full((height, width), EMPTY, dtype=np.int16)
        self._u = np.arange(width, dtype=np.float64)
        self._v = np.arange(height, dtype=np.float64)

    def copy(self) -> Raster:
        """An independent raster with the same content."""
        other = Raster(self.camera, self.inverse_z.shape[1], self.inverse_z.shape[0])
        other.inverse_z[:] = self.inverse_z
        other.ident[:] = self.ident
        return other

    def farthest_near(self) -> np.ndarray:
        """float32 [H, W]: the smallest inverse depth in the 3 x 3 pixels around each, inside the image."""
        rows = self.inverse_z.copy()
        np.minimum(rows[1:], self.inverse_z[:-1], out=rows[1:])
        np.minimum(rows[:-1], self.inverse_z[1:], out=rows[:-1])
        both = rows.copy()
        np.minimum(both[:, 1:], rows[:, :-1], out=both[:, 1:])
        np.minimum(both[:, :-1], rows[:, 1:], out=both[:, :-1])
        return both

    def polygon(self, points: np.ndarray, ident: int) -> None:
        """Draws a convex planar polygon, world [n, 3]."""
        self.polygons([points], ident)

    def polygons(self, rings: Sequence[np.ndarray], first: int) -> None:
        """Draws convex planar polygons, world [n, 3] each, as ``first``, ``first`` + 1, ...; of equally near ones the
        first is kept."""
        if not rings:
            return
        inside = self.camera.to_camera(np.concatenate(rings))
        ends = np.cumsum([len(ring) for ring in rings])
        clipped = [inside[end - len(ring) : end] for ring, end in zip(rings, ends.tolist())]
        if inside[:, 2].min() < _NEAR:
            clipped = [_clip_near(ring) for ring in clipped]
        shapes: dict[int, _Projected] = {}
        for count in sorted({len(ring) for ring in clipped if len(ring) >= 3}):
            shapes[count] = self._project(np.stack([ring for ring in clipped if len(ring) == count]))
        place = dict.fromkeys(shapes, 0)
        for ident, ring in enumerate(clipped, first):
            if len(ring) in shapes:
                found, k = shapes[len(ring)], place[len(ring)]
                place[len(ring)] += 1
                self._draw(found, k, ident)

    def _project(self, points: np.ndarray) -> _Projected:
        """What drawing needs of P polygons of n corners, camera [P, n, 3]."""
        K = self.camera.K.astype(np.float64)
        u = K[0, 0] * (points[..., 0] / points[..., 2]) + K[0, 2]
        v = K[1, 1] * (points[..., 1] / points[..., 2]) + K[1, 2]
        after = np.concatenate([points[:, 1:], points[:, :1]], axis=1)
        gap, total = points - after, points + after
        normal = np.stack([(gap[..., (k + 1) % 3] * total[..., (k + 2) % 3]).sum(axis=1) for k in range(3)], axis=1)
        distance = (normal * points.mean(axis=1)).sum(axis=1)
        # Seen exactly edge-on, a polygon covers no pixel.
        flat = np.abs(distance) < 1e-9
        affine = np.stack(self._plane_affine(normal.T, np.where(flat, 1.0, distance)), axis=1)
        u1, v1 = (np.concatenate([x[:, 1:], x[:, :1]], axis=1) for x in (u, v))
        area = (u * v1 - u1 * v).sum(axis=1)
        turn = np.where(area > 0, 1.0, -1.0)[:, None]
        boxes = np.stack([u.min(axis=1), u.max(axis=1), v.min(axis=1), v.max(axis=1)], axis=1)
        drawn = ~flat & (np.abs(area) >= 1e-9)
        return _Projected(u, v, turn * (u1 - u), turn * (v1 - v), affine, boxes, drawn)

    def _draw(self, found: _Projected, k: int, ident: int) -> None:
        box = self._box(*found.boxes[k]) if found.drawn[k] else None
        if box is None:
            return
        rows, cols = box
        covered = _covered(found.u[k], found.v[k], found.along[k], found.across[k], self._u[cols], self._v[rows])
        self._keep(rows, cols, covered, self._inverse(found.affine[k], rows, cols), ident)

    def ground(self, far: float, ident: int) -> None:
        """Draws the plane y = 0 out to depth ``far``."""
        normal, point = self.camera.R[:, 1].astype(np.float64), self.camera.t.astype(np.float64)
        rows, cols = slice(0, len(self._v)), slice(0, len(self._u))
        inverse = self._inverse(self._plane_affine(normal, (normal * point).sum()), rows, cols)
        self._keep(rows, cols, inverse > 1.0 / far, inverse, ident)

    def ellipsoid(self, centre: np.ndarray, radii: np.ndarray, ident: int) -> None:
        """Draws an ellipsoid with world axes: centre, radii [3]. The camera must be outside."""
        c = self.camera.to_camera(centre[None])[0]
        largest = float(radii.max())
        if c[2] - largest < _NEAR:
            return
        K, R = self.camera.K.astype(np.float64), self.camera.R.astype(np.float64)
        around = [c[:2] + sign * largest for sign in (-1, 1)]
        reach = np.array([[p / z for p in side for z in (c[2] - largest, c[2] + largest)] for side in around])
        u = K[0, 0] * reach[:, :2] + K[0, 2]
        v = K[1, 1] * reach[:, 2:] + K[1, 2]
        box = self._box(u.min(), u.max(), v.min(), v.max())
        if box is None:
            return
        rows, cols = box
        # Rays and centre in world axes divided by the radii, where the ellipsoid is a unit sphere.
        x = ((self._u[cols] - K[0, 2]) / K[0, 0])[None, :]
        y = ((self._v[rows] - K[1, 2]) / K[1, 1])[:, None]
        ray = [((R[0, i] * x + R[2, i]) + R[1, i] * y) / radii[i] for i in range(3)]
        middle = [((R[0, i] * c[0] + R[1, i] * c[1]) + R[2, i] * c[2]) / radii[i] for i in range(3)]
        aa = (ray[0] * ray[0] + ray[1] * ray[1]) + ray[2] * ray[2]
        ab = (ray[0] * middle[0] + ray[1] * middle[1]) + ray[2] * middle[2]
        bb = (middle[0] ** 2 + middle[1] ** 2) + middle[2] ** 2 - 1.0
        root = ab * ab - aa * bb
        hit = root > 0
        z = (ab - np.sqrt(np.maximum(root, 0))) / aa
        inverse = (1.0 / np.maximum(z, 1e-6)).astype(np.float32)
        self._keep(rows, cols, hit & (z > _NEAR), inverse, ident)

    def _inverse(self, affine: tuple[float, float, float], rows: slice, cols: slice) -> np.ndarray:
        gu, gv, g0 = affine
        across, down = gu * self._u[cols], gv * self._v[rows] + g0
        return across.astype(np.float32)[None, :] + down.astype(np.float32)[:, None]

    def _keep(self, rows: slice, cols: slice, covered: np.ndarray, inverse: np.ndarray, ident: int) -> None:
        nearest = self.inverse_z[rows, cols]
        covered &= inverse > nearest
        np.copyto(nearest, inverse, where=covered)
        np.copyto(self.ident[rows, cols], np.int16(ident), where=covered)

    def _box(self, u0: float, u1: float, v0: float, v1: float) -> tuple[slice, slice] | None:
        height, width = self.ident.shape
        left, right = max(0, int(np.ceil(max(u0, -1.0)))), min(width - 1, int(np.floor(min(u1, width))))
        top, bottom = max(0, int(np.ceil(max(v0, -1.0)))), min(height - 1, int(np.floor(min(v1, height))))
        if left > right or top > bottom:
            return None
        return slice(top, bottom + 1), slice(left, right + 1)

    def _plane_affine(self, normal: np.ndarray, distance: np.ndarray | float) -> tuple:
        """(g_u, g_v, g_0) with 1 / z = g_u u + g_v v + g_0 on the planes normal [3, ...] . X = distance [...]."""
        K = self.camera.K.astype(np.float64)
        gu, gv = normal[0] / (K[0, 0] * distance), normal[1] / (K[1, 1] * distance)
        return gu, gv, normal[2] / distance - gu * K[0, 2] - gv * K[1, 2]


def _clip_near(points: np.ndarray) -> np.ndarray:
    """The part of a convex polygon [n, 3] (camera) with z >= near."""
    if (points[:, 2] >= _NEAR).all():
        return points
    kept = []
    for p, q in zip(points, np.concatenate([points[1:], points[:1]])):
        if p[2] >= _NEAR:
            kept.append(p)
        if (p[2] >= _NEAR) != (q[2] >= _NEAR):
            kept.append(p + (_NEAR - p[2]) / (q[2] - p[2]) * (q - p))
    return np.array(kept).reshape(-1, 3)


def _covered(u: np.ndarray, v: np.ndarray, along: np.ndarray, across: np.ndarray, cols: np.ndarray,
             rows: np.ndarray) -> np.ndarray:
    """Pixels [rows, cols] on or inside a convex polygon with image corners (u, v) and sides (along, across), all [n].

    A row's pixels on the inner side of an edge, along (row - v) >= across (col - u), are those up to a column or from
    one on: the products on the right are sorted, rounded or not. So one search an edge finds the spans of all rows.
    """
    if len(rows) * len(cols) <= _SMALL_BOX:
        bound = along[:, None] * (rows - v[:, None])
        return (bound[:, :, None] >= (across[:, None] * (cols - u[:, None]))[:, None, :]).all(axis=0)
    first = np.zeros(len(rows), dtype=np.int64)
    last = np.full(len(rows), len(cols), dtype=np.int64)
    for a0, b0, da, db in zip(u, v, along, across):
        bound, products = da * (rows - b0), db * (cols - a0)
        if db >= 0:
            np.minimum(last, products.searchsorted(bound, "right"), out=last)
        else:
            np.maximum(first, len(cols) - products[::-1].searchsorted(bound, "right"), out=first)
    column = np.arange(len(cols))
    return (column >= first[:, None]) & (column < last[:, None])
