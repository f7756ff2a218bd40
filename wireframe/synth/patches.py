"""What makes a COLMAP cloud unlike an even sample of the surface: bare and crowded places, far-off backdrop, tails."""

from __future__ import annotations

import numpy as np

from wireframe.hashing import hash64, key
from wireframe.synth.building import Building
from wireframe.synth.config import SynthConfig

# A world cell as one number: its three indices in 21 bits each.
_OFFSET, _BITS = 1 << 20, 21
# Clusters of backdrop points (trees, other houses), how far behind the house's ring they stand, how high they reach.
_CLUSTERS = 40
_FAR = (4.0, 45.0)
_HEIGHT = 11.0


def thin(rng: np.random.Generator, xyz: np.ndarray, cell_seed: int, config: SynthConfig) -> np.ndarray:
    """bool [n]: which candidates [n, 3] a patchy reconstruction finds.

    In a world cell of ``config.colmap_cell`` metres it finds nothing with probability ``colmap_hole_share``; the others
    differ by a log-normal factor. Both depend on the cell and ``cell_seed`` alone, so that rounds of candidates agree.
    """
    index = np.floor(xyz / config.colmap_cell).astype(np.int64) + _OFFSET
    cells = (index[:, 0] << 2 * _BITS) | (index[:, 1] << _BITS) | index[:, 2]
    hole, first, second = ((hash64(cell_seed, 0, part, cells) >> np.uint64(11)).astype(np.float64) * 2.0**-53
                           for part in range(3))
    # Box and Muller's normal number of two uniform ones.
    normal = np.sqrt(-2 * np.log(1 - first)) * np.cos(2 * np.pi * second)
    weight = np.where(hole < config.colmap_hole_share, 0.0, np.exp(config.colmap_clump_sigma * (normal - 1.5)))
    return rng.random(len(xyz)) < weight


def cell_seed(seed: int, index: int, stream: int) -> int:
    """What keys the cells of one scene."""
    return key(seed, index, stream)


def backdrop(rng: np.random.Generator, building: Building, count: int) -> tuple[np.ndarray, np.ndarray]:
    """``count`` points float64 [n, 3] on what stands around the scene, in clusters, and their colours [n, 3]."""
    azimuth, gap = rng.uniform(0, 2 * np.pi, _CLUSTERS), rng.uniform(*_FAR, _CLUSTERS)
    height = rng.uniform(0, _HEIGHT, _CLUSTERS)
    reach = building.radius + gap
    middle = np.stack([reach * np.cos(azimuth), height, reach * np.sin(azimuth)], axis=1)
    middle[:, ::2] += building.centre[::2]
    points = middle[rng.integers(_CLUSTERS, size=count)] + [2.5, 1.5, 2.5] * rng.standard_normal((count, 3))
    points[:, 1] = np.abs(points[:, 1])
    return points, np.full((count, 3), 80)


def add_tails(rng: np.random.Generator, xyz: np.ndarray, config: SynthConfig) -> np.ndarray:
    """The points [n, 3], a share of them displaced by a wide normal error."""
    hit = rng.random(len(xyz)) < config.colmap_tail_share
    return xyz + np.where(hit[:, None], config.colmap_tail_sigma * rng.standard_normal(xyz.shape), 0.0)
