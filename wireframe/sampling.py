"""Priority sampling: a fixed number of points, structural ones first, in normalised coordinates.

Source of the rules: the S23DR 2026 learned baseline (priority sampling, normalisation); its unseeded draws are
replaced by hashes of the scene's id, and a short source hands its quota on before anything is repeated.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from wireframe import hashing
from wireframe.fusion import SOURCE_COLMAP, SOURCE_DEPTH, LabelledPoints

REFERENCE_POINTS = 8000
MAD_FACTOR = 2.5
BOX_QUANTILES = (0.025, 0.975)
MIN_SCALE = 1e-6


@dataclasses.dataclass(frozen=True)
class SampledScene:
    """The arrays of one sampled row; T points, padded with ``mask`` False.

    Attributes:
        order_id: the scene's id.
        xyz_norm: float32 [T, 3], (world - center) / scale.
        class_id: uint8 [T], index into ``classes.POINT_CLASSES``.
        source: uint8 [T], 0 COLMAP, 1 depth.
        mask: bool [T], True = a real point.
        gt_segments: float32 [E, 2, 3], normalised.
        scale: float32 scalar; center: float32 [3]. world = xyz_norm x scale + center.
        gt_vertices: float32 [V, 3] world; gt_edges: int32 [E, 2]; gt_edge_classes: int64 [E].
        visible_src: uint8 [T]; visible_id: int16 [T]; behind: int16 [T] gestalt id, -1 none.
        n_views_voted: uint8 [T]; vote_frac: float32 [T].
    """

    order_id: str
    xyz_norm: np.ndarray
    class_id: np.ndarray
    source: np.ndarray
    mask: np.ndarray
    gt_segments: np.ndarray
    scale: np.ndarray
    center: np.ndarray
    gt_vertices: np.ndarray
    gt_edges: np.ndarray
    visible_src: np.ndarray
    visible_id: np.ndarray
    behind: np.ndarray
    n_views_voted: np.ndarray
    vote_frac: np.ndarray
    gt_edge_classes: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, in the order of the published rows."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "order_id"}

    def world_points(self) -> tuple[np.ndarray, np.ndarray]:
        """World coordinates float32 [n, 3] and class ids uint8 [n] of the real points."""
        return self.xyz_norm[self.mask] * self.scale + self.center, self.class_id[self.mask]


def sample_points(points: LabelledPoints, num_points: int = 4096, seed: int = 0) -> SampledScene:
    """A fixed-size priority sample: three quarters COLMAP, one quarter depth, lowest tiers first.

    Args:
        points: fused points; those with ``keep`` False or an excluded tier are left out.
        num_points: T, a positive multiple of 4 in practice; COLMAP's quota is 3 T // 4.
        seed: with the scene's id, the key of every draw.

    Returns:
        SampledScene: COLMAP points, then depth points, each by (tier, hash). When both sources are exhausted the last
        point is repeated with mask False; without any point all arrays are zero and scale is 1.

    Raises:
        ValueError: ``num_points`` is not positive.
    """
    if num_points < 1:
        raise ValueError(f"num_points must be at least 1, got {num_points}")
    points = points.select(points.keep & (points.group_id >= 0))
    key = hashing.scene_key(points.order_id)
    center, scale = centre_and_scale(points.xyz, points.source, seed, key)
    chosen = _choose(points, num_points, hashing.hash64(seed, key, hashing.SAMPLING, np.arange(len(points))))
    mask = np.zeros(num_points, dtype=bool)
    mask[: len(chosen)] = True
    index = np.concatenate([chosen, np.repeat(chosen[-1:], num_points - len(chosen))])

    def padded(array: np.ndarray) -> np.ndarray:
        return array[index] if len(index) else np.zeros((num_points, *array.shape[1:]), dtype=array.dtype)

    return SampledScene(
        order_id=points.order_id,
        xyz_norm=padded(_normalise(points.xyz, center, scale)),
        class_id=padded(points.class_id),
        source=padded(points.source),
        mask=mask,
        gt_segments=_normalise(points.vertices, center, scale)[points.edges].reshape(-1, 2, 3),
        scale=scale,
        center=center,
        gt_vertices=points.vertices.astype(np.float32),
        gt_edges=points.edges.astype(np.int32),
        visible_src=padded(points.visible_src),
        visible_id=padded(points.visible_id),
        behind=padded(points.behind_gest_id),
        n_views_voted=padded(points.n_views_voted),
        vote_frac=padded(points.vote_frac),
        gt_edge_classes=points.edge_classes.astype(np.int64),
    )


def _choose(points: LabelledPoints, num_points: int, hashes: np.ndarray) -> np.ndarray:
    """Positions of the chosen points: COLMAP by (tier, hash), then depth likewise; ties by position."""
    available = {source: np.flatnonzero(points.source == source) for source in (SOURCE_COLMAP, SOURCE_DEPTH)}
    quota_colmap = 3 * num_points // 4
    n_colmap, n_depth = len(available[SOURCE_COLMAP]), len(available[SOURCE_DEPTH])
    take_colmap = min(n_colmap, max(quota_colmap, num_points - n_depth))
    take_depth = min(n_depth, num_points - take_colmap)
    chosen = []
    for source, take in ((SOURCE_COLMAP, take_colmap), (SOURCE_DEPTH, take_depth)):
        index = available[source]
        order = np.lexsort((hashes[index], points.group_id[index]))
        chosen.append(index[order[:take]])
    return np.concatenate(chosen)


def centre_and_scale(xyz: np.ndarray, source: np.ndarray, seed: int, scene: int) -> tuple[np.ndarray, np.ndarray]:
    """Robust centre and scale of a cloud (baseline facts, section 2, step 6).

    The reference is the depth points (all points where there are none), at most 8000 of them by smallest hash;
    points farther from the coordinate-wise median than median + 2.5 MAD of that distance are dropped; centre and
    scale are the middle and the diagonal of the box between the 2.5th and 97.5th percentiles.

    Args:
        xyz: float32 [P, 3]; source: uint8 [P]; seed, scene: the random key.

    Returns:
        center float32 [3], scale float32 [] (>= 1e-6; 1 for an empty cloud).
    """
    reference = np.flatnonzero(source == SOURCE_DEPTH)
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
    return ((low + high) / 2).astype(np.float32), np.float32(max(diagonal, MIN_SCALE))


def _normalise(world: np.ndarray, center: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """(world - center) / scale in float64 from the stored float32 values, rounded to float32 once."""
    return ((world.astype(np.float64) - center.astype(np.float64)) / np.float64(scale)).astype(np.float32)
