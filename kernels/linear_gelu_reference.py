"""PyTorch reference of the product with bias and GELU: the oracle of the tests, and the path of the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_gelu_reference(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
) -> Tensor:
    """y / 2 (1 + erf(y / sqrt 2)) with y = x weight^T + bias; returns [..., N] in x.dtype.

    The product is that of the dtype, as torch has it on the device. On a CPU half precision is computed in float32 and
    rounded once: few CPUs multiply it themselves, and torch takes eight times as long where they do not.
    """
    working = x.dtype
    if x.device.type == "cpu" and x.dtype.itemsize < 4:
        working = torch.float32
    with torch.autocast(x.device.type, enabled=False):
        y = F.linear(x.to(working), weight.to(working), None if bias is None else bias.to(working))
        return F.gelu(y).to(x.dtype)
