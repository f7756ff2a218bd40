"""Fusion and sampling of many scenes at once, on the CPU or a GPU, from raw maps to the inputs of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from wireframe.kernels import ops
from wireframe.scene_batch import SceneBatch


def sample_scenes(
    batch: SceneBatch,
    num_points: int = 4096,
    seed: int = 0,
    *,
    depth_points_per_view: int = 20000,
    zbuffer: float | None = None,
    impl: str = "auto",
    threads: int | None = None,
) -> dict[str, Tensor]:
    """``sample_points(fuse_views(scene))`` of every scene of the batch, on its device, with the same bits.

    On a GPU nothing here waits for the device after the first call: no size depends on what the votes say.

    It uses torch's own operations too, whose thread pool does not survive ``os.fork``: start workers by spawn.

    Args:
        batch: B scenes, ``SceneBatch.from_scenes(scenes).to(device)``.
        num_points: T. seed, depth_points_per_view, zbuffer, impl, threads: as in ``fuse_views`` and ``sample_points``.

    Returns:
        Tensors [B, T, ...] named like the arrays of ``SampledScene``: xyz_norm, class_id, source, mask, visible_src,
        visible_id, behind, n_views_voted, vote_frac; center float32 [B, 3] and scale float32 [B].
    """
    how = {"impl": impl, "threads": threads}
    mask, limits = ops.house_mask(batch, **how), ops.clip_limits(batch, **how)
    drawn, counts = ops.depth_points(batch, mask, limits, depth_points_per_view, seed, **how)
    slots = drawn.shape[1]
    real_depth = torch.arange(slots, device=batch.device) < counts[:, None]
    xyz = _interleave(batch, batch.points, drawn)
    source = _interleave(batch, batch.points.new_zeros(len(batch.points)), torch.ones_like(real_depth)).to(torch.uint8)
    real = _interleave(batch, torch.ones(len(batch.points), dtype=torch.bool, device=batch.device), real_depth)
    # Every view has `slots` places, so where a scene begins is known without asking the device.
    offsets = batch.point_offsets + slots * batch.view_offsets
    # An empty place must not hide a point: what is not finite is in no view.
    voters = xyz if zbuffer is None else xyz.masked_fill(~real[:, None], torch.nan)
    votes = ops.vote_labels(batch, voters, offsets, zbuffer=zbuffer, **how)
    group_id, class_id = ops.point_tiers(votes.visible_src, votes.visible_id, votes.behind, **how)
    keep = real & (votes.support >= 1) & (votes.n_views_voted >= 1) & (group_id >= 0)
    center, scale = ops.centre_and_scale(xyz, source, keep, offsets, batch.keys, seed, **how)
    index, count = ops.priority_sample(source, group_id, keep, offsets, batch.keys, num_points, seed, **how)
    found = count > 0
    index = index.clamp_min(0)

    def padded(array: Tensor) -> Tensor:
        # Zero where a scene has no points; without any place at all there is nothing to look up.
        picked = array[index] if len(array) else array.new_zeros(*index.shape, *array.shape[1:])
        return picked.masked_fill(found.logical_not().view(-1, 1, *(1 for _ in array.shape[1:])), 0)

    world = padded(xyz).double()
    return {
        "xyz_norm": ((world - center.double()[:, None]) / scale.double()[:, None, None]).float(),
        "class_id": padded(class_id),
        "source": padded(source),
        "mask": torch.arange(num_points, device=batch.device) < count[:, None],
        "visible_src": padded(votes.visible_src),
        "visible_id": padded(votes.visible_id),
        "behind": padded(votes.behind),
        "n_views_voted": padded(votes.n_views_voted),
        "vote_frac": padded(votes.vote_frac),
        "center": center,
        "scale": scale,
    }


def _interleave(batch: SceneBatch, points: Tensor, depth: Tensor) -> Tensor:
    """Each scene's rows of ``points`` [P, ...], then its views' rows of ``depth`` [V, slots, ...], flat."""
    parts = []
    for b in range(len(batch)):
        parts.append(points[batch.points_of[b] : batch.points_of[b + 1]])
        parts.append(depth[batch.views_of[b] : batch.views_of[b + 1]].flatten(0, 1).to(points.dtype))
    return torch.cat(parts)
