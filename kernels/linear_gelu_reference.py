"""PyTorch reference of a linear map with GELU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from wireframe.kernels.cpu_products import widened


def linear_gelu_reference(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
) -> Tensor:
    """gelu(x weight^T + bias) [..., N] in the dtype of x, as torch rounds it on the device."""
    bias = None if bias is None else bias.to(x.dtype)
    if widened(x):
        return F.gelu(F.linear(x.float(), weight.float(), None if bias is None else bias.float())).to(x.dtype)
    return F.gelu(F.linear(x, weight, bias))
