"""The operations of fusion and sampling on CPU tensors by ``wireframe._C``: outputs allocated, buffers handed over.

Same functions and order of arguments as ``numpy_reference.py`` and ``native_cuda.py``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from wireframe.kernels import native
from wireframe.voting import LABEL_TABLES

_UINT64 = (1 << 64) - 1


def house_mask(gestalt: Tensor, views: Tensor, radius: int, threads: int) -> Tensor:
    out = torch.from_numpy(np.zeros(gestalt.shape, dtype=bool))
    native.module().house_mask(*_buffers(gestalt, views), LABEL_TABLES, radius, out.numpy(), threads)
    return out


def clip_limits(depth: Tensor, views: Tensor, threads: int) -> Tensor:
    out = torch.empty(views.shape[0], dtype=torch.float64)
    native.module().clip_limits(*_buffers(depth, views, out), threads)
    return out


def depth_points(
    depth: Tensor, mask: Tensor, limits: Tensor, views: Tensor, K: Tensor, R: Tensor, t: Tensor, keys: Tensor,
    count: int, seed: int, threads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    xyz = torch.empty(views.shape[0], count, 3, dtype=torch.float32)
    counts = torch.empty(views.shape[0], dtype=torch.int64)
    inputs = _buffers(depth, mask, limits, views, K, R, t, keys)
    native.module().depth_points(*inputs, seed & _UINT64, xyz.numpy(), counts.numpy(), threads)
    return xyz, counts


def vote_labels(
    xyz: Tensor, offsets: Tensor, view_offsets: Tensor, ade: Tensor, gestalt: Tensor, views: Tensor,
    K: Tensor, R: Tensor, t: Tensor, zbuffer: float, threads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtypes = (torch.uint8, torch.int16, torch.int16, torch.uint8, torch.uint8, torch.float32)
    out = tuple(torch.empty(xyz.shape[0], dtype=dtype) for dtype in dtypes)
    inputs = _buffers(xyz, offsets, view_offsets, ade, gestalt, views, K, R, t)
    native.module().vote_labels(*inputs, LABEL_TABLES, zbuffer, _buffers(*out), threads)
    return out


def point_tiers(visible_src: Tensor, visible_id: Tensor, behind: Tensor, threads: int) -> tuple[Tensor, Tensor]:
    group_id = torch.empty(visible_src.shape, dtype=torch.int8)
    class_id = torch.empty(visible_src.shape, dtype=torch.uint8)
    inputs = _buffers(visible_src, visible_id, behind)
    native.module().point_tiers(*inputs, LABEL_TABLES, group_id.numpy(), class_id.numpy())
    return group_id, class_id


def centre_and_scale(
    xyz: Tensor, source: Tensor, keep: Tensor, offsets: Tensor, keys: Tensor, seed: int, threads: int
) -> tuple[Tensor, Tensor]:
    center = torch.empty(keys.shape[0], 3, dtype=torch.float32)
    scale = torch.empty(keys.shape[0], dtype=torch.float32)
    inputs = _buffers(xyz, source, keep, offsets, keys)
    native.module().centre_and_scale(*inputs, seed & _UINT64, center.numpy(), scale.numpy(), threads)
    return center, scale


def priority_sample(
    source: Tensor, group_id: Tensor, keep: Tensor, offsets: Tensor, keys: Tensor,
    num_points: int, seed: int, threads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    index = torch.empty(keys.shape[0], num_points, dtype=torch.int64)
    count = torch.empty(keys.shape[0], dtype=torch.int64)
    inputs = _buffers(source, group_id, keep, offsets, keys)
    native.module().priority_sample(*inputs, seed & _UINT64, index.numpy(), count.numpy(), threads)
    return index, count


def _buffers(*tensors: Tensor) -> tuple:
    return tuple(tensor.detach().numpy() for tensor in tensors)
