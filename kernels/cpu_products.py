"""Products in bfloat16 on a CPU that has no instructions for them."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def has_bfloat16_products() -> bool:
    """Whether the CPU multiplies bfloat16 by instructions of its own."""
    known = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(supported is not None and supported() for supported in known)


def widened(x: Tensor) -> bool:
    """Whether products of x are to be taken in float32 and rounded: the same rounding at twenty times the speed."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not has_bfloat16_products()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, all of one dtype, with float32 sums, rounded once."""
    if not widened(weight):
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(weight.dtype)
