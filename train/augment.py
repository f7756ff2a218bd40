"""Augmentation as a function of (seed, step, scene): a turn about y with a flip of x, and which points are taken.

Whatever the batch, the device or the order of calls, a scene gets the same bits: draws are hashes, the turn is products
and one sum an element, and only its few coefficients come from the host.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from wireframe import hashing
from wireframe.kernels.tensor_hashing import hash_sequence, stream_keys
from wireframe.train.config import AugmentConfig

_LARGEST, _TOP_BIT = (1 << 63) - 1, -(1 << 63)


def scene_hashes(seed: int, scene_keys: Tensor, stream: int | Tensor, count: int) -> Tensor:
    """int64 [B, count]: the bits of ``hashing.hash64(seed, scene, stream, 0 .. count - 1)`` for every scene.

    Args:
        scene_keys: int64 [B], ``hashing.key_bits`` of the scenes; the hashes come from its device.
    """
    return hash_sequence(stream_keys(scene_keys, seed, stream), count)


def turns(seed: int, step: int, scene_keys: np.ndarray, augment: AugmentConfig) -> Tensor:
    """float32 [B, 4], on the CPU: x' = t0 x + t1 z and z' = t2 x + t3 z of every scene.

    A rotation about y by any angle behind a flip of x with probability one half, as ``augment`` says.

    Args:
        seed, step: with the scene's key, the key of the draw.
        scene_keys: int64 [B].
    """
    bits = scene_hashes(seed, torch.from_numpy(scene_keys), hashing.AUGMENTATION + step, 2).numpy()
    draws = (bits.view(np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    coefficients = np.empty((len(scene_keys), 4))
    for row, (angle, coin) in zip(coefficients, draws.tolist()):
        angle = 2 * math.pi * angle if augment.rotate else 0.0
        mirror = -1.0 if augment.flip and coin < 0.5 else 1.0
        # One number at a time: NumPy's vectorised sine may round by the place in the array.
        c, s = math.cos(angle), math.sin(angle)
        row[:] = c * mirror, s, -s * mirror, c
    return torch.from_numpy(coefficients.astype(np.float32))


def turn(xyz: Tensor, coefficients: Tensor) -> Tensor:
    """Points [B, ..., 3] turned by the coefficients [B, 4] of ``turns``, in float32.

    Every product and sum is an operation of its own, so it rounds alike on every device and in every batch.
    """
    x, y, z = xyz.unbind(-1)
    t = coefficients.view(len(coefficients), 4, *([1] * (x.dim() - 1))).unbind(1)
    return torch.stack([x * t[0] + z * t[1], y, x * t[2] + z * t[3]], dim=-1)


def draw_points(seed: int, step: int | Tensor, scene_keys: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which points of every scene this step takes: the ``count`` valid ones with the smallest hashes.

    Args:
        seed, step: with the scene's key, the key of the draw; the step also as int64 [] on the device.
        scene_keys: int64 [B]; mask: bool [B, P], True = a real point.
        count: how many to take, at most P.

    Returns:
        index int64 [B, count], ascending, the last one repeated where a scene has fewer; mask bool [B, count], False
        there.
    """
    points = mask.shape[1]
    hashes = scene_hashes(seed, scene_keys, hashing.RESAMPLE + step, points)
    # With the top bit turned, the order of int64 is that of the unsigned hashes. Within a scene no two are equal.
    hashes = torch.where(mask, hashes ^ _TOP_BIT, _LARGEST)
    index = _smallest(hashes, count)
    index = _ascending(torch.where(mask.gather(1, index), index, points))
    real = mask.sum(1, keepdim=True).clamp_(max=count)
    kept = torch.arange(count, device=mask.device) < real
    last = index.gather(1, (real - 1).clamp_(min=0)).clamp_(max=points - 1)
    return torch.where(kept, index, last), kept


def _smallest(values: Tensor, count: int) -> Tensor:
    """Where the ``count`` smallest of every row stand, in any order."""
    if values.device.type == "cpu":
        # Several times as fast as topk there.
        return torch.from_numpy(np.argpartition(values.numpy(), count - 1, axis=1)[:, :count])
    return values.topk(count, dim=1, largest=False, sorted=False).indices


def _ascending(index: Tensor) -> Tensor:
    if index.device.type == "cpu":
        return torch.from_numpy(np.sort(index.numpy(), axis=1))
    return index.sort(dim=1).values
