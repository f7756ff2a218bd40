"""Priority sampling, in NumPy: the readable reference of ``wireframe.kernels.ops.priority_sample``.

Source of the rule: the S23DR 2026 learned baseline; its unseeded draw is replaced by hashes, and a
short source hands its quota on before anything is repeated.
"""

from __future__ import annotations

import numpy as np

from wireframe import hashing


def quotas(colmap: int, depth: int, num_points: int) -> tuple[int, int]:
    """How many of the available COLMAP and depth points are taken: three quarters and one, what one lacks to the other.
    """
    take_colmap = min(colmap, max(3 * num_points // 4, num_points - depth))
    return take_colmap, min(depth, num_points - take_colmap)


def priority_sample(source: np.ndarray, group_id: np.ndarray, num_points: int, seed: int, scene: int) -> np.ndarray:
    """Positions of the chosen points: COLMAP by (tier, hash), then depth likewise.

    Args:
        source: uint8 [P], 0 COLMAP, 1 depth; group_id: int8 [P], tiers, 0 first.
        num_points: how many at most.
        seed, scene: the random key; a point's hash is that of its position.

    Returns:
        int64 [min(P, num_points)].
    """
    hashes = hashing.hash64(seed, scene, hashing.SAMPLING, np.arange(len(source)))
    available = [np.flatnonzero(source == number) for number in (0, 1)]
    chosen = []
    for index, take in zip(available, quotas(*map(len, available), num_points)):
        chosen.append(index[np.lexsort((hashes[index], group_id[index]))[:take]])
    return np.concatenate(chosen)
