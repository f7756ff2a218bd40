"""The hash of ``wireframe.hashing`` on tensors of any device, bit by bit.

int64 stands for the 64 bits: sums and products wrap, and a shift to the right is masked to be the logical one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wireframe import hashing
from wireframe.kernels.checks import signed64

_GOLDEN = signed64(0x9E3779B97F4A7C15)
_FIRST = signed64(0xBF58476D1CE4E5B9)
_SECOND = signed64(0x94D049BB133111EB)


def fold_key(keys: Tensor, part: int | Tensor) -> Tensor:
    """Keys int64 [B] with one more part folded in, as ``hashing.key`` does; ``part`` in the range of int64."""
    return _mix((keys ^ part).add_(_GOLDEN))


def stream_keys(keys: Tensor, seed: int, stream: int | Tensor) -> Tensor:
    """int64 [B]: the bits of ``hashing.key(seed, scene, stream)`` for every scene.

    Args:
        keys: int64 [B], ``hashing.key_bits`` of the scenes; the results are on their device.
        seed, stream: modulo 2^64; the stream also as an int64 tensor of no dimensions on the device of ``keys``.
    """
    part = stream if isinstance(stream, Tensor) else signed64(stream)
    return fold_key(fold_key(keys, signed64(hashing.key(seed))), part)


def hash_sequence(keys: Tensor, count: int) -> Tensor:
    """int64 [B, count]: the first ``count`` values of the SplitMix64 sequence of every key in int64 [B]."""
    positions = torch.arange(1, count + 1, device=keys.device).mul_(_GOLDEN)
    return _mix(positions + keys[:, None])


def _mix(x: Tensor) -> Tensor:
    """``hashing._mix_int`` of fresh memory, in place."""
    x = x.bitwise_xor_(_shifted(x, 30)).mul_(_FIRST)
    x = x.bitwise_xor_(_shifted(x, 27)).mul_(_SECOND)
    return x.bitwise_xor_(_shifted(x, 31))


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)
