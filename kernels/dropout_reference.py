"""Dropout that is a function of keys: the keys of a step, masks, and the PyTorch reference."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor

from wireframe import hashing
from wireframe.kernels.tensor_hashing import fold_key, hash_sequence, stream_keys

# Values of the 16 bits that decide about one element; one hash holds four of them, the lowest first.
LEVELS = 1 << 16
ELEMENTS = 4

# Hashes at a time: what the passes over them write stays in the second cache of a core.
_CHUNK = 1 << 16


def drop_threshold(p: float) -> int:
    """Elements with 16 bits below it are dropped: round(65536 p), but one value in 65536 is always kept."""
    return min(round(p * LEVELS), LEVELS - 1)


def keep_scale(threshold: int) -> float:
    """1 / (1 - p') = 65536 / (65536 - threshold); every implementation rounds it to float32 and multiplies by that."""
    return LEVELS / (LEVELS - threshold)


def step_keys(scene_keys: Tensor, seed: int, step: int | Tensor) -> Tensor:
    """The keys under which scenes drop out in one step of training.

    Args:
        scene_keys: int64 [B], ``hashing.key_bits`` of the scenes.
        seed: of the run, modulo 2^64.
        step: of the run, from 0; an integer, or an int64 tensor of one element on the device of ``scene_keys`` (so
            that a captured graph can advance it).

    Returns:
        int64 [B], the bits of ``hashing.key(seed, scene, DROPOUT + step)``, on the device of ``scene_keys``.

    Raises:
        TypeError, ValueError: arguments of other kinds.
    """
    if not isinstance(scene_keys, Tensor):
        raise TypeError(f"step_keys: scene_keys must be a tensor, not {type(scene_keys).__name__}")
    if scene_keys.dtype != torch.int64:
        raise ValueError(f"step_keys: scene_keys must be int64, got {scene_keys.dtype}")
    if not hasattr(seed, "__index__"):
        raise TypeError(f"step_keys: seed must be an integer, not {type(seed).__name__}")
    if isinstance(step, Tensor):
        if step.dtype != torch.int64 or step.numel() != 1:
            raise ValueError(f"step_keys: step must be one int64, got {step.dtype} {list(step.shape)}")
        stream = step.reshape(()) + hashing.DROPOUT
    elif not hasattr(step, "__index__"):
        raise TypeError(f"step_keys: step must be an integer, not {type(step).__name__}")
    else:
        stream = hashing.DROPOUT + operator.index(step)
    return stream_keys(scene_keys, seed, stream)


def dropout_factors(keys: Tensor, site: int, threshold: int, count: int) -> Tensor:
    """float32 [B, count]: 0 where element i of a scene is dropped, else 1 / (1 - p').

    Element i has bits 16 (i % 4) .. 16 (i % 4) + 15 of the hash at position i // 4 of the scene's key with the site
    folded in, and is dropped where they, as a number, are below ``threshold``.

    Args:
        keys: int64 [B]. site: of the model. threshold: ``drop_threshold``. count: elements of a scene.
    """
    factors = keys.new_empty((keys.shape[0], count), dtype=torch.float32)
    keys, words = fold_key(keys, site), -(-count // ELEMENTS)
    on_cpu = keys.device.type == "cpu" and not torch.compiler.is_compiling()
    scenes = max(1, _CHUNK // max(words, 1)) if on_cpu else max(1, keys.shape[0])
    for start in range(0, keys.shape[0], scenes):
        bits = hash_sequence(keys[start : start + scenes], words).view(torch.int16)[:, :count]
        # Minus 32768 in an order-preserving way, since int16 has a sign. Comparing in place avoids booleans, which
        # cost a CPU ten times as much.
        factors[start : start + scenes] = bits.bitwise_xor_(-(LEVELS >> 1)).ge_(threshold - (LEVELS >> 1))
    return factors.mul_(keep_scale(threshold))


class _DropoutAdd(torch.autograd.Function):
    """Keeps keys for the backward pass, where the factors are made once more."""

    @staticmethod
    def forward(x: Tensor, branch: Tensor, keys: Tensor, site: int, threshold: int) -> Tensor:
        return _scaled(branch, keys, site, threshold, torch.promote_types(x.dtype, branch.dtype), x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, branch, keys, *ctx.where = inputs
        ctx.dtypes = x.dtype, branch.dtype
        ctx.save_for_backward(keys)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (keys,) = ctx.saved_tensors
        dx = grad.to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        dbranch = _scaled(grad, keys, *ctx.where, ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
        return dx, dbranch, None, None, None


def _scaled(
    branch: Tensor, keys: Tensor, site: int, threshold: int, dtype: torch.dtype, x: Tensor | None = None
) -> Tensor:
    """x + branch * factors, in float32 (float64 where the result is), rounded to ``dtype`` once."""
    count = math.prod(branch.shape[1:])
    working = torch.float64 if torch.float64 in (dtype, branch.dtype) else torch.float32
    factors = dropout_factors(keys, site, threshold, count).to(working).view(branch.shape)
    # In this order, so that a branch with other strides does not hand them on.
    scaled = factors * branch.to(working)
    # Neither in place nor by a cast to the same: compiled by torch 2.11, a Function whose last operation returns the
    # tensor it was given has gradients of zero.
    out = scaled if x is None else scaled + x
    return out if out.dtype == dtype else out.to(dtype)


def dropout_add_reference(
    x: Tensor,  # [B, ...]
    branch: Tensor,  # [B, ...]
    keys: Tensor,  # [B] int64
    site: int,
    p: float,
) -> Tensor:
    """x + branch * factors of ``dropout_factors``; the products and sums in float32, float64 for float64 inputs.

    p = 0 is x + branch. Returns [B, ...] in the dtype of x + branch.
    """
    threshold = drop_threshold(p)
    if threshold == 0:
        return x + branch
    return _DropoutAdd.apply(x, branch, keys, site, threshold)
