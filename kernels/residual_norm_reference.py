"""PyTorch reference of the residual connection with dropout and the norm behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from wireframe.kernels.dropout_reference import dropout_add_reference
from wireframe.kernels.tensors import without_autocast


def rms_norm_reference(
    x: Tensor,  # [..., C]
    weight: Tensor,  # [C]
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 (float64 for float64), rounded once.

    Returns [..., C] in ``dtype``.
    """
    working = torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
    with without_autocast(x.device.type):
        wide = x.to(working)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        normed, weight = wide * scale, weight.to(working)
        # In place, which takes half of the time, where no gradient wants what is there.
        return (normed * weight if torch.is_grad_enabled() else normed.mul_(weight)).to(dtype)


def residual_norm_reference(
    x: Tensor,  # [B, ..., C]
    branch: Tensor,  # [B, ..., C]
    weight: Tensor,  # [C]
    keys: Tensor | None,  # [B] int64
    site: int,
    p: float,
    eps: float,
    dtype: torch.dtype,
    copy: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(total, normed, copy) [B, ..., C]: the sum, its norm in ``dtype``, and if asked for the sum in ``dtype``."""
    total = x + branch if keys is None else dropout_add_reference(x, branch, keys, site, p)
    return total, rms_norm_reference(total, weight, eps, dtype), total.to(dtype) if copy else None
