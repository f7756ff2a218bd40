"""A training scene as one row of bytes: one gather, one copy to a device and one digest a scene."""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wireframe.errors import SampleError
from wireframe.sampling import SampledScene

# Every array begins at a multiple of this, so that a row can be read as any dtype.
_ALIGNMENT = 16


class _Field(NamedTuple):
    offset: int
    shape: tuple[int, ...]
    numpy: np.dtype
    torch: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.numpy.itemsize


class RowLayout:
    """Where the arrays of a scene with T points and at most S segments lie in its row.

    Attributes:
        points: T; segments: S.
        bytes: R, the length of a row, a multiple of 16.
    """

    def __init__(self, points: int, segments: int):
        self.points, self.segments = points, segments
        shapes = {
            "xyz_norm": ((points, 3), np.float32, torch.float32),
            "vote_frac": ((points,), np.float32, torch.float32),
            "behind": ((points,), np.int16, torch.int16),
            "class_id": ((points,), np.uint8, torch.uint8),
            "source": ((points,), np.uint8, torch.uint8),
            "n_views_voted": ((points,), np.uint8, torch.uint8),
            "mask": ((points,), np.bool_, torch.bool),
            "segments": ((segments, 2, 3), np.float32, torch.float32),
            "segment_mask": ((segments,), np.bool_, torch.bool),
        }
        self._fields: dict[str, _Field] = {}
        self.bytes = 0
        for name, (shape, numpy, torch_dtype) in shapes.items():
            field = self._fields[name] = _Field(self.bytes, shape, np.dtype(numpy), torch_dtype)
            self.bytes += -(-field.bytes // _ALIGNMENT) * _ALIGNMENT

    def pack(self, scene: SampledScene) -> np.ndarray:
        """uint8 [R]: the arrays that training needs; segments and mask are padded with zeros.

        Raises:
            SampleError: the scene has another number of points, or more than S segments.
        """
        count = len(scene.gt_segments)
        if len(scene.mask) != self.points:
            raise SampleError(
                f"rows of one training set must have one number of points, found {self.points} and, in scene "
                f"{scene.order_id}, {len(scene.mask)}"
            )
        if count > self.segments:
            raise SampleError(f"scene {scene.order_id} has {count} segments, above {self.segments}")
        row = np.zeros(self.bytes, dtype=np.uint8)
        for name, field in self._fields.items():
            array = row[field.offset : field.offset + field.bytes].view(field.numpy).reshape(field.shape)
            if name == "segments":
                array[:count] = scene.gt_segments
            elif name == "segment_mask":
                array[:count] = True
            else:
                array[...] = getattr(scene, name)
        return row

    def unpack(self, rows: Tensor) -> dict[str, Tensor]:
        """The arrays of packed rows, uint8 [B, R] contiguous, as contiguous tensors [B, ...] on their device."""
        return {
            name: rows[:, field.offset : field.offset + field.bytes]
            .view(field.torch)
            .reshape(len(rows), *field.shape)
            .contiguous()
            for name, field in self._fields.items()
        }


def row_digest(order_id: str, row: np.ndarray) -> bytes:
    """SHA-256 of a scene: of its id and its packed row."""
    digest = hashlib.sha256(order_id.encode() + b"\n")
    digest.update(row)
    return digest.digest()
