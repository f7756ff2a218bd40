"""Sampled rows made of hashes alone, for runs without data: the same bits on every machine, and no houses.

Only hashes, sums, products and quotients are used, whose float64 bits do not depend on the machine. Points lie along
the edges of a scene and are labelled by them, so there is something to learn.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from wireframe import hashing
from wireframe.classes import GESTALT_NAMES, POINT_CLASSES
from wireframe.normalisation import normalise
from wireframe.sampling import SampledScene

MIN_EDGES, MAX_EDGES = 6, 20
_SCALE = 12.0
# Most points of a scene lie near an edge; the others anywhere in the box.
_NEAR_EDGE = 0.75
_SPREAD = 0.01


@dataclasses.dataclass(frozen=True)
class MadeRows:
    """A source of ``count`` made rows of ``points`` points, for ``load_training_sets``."""

    points: int
    count: int
    seed: int = 0


def made_rows(points: int, count: int, seed: int = 0) -> list[SampledScene]:
    """``count`` scenes of ``points`` points and 6 to 20 edges; a scene's edges do not depend on ``points``."""
    return [made_row(points, index, seed) for index in range(count)]


def made_id(index: int, seed: int = 0) -> str:
    """The order_id of the scene ``index``, from 0."""
    return f"made-{seed}-{index:06d}"


def made_row(points: int, index: int, seed: int = 0) -> SampledScene:
    """The scene ``index``, from 0, of ``made_rows``."""
    order_id = made_id(index, seed)
    draw = _Draws(seed, hashing.scene_key(order_id))
    vertices, edges = _wireframe(draw)
    center = (10.0 * draw.uniform(3) - 5.0).astype(np.float32)
    scale = np.float32(_SCALE)
    world = (vertices * _SCALE + center.astype(np.float64)).astype(np.float32)
    real = points - draw.below(max(points // 8, 1))
    xyz, edge = _cloud(draw, vertices, edges, points)
    near = edge >= 0
    # An edge's class and name follow from its number: what lies along one edge looks alike.
    arrays = {
        "xyz_norm": xyz.astype(np.float32),
        "class_id": np.where(near, 3 + edge % 7, len(POINT_CLASSES) - 1).astype(np.uint8),
        "source": (np.arange(points) >= 3 * points // 4).astype(np.uint8),
        "visible_src": np.where(near, 1, 2).astype(np.uint8),
        "visible_id": np.where(near, edge % len(GESTALT_NAMES), draw.below_many(points, 100)).astype(np.int16),
        "behind": (draw.below_many(points, len(GESTALT_NAMES) + 1) - 1).astype(np.int16),
        "n_views_voted": (1 + draw.below_many(points, 8)).astype(np.uint8),
        "vote_frac": ((32 + draw.below_many(points, 33)) / 64).astype(np.float32),
    }
    padded = np.minimum(np.arange(points), real - 1)
    return SampledScene(
        order_id=order_id,
        mask=np.arange(points) < real,
        scale=scale,
        center=center,
        gt_segments=normalise(world, center, scale)[edges],
        gt_vertices=world,
        gt_edges=edges.astype(np.int32),
        gt_edge_classes=(edges[:, 0] % 7).astype(np.int64),
        **{name: array[padded] for name, array in arrays.items()},
    )


class _Draws:
    """Hashes of one scene, each taken once, in the order of the calls."""

    def __init__(self, seed: int, key: int):
        self._seed, self._key, self._stream = seed, key, hashing.SYNTH

    def bits(self, count: int) -> np.ndarray:
        self._stream += 1
        return hashing.hash64(self._seed, self._key, self._stream, np.arange(count))

    def uniform(self, *shape: int) -> np.ndarray:
        """float64 of this shape in [0, 1): 24 bits, so that float32 holds them too."""
        return (self.bits(int(np.prod(shape))) >> np.uint64(40)).astype(np.float64).reshape(shape) / (1 << 24)

    def below_many(self, count: int, bound: int) -> np.ndarray:
        return ((self.bits(count) >> np.uint64(33)) % np.uint64(bound)).astype(np.int64)

    def below(self, bound: int) -> int:
        return int(self.below_many(1, bound)[0])


def _wireframe(draw: _Draws) -> tuple[np.ndarray, np.ndarray]:
    """Vertices float64 [V, 3] in [-0.4, 0.4] and edges int64 [E, 2]: a closed ring, then chords of it."""
    count = MIN_EDGES + draw.below(MAX_EDGES - MIN_EDGES + 1)
    # Seven corners have 21 pairs, enough for every count.
    corners = min(count, 7 + draw.below(max(count - 6, 1)))
    vertices = 0.8 * draw.uniform(corners, 3) - 0.4
    first, second = np.triu_indices(corners, k=1)
    ring = (second - first == 1) | (second - first == corners - 1)
    rank = draw.bits(len(first))
    # The ring first, then the chords in the order of their hashes.
    order = np.lexsort((rank, ~ring))[:count]
    return vertices, np.stack([first[order], second[order]], axis=1)


def _cloud(draw: _Draws, vertices: np.ndarray, edges: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Points float64 [T, 3] and the edge each lies near, int64 [T], -1 for none; the ends of every edge are among
    the first ones as far as they go, so the segments lie within the cloud."""
    edge = draw.below_many(points, len(edges))
    along = draw.uniform(points)
    ends = min(2 * len(edges), points)
    edge[:ends], along[:ends] = np.arange(ends) // 2, np.arange(ends) % 2
    start, stop = vertices[edges[edge, 0]], vertices[edges[edge, 1]]
    noise = _SPREAD * (2.0 * draw.uniform(points, 3) - 1.0)
    noise[:ends] = 0.0
    anywhere = draw.uniform(points) >= _NEAR_EDGE
    anywhere[:ends] = False
    xyz = start + along[:, None] * (stop - start) + noise
    return np.where(anywhere[:, None], 0.9 * draw.uniform(points, 3) - 0.45, xyz), np.where(anywhere, -1, edge)
