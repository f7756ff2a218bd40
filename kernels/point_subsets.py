"""Subsets that cover a point cloud: exact farthest point sampling and voxel sampling, computed on the CPU."""

from __future__ import annotations

import numbers

import numpy as np
import torch
from torch import Tensor

from wireframe import subsets
from wireframe.kernels import dispatch, native
from wireframe.kernels.checks import check_devices, check_integer, check_tensor, naming, thread_count


def farthest_point_sample(
    xyz: Tensor,  # [P, 3]
    count: int,
    *,
    start: int = 0,
    impl: str = "auto",
    threads: int | None = None,
) -> Tensor:
    """Indices of ``count`` points, each the farthest from all before it; exact.

    Squared distances are float64, (dx dx + dy dy) + dz dz in this order. Ties go to the lowest index; a chosen point
    is not chosen again, so points that repeat others come last, by index.

    Args:
        xyz: float32 [P, 3], finite.
        count: how many, at least 1; all P where there are fewer.
        start: index of the first one; 0 for an empty cloud.
        impl: "auto", "reference" (NumPy, P x count distances) or "native" (a tree of boxes).
        threads: as in the other operations, and without effect: each step needs the one before.

    Returns:
        int64 [min(count, P)], in the order of choice.

    Raises:
        TypeError: ``xyz`` is not a tensor, ``count`` or ``start`` not an integer.
        ValueError: a wrong dtype or shape, ``count`` below 1, ``start`` not a point, a coordinate not finite, or an
            unknown ``impl``.
        ImplementationError: an explicit ``impl`` that cannot run.
    """
    op = "farthest_point_sample"
    xyz = check_tensor(op, "xyz", xyz, torch.float32, ("P", 3))
    count, start = check_integer(op, "count", count, 1), check_integer(op, "start", start, 0)
    points = xyz.shape[0]
    if start >= max(points, 1):
        raise ValueError(f"{op}: start must be the index of one of {points} points, got {start}")
    thread_count(threads)
    return _farthest_point_sample(xyz, count, start, dispatch.choose(op, impl, xyz.device.type))


@torch.library.custom_op("wireframe::farthest_point_sample", mutates_args=())
def _farthest_point_sample(xyz: Tensor, count: int, start: int, impl: str) -> Tensor:
    points = _array(xyz)
    with naming("farthest_point_sample"):
        if impl == "reference":
            chosen = subsets.farthest_point_sample(points, count, start)
        else:
            chosen = np.empty(min(count, len(points)), dtype=np.int64)
            native.module().farthest_point_sample(points, start, chosen)
    return torch.from_numpy(chosen).to(xyz.device)


@_farthest_point_sample.register_fake
def _(xyz: Tensor, count: int, start: int, impl: str) -> Tensor:
    return xyz.new_empty(torch.sym_min(count, xyz.shape[0]), dtype=torch.int64)


def voxel_sample(
    xyz: Tensor,  # [P, 3]
    size: float,
    priority: Tensor | None = None,  # [P]
    *,
    impl: str = "auto",
    threads: int | None = None,
) -> Tensor:
    """Indices of one point for every occupied voxel of a cubic grid.

    The voxel of a point is floor(x / size) on each axis, in float64. Of its points the one with the lowest priority is
    taken; ties, and all points without priorities, go to the lowest index.

    Args:
        xyz: float32 [P, 3], finite.
        size: edge of a voxel, in the units of ``xyz``.
        priority: int64 [P] or None.
        impl: "auto", "reference" (NumPy) or "native" (a hash table that compares whole cells).
        threads: how many, torch's own number for None; the result does not depend on it.

    Returns:
        int64 [voxels], ascending.

    Raises:
        TypeError: ``xyz`` or ``priority`` is not a tensor, ``size`` not a number.
        ValueError: a wrong dtype, shape or device, ``size`` not positive and finite or so small that xyz / size leaves
            2^62, a coordinate not finite, ``threads`` below 1, or an unknown ``impl``.
        ImplementationError: an explicit ``impl`` that cannot run.
    """
    op = "voxel_sample"
    xyz = check_tensor(op, "xyz", xyz, torch.float32, ("P", 3))
    if priority is not None:
        priority = check_tensor(op, "priority", priority, torch.int64, (xyz.shape[0],))
        check_devices(op, xyz=xyz, priority=priority)
    if not isinstance(size, numbers.Real):
        raise TypeError(f"{op}: size must be a number, not {type(size).__name__}")
    with naming(op):
        size = subsets.checked_size(size)
    impl = dispatch.choose(op, impl, xyz.device.type)
    return _voxel_sample(xyz, size, priority, impl, thread_count(threads))


@torch.library.custom_op("wireframe::voxel_sample", mutates_args=())
def _voxel_sample(xyz: Tensor, size: float, priority: Tensor | None, impl: str, threads: int) -> Tensor:
    points = _array(xyz)
    order = None if priority is None else _array(priority)
    with naming("voxel_sample"):
        if impl == "reference":
            chosen = subsets.voxel_sample(points, size, order)
        else:
            room = np.empty(len(points), dtype=np.int64)
            found = native.module().voxel_sample(points, size, order, room, threads)
            # A copy: few voxels should not hold on to room for every point.
            chosen = room[:found].copy()
    return torch.from_numpy(chosen).to(xyz.device)


@_voxel_sample.register_fake
def _(xyz: Tensor, size: float, priority: Tensor | None, impl: str, threads: int) -> Tensor:
    return xyz.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().numpy()
