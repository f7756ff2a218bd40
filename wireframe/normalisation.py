"""Robust centre and scale of a cloud, in NumPy: the readable reference of ``wireframe.kernels.ops.centre_and_scale``.

Source of the rule: the S23DR 2026 learned baseline; its unseeded draw is replaced by hashes.
"""

from __future__ import annotations

import numpy as np

from wireframe import hashing

REFERENCE_POINTS = 8000
MAD_FACTOR = 2.5
BOX_QUANTILES = (0.025, 0.975)
MIN_SCALE = 1e-6
_SOURCE_DEPTH = 1


def centre_and_scale(xyz: np.ndarray, source: np.ndarray, seed: int, scene: int) -> tuple[np.ndarray, np.ndarray]:
    """Robust centre and scale of a cloud.

    The reference is the depth points (all points where there are none), at most 8000 of them by smallest hash;
    points farther from the coordinate-wise median than median + 2.5 MAD of that distance are dropped; centre and
    scale are the middle and the diagonal of the box between the 2.5th and 97.5th percentiles.

    Args:
        xyz: float32 [P, 3]; source: uint8 [P]; seed, scene: the random key.

    Returns:
        center float32 [3], scale float32 [] (>= 1e-6; 1 for an empty cloud).
    """
    reference = np.flatnonzero(source == _SOURCE_DEPTH)
    if len(reference) == 0:
        reference = np.arange(len(xyz))
    if len(reference) == 0:
        return np.zeros(3, dtype=np.float32), np.float32(1.0)
    hashes = hashing.hash64(seed, scene, hashing.CENTRE_SCALE, reference)
    cloud = xyz[reference[hashing.smallest(hashes, REFERENCE_POINTS)]].astype(np.float64)
    d = cloud - np.median(cloud, axis=0)
    distance = np.sqrt((d[:, 0] * d[:, 0] + d[:, 1] * d[:, 1]) + d[:, 2] * d[:, 2])
    middle = np.median(distance)
    spread = np.median(np.abs(distance - middle))
    cloud = np.sort(cloud[distance <= middle + MAD_FACTOR * spread], axis=0)
    low, high = (cloud[int(f * (len(cloud) - 1))] for f in BOX_QUANTILES)
    side = high - low
    diagonal = np.sqrt((side[0] * side[0] + side[1] * side[1]) + side[2] * side[2])
    # Adding zero: which of -0 and +0 a sort leaves at the percentile is not defined.
    return ((low + high) / 2 + 0.0).astype(np.float32), np.float32(max(diagonal, MIN_SCALE))


def normalise(world: np.ndarray, center: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """(world - center) / scale in float64 from the stored float32 values, rounded to float32 once."""
    return ((world.astype(np.float64) - center.astype(np.float64)) / np.float64(scale)).astype(np.float32)
