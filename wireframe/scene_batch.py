"""Scenes side by side: flat maps and a table of views, as the operations of fusion take them on CPU and GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from wireframe import hashing
from wireframe.kernels.checks import check_devices, check_tensor
from wireframe.scene import Scene, View

# Columns of SceneBatch.views; struct ViewRow in csrc/point_math.h.
VIEW_COLUMNS = ("scene", "index", "height", "width", "labels", "depth_height", "depth_width", "depth")


_LAYOUT = {
    "ade": (torch.uint8, "N"), "gestalt": (torch.uint8, "N"), "depth": (torch.uint16, "M"),
    "views": (torch.int64, "V", len(VIEW_COLUMNS)), "K": (torch.float32, "V", 3, 3), "R": (torch.float32, "V", 3, 3),
    "t": (torch.float32, "V", 3), "points": (torch.float32, "P", 3), "keys": (torch.int64, "B"),
    "view_offsets": (torch.int64, "B + 1"), "point_offsets": (torch.int64, "B + 1"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SceneBatch:
    """B scenes with V views and P COLMAP points in all. Made by ``from_scenes``; all tensors are contiguous.

    Attributes:
        ade, gestalt: uint8 [N], the label maps of all views, one after another, row-major.
        depth: uint16 [M], the depth maps in millimetres, 0 = none.
        views: int64 [V, 8], a row for each view, by scene; columns ``VIEW_COLUMNS``: position of its scene, position
            in the raw row, size of its label maps, where they begin, size of its depth map (0 without one), where
            it begins.
        K, R: float32 [V, 3, 3]; t: float32 [V, 3].
        points: float32 [P, 3], world metres.
        keys: int64 [B], the bits of each scene's random key (``hashing.scene_key``).
        view_offsets, point_offsets: int64 [B + 1]; scene b has the views and points offsets[b] to offsets[b + 1].
        views_of, points_of: the same two as tuples of int, so that nobody has to ask the device for them.
        most_depth_pixels: of any one depth map; no draw from a view gives more points.
    """

    ade: Tensor
    gestalt: Tensor
    depth: Tensor
    views: Tensor
    K: Tensor
    R: Tensor
    t: Tensor
    points: Tensor
    keys: Tensor
    view_offsets: Tensor
    point_offsets: Tensor
    views_of: tuple[int, ...]
    points_of: tuple[int, ...]
    most_depth_pixels: int

    def __post_init__(self) -> None:
        for name, (dtype, *shape) in _LAYOUT.items():
            tensor = check_tensor("SceneBatch", name, getattr(self, name), dtype, tuple(shape))
            if not getattr(self, name).is_contiguous():
                object.__setattr__(self, name, tensor)
        check_devices("SceneBatch", **{name: getattr(self, name) for name in _LAYOUT})
        lengths = {"gestalt": len(self.ade), "K": len(self.views), "R": len(self.views), "t": len(self.views)}
        lengths |= {"view_offsets": len(self) + 1, "point_offsets": len(self) + 1}
        for name, length in lengths.items():
            if len(getattr(self, name)) != length:
                raise ValueError(f"SceneBatch: {name} must have {length} entries, got {len(getattr(self, name))}")
        if self.device.type == "cpu":
            # On a GPU it would have to wait; what is there came from a batch that was checked here.
            _check_table(self)

    def __len__(self) -> int:
        return self.keys.shape[0]

    @property
    def device(self) -> torch.device:
        return self.ade.device

    @classmethod
    def from_scenes(cls, scenes: Sequence[Scene], *, depth: bool = True) -> SceneBatch:
        """The batch of these scenes, on the CPU; ``depth=False`` leaves the depth maps out."""
        views = [(number, view) for number, scene in enumerate(scenes) for view in scene.views]
        maps = [view.depth if depth else None for _, view in views]
        table = np.zeros((len(views), len(VIEW_COLUMNS)), dtype=np.int64)
        for row, (number, view), depth_map in zip(table, views, maps):
            row[:4] = number, view.index, *view.gestalt.shape
            if depth_map is not None:
                row[5:7] = depth_map.shape
        table[1:, 4] = np.cumsum(table[:-1, 2] * table[:-1, 3])
        table[1:, 7] = np.cumsum(table[:-1, 5] * table[:-1, 6])
        views_of = _offsets([len(scene.views) for scene in scenes])
        points_of = _offsets([len(scene.points) for scene in scenes])
        return cls(
            ade=_flat([view.ade for _, view in views], np.uint8),
            gestalt=_flat([view.gestalt for _, view in views], np.uint8),
            depth=_flat([map for map in maps if map is not None], np.uint16),
            views=torch.from_numpy(table),
            K=_flat([view.K for _, view in views], np.float32).reshape(-1, 3, 3),
            R=_flat([view.R for _, view in views], np.float32).reshape(-1, 3, 3),
            t=_flat([view.t for _, view in views], np.float32).reshape(-1, 3),
            points=_flat([scene.points for scene in scenes], np.float32).reshape(-1, 3),
            keys=torch.from_numpy(hashing.key_bits([scene.order_id for scene in scenes])),
            view_offsets=torch.tensor(views_of),
            point_offsets=torch.tensor(points_of),
            views_of=views_of,
            points_of=points_of,
            most_depth_pixels=int((table[:, 5] * table[:, 6]).max(initial=0)),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SceneBatch:
        """The batch on another device."""
        return dataclasses.replace(self, **{
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items() if isinstance(value, Tensor)
        })  # fmt: skip


def views_from_table(
    views: np.ndarray, K: np.ndarray, R: np.ndarray, t: np.ndarray,
    ade: np.ndarray, gestalt: np.ndarray, depth: np.ndarray,
) -> Iterator[View]:
    """The views of a batch, as the readable reference takes them; the arrays are views into the flat maps."""
    for row, (_, index, height, width, labels, depth_height, depth_width, start) in enumerate(views.tolist()):
        here, there = slice(labels, labels + height * width), slice(start, start + depth_height * depth_width)
        yield View(
            "", index, K[row], R[row], t[row],
            ade[here].reshape(height, width),
            gestalt[here].reshape(height, width),
            depth[there].reshape(depth_height, depth_width) if depth_height else None,
        )  # fmt: skip


def _check_table(batch: SceneBatch) -> None:
    """Raises ValueError where the table names pixels, scenes or points that are not there."""
    scene, index, height, width, labels, depth_height, depth_width, depth = batch.views.numpy().T
    sized = (index >= 0) & (height > 0) & (width > 0) & ((depth_height > 0) == (depth_width > 0))
    placed = _fits(height, width, labels, len(batch.ade)) & _fits(depth_height, depth_width, depth, len(batch.depth))
    if not (sized & placed).all():
        raise ValueError(f"SceneBatch: row {int((sized & placed).argmin())} of views lies outside the maps")
    # Maps that overlapped would be written by several threads at once.
    for name, begin, area in (("label", labels, height * width), ("depth", depth, depth_height * depth_width)):
        if not np.array_equal(begin, np.cumsum(area) - area):
            raise ValueError(f"SceneBatch: the {name} maps in views do not follow one another")
    if (depth_height * depth_width).max(initial=0) != batch.most_depth_pixels:
        raise ValueError(f"SceneBatch: most_depth_pixels is not {batch.most_depth_pixels}")
    for name, known, length in (
        ("view_offsets", batch.views_of, len(batch.views)), ("point_offsets", batch.points_of, len(batch.points)),
    ):  # fmt: skip
        rising = known[:1] == (0,) and known[-1] == length and sorted(known) == list(known)
        if not rising or tuple(getattr(batch, name).tolist()) != known:
            raise ValueError(f"SceneBatch: {name} must not decrease and must go from 0 to {length}")
    if not np.array_equal(scene, np.repeat(np.arange(len(batch)), np.diff(batch.views_of))):
        raise ValueError("SceneBatch: the scenes of views and view_offsets differ")


def _fits(height: np.ndarray, width: np.ndarray, begin: np.ndarray, size: int) -> np.ndarray:
    small = (height >= 0) & (width >= 0) & (height < 1 << 31) & (width < 1 << 31)
    # Sizes that pass the first test cannot overflow here.
    pixels = np.where(small, height * width, 0)
    # Pixels are 32-bit numbers on a GPU, with room for the last step of a loop.
    return small & (pixels < (1 << 31) - (1 << 16)) & (begin >= 0) & (begin <= size) & (pixels <= size - begin)


def _offsets(counts: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(x) for x in np.cumsum([0, *counts]))


def _flat(arrays: Sequence[np.ndarray], dtype: type) -> Tensor:
    if not arrays:
        return torch.from_numpy(np.zeros(0, dtype))
    # concatenate copies, so what comes out is writable, contiguous and of native byte order.
    return torch.from_numpy(np.concatenate([np.asarray(array, dtype).ravel() for array in arrays]))
