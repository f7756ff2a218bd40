"""The operations of fusion and sampling on tensors of any device by their readable NumPy references, scene by scene.

Same functions and order of arguments as ``native_cpu.py`` and ``native_cuda.py``; ``threads`` is not used.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from wireframe import depth as depth_reference
from wireframe import normalisation, priority, voting
from wireframe.scene import View
from wireframe.scene_batch import views_from_table

_NO_DEPTH = np.zeros(0, dtype=np.uint16)


def house_mask(gestalt: Tensor, views: Tensor, radius: int, threads: int) -> Tensor:
    maps, out = _array(gestalt), np.zeros(gestalt.shape, dtype=bool)
    for _, _, height, width, begin, *_ in _array(views).tolist():
        label_map = maps[begin : begin + height * width].reshape(height, width)
        out[begin : begin + height * width] = depth_reference.house_mask(label_map, radius).ravel()
    return _tensor(out, gestalt)


def clip_limits(depth: Tensor, views: Tensor, threads: int) -> Tensor:
    maps = _array(depth)
    sizes = [(begin, begin + height * width) for *_, height, width, begin in _array(views).tolist()]
    return _tensor(np.array([depth_reference.clip_limit(maps[a:b]) for a, b in sizes], dtype=np.float64), depth)


def depth_points(
    depth: Tensor, mask: Tensor, limits: Tensor, views: Tensor, K: Tensor, R: Tensor, t: Tensor, keys: Tensor,
    count: int, seed: int, threads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    xyz = np.zeros((views.shape[0], count, 3), dtype=np.float32)
    counts = np.zeros(views.shape[0], dtype=np.int64)
    masks = _array(mask)
    for v, (scene, view) in enumerate(_views(views, K, R, t, masks, masks, depth)):
        if view.depth is not None:
            # The mask stands in both places of a label map here.
            found = depth_reference.depth_points(
                view, view.gestalt, float(_array(limits)[v]), count, seed, int(_array(keys)[scene])
            )
            xyz[v, : len(found)], counts[v] = found, len(found)
    return _tensor(xyz, depth), _tensor(counts, depth)


def vote_labels(
    xyz: Tensor, offsets: Tensor, view_offsets: Tensor, ade: Tensor, gestalt: Tensor, views: Tensor,
    K: Tensor, R: Tensor, t: Tensor, zbuffer: float, threads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    world = _array(xyz)
    all_views = [view for _, view in _views(views, K, R, t, _array(ade), _array(gestalt), None)]
    tolerance = None if zbuffer < 0 else zbuffer
    points_of, views_of = _spans(offsets, len(world)), _spans(view_offsets, len(all_views))
    found = [voting.vote_labels(world[a:b], all_views[c:d], tolerance) for (a, b), (c, d) in zip(points_of, views_of)]
    found = found or [voting.vote_labels(world, [])]
    return tuple(_tensor(np.concatenate(arrays), xyz) for arrays in zip(*found))


def point_tiers(visible_src: Tensor, visible_id: Tensor, behind: Tensor, threads: int) -> tuple[Tensor, Tensor]:
    group_id, class_id = voting.point_tiers(_array(visible_src), _array(visible_id), _array(behind))
    return _tensor(group_id, visible_src), _tensor(class_id, visible_src)


def centre_and_scale(
    xyz: Tensor, source: Tensor, keep: Tensor, offsets: Tensor, keys: Tensor, seed: int, threads: int
) -> tuple[Tensor, Tensor]:
    _check_sources(source)
    if not np.isfinite(_array(xyz)[_array(keep)]).all():
        raise ValueError("xyz holds a kept point that is not finite")
    center = np.zeros((keys.shape[0], 3), dtype=np.float32)
    scale = np.ones(keys.shape[0], dtype=np.float32)
    for b, kept in enumerate(_kept(keep, offsets)):
        key = int(_array(keys)[b])
        center[b], scale[b] = normalisation.centre_and_scale(_array(xyz)[kept], _array(source)[kept], seed, key)
    return _tensor(center, xyz), _tensor(scale, xyz)


def priority_sample(
    source: Tensor, group_id: Tensor, keep: Tensor, offsets: Tensor, keys: Tensor,
    num_points: int, seed: int, threads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check_sources(source)
    index = np.full((keys.shape[0], num_points), -1, dtype=np.int64)
    count = np.zeros(keys.shape[0], dtype=np.int64)
    for b, kept in enumerate(_kept(keep, offsets)):
        key = int(_array(keys)[b])
        chosen = kept[priority.priority_sample(_array(source)[kept], _array(group_id)[kept], num_points, seed, key)]
        count[b] = len(chosen)
        index[b, : len(chosen)] = chosen
        index[b, len(chosen) :] = chosen[-1:] if len(chosen) else -1
    return _tensor(index, source), _tensor(count, source)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _tensor(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device)


def _check_sources(source: Tensor) -> None:
    if (_array(source) > 1).any():
        raise ValueError(f"source must be 0 (COLMAP) or 1 (depth), got {int(source.max())}")


def _spans(offsets: Tensor, size: int) -> Iterator[tuple[int, int]]:
    """The ranges between the offsets, which cover ``size`` elements."""
    bounds = _array(offsets).tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != size or sorted(bounds) != bounds:
        raise ValueError(f"offsets must not decrease and must go from 0 to {size}")
    return zip(bounds[:-1], bounds[1:])


def _kept(keep: Tensor, offsets: Tensor) -> Iterator[np.ndarray]:
    """For each scene, the flat positions of its kept points."""
    for first, last in _spans(offsets, keep.shape[0]):
        yield first + np.flatnonzero(_array(keep)[first:last])


def _views(
    views: Tensor, K: Tensor, R: Tensor, t: Tensor, ade: np.ndarray, gestalt: np.ndarray, depth: Tensor | None
) -> Iterator[tuple[int, View]]:
    table = _array(views).copy()
    if depth is None:
        table[:, 5:] = 0
    maps = _NO_DEPTH if depth is None else _array(depth)
    return zip(table[:, 0].tolist(), views_from_table(table, *map(_array, (K, R, t)), ade, gestalt, maps))
