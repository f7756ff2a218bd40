"""View fusion on a batch of scenes: house mask, depth points, vote of the views, tiers.

Rules: S23DR 2026 learned baseline, its fusion. Reference, CPU and CUDA give the same bits for any number of
threads and any batch: the arithmetic is float64 in one fixed order, the draws are hashes, and what runs concurrently is
either independent or an integer sum or minimum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wireframe.depth import MASK_RADIUS
from wireframe.kernels import dispatch
from wireframe.kernels.checks import check_devices, check_integer, check_tensor, naming, signed64, thread_count
from wireframe.scene_batch import SceneBatch
from wireframe.voting import Votes


def house_mask(
    batch: SceneBatch, *, radius: int = MASK_RADIUS, impl: str = "auto", threads: int | None = None
) -> Tensor:
    """Pixels of the house in every label map, dilated by a box of ``2 radius + 1`` pixels a side.

    Returns:
        bool [N], laid out like ``batch.gestalt``.

    Raises:
        ValueError: a negative radius. ImplementationError: an explicit ``impl`` that cannot run.
    """
    radius = check_integer("house_mask", "radius", radius, 0)
    impl = dispatch.choose("house_mask", impl, batch.device.type)
    return _house_mask(batch.gestalt, batch.views, radius, impl, thread_count(threads))


def clip_limits(batch: SceneBatch, *, impl: str = "auto", threads: int | None = None) -> Tensor:
    """The 99.5th percentile of the positive depths of every view, by linear interpolation (NumPy's default).

    Returns:
        float64 [V] millimetres, 0 for a view without positive depth.
    """
    impl = dispatch.choose("clip_limits", impl, batch.device.type)
    return _clip_limits(batch.depth, batch.views, impl, thread_count(threads))


def depth_points(
    batch: SceneBatch,
    mask: Tensor,  # [N] bool
    limits: Tensor,  # [V] float64
    count: int,
    seed: int = 0,
    *,
    impl: str = "auto",
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """World points of up to ``count`` depth pixels in every view: those in the mask with the smallest hashes.

    Args:
        mask: bool [N], as ``house_mask`` gives it. limits: float64 [V] millimetres, as ``clip_limits`` gives them.
        count: how many a view at most; more than ``batch.most_depth_pixels`` is taken for that many.
        seed: with scene and view, the key of the draw.

    Returns:
        xyz float32 [V, count, 3] world metres, in row-major order of the pixels, zero beyond counts; counts int64 [V].
    """
    count = min(check_integer("depth_points", "count", count, 0), batch.most_depth_pixels)
    mask = check_tensor("depth_points", "mask", mask, torch.bool, tuple(batch.gestalt.shape))
    limits = check_tensor("depth_points", "limits", limits, torch.float64, (batch.views.shape[0],))
    device = check_devices("depth_points", batch=batch.depth, mask=mask, limits=limits)
    impl = dispatch.choose("depth_points", impl, device)
    return _depth_points(
        batch.depth, mask, limits, batch.views, batch.K, batch.R, batch.t, batch.keys,
        count, signed64(seed), impl, thread_count(threads),
    )  # fmt: skip


def vote_labels(
    batch: SceneBatch,
    xyz: Tensor,  # [P, 3]
    offsets: Tensor,  # [B + 1]
    *,
    zbuffer: float | None = None,
    impl: str = "auto",
    threads: int | None = None,
) -> Votes:
    """The label that most views agree on, for world points of every scene of the batch.

    Args:
        xyz: float32 [P, 3] world metres; a point that is not finite gets no vote.
        offsets: int64 [B + 1]; scene b has the points offsets[b] to offsets[b + 1].
        zbuffer: None, or the relative tolerance of a visibility test: in each view, the nearest of the scene's points
            that project into a cell of 8 x 8 pixels hides those that lie more than this share farther.

    Returns:
        Votes of tensors [P]: visible_src u8, visible_id i16, behind i16, support u8, n_views_voted u8, vote_frac f32.
    """
    xyz = check_tensor("vote_labels", "xyz", xyz, torch.float32, ("P", 3))
    offsets = check_tensor("vote_labels", "offsets", offsets, torch.int64, (len(batch) + 1,))
    if zbuffer is not None and not 0 <= zbuffer < float("inf"):
        raise ValueError(f"vote_labels: zbuffer must be None, 0 or a positive tolerance, got {zbuffer}")
    impl = dispatch.choose("vote_labels", impl, check_devices("vote_labels", batch=batch.ade, xyz=xyz, offsets=offsets))
    return Votes(*_vote_labels(
        xyz, offsets, batch.view_offsets, batch.ade, batch.gestalt, batch.views, batch.K, batch.R, batch.t,
        -1.0 if zbuffer is None else float(zbuffer), impl, thread_count(threads),
    ))  # fmt: skip


def point_tiers(
    visible_src: Tensor,  # [P]
    visible_id: Tensor,  # [P]
    behind: Tensor,  # [P]
    *,
    impl: str = "auto",
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Priority tier and class of labelled points.

    Args:
        visible_src: uint8 [P]; visible_id, behind: int16 [P], as ``vote_labels`` gives them.

    Returns:
        group_id int8 [P], 0-4, -1 excluded; class_id uint8 [P], index into ``classes.POINT_CLASSES``.
    """
    visible_src = check_tensor("point_tiers", "visible_src", visible_src, torch.uint8, ("P",))
    length = tuple(visible_src.shape)
    visible_id = check_tensor("point_tiers", "visible_id", visible_id, torch.int16, length)
    behind = check_tensor("point_tiers", "behind", behind, torch.int16, length)
    device = check_devices("point_tiers", visible_src=visible_src, visible_id=visible_id, behind=behind)
    return _point_tiers(
        visible_src, visible_id, behind, dispatch.choose("point_tiers", impl, device), thread_count(threads)
    )


@torch.library.custom_op("wireframe::house_mask", mutates_args=())
def _house_mask(gestalt: Tensor, views: Tensor, radius: int, impl: str, threads: int) -> Tensor:
    with naming("house_mask"):
        return dispatch.fusion_module(impl, gestalt.device.type).house_mask(gestalt, views, radius, threads)


@_house_mask.register_fake
def _(gestalt, views, radius, impl, threads):
    return torch.empty_like(gestalt, dtype=torch.bool)


@torch.library.custom_op("wireframe::clip_limits", mutates_args=())
def _clip_limits(depth: Tensor, views: Tensor, impl: str, threads: int) -> Tensor:
    with naming("clip_limits"):
        return dispatch.fusion_module(impl, depth.device.type).clip_limits(depth, views, threads)


@_clip_limits.register_fake
def _(depth, views, impl, threads):
    return depth.new_empty(views.shape[0], dtype=torch.float64)


@torch.library.custom_op("wireframe::depth_points", mutates_args=())
def _depth_points(
    depth: Tensor, mask: Tensor, limits: Tensor, views: Tensor, K: Tensor, R: Tensor, t: Tensor, keys: Tensor,
    count: int, seed: int, impl: str, threads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    run = dispatch.fusion_module(impl, depth.device.type).depth_points
    with naming("depth_points"):
        return run(depth, mask, limits, views, K, R, t, keys, count, seed, threads)


@_depth_points.register_fake
def _(depth, mask, limits, views, K, R, t, keys, count, seed, impl, threads):
    n = views.shape[0]
    return depth.new_empty((n, count, 3), dtype=torch.float32), depth.new_empty(n, dtype=torch.int64)


@torch.library.custom_op("wireframe::vote_labels", mutates_args=())
def _vote_labels(
    xyz: Tensor, offsets: Tensor, view_offsets: Tensor, ade: Tensor, gestalt: Tensor, views: Tensor,
    K: Tensor, R: Tensor, t: Tensor, zbuffer: float, impl: str, threads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    run = dispatch.fusion_module(impl, xyz.device.type).vote_labels
    with naming("vote_labels"):
        return run(xyz, offsets, view_offsets, ade, gestalt, views, K, R, t, zbuffer, threads)


@_vote_labels.register_fake
def _(xyz, offsets, view_offsets, ade, gestalt, views, K, R, t, zbuffer, impl, threads):
    dtypes = (torch.uint8, torch.int16, torch.int16, torch.uint8, torch.uint8, torch.float32)
    return tuple(xyz.new_empty(xyz.shape[0], dtype=dtype) for dtype in dtypes)


@torch.library.custom_op("wireframe::point_tiers", mutates_args=())
def _point_tiers(
    visible_src: Tensor, visible_id: Tensor, behind: Tensor, impl: str, threads: int
) -> tuple[Tensor, Tensor]:
    run = dispatch.fusion_module(impl, visible_src.device.type).point_tiers
    with naming("point_tiers"):
        return run(visible_src, visible_id, behind, threads)


@_point_tiers.register_fake
def _(visible_src, visible_id, behind, impl, threads):
    return torch.empty_like(visible_src, dtype=torch.int8), torch.empty_like(visible_src)
