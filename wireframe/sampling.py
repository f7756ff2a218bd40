"""Sampling: a fixed number of fused points, structural ones first, in normalised coordinates.

The steps are the operations of ``wireframe.kernels.ops``; ``priority.py``, ``normalisation.py`` and ``subsets.py`` are
their readable references.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from wireframe import hashing
from wireframe.fusion import SOURCE_COLMAP, SOURCE_DEPTH, LabelledPoints
from wireframe.normalisation import normalise
from wireframe.priority import quotas

SAMPLERS = ("priority", "fps", "voxel")
VOXEL_SIZE = 0.05


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


def sample_points(
    points: LabelledPoints,
    num_points: int = 4096,
    seed: int = 0,
    *,
    sampler: str = "priority",
    impl: str = "auto",
    threads: int | None = None,
) -> SampledScene:
    """A fixed-size sample: three quarters COLMAP, one quarter depth, in the sampler's order.

    Args:
        points: fused points; those with ``keep`` False, an excluded tier or a coordinate that is not finite are left
            out.
        num_points: T, a positive multiple of 4 in practice; COLMAP's quota is 3 T // 4.
        seed: with the scene's id, the key of every draw.
        sampler: the order in which the points of a source are taken. "priority", the baseline's: by (tier, hash);
            "fps": farthest point first, from the one with the smallest hash; "voxel": the first point, by
            (tier, hash), of every voxel of 5 cm, then the others.
        impl: "auto", "native" or "reference"; all give the same bits.
        threads: of the native implementation; None = torch's number.

    Returns:
        SampledScene: COLMAP points, then depth points, each in the sampler's order. When both sources are exhausted the
        last point is repeated with mask False; without any point all arrays are zero and scale is 1.

    Raises:
        ValueError: ``num_points`` is not positive, or an unknown sampler. ImplementationError: an explicit ``impl``
            that cannot run.
    """
    import torch

    from wireframe.kernels import ops

    if num_points < 1:
        raise ValueError(f"num_points must be at least 1, got {num_points}")
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}")
    keep = points.keep & (points.group_id >= 0)
    finite = np.isfinite(points.xyz)
    if not finite.all():
        keep &= finite.all(axis=1)
    if not keep.all():
        points = points.select(keep)
    arrays = (points.xyz, points.source, points.group_id)
    xyz, source, group_id = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
    everything = torch.from_numpy(np.ones(len(points), dtype=bool))
    keys = torch.from_numpy(hashing.key_bits([points.order_id]))
    one_scene = (everything, torch.tensor([0, len(points)]), keys)
    how = {"impl": impl, "threads": threads}
    centers, scales = ops.centre_and_scale(xyz, source, *one_scene, seed, **how)
    if sampler == "priority":
        indices, counts = ops.priority_sample(source, group_id, *one_scene, num_points, seed, **how)
        index, count = indices[0].numpy(), int(counts[0])
    else:
        chosen = np.concatenate(list(_spread(points, num_points, seed, sampler, how)))
        index, count = np.concatenate([chosen, np.repeat(chosen[-1:], num_points - len(chosen))]), len(chosen)
        index = index if count else np.full(num_points, -1)
    return _sampled(points, index, count, centers[0].numpy(), scales[0].numpy()[()])


def _spread(points: LabelledPoints, num_points: int, seed: int, sampler: str, how: dict) -> Iterator[np.ndarray]:
    """For each source, the positions of the points that a sampler other than the baseline's takes."""
    import torch

    from wireframe.kernels import ops

    hashes = hashing.hash64(seed, hashing.scene_key(points.order_id), hashing.SAMPLING, np.arange(len(points)))
    available = [np.flatnonzero(points.source == number) for number in (SOURCE_COLMAP, SOURCE_DEPTH)]
    for index, take in zip(available, quotas(*map(len, available), num_points)):
        if take == 0:
            yield index[:0]
            continue
        xyz, rank = torch.from_numpy(points.xyz[index]), np.empty(len(index), dtype=np.int64)
        rank[np.lexsort((hashes[index], points.group_id[index]))] = np.arange(len(index))
        if sampler == "fps":
            yield index[ops.farthest_point_sample(xyz, take, start=int(hashes[index].argmin()), **how).numpy()]
        else:
            later = np.ones(len(index), dtype=bool)
            later[ops.voxel_sample(xyz, VOXEL_SIZE, torch.from_numpy(rank), **how).numpy()] = False
            yield index[np.lexsort((rank, later))[:take]]


def _sampled(
    points: LabelledPoints, index: np.ndarray, count: int, center: np.ndarray, scale: np.float32
) -> SampledScene:
    """The points at ``index`` as a sampled row; the first ``count`` are real, and without any all arrays are zero."""

    def padded(array: np.ndarray) -> np.ndarray:
        return array[index] if count else np.zeros((len(index), *array.shape[1:]), dtype=array.dtype)

    return SampledScene(
        order_id=points.order_id,
        xyz_norm=normalise(padded(points.xyz), center, scale),
        class_id=padded(points.class_id),
        source=padded(points.source),
        mask=np.arange(len(index)) < count,
        gt_segments=normalise(points.vertices, center, scale)[points.edges].reshape(-1, 2, 3),
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
