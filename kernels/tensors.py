"""What the operations around Triton kernels do with tensors: which dtypes, from which addresses, with which strides."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

# What kernels that compute in float32 read and write.
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fresh(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous memory of the shape and, unless told otherwise, the dtype of x."""
    # Not empty_like: that keeps the strides of a view, and the kernels write contiguous tensors.
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def aligned(x: Tensor) -> Tensor:
    """x contiguous, from an address at which fresh memory may begin.

    Alignment chooses the layout of a kernel and with it the order of its sums; so bits depend on values and shapes.
    """
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def aligned_or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None else aligned(x)


def without_autocast(device: str) -> contextlib.AbstractContextManager:
    """Products in the dtypes that their arguments have; ``device`` is a type, "meta" too, which knows no autocast."""
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else contextlib.nullcontext()
