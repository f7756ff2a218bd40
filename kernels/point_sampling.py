"""Sampling of fused points, batched over scenes: robust centre and scale, and the priority sample.

Rules: S23DR 2026 learned baseline, its normalisation and its priority sampling. A point's random number is the hash of
its rank among the kept points of its scene, and every statistic is an order statistic: reference, CPU and CUDA give the
same bits for any number of threads and any batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wireframe.kernels import dispatch
from wireframe.kernels.checks import check_devices, check_integer, check_tensor, naming, signed64, thread_count


def centre_and_scale(
    xyz: Tensor,  # [P, 3]
    source: Tensor,  # [P]
    keep: Tensor,  # [P]
    offsets: Tensor,  # [B + 1]
    keys: Tensor,  # [B]
    seed: int = 0,
    *,
    impl: str = "auto",
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Robust centre and scale of the kept points of every scene (``wireframe.normalisation.centre_and_scale``).

    Args:
        xyz: float32 [P, 3] world metres, finite where kept.
        source: uint8 [P], 0 COLMAP, 1 depth. keep: bool [P], the points that count.
        offsets: int64 [B + 1]; scene b has the points offsets[b] to offsets[b + 1].
        keys: int64 [B], bits of ``hashing.scene_key``; with ``seed`` the random key.

    Returns:
        center float32 [B, 3], scale float32 [B] (>= 1e-6); 0 and 1 for a scene without kept points.

    Raises:
        ValueError: wrong dtype, shape or device, or (on the CPU) a kept point that is not finite.
    """
    op = "centre_and_scale"
    xyz = check_tensor(op, "xyz", xyz, torch.float32, ("P", 3))
    source = check_tensor(op, "source", source, torch.uint8, (xyz.shape[0],))
    keep, offsets, keys = _ragged(op, source, keep, offsets, keys)
    device = check_devices(op, xyz=xyz, source=source, keep=keep, offsets=offsets, keys=keys)
    impl = dispatch.choose(op, impl, device)
    return _centre_and_scale(xyz, source, keep, offsets, keys, signed64(seed), impl, thread_count(threads))


def priority_sample(
    source: Tensor,  # [P]
    group_id: Tensor,  # [P]
    keep: Tensor,  # [P]
    offsets: Tensor,  # [B + 1]
    keys: Tensor,  # [B]
    num_points: int,
    seed: int = 0,
    *,
    impl: str = "auto",
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The points of every scene that a sample of ``num_points`` takes: three quarters COLMAP, one quarter depth.

    Args:
        source: uint8 [P], 0 COLMAP, 1 depth. group_id: int8 [P], tiers, 0 first. keep: bool [P].
        offsets: int64 [B + 1]; keys: int64 [B]; seed: as in ``centre_and_scale``.

    Returns:
        index int64 [B, num_points] into the points: COLMAP by (tier, hash), then depth likewise, then the last one
        again, -1 in a scene without kept points; count int64 [B], how many differ.

    Raises:
        TypeError: ``num_points`` is not an integer. ValueError: ``num_points`` below 1, wrong dtype, shape or device,
            or (on the CPU) another source than 0 and 1. ImplementationError: an explicit ``impl`` that cannot run.
    """
    op = "priority_sample"
    num_points = check_integer(op, "num_points", num_points, 1)
    source = check_tensor(op, "source", source, torch.uint8, ("P",))
    group_id = check_tensor(op, "group_id", group_id, torch.int8, tuple(source.shape))
    keep, offsets, keys = _ragged(op, source, keep, offsets, keys)
    device = check_devices(op, source=source, group_id=group_id, keep=keep, offsets=offsets, keys=keys)
    impl = dispatch.choose(op, impl, device)
    return _priority_sample(
        source, group_id, keep, offsets, keys, num_points, signed64(seed), impl, thread_count(threads)
    )


def _ragged(op: str, source: Tensor, keep: Tensor, offsets: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    keys = check_tensor(op, "keys", keys, torch.int64, ("B",))
    offsets = check_tensor(op, "offsets", offsets, torch.int64, (keys.shape[0] + 1,))
    keep = check_tensor(op, "keep", keep, torch.bool, tuple(source.shape))
    return keep, offsets, keys


@torch.library.custom_op("wireframe::centre_and_scale", mutates_args=())
def _centre_and_scale(
    xyz: Tensor, source: Tensor, keep: Tensor, offsets: Tensor, keys: Tensor, seed: int, impl: str, threads: int
) -> tuple[Tensor, Tensor]:
    run = dispatch.fusion_module(impl, xyz.device.type).centre_and_scale
    with naming("centre_and_scale"):
        return run(xyz, source, keep, offsets, keys, seed, threads)


@_centre_and_scale.register_fake
def _(xyz, source, keep, offsets, keys, seed, impl, threads):
    return xyz.new_empty((keys.shape[0], 3)), xyz.new_empty(keys.shape[0])


@torch.library.custom_op("wireframe::priority_sample", mutates_args=())
def _priority_sample(
    source: Tensor, group_id: Tensor, keep: Tensor, offsets: Tensor, keys: Tensor,
    num_points: int, seed: int, impl: str, threads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    run = dispatch.fusion_module(impl, source.device.type).priority_sample
    with naming("priority_sample"):
        return run(source, group_id, keep, offsets, keys, num_points, seed, threads)


@_priority_sample.register_fake
def _(source, group_id, keep, offsets, keys, num_points, seed, impl, threads):
    return keys.new_empty((keys.shape[0], num_points)), keys.new_empty(keys.shape[0])
