"""The operations of fusion and sampling on tensors of a CUDA device by ``wireframe._C_cuda``.

Same functions and order of arguments as ``numpy_reference.py`` and ``native_cpu.py``; ``threads`` is not used. Outputs
and workspaces are allocated here, the kernels are queued on the device's current stream, and nothing waits for them;
the first call on a device alone copies the label tables there, so it must not be part of a graph's capture.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from wireframe.kernels import native
from wireframe.kernels.checks import check_tensor
from wireframe.voting import LABEL_TABLES

_UINT64 = (1 << 64) - 1
# Positions within a scene are 32-bit numbers on the device, with room for the last step of a loop.
_MOST_POINTS = (1 << 31) - (1 << 16)


def house_mask(gestalt: Tensor, views: Tensor, radius: int, threads: int) -> Tensor:
    call = _Call("house_mask", gestalt.device)
    n, v = gestalt.shape[0], views.shape[0]
    inputs = [
        call.read("gestalt", gestalt, torch.uint8, (n,)), n, call.views(views), v, call.tables(), radius,
    ]  # fmt: skip
    # Pixels that no view covers are no house.
    mask = call.output((n,), torch.bool).zero_()
    call.run((n,), *inputs, call.write(mask))
    return mask


def clip_limits(depth: Tensor, views: Tensor, threads: int) -> Tensor:
    call = _Call("clip_limits", depth.device)
    m, v = depth.shape[0], views.shape[0]
    limits = call.output((v,), torch.float64)
    call.run(
        (v,), call.read("depth", depth, torch.uint16, (m,)), m, call.views(views), v, call.write(limits)
    )
    return limits


def depth_points(
    depth: Tensor, mask: Tensor, limits: Tensor, views: Tensor, K: Tensor, R: Tensor, t: Tensor, keys: Tensor,
    count: int, seed: int, threads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = _Call("depth_points", depth.device)
    m, n, v, b = depth.shape[0], mask.shape[0], views.shape[0], keys.shape[0]
    xyz = call.output((v, count, 3), torch.float32)
    counts = call.output((v,), torch.int64)
    call.run(
        (m, v),
        call.read("depth", depth, torch.uint16, (m,)), m, call.read("mask", mask, torch.bool, (n,)), n,
        call.read("limits", limits, torch.float64, (v,)), call.views(views), v, *call.cameras(K, R, t, v),
        call.read("keys", keys, torch.int64, (b,)), b, count, seed & _UINT64, call.write(xyz), call.write(counts),
    )  # fmt: skip
    return xyz, counts


def vote_labels(
    xyz: Tensor, offsets: Tensor, view_offsets: Tensor, ade: Tensor, gestalt: Tensor, views: Tensor,
    K: Tensor, R: Tensor, t: Tensor, zbuffer: float, threads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = _Call("vote_labels", xyz.device)
    p, b, n, v = xyz.shape[0], offsets.shape[0] - 1, ade.shape[0], views.shape[0]
    dtypes = (torch.uint8, torch.int16, torch.int16, torch.uint8, torch.uint8, torch.float32)
    out = tuple(call.output((p,), dtype) for dtype in dtypes)
    call.run(
        (n, v, zbuffer),
        call.read("xyz", xyz, torch.float32, (p, 3)), call.points(p),
        call.read("offsets", offsets, torch.int64, (b + 1,)),
        call.read("view_offsets", view_offsets, torch.int64, (b + 1,)), b,
        call.read("ade", ade, torch.uint8, (n,)), call.read("gestalt", gestalt, torch.uint8, (n,)), n,
        call.views(views), v, *call.cameras(K, R, t, v), call.tables(), zbuffer, *map(call.write, out),
    )  # fmt: skip
    return out


def point_tiers(visible_src: Tensor, visible_id: Tensor, behind: Tensor, threads: int) -> tuple[Tensor, Tensor]:
    call = _Call("point_tiers", visible_src.device)
    p = visible_src.shape[0]
    group_id, class_id = call.output((p,), torch.int8), call.output((p,), torch.uint8)
    call.run(
        None,
        call.read("visible_src", visible_src, torch.uint8, (p,)),
        call.read("visible_id", visible_id, torch.int16, (p,)),
        call.read("behind", behind, torch.int16, (p,)), p, call.tables(), call.write(group_id), call.write(class_id),
    )  # fmt: skip
    return group_id, class_id


def centre_and_scale(
    xyz: Tensor, source: Tensor, keep: Tensor, offsets: Tensor, keys: Tensor, seed: int, threads: int
) -> tuple[Tensor, Tensor]:
    call = _Call("centre_and_scale", xyz.device)
    p, b = xyz.shape[0], keys.shape[0]
    center, scale = call.output((b, 3), torch.float32), call.output((b,), torch.float32)
    call.run(
        (p, b),
        call.read("xyz", xyz, torch.float32, (p, 3)), call.read("source", source, torch.uint8, (p,)),
        call.read("keep", keep, torch.bool, (p,)), call.points(p),
        call.read("offsets", offsets, torch.int64, (b + 1,)), call.read("keys", keys, torch.int64, (b,)), b,
        seed & _UINT64, call.write(center), call.write(scale),
    )  # fmt: skip
    return center, scale


def priority_sample(
    source: Tensor, group_id: Tensor, keep: Tensor, offsets: Tensor, keys: Tensor,
    num_points: int, seed: int, threads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = _Call("priority_sample", source.device)
    p, b = source.shape[0], keys.shape[0]
    index, count = call.output((b, num_points), torch.int64), call.output((b,), torch.int64)
    call.run(
        (p, b, num_points),
        call.read("source", source, torch.uint8, (p,)), call.read("group_id", group_id, torch.int8, (p,)),
        call.read("keep", keep, torch.bool, (p,)), call.points(p),
        call.read("offsets", offsets, torch.int64, (b + 1,)), call.read("keys", keys, torch.int64, (b,)), b,
        seed & _UINT64, num_points, call.write(index), call.write(count),
    )  # fmt: skip
    return index, count


class _Call:
    """One operation on one device: its tensors as addresses, its workspace, its launch.

    A kernel cannot find fault with what it is given, so each tensor is checked here: dtype, shape, device, and that it
    is contiguous.
    """

    def __init__(self, op: str, device: torch.device) -> None:
        self.op, self.device = op, device

    def read(self, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
        check_tensor(self.op, name, tensor, dtype, shape)
        if not tensor.is_contiguous():
            raise ValueError(f"{self.op}: {name} must be contiguous")
        if tensor.device != self.device:
            raise ValueError(f"{self.op}: {name} must be on {self.device}, got {tensor.device}")
        return _address(tensor)

    def views(self, views: Tensor) -> int:
        return self.read("views", views, torch.int64, (views.shape[0], 8))

    def cameras(self, K: Tensor, R: Tensor, t: Tensor, views: int) -> list[int]:
        shapes = {"K": (K, (views, 3, 3)), "R": (R, (views, 3, 3)), "t": (t, (views, 3))}
        return [self.read(name, tensor, torch.float32, shape) for name, (tensor, shape) in shapes.items()]

    def tables(self) -> int:
        # Held until the launch: of two threads that make the tables at once, only one's stay in the cache.
        self._tables = _tables(self.device)
        return _address(self._tables)

    def points(self, count: int) -> int:
        if count > _MOST_POINTS:
            raise ValueError(f"{self.op}: at most {_MOST_POINTS} points in a batch, got {count}")
        return count

    def output(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return _empty(shape, dtype, self.device)

    def write(self, tensor: Tensor) -> int:
        return tensor.data_ptr()

    def run(self, sizes: tuple | None, *arguments) -> None:
        """Queues the operation; ``sizes`` are what its workspace depends on, None where it has none."""
        module = native.module("_C_cuda")
        with _queue(self.device) as place:
            workspace = []
            if sizes is not None:
                memory = _workspace(getattr(module, f"{self.op}_workspace")(*sizes), self.device)
                workspace = [memory.data_ptr(), memory.shape[0]]
            getattr(module, self.op)(*place, *workspace, *arguments)


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr()


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _workspace(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


@contextlib.contextmanager
def _queue(device: torch.device) -> Iterator[tuple[int, int]]:
    """The device's number and the address of its current stream, with the device made current."""
    with torch.cuda.device(device):
        yield torch.cuda.current_device(), torch.cuda.current_stream(device).cuda_stream


@functools.cache
def _tables(device: torch.device) -> Tensor:
    """The label tables on the device, copied once."""
    return torch.from_numpy(LABEL_TABLES.copy()).to(device)
