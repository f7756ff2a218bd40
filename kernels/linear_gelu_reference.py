"""PyTorch reference of the product with bias and GELU: the oracle of the tests, and the path of the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wireframe.kernels.cpu_products import widened
from wireframe.kernels.tensors import without_autocast


def linear_gelu_reference(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
) -> Tensor:
    """y / 2 (1 + erf(y / sqrt 2)) with y = x weight^T + bias; returns [..., N] in x.dtype.

    The product is that of the dtype, as torch has it on the device; where a CPU cannot multiply bfloat16, all is in
    float32 and rounded once.
    """
    working = torch.float32 if widened(x) else x.dtype
    with without_autocast(x.device.type):
        y = F.linear(x.to(working), weight.to(working), None if bias is None else bias.to(working))
        # In place where no gradient wants y: fresh memory of this size takes longer than the function.
        return (F.gelu(y) if torch.is_grad_enabled() else torch.ops.aten.gelu_(y)).to(x.dtype)
