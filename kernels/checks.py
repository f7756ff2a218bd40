"""Checks of the arguments of operations: one line that names the operation, the argument and what it should be."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator

import torch
from torch import Tensor


def check_tensor(op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | str, ...]) -> Tensor:
    """The tensor, contiguous.

    Args:
        shape: a length for each axis, or a letter where any length will do.

    Raises:
        TypeError: not a tensor. ValueError: another dtype or shape.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, not {type(tensor).__name__}")
    fits = tensor.dim() == len(shape) and all(
        isinstance(wanted, str) or wanted == found for wanted, found in zip(shape, tensor.shape)
    )
    if tensor.dtype != dtype or not fits:
        wanted = f"{_dtype(dtype)} [{', '.join(map(str, shape))}]"
        raise ValueError(f"{op}: {name} must be {wanted}, got {_dtype(tensor.dtype)} {list(tensor.shape)}")
    return tensor.contiguous()


def check_devices(op: str, **tensors: Tensor) -> str:
    """The type of the one device that holds all tensors.

    Raises:
        ValueError: they are on several devices.
    """
    (first, tensor), *rest = tensors.items()
    for name, other in rest:
        if other.device != tensor.device:
            raise ValueError(f"{op}: {name} is on {other.device}, {first} on {tensor.device}")
    return tensor.device.type


def check_floating(op: str, **tensors: Tensor) -> None:
    """Refuse what is no tensor of real floating numbers.

    Raises:
        TypeError: not a tensor. ValueError: another dtype.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, not {type(tensor).__name__}")
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{op}: {name} must be floating, got {_dtype(tensor.dtype)}")


def thread_count(threads: int | None) -> int:
    """``threads``, or torch's own number for None; at most 256, which is as many as the pool ever starts.

    Raises:
        TypeError: not an integer. ValueError: below 1.
    """
    if threads is None:
        return torch.get_num_threads()
    try:
        threads = operator.index(threads)
    except TypeError:
        raise TypeError(f"threads must be an integer, not {type(threads).__name__}") from None
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    return min(threads, 256)


def check_integer(op: str, name: str, value: int, least: int) -> int:
    """``value``, at most 2^40, which is more than any array here has elements.

    Raises:
        TypeError: not an integer. ValueError: below ``least``.
    """
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name} must be an integer, not {type(value).__name__}") from None
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")
    return min(value, 1 << 40)


@contextlib.contextmanager
def naming(op: str) -> Iterator[None]:
    """Puts the operation before a ValueError from inside, whose text begins with the argument."""
    try:
        yield
    except ValueError as problem:
        raise ValueError(f"{op}: {problem}") from None


def signed64(value: int) -> int:
    """A seed modulo 2^64 as an int64, the only integer that an operator schema takes.

    Raises:
        TypeError: not an integer.
    """
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"seed must be an integer, not {type(value).__name__}") from None
    return ((value + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
